//! `lorameta_rs._core`: paths and a few hundred floats in, files out. The one module that knows
//! Python; the tensors' bytes never cross into it.

mod adapters;
mod jobs;
mod running;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use pyo3::prelude::*;

use self::{
    adapters::{PyAdapter, PyLayout, PyModule, PyValue, from_values, to_values, unwrap},
    jobs::{Given, Job, Outcome, PyPlan, Settings},
    running::{interruptible, to_python},
};
use crate::{
    Container, Conversion, Dtype, Error, Heads, Opening,
    adapter::Adapter,
    gguf::names,
    gram::{Gram, Space},
};

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{
        Outcome, PyAdapter, PyLayout, PyModule, PyPlan, combine, convert, cosines, dora_norms,
        file_tensors, first_match, gguf_metadata, gguf_permutes, gguf_tensor_name, gram, norms,
        open_adapters, peft_module_name, plan, scan, soup_errors, version,
    };
}

#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
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
