//! `lorameta_rs._core`: paths and a few hundred floats in, files out. The one file that knows
//! Python; the tensors' bytes never cross into it.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, mpsc},
    time::{Duration, UNIX_EPOCH},
};

use pyo3::{
    exceptions::{PyKeyboardInterrupt, PyRuntimeError},
    prelude::*,
    types::PyType,
};

use crate::{
    Base, Cat, Container, Conversion, Dense, Dtype, Error, Heads, Io, Kept, Majority, Opening,
    Options, Plan, Rank, Result, Rule, Soup, Sparse, Sparsity, Svd, Terms, Watch,
    adapter::Adapter,
    gguf::{Metadata, Value, names},
    gram::{Gram, Space},
    layout::{Factor, Kind, Layout},
    merge::ITERATIONS,
};

/// What vLLM loads unless it is told to expect more.
const DEFAULT_RANK: usize = 16;

/// How often Ctrl-C is looked for and progress is told: well within 100 ms.
const PULSE: Duration = Duration::from_millis(40);

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{
        Outcome, PyAdapter, PyLayout, PyModule, PyPlan, combine, convert, cosines, dora_norms,
        file_tensors, first_match, gguf_metadata, gguf_permutes, gguf_tensor_name, gram, norms,
        open_adapters, peft_module_name, plan, scan, soup_errors,
    };
}

/// One adapter file whose header has been read and checked.
#[pyclass(frozen, name = "Adapter", module = "lorameta_rs._core")]
struct PyAdapter(Adapter);

#[pymethods]
impl PyAdapter {
    #[getter]
    fn path(&self) -> PathBuf {
        self.0.path.clone()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.stamp().size
    }

    #[getter]
    fn mtime_ns(&self) -> u128 {
        let modified = self.0.stamp().modified;
        modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |t| t.as_nanos())
    }

    #[getter]
    fn layout(&self) -> PyLayout {
        PyLayout(Arc::clone(&self.0.layout))
    }

    #[getter]
    fn container(&self) -> &'static str {
        self.0.container.name()
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, PyValue> {
        to_values(&self.0.metadata)
    }

    fn with_experts(&self, py: Python<'_>, experts: Vec<usize>) -> PyResult<Self> {
        self.0.with_experts(&experts).map(Self).map_err(|error| to_python(py, error))
    }
}

/// The value of a key of a GGUF file. Lists are left out on reading.
#[derive(FromPyObject, IntoPyObject)]
enum PyValue {
    Flag(bool),
    Integer(i128),
    Number(f64),
    Text(String),
}

fn to_values(metadata: &Metadata) -> BTreeMap<String, PyValue> {
    let one = |(key, value): (&String, &Value)| {
        let value = match value {
            Value::Text(text) => PyValue::Text(text.clone()),
            Value::Integer(integer) => PyValue::Integer(*integer),
            Value::Number(number) => PyValue::Number(*number),
            Value::Flag(flag) => PyValue::Flag(*flag),
            Value::List(_) => return None,
        };
        Some((key.clone(), value))
    };
    metadata.iter().filter_map(one).collect()
}

fn from_values(values: BTreeMap<String, PyValue>) -> Metadata {
    let one = |value| match value {
        PyValue::Text(text) => Value::Text(text),
        PyValue::Integer(integer) => Value::Integer(integer),
        PyValue::Number(number) => Value::Number(number),
        PyValue::Flag(flag) => Value::Flag(flag),
    };
    values.into_iter().map(|(key, value)| (key, one(value))).collect()
}

/// The modules of an adapter. Adapters opened together that have the same tensors in the same
/// places have equal layouts.
#[pyclass(frozen, name = "Layout", module = "lorameta_rs._core")]
struct PyLayout(Arc<Layout>);

#[pymethods]
impl PyLayout {
    #[getter]
    fn modules(&self) -> Vec<PyModule> {
        let shape = |tensor: usize| self.0.tensors[tensor].shape.clone();
        let one = |module: &crate::layout::Module| PyModule {
            name: module.name.clone(),
            kind: match module.kind {
                Kind::Linear => "linear",
                Kind::Embedding => "embedding",
                Kind::Conv => "conv",
            },
            rank: module.rank,
            experts: module.experts,
            dora: module.magnitude.is_some(),
            a_shape: shape(module.a),
            b_shape: shape(module.b),
            dtypes: [Factor::A, Factor::B]
                .map(|factor| self.0.tensors[module.tensor(factor)].dtype.to_string())
                .into(),
        };
        self.0.modules.iter().map(one).collect()
    }

