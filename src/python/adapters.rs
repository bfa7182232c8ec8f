//! Adapters, their layouts and the metadata of GGUF files, as Python sees them.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::UNIX_EPOCH};

use pyo3::prelude::*;

use super::running::to_python;
use crate::{
    adapter::Adapter,
    gguf::{Metadata, Value},
    layout::{Factor, Kind, Layout},
};

/// One adapter file whose header has been read and checked.
#[pyclass(frozen, name = "Adapter", module = "lorameta_rs._core")]
pub(super) struct PyAdapter(pub(super) Adapter);

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
pub(super) enum PyValue {
    Flag(bool),
    Integer(i128),
    Number(f64),
    Text(String),
}

pub(super) fn to_values(metadata: &Metadata) -> BTreeMap<String, PyValue> {
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

pub(super) fn from_values(values: BTreeMap<String, PyValue>) -> Metadata {
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
pub(super) struct PyLayout(Arc<Layout>);

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
pub(super) struct PyModule {
    name: String,
    kind: &'static str,
    rank: usize,
    experts: usize,
    dora: bool,
    a_shape: Vec<usize>,
    b_shape: Vec<usize>,
    dtypes: (String, String),
}

/// The adapters themselves.
pub(super) fn unwrap(adapters: Vec<Py<PyAdapter>>) -> Vec<Adapter> {
    adapters.into_iter().map(|adapter| adapter.get().0.clone()).collect()
}
