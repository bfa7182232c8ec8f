//! Small adapters for the tests.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::{Dtype, kernels::widest, watch::Watch, writer::Writer};

pub(crate) fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// An adapter with modules `q` and `v`, of numbers that depend on its seed.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) modules: Vec<&'static str>,
    pub(crate) rank: usize,
    pub(crate) inner: usize,
    pub(crate) outer: usize,
    pub(crate) dtype: Dtype,
    pub(crate) seed: u32,
    /// What stands at the first place of every tensor.
    pub(crate) first: Option<f32>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            modules: vec!["q", "v"],
            rank: 2,
            inner: 37,
            outer: 41,
            dtype: Dtype::F32,
            seed: 1,
            first: None,
        }
    }
}

impl Spec {
    /// The tensors' names and shapes, sorted by name.
    pub(crate) fn tensors(&self) -> Vec<(String, [usize; 2])> {
        let both = |module: &&str| {
            let name = |factor| format!("base_model.model.{module}.lora_{factor}.weight");
            [(name("A"), [self.rank, self.inner]), (name("B"), [self.outer, self.rank])]
        };
        self.modules.iter().flat_map(both).collect()
    }

    pub(crate) fn numbers(&self, tensor: usize) -> Vec<f32> {
        let [rows, columns] = self.tensors()[tensor].1;
        let mut state = self.seed.wrapping_mul(2_654_435_761).wrapping_add(tensor as u32);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut numbers: Vec<f32> = (0..rows * columns).map(|_| next()).collect();
        if let (Some(number), Some(first)) = (numbers.first_mut(), self.first) {
            *number = first;
        }
        numbers
    }

    pub(crate) fn write(&self, folder: &TempDir, name: &str) -> PathBuf {
        let path = folder.path().join(name);
        let tensors = self.tensors();
        let shapes = tensors.iter().map(|(name, shape)| (&name[..], &shape[..]));
        let writer = Writer::create(&path, self.dtype, shapes).unwrap();
        for tensor in 0..tensors.len() {
            writer.write(tensor, 0, &self.numbers(tensor)).unwrap();
        }
        Writer::finish(vec![writer], &Watch::default()).unwrap();
        path
    }
}

/// Numbers from −8 to 8 that depend on a seed.
pub(crate) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 20) as f32 - 8.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Numbers as the bytes of a type.
pub(crate) fn narrowed(dtype: Dtype, numbers: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.size(numbers.len())];
    (widest().narrow)(dtype, numbers, &mut bytes);
    bytes
}

/// Tensors by name, sorted.
pub(crate) type Tensors = Vec<(String, Vec<f32>)>;

/// The numbers of each tensor of a float32 file.
pub(crate) fn read(path: &PathBuf) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, view)| {
            let mut numbers = vec![0.0; view.shape().iter().product()];
            (widest().widen)(Dtype::F32, view.data(), &mut numbers);
            (name.to_owned(), numbers)
        })
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}