    #[getter]
    fn notes(&self) -> Vec<String> {
        self.0.notes.clone()
    }

    fn __eq__(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn __hash__(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }
}

/// One module of a layout.
#[pyclass(frozen, get_all, name = "Module", module = "lorameta_rs._core")]
struct PyModule {
    name: String,
    kind: &'static str,
    rank: usize,
    experts: usize,
    dora: bool,
    a_shape: Vec<usize>,
    b_shape: Vec<usize>,
    dtypes: (String, String),
}

/// What a job will read and take.
#[pyclass(frozen, get_all, name = "Plan", module = "lorameta_rs._core")]
struct PyPlan {
    bytes: u64,
    memory: usize,
    threads: usize,
}

impl From<&Plan> for PyPlan {
    fn from(plan: &Plan) -> Self {
        Self { bytes: plan.bytes, memory: plan.memory, threads: plan.threads }
    }
}

#[pyfunction]
#[pyo3(signature = (paths, drop_unsupported=false, heads=None, names=None, dora=false))]
fn open_adapters<'py>(
    py: Python<'py>,
    paths: Vec<PathBuf>,
    drop_unsupported: bool,
    heads: Option<Heads>,
    names: Option<HashMap<String, String>>,
    dora: bool,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let opening = Opening { drop_unsupported, heads, names, dora };
    let opened = py.detach(|| Adapter::open_all(&paths, &opening));
    let one = |opened| match opened {
        Ok(adapter) => Ok(Bound::new(py, PyAdapter(adapter))?.into_any()),
        Err(error) => Ok(to_python(py, error).into_value(py).into_bound(py).into_any()),
    };
    opened.into_iter().map(one).collect()
}

/// A tensor's name, type and shape, and where its bytes begin and end.
type FileTensor = (String, String, Vec<usize>, u64, u64);

#[pyfunction]
fn file_tensors(py: Python<'_>, path: PathBuf) -> PyResult<Vec<FileTensor>> {
    let tensors = py.detach(|| crate::file_tensors(&path)).map_err(|error| to_python(py, error))?;
    let one = |tensor: crate::Tensor| {
        let (start, end) = (tensor.bytes.start, tensor.bytes.end);
        (tensor.name, tensor.dtype.to_string(), tensor.shape, start, end)
    };
    Ok(tensors.into_iter().map(one).collect())
}

#[pyfunction]
fn gguf_metadata(py: Python<'_>, path: PathBuf) -> PyResult<BTreeMap<String, PyValue>> {
    let metadata =
        py.detach(|| crate::gguf_metadata(&path)).map_err(|error| to_python(py, error))?;
    Ok(to_values(&metadata))
}

#[pyfunction]
fn gguf_tensor_name(module: &str) -> Option<String> {
    names::tensor_name(module)
}

#[pyfunction]
fn peft_module_name(tensor: &str, architecture: &str) -> Option<String> {
    names::module_name(tensor, architecture)
}

#[pyfunction]
fn gguf_permutes(py: Python<'_>, architecture: &str) -> PyResult<bool> {
    names::permutes(architecture).map_err(|reason| to_python(py, Error::Setting(reason)))
}

#[pyfunction]
fn first_match(
    py: Python<'_>,
    patterns: Vec<String>,
    names: Vec<String>,
) -> PyResult<Vec<Option<usize>>> {
    py.detach(|| crate::first_match(&patterns, &names)).map_err(|error| to_python(py, error))
}

#[pyfunction]
fn scan(py: Python<'_>, adapter: Py<PyAdapter>) -> PyResult<Vec<(String, &'static str)>> {
    let adapter = &adapter.get().0;
    interruptible(py, adapter.stamp().size, None, |watch| crate::scan(adapter, watch))
}

/// The attributes of `lorameta_rs.merge.Options` that the core knows.
#[derive(FromPyObject)]
struct Settings {
    method: String,
    rank: Option<usize>,
    energy: Option<f64>,
    seed: u64,
    density: Option<f64>,
    majority_sign: String,
    dtype: String,
    threads: usize,
    memory: usize,
    io: String,
    allow_nan: bool,
}

