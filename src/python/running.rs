//! Long work: off the interpreter, with progress and Ctrl-C, and errors as Python's exceptions.

use std::{sync::mpsc, time::Duration};

use pyo3::{
    exceptions::{PyKeyboardInterrupt, PyRuntimeError},
    prelude::*,
    types::PyType,
};

use crate::{Error, Result, Watch};

/// How often Ctrl-C is looked for and progress is told: well within 100 ms.
const PULSE: Duration = Duration::from_millis(40);

/// Run long work off the interpreter: tell `progress(done, total)` how far it is, stop it on
/// Ctrl-C, and turn its error.
pub(super) fn interruptible<T: Send>(
    py: Python<'_>,
    total: u64,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&Watch) -> Result<T> + Send,
) -> PyResult<T> {
    let watch = &Watch::default();
    std::thread::scope(|scope| {
        let (ended, end) = mpsc::channel::<()>();
        let end = &mut { end };
        let worker = scope.spawn(move || {
            let _ended = ended; // dropped when the work is done, also by a panic
            work(watch)
        });
        let mut interrupted = None;
        let pulse = || {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |p| p.call1(py, (watch.done(), total)).map(drop))
        };
        let mut wait = || {
            // Borrowed uniquely: a receiver may be sent to another thread, but not shared with it.
            let end = &mut *end;
            py.detach(move || end.recv_timeout(PULSE))
        };
        while wait() == Err(mpsc::RecvTimeoutError::Timeout) {
            if interrupted.is_none() {
                interrupted = pulse().err();
                if interrupted.is_some() {
                    watch.stop();
                }
            }
        }
        let result = py.detach(|| worker.join());
        match (interrupted, result) {
            (Some(error), _) => Err(error),
            (None, Ok(Ok(done))) => pulse().map(|()| done),
            (None, Ok(Err(error))) => Err(to_python(py, error)),
            (None, Err(_)) => Err(PyRuntimeError::new_err("the core panicked: this is a bug")),
        }
    })
}

/// The exception of `lorameta_rs.errors` that an error becomes.
pub(super) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let class = match &error {
        Error::Stopped => return PyKeyboardInterrupt::new_err(()),
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => "MissingFile",
        Error::Io { .. } => "UnreadableFile",
        Error::File { .. } | Error::Tensor { .. } | Error::Pattern { .. } => "InvalidAdapter",
        Error::Shape { .. } => "LayoutMismatch",
        Error::NotFinite { .. } | Error::Overflow { .. } => "NotFinite",
        Error::Changed { .. } => "FileChanged",
        Error::Memory { .. } | Error::Setting(_) => "InvalidSetting",
    };
    let raise = || -> PyResult<PyErr> {
        let class = py.import("lorameta_rs.errors")?.getattr(class)?.cast_into::<PyType>()?;
        Ok(match &error {
            // `OSError(errno, text, filename)` sets its attributes.
            Error::Io { path, source } => PyErr::from_type(
                class,
                (source.raw_os_error(), reason(source), path.as_os_str().to_owned()),
            ),
            _ => PyErr::from_type(class, error.to_string()),
        })
    };
    raise().unwrap_or_else(|error| error)
}

/// What the system said, without the number that Rust puts behind it.
fn reason(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
