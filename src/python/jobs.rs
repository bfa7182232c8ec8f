//! What Python asks to be merged, and what it is told of it.

use std::path::PathBuf;

use pyo3::prelude::*;

use super::adapters::{PyAdapter, unwrap};
use crate::{
    Base, Cat, Dense, Dtype, Error, Io, Kept, Majority, Options, Plan, Rank, Result, Rule, Soup,
    Sparse, Sparsity, Svd, Terms, Watch, adapter::Adapter, merge::ITERATIONS,
};

/// What vLLM loads unless it is told to expect more.
pub(super) const DEFAULT_RANK: usize = 16;

/// The attributes of `lorameta_rs.merge.Options` that the core knows.
#[derive(FromPyObject)]
pub(super) struct Settings {
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
    pub(super) fn options(&self) -> Result<Options> {
        let io = match &self.io[..] {
            "read" => Io::Read,
            "mmap" => Io::Mmap,
            io => return Err(Error::Setting(format!("io is `{io}`, expected read or mmap"))),
        };
        Ok(Options { threads: self.threads, memory: self.memory, io, allow_nan: self.allow_nan })
    }

    pub(super) fn dtype(&self) -> Result<Dtype> {
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
pub(super) enum Job<'a> {
    Soup(Soup<'a>),
    Cat(Cat<'a>),
    Svd(Svd<'a>),
    Sparse(Sparse<'a>),
    Dense(Dense<'a>),
}

impl<'a> Job<'a> {
    pub(super) fn new(terms: &'a Terms<'a>, settings: &Settings) -> Result<Self> {
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

    pub(super) fn plan(&self) -> &Plan {
        match self {
            Self::Soup(soup) => soup.plan(),
            Self::Cat(cat) => cat.plan(),
            Self::Svd(svd) => svd.plan(),
            Self::Sparse(sparse) => sparse.plan(),
            Self::Dense(dense) => dense.plan(),
        }
    }

    /// What became of each target: its rank where the method chooses one, and what that keeps.
    pub(super) fn write(
        &self,
        outputs: &[PathBuf],
        dtype: Dtype,
        watch: &Watch,
    ) -> Result<Vec<Outcome>> {
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
pub(super) struct Outcome {
    rank: Option<usize>,
    kept: Vec<(String, f64, f64, bool)>,
}

/// The attributes of `lorameta_rs.sums.Terms`.
#[derive(FromPyObject)]
pub(super) struct Given {
    adapters: Vec<Py<PyAdapter>>,
    coefficients: Vec<Vec<Vec<f64>>>,
    strengths: Option<Vec<Vec<f64>>>,
    base_weights: Vec<PathBuf>,
}

/// The same, read and opened: what `Terms` borrow.
pub(super) struct Opened {
    adapters: Vec<Adapter>,
    coefficients: Vec<Vec<Vec<f64>>>,
    strengths: Option<Vec<Vec<f64>>>,
    base: Option<Base>,
}

impl Given {
    pub(super) fn open(self) -> Result<Opened> {
        let Self { adapters, coefficients, strengths, base_weights } = self;
        let base = (!base_weights.is_empty()).then(|| Base::open(&base_weights)).transpose()?;
        Ok(Opened { adapters: unwrap(adapters), coefficients, strengths, base })
    }
}

impl Opened {
    pub(super) fn terms(&self) -> Result<Terms<'_>> {
        let terms = Terms::new(&self.adapters, &self.coefficients, self.strengths.as_deref())?;
        Ok(terms.with_base(self.base.as_ref()))
    }
}

/// What a job will read and take.
#[pyclass(frozen, get_all, name = "Plan", module = "lorameta_rs._core")]
pub(super) struct PyPlan {
    bytes: u64,
    memory: usize,
    threads: usize,
}

impl From<&Plan> for PyPlan {
    fn from(plan: &Plan) -> Self {
        Self { bytes: plan.bytes, memory: plan.memory, threads: plan.threads }
    }
}