impl Settings {
    fn options(&self) -> Result<Options> {
        let io = match &self.io[..] {
            "read" => Io::Read,
            "mmap" => Io::Mmap,
            io => return Err(Error::Setting(format!("io is `{io}`, expected read or mmap"))),
        };
        Ok(Options { threads: self.threads, memory: self.memory, io, allow_nan: self.allow_nan })
    }

    fn dtype(&self) -> Result<Dtype> {
        let written = Dtype::from_name(&self.dtype).filter(|dtype| *dtype != Dtype::Q8_0);
        written.ok_or_else(|| {
            let dtype = &self.dtype;
            Error::Setting(format!("dtype is `{dtype}`, expected float32, float16 or bfloat16"))
        })
    }

    /// The rule of a method's name, without the `_svd` that it may end with.
    fn sparsity(&self, name: &str) -> Result<Sparsity> {
        let rule = match name {
            "linear" => Rule::Linear,
            "magnitude_prune" => Rule::MagnitudePrune,
            "ties" => Rule::Ties,
            "dare_linear" => Rule::DareLinear,
            "dare_ties" => Rule::DareTies,
            _ => return Err(Error::Setting(format!("no method `{name}`"))),
        };
        let majority = match &self.majority_sign[..] {
            "total" => Majority::Total,
            "frequency" => Majority::Frequency,
            sign => {
                let text = format!("majority sign is `{sign}`, expected total or frequency");
                return Err(Error::Setting(text));
            }
        };
        Ok(Sparsity { rule, density: self.density.unwrap_or(1.0), majority, seed: self.seed })
    }

    fn rank(&self) -> Result<Rank> {
        match (self.rank, self.energy) {
            (Some(_), Some(_)) => Err(Error::Setting("rank and energy: give one".to_owned())),
            (rank, None) => Ok(Rank::Fixed(rank.unwrap_or(DEFAULT_RANK))),
            (None, Some(share)) => Ok(Rank::Energy(share)),
        }
    }
}

