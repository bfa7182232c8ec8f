//! The base model's weights, for adapters that are said relative to them (DoRA): read by rows,
//! never whole.

use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{
    adapter::Stamp,
    container,
    error::{At, Error, Quoted, Result, not_finite},
    kernels::widest,
    source::{Io, Source},
    tensor::Tensor,
    watch::Watch,
};

/// The safetensors files of a base model, whose headers have been read and checked.
pub struct Base {
    files: Vec<Shard>,
    /// Where each tensor is: a file and what its header says.
    tensors: HashMap<String, (usize, Tensor)>,
}

struct Shard {
    path: PathBuf,
    stamp: Stamp,
    source: Source,
}

/// One matrix of the base, out × in.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    shard: &'a Shard,
    tensor: &'a Tensor,
}

impl Base {
    /// Read the headers of a model's files; the shards of one model are taken together.
    ///
    /// # Errors
    /// A file cannot be read, or is not safetensors.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut base = Self { files: vec![], tensors: HashMap::new() };
        for path in paths {
            let (file, tensors) = container::safetensors(path)?;
            let stamp = Stamp::of(&file.metadata().at(path)?);
            let number = base.files.len();
            let source = Source::new(file, Io::Read).at(path)?;
            base.files.push(Shard { path: path.clone(), stamp, source });
            let named = tensors.into_iter().map(|tensor| (tensor.name.clone(), (number, tensor)));
            base.tensors.extend(named);
        }
        Ok(base)
    }

    /// The weight of a module that `adapter` changes, which has to be `shape`.
    ///
    /// # Errors
    /// The base has none, or one of another shape, or quantised.
    pub(crate) fn weight(
        &self,
        module: &str,
        shape: [usize; 2],
        adapter: &Path,
    ) -> Result<Weight<'_>> {
        // A checkpoint may lack the first parts of a path: those of the head around the model.
        let ends = std::iter::successors(Some(module), |path| Some(path.split_once('.')?.1));
        let mut found = ends.filter_map(|end| self.tensors.get(&format!("{end}.weight")));
        let Some((number, tensor)) = found.next() else {
            let path = self.files.first().map_or_else(PathBuf::new, |shard| shard.path.clone());
            let reason = format!(
                "the base's weights have no {}, which `{}` changes by DoRA",
                Quoted(&format!("{module}.weight")),
                adapter.display()
            );
            return Err(Error::File { path, reason });
        };
        let shard = &self.files[*number];
        if tensor.shape != shape {
            return Err(Error::Shape {
                path: shard.path.clone(),
                tensor: tensor.name.clone(),
                found: tensor.shape.clone(),
                other: adapter.to_owned(),
                expected: shape.to_vec(),
            });
        }
        if !tensor.dtype.is_float() {
            let reason = format!(
                "has type {}, expected F32, F16, BF16 or F64: give the weights from before they \
                 were quantised",
                tensor.dtype
            );
            return Err(Error::Tensor {
                path: shard.path.clone(),
                tensor: tensor.name.clone(),
                reason,
            });
        }
        Ok(Weight { shard, tensor })
    }

    /// # Errors
    /// A file is not what it was when its header was read.
    pub(crate) fn still_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|shard| shard.stamp.still(&shard.path))
    }
}

impl Weight<'_> {
    /// What it takes in its file, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.tensor.bytes.end - self.tensor.bytes.start
    }

    /// The rows in `rows`, one after another, into `numbers`; `bytes` is made as large as it needs
    /// to be.
    ///
    /// # Errors
    /// The file cannot be read; a number is not finite; the watch said to stop.
    pub(crate) fn read(
        &self,
        rows: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
        watch: &Watch,
    ) -> Result<()> {
        watch.go_on()?;
        let Self { shard, tensor } = self;
        let columns = tensor.shape[1];
        let numbers = &mut numbers[..rows.len() * columns];
        let range = rows.start * columns..rows.end * columns;
        tensor.read(&shard.source, range, bytes, numbers).at(&shard.path)?;
        if !(widest().finite)(numbers)
            && let Some(&number) = numbers.iter().find(|number| !number.is_finite())
        {
            return Err(Error::NotFinite {
                path: shard.path.clone(),
                tensor: tensor.name.clone(),
                value: not_finite(number),
            });
        }
        watch.advance(tensor.dtype.size(numbers.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, testing::folder, writer::Writer};

    #[test]
    fn weights_are_found_in_shards_also_without_the_first_parts_of_their_names() {
        let folder = folder();
        let paths = ["one", "two"].map(|name| folder.path().join(name));
        for (path, name) in paths.iter().zip(["h.0.q.weight", "h.1.q.weight"]) {
            let writer =
                Writer::create(path, Dtype::BF16, [(name, &[3, 2][..])].into_iter()).unwrap();
            writer.write(0, 0, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
            Writer::finish(vec![writer], &Watch::default()).unwrap();
        }
        let base = Base::open(&paths).unwrap();
        let who = Path::new("who");
        let weight = base.weight("transformer.h.1.q", [3, 2], who).unwrap();
        let mut numbers = [0.0; 4];
        weight.read(1..3, &mut vec![], &mut numbers, &Watch::default()).unwrap();
        assert_eq!((numbers, weight.size()), ([3.0, 4.0, 5.0, 6.0], 12));
        let missing = base.weight("h.2.q", [3, 2], who).err().unwrap().to_string();
        assert!(missing.contains("no `h.2.q.weight`, which `who` changes"), "{missing}");
        let other = base.weight("h.1.q", [2, 3], who).err().unwrap();
        assert!(matches!(other, Error::Shape { .. }));
        std::fs::write(&paths[0], b"gone").unwrap();
        assert!(matches!(base.still_unchanged(), Err(Error::Changed { .. })));
        assert!(Base::open(&paths).is_err());
    }
}
