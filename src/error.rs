//! What can go wrong, one variant for each thing a user can put right.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// What went wrong; the message names the file, the tensor, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("`{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a safetensors file, or one whose header does not hold.
    #[error("`{}`: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do about it.
        reason: String,
    },
    /// A tensor that is not, or not rightly, one factor of a LoRA module.
    #[error("`{}`: {}: {reason}", path.display(), Quoted(tensor))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name as it stands in the file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file has the tensor, in another shape than the adapters it is to be combined with.
    #[error(
        "`{}`: {} has shape {found:?}, where `{}` has or needs {expected:?}; \
         they are for different base models, or differ in rank: sum those by `svd` or `cat`",
        path.display(), Quoted(tensor), other.display()
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's PEFT name.
        tensor: String,
        /// Its shape in `path`.
        found: Vec<usize>,
        /// The first adapter that has the tensor.
        other: PathBuf,
        /// Its shape there.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    #[error("`{}`: {} holds {value} as a float32", path.display(), Quoted(tensor))]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor's name as it stands in the file.
        tensor: String,
        /// `NaN`, `Inf` or `-Inf`.
        value: &'static str,
    },
    /// The members are finite, their weighted sum is not.
    #[error(
        "{}: the weighted sum is beyond the range of {dtype}; \
             use smaller coefficients or a wider --dtype",
        Quoted(tensor)
    )]
    Overflow {
        /// The tensor's PEFT name.
        tensor: String,
        /// The output's type.
        dtype: crate::Dtype,
    },
    /// The file was replaced or written to while the job ran.
    #[error("`{}` changed while it was being read; nothing was written, run the job again",
            path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The job cannot be cut small enough for the budget.
    #[error(
        "the memory budget is {given} MiB, this job needs at least {needed} MiB; \
             raise --memory or use fewer --threads"
    )]
    Memory {
        /// The budget.
        given: usize,
        /// The least that would do.
        needed: usize,
    },
    /// A `rank_pattern` or `alpha_pattern` key that is no regular expression of the linear kind.
    #[error(
        "the pattern {} is not a regular expression that can be matched in linear time: \
             {reason}",
        Quoted(pattern)
    )]
    Pattern {
        /// The key.
        pattern: String,
        /// What the regex engine said.
        reason: String,
    },
    /// Arguments that contradict each other.
    #[error("{0}")]
    Setting(String),
    /// The caller asked the job to stop.
    #[error("stopped")]
    Stopped,
}

/// A result whose error names a file.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Say which file an `io::Error` is about.
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.to_owned(), source })
    }
}

/// A name from a file, fit for a message: in backticks, escaped, and not longer than a line.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 160;
        let shown: String = self.0.chars().take(LONGEST).flat_map(escape).collect();
        let more = if self.0.chars().nth(LONGEST).is_some() { "…" } else { "" };
        write!(f, "`{shown}{more}`")
    }
}

/// Control characters as escapes, everything printable as it is.
fn escape(c: char) -> impl Iterator<Item = char> {
    let plain = (!c.is_control()).then_some(c);
    let escaped = c.is_control().then(|| c.escape_default());
    plain.into_iter().chain(escaped.into_iter().flatten())
}

/// What a number that is not finite is called.
pub(crate) fn not_finite(number: f32) -> &'static str {
    if number.is_nan() {
        "NaN"
    } else if number > 0.0 {
        "Inf"
    } else {
        "-Inf"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_shortened() {
        assert_eq!(Quoted("模型.a").to_string(), "`模型.a`");
        assert_eq!(Quoted("a\0b\n").to_string(), "`a\\u{0}b\\n`");
        assert_eq!(Quoted(&"x".repeat(5000)).to_string().chars().count(), 163);
    }

    #[test]
    fn messages_name_the_file_and_what_to_do() {
        let error = Error::Memory { given: 1, needed: 12 };
        assert!(error.to_string().contains("raise --memory"), "{error}");
        let gone = io::Error::from(io::ErrorKind::NotFound);
        let error = Err::<(), _>(gone).at(Path::new("a/b")).unwrap_err();
        assert!(error.to_string().starts_with("`a/b`: "), "{error}");
    }
}