/// A way of combining adapters, prepared.
enum Job<'a> {
    Soup(Soup<'a>),
    Cat(Cat<'a>),
    Svd(Svd<'a>),
    Sparse(Sparse<'a>),
    Dense(Dense<'a>),
}

impl<'a> Job<'a> {
    fn new(terms: &'a Terms<'a>, settings: &Settings) -> Result<Self> {
        let options = settings.options()?;
        Ok(match &settings.method[..] {
            "soup" => Self::Soup(Soup::new(terms, options)?),
            "cat" => Self::Cat(Cat::new(terms, options)?),
            "svd" => {
                let (rank, seed) = (settings.rank()?, settings.seed);
                Self::Svd(Svd::new(terms, rank, seed, ITERATIONS, options)?)
            }
            name => match name.strip_suffix("_svd") {
                None => Self::Sparse(Sparse::new(terms, settings.sparsity(name)?, options)?),
                Some(name) => {
                    let rank = settings.rank.unwrap_or(DEFAULT_RANK);
                    Self::Dense(Dense::new(terms, settings.sparsity(name)?, rank, options)?)
                }
            },
        })
    }

    fn plan(&self) -> &Plan {
        match self {
            Self::Soup(soup) => soup.plan(),
            Self::Cat(cat) => cat.plan(),
            Self::Svd(svd) => svd.plan(),
            Self::Sparse(sparse) => sparse.plan(),
            Self::Dense(dense) => dense.plan(),
        }
    }

    /// What became of each target: its rank where the method chooses one, and what that keeps.
    fn write(&self, outputs: &[PathBuf], dtype: Dtype, watch: &Watch) -> Result<Vec<Outcome>> {
        let none = |rank| Outcome { rank, kept: vec![] };
        match self {
            Self::Soup(soup) => {
                soup.write(outputs, dtype, watch)?;
                Ok(outputs.iter().map(|_| none(None)).collect())
            }
            Self::Cat(cat) => {
                cat.write(outputs, dtype, watch)?;
                Ok(cat.ranks().into_iter().map(|rank| none(Some(rank))).collect())
            }
            Self::Sparse(sparse) => {
                sparse.write(outputs, dtype, watch)?;
                Ok(sparse.ranks().iter().map(|&rank| none(Some(rank))).collect())
            }
            Self::Dense(dense) => {
                dense.write(outputs, dtype, watch)?;
                Ok(dense.ranks().into_iter().map(|rank| none(Some(rank))).collect())
            }
            Self::Svd(svd) => {
                let of = |kept: Kept| (kept.module, kept.energy, kept.kept, kept.exact);
                let one = |(rank, kept): (usize, Vec<Kept>)| Outcome {
                    rank: Some(rank),
                    kept: kept.into_iter().map(of).collect(),
                };
                Ok(svd.write(outputs, dtype, watch)?.into_iter().map(one).collect())
            }
        }
    }
}

/// What became of one target.
#[pyclass(frozen, get_all, name = "Outcome", module = "lorameta_rs._core")]
struct Outcome {
    rank: Option<usize>,
    kept: Vec<(String, f64, f64, bool)>,
}

/// The attributes of `lorameta_rs.sums.Terms`.
#[derive(FromPyObject)]
struct Given {
    adapters: Vec<Py<PyAdapter>>,
    coefficients: Vec<Vec<Vec<f64>>>,
    strengths: Option<Vec<Vec<f64>>>,
    base_weights: Vec<PathBuf>,
}

/// The same, read and opened: what `Terms` borrow.
struct Opened {
    adapters: Vec<Adapter>,
    coefficients: Vec<Vec<Vec<f64>>>,
    strengths: Option<Vec<Vec<f64>>>,
    base: Option<Base>,
}

impl Given {
    fn open(self) -> Result<Opened> {
        let Self { adapters, coefficients, strengths, base_weights } = self;
        let base = (!base_weights.is_empty()).then(|| Base::open(&base_weights)).transpose()?;
        Ok(Opened { adapters: unwrap(adapters), coefficients, strengths, base })
    }
}

impl Opened {
    fn terms(&self) -> Result<Terms<'_>> {
        let terms = Terms::new(&self.adapters, &self.coefficients, self.strengths.as_deref())?;
        Ok(terms.with_base(self.base.as_ref()))
    }
}

#[pyfunction]
fn plan(py: Python<'_>, terms: Given, settings: Settings) -> PyResult<PyPlan> {
    let plan = || {
        let opened = terms.open()?;
        let terms = opened.terms()?;
        Ok(PyPlan::from(Job::new(&terms, &settings)?.plan()))
    };
    py.detach(plan).map_err(|error| to_python(py, error))
}

#[pyfunction]
#[pyo3(signature = (terms, outputs, settings, progress=None))]
fn combine(
    py: Python<'_>,
    terms: Given,
    outputs: Vec<PathBuf>,
    settings: Settings,
    progress: Option<Py<PyAny>>,
) -> PyResult<(PyPlan, Vec<Outcome>)> {
    let raise = |error| to_python(py, error);
    let opened = py.detach(|| terms.open()).map_err(raise)?;
    let terms = opened.terms().map_err(raise)?;
    let job = py.detach(|| Job::new(&terms, &settings)).map_err(raise)?;
    let dtype = settings.dtype().map_err(raise)?;
    let total = job.plan().bytes;
    let outcomes = interruptible(py, total, progress, |watch| job.write(&outputs, dtype, watch))?;
    Ok((PyPlan::from(job.plan()), outcomes))
}

#[pyfunction]
#[pyo3(signature = (adapter, strengths, out, container, dtype, settings, *, architecture=None,
                    alpha=0.0, heads=None, rank=None, metadata=BTreeMap::new(), progress=None))]
