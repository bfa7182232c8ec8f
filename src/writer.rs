//! Write a safetensors file in pieces, from many threads; it appears whole or not at all.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{
    Dtype,
    error::{At, Result},
    kernels::widest,
    source::begin_flush,
    watch::Watch,
};

/// Numbers that are converted and written at a time, whole blocks of packed types: what becomes of
/// them stays in a near cache, and in memory that an allocator keeps.
pub(crate) const NARROWED: usize = 16 << 10;

/// A file that is being written beside its place.
pub(crate) struct Writer {
    path: PathBuf,
    file: NamedTempFile,
    /// The tensors, in the order in which they were announced.
    places: Vec<Place>,
}

/// Where a tensor begins in a file, and its type.
pub(crate) type Place = (u64, Dtype);

/// A file's header, and where what follows it has its place.
pub(crate) struct Head {
    pub(crate) bytes: Vec<u8>,
    pub(crate) places: Vec<Place>,
    /// Of the whole file.
    pub(crate) size: u64,
}

impl Writer {
    /// Begin `path` with a header for `tensors`, names and shapes, all of type `dtype`.
    pub(crate) fn create<'a>(
        path: &Path,
        dtype: Dtype,
        tensors: impl Iterator<Item = (&'a str, &'a [usize])> + Clone,
    ) -> Result<Self> {
        Self::begin(path, header(dtype, tensors))
    }

    /// Begin `path` with a header.
    pub(crate) fn begin(path: &Path, head: Head) -> Result<Self> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask
        let mut file = builder.tempfile_in(folder).at(path)?;
        file.write_all(&head.bytes).at(path)?;
        file.as_file().set_len(head.size).at(path)?;
        Ok(Self { path: path.to_owned(), file, places: head.places })
    }

    /// Write `numbers` into `tensor` (its place in the list given to `create`), from its element
    /// `start` on. Answers whether every number is finite in the file's type.
    pub(crate) fn write(&self, tensor: usize, start: usize, numbers: &[f32]) -> Result<bool> {
        let finite = self.places[tensor].1 != Dtype::F32 || (widest().finite)(numbers);
        Ok(self.write_finite(tensor, start, numbers)? && finite)
    }

    /// `write` of numbers that are known to be finite: only the file's type is asked.
    pub(crate) fn write_finite(
        &self,
        tensor: usize,
        start: usize,
        numbers: &[f32],
    ) -> Result<bool> {
        let (place, dtype) = self.places[tensor];
        let offset = place + dtype.size(start) as u64;
        let mut finite = true;
        if dtype == Dtype::F32 && cfg!(target_endian = "little") {
            self.put(bytemuck::cast_slice(numbers), offset)?;
        } else {
            let mut bytes = vec![0; dtype.size(NARROWED.min(numbers.len()))];
            let offsets = (offset..).step_by(bytes.len().max(1));
            for (numbers, offset) in numbers.chunks(NARROWED).zip(offsets) {
                let bytes = &mut bytes[..dtype.size(numbers.len())];
                finite &= (widest().narrow)(dtype, numbers, bytes);
                self.put(bytes, offset)?;
            }
        }
        begin_flush(self.file.as_file(), offset, dtype.size(numbers.len()));
        Ok(finite)
    }

    fn put(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(self.file.as_file(), bytes, offset).at(&self.path)
    }

    /// Flush the files, then give them their names.
    ///
    /// # Errors
    /// A file cannot be flushed or named; `watch` said to stop before all were flushed.
    pub(crate) fn finish(writers: Vec<Self>, watch: &Watch) -> Result<()> {
        for writer in &writers {
            watch.go_on()?;
            writer.file.as_file().sync_all().at(&writer.path)?;
        }
        watch.go_on()?;
        for Self { path, file, .. } in writers {
            file.persist(&path).map_err(|error| error.error).at(&path)?;
        }
        Ok(())
    }
}

/// The header of a safetensors file.
fn header<'a>(dtype: Dtype, tensors: impl Iterator<Item = (&'a str, &'a [usize])> + Clone) -> Head {
    // PEFT's mark, which transformers asks for; `_` sorts before any module path.
    let mut entries: BTreeMap<&str, Value> =
        BTreeMap::from([("__metadata__", json!({"format": "pt"}))]);
    let mut places = Vec::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += dtype.size(shape.iter().product()) as u64;
        places.push((start, dtype));
        let entry =
            json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end]});
        entries.insert(name, entry);
    }
    let mut json = json!(entries).to_string().into_bytes();
    // Padded so that the data begins at a multiple of eight.
    json.resize(json.len().next_multiple_of(8), b' ');
    let data = 8 + json.len() as u64;
    places.iter_mut().for_each(|(start, _)| *start += data);
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Head { bytes, places, size: data + end }
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{folder, narrowed};
    use safetensors::SafeTensors;

    #[test]
    fn the_safetensors_crate_reads_what_was_written() {
        let folder = folder();
        for (dtype, size) in [(Dtype::F32, 4), (Dtype::F16, 2), (Dtype::BF16, 2)] {
            let path = folder.path().join(dtype.to_string());
            let shapes: [(&str, &[usize]); 3] = [("a\n", &[3]), ("b", &[0, 2]), ("c", &[2, 1])];
            let writer = Writer::create(&path, dtype, shapes.into_iter()).unwrap();
            assert!(writer.write(2, 1, &[4.0]).unwrap());
            assert!(writer.write(0, 0, &[1.0, -2.0, 0.5]).unwrap());
            assert!(!writer.write(2, 0, &[f32::INFINITY]).unwrap());
            assert!(!path.exists());
            Writer::finish(vec![writer], &Watch::default()).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            let read = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(read.tensor("a\n").unwrap().shape(), [3]);
            assert_eq!(read.tensor("a\n").unwrap().data().len(), 3 * size);
            let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
            assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        }
    }

    #[test]
    fn a_writer_that_is_dropped_leaves_nothing() {
        let folder = folder();
        let path = folder.path().join("out.safetensors");
        let writer = Writer::create(&path, Dtype::F32, [("a", &[1][..])].into_iter()).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_converted_in_parts_lies_where_it_belongs() {
        let numbers: Vec<f32> = (0..2 * NARROWED + 96).map(|i| i as f32).collect();
        let folder = folder();
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::Q8_0] {
            let path = folder.path().join(dtype.to_string());
            let head = Head { bytes: vec![7; 5], places: vec![(5, dtype)], size: 5 };
            let writer = Writer::begin(&path, head).unwrap();
            let (first, rest) = numbers.split_at(64);
            assert!(writer.write(0, 64, rest).unwrap());
            assert!(writer.write(0, 0, first).unwrap());
            Writer::finish(vec![writer], &Watch::default()).unwrap();
            let expected = [vec![7; 5], narrowed(dtype, &numbers)].concat();
            assert!(std::fs::read(&path).unwrap() == expected, "{dtype}");
        }
    }
}