#[expect(clippy::too_many_arguments, reason = "named, in Python")]
fn convert(
    py: Python<'_>,
    adapter: Py<PyAdapter>,
    strengths: Vec<f64>,
    out: Option<PathBuf>,
    container: &str,
    dtype: &str,
    settings: Settings,
    architecture: Option<&str>,
    alpha: f64,
    heads: Option<Heads>,
    rank: Option<usize>,
    metadata: BTreeMap<String, PyValue>,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let adapter = &adapter.get().0;
    let unknown = |what: &str, found: &str, known: &str| {
        to_python(py, Error::Setting(format!("{what} is `{found}`, expected one of {known}")))
    };
    let conversion = Conversion {
        container: Container::from_name(container)
            .ok_or_else(|| unknown("container", container, "peft, gguf, mlx"))?,
        dtype: Dtype::from_name(dtype)
            .ok_or_else(|| unknown("dtype", dtype, "float32, float16, bfloat16, q8_0"))?,
        strengths: &strengths,
        rank,
        architecture,
        alpha,
        heads,
        metadata: from_values(metadata),
    };
    let options = settings.options().map_err(|error| to_python(py, error))?;
    let Some(out) = out else {
        return crate::check_conversion(adapter, &conversion).map_err(|error| to_python(py, error));
    };
    interruptible(py, adapter.stamp().size, progress, |watch| {
        crate::convert(adapter, &out, &conversion, &options, watch)
    })
}

#[pyfunction]
fn soup_errors(py: Python<'_>, terms: Given, settings: Settings) -> PyResult<(Vec<f64>, bool)> {
    interruptible(py, 0, None, |watch| {
        let opened = terms.open()?;
        let found = crate::gram::soup_errors(&opened.terms()?, &settings.options()?, watch)?;
        Ok((found.errors, found.exact))
    })
}

#[pyfunction]
#[pyo3(signature = (adapters, settings, progress=None))]
fn norms(
    py: Python<'_>,
    adapters: Vec<Py<PyAdapter>>,
    settings: Settings,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Vec<f64>>> {
    let adapters = unwrap(adapters);
    let total = adapters.iter().map(|adapter| adapter.stamp().size).sum();
    interruptible(py, total, progress, |watch| {
        crate::gram::norms(&adapters, &settings.options()?, watch)
    })
}

/// A matrix, row by row, each number as its bytes: a list of numbers takes four times that.
type Rows = Cow<'static, [u8]>;

/// In parameter space, or in that of ΔW where there are strengths; of all modules together, or of
/// each alone.
#[pyfunction]
#[pyo3(signature = (adapters, strengths, of_modules, settings, progress=None))]
fn gram(
    py: Python<'_>,
    adapters: Vec<Py<PyAdapter>>,
    strengths: Option<Vec<Vec<f64>>>,
    of_modules: bool,
    settings: Settings,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<(Option<String>, Rows)>> {
    let adapters = unwrap(adapters);
    let space = strengths.as_deref().map_or(Space::Parameters, Space::Deltas);
    let gram = settings.options().and_then(|options| Gram::new(&adapters, space, options));
    let gram = gram.map_err(|error| to_python(py, error))?;
    let rows = |matrix: faer::Mat<f64>| -> Rows {
        matrix.row_iter().flat_map(|row| row.iter().flat_map(|x| x.to_ne_bytes())).collect()
    };
    interruptible(py, gram.plan().bytes, progress, |watch| {
        if !of_modules {
            return Ok(vec![(None, rows(gram.sum(watch)?))]);
        }
        let names = gram.modules().into_iter().map(|name| Some(name.to_owned()));
        Ok(names.zip(gram.of_modules(watch)?.into_iter().map(rows)).collect())
    })
}

#[pyfunction]
fn dora_norms(py: Python<'_>, terms: Given, settings: Settings) -> PyResult<Vec<Vec<f64>>> {
    interruptible(py, 0, None, |watch| {
        let opened = terms.open()?;
        crate::merge::dora_norms(&opened.terms()?, &settings.options()?, watch)
    })
}

#[pyfunction]
fn cosines(
    py: Python<'_>,
    adapters: Vec<Py<PyAdapter>>,
    module: String,
    settings: Settings,
) -> PyResult<Vec<Vec<f64>>> {
    let adapters = unwrap(adapters);
    interruptible(py, 0, None, |watch| {
        crate::gram::cosines(&adapters, &module, &settings.options()?, watch)
    })
}

fn unwrap(adapters: Vec<Py<PyAdapter>>) -> Vec<Adapter> {
    adapters.into_iter().map(|adapter| adapter.get().0.clone()).collect()
}

/// Run long work off the interpreter: tell `progress(done, total)` how far it is, stop it on
/// Ctrl-C, and turn its error.
fn interruptible<T: Send>(
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
fn to_python(py: Python<'_>, error: Error) -> PyErr {
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
