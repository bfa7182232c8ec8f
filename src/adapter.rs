//! One adapter file: what its header says, and the stamp by which a change is noticed.

use std::{
    collections::HashSet,
    fs::{File, Metadata},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rayon::{ThreadPoolBuilder, prelude::*};

use crate::{
    container::{self, Container, Contents, Opening},
    error::{At, Error, Quoted, Result},
    gguf,
    layout::Layout,
};

/// An adapter whose header has been read and checked. It holds no file open: a job opens the
/// members it reads, so that a bank may have more members than a process may have open files.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The file.
    pub path: PathBuf,
    /// Its tensors and modules, shared by all adapters that have the same ones in the same places.
    pub layout: Arc<Layout>,
    /// Its format.
    pub container: Container,
    /// The keys of a GGUF file; none of another.
    pub metadata: Arc<gguf::Metadata>,
    stamp: Stamp,
}

/// A file's size and time of change: what tells one version of it from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// In bytes.
    pub size: u64,
    /// When it was last written to, where the file system says so.
    pub modified: Option<SystemTime>,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self { size: metadata.len(), modified: metadata.modified().ok() }
    }

    /// # Errors
    /// The file at `path` has another one by now.
    pub(crate) fn still(self, path: &Path) -> Result<()> {
        self.is_that_of(&std::fs::metadata(path).at(path)?, path)
    }

    fn is_that_of(self, metadata: &Metadata, path: &Path) -> Result<()> {
        let same = Self::of(metadata) == self;
        if same { Ok(()) } else { Err(Error::Changed { path: path.to_owned() }) }
    }
}

impl Adapter {
    /// Read and check the header of `path`.
    ///
    /// # Errors
    /// The file cannot be read, is no adapter, or holds something else than LoRA factors.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path, &Opening::default())
    }

    fn read(path: &Path, opening: &Opening) -> Result<Self> {
        let (file, _) = container::open(path)?;
        let stamp = Stamp::of(&file.metadata().at(path)?);
        let contents = container::read(path, file, stamp.size, opening)?;
        let Contents { container, metadata, tensors, notes } = contents;
        if tensors.is_empty() {
            let reason = "holds no tensor".to_owned();
            return Err(Error::File { path: path.to_owned(), reason });
        }
        let layout = Layout::of(tensors, notes, opening).map_err(|fault| Error::Tensor {
            path: path.to_owned(),
            tensor: fault.tensor,
            reason: fault.reason,
        })?;
        if layout.modules.is_empty() {
            let reason = "holds no LoRA factors".to_owned();
            return Err(Error::File { path: path.to_owned(), reason });
        }
        let (layout, metadata) = (Arc::new(layout), Arc::new(metadata));
        Ok(Self { path: path.to_owned(), layout, container, metadata, stamp })
    }

    /// Open many adapters in parallel; those with the same layout share it. The answers are in the
    /// order of `paths`.
    pub fn open_all(paths: &[PathBuf], opening: &Opening) -> Vec<Result<Self>> {
        let layouts = Mutex::new(HashSet::<Arc<Layout>>::new());
        let open = |path: &PathBuf| {
            let mut adapter = Self::read(path, opening)?;
            let mut known = layouts.lock().unwrap_or_else(PoisonError::into_inner);
            match known.get(&adapter.layout) {
                Some(layout) => adapter.layout = Arc::clone(layout),
                None => drop(known.insert(Arc::clone(&adapter.layout))),
            }
            Ok(adapter)
        };
        // Threads of its own: those that all of a process share do not outlive a fork.
        match ThreadPoolBuilder::new().build() {
            Ok(pool) => pool.install(|| paths.par_iter().map(open).collect()),
            Err(_) => paths.iter().map(open).collect(),
        }
    }

    /// The same, with so many experts in the factors of each module of its layout.
    ///
    /// # Errors
    /// A rank is no multiple of them.
    pub fn with_experts(&self, experts: &[usize]) -> Result<Self> {
        let mut layout = Layout::clone(&self.layout);
        for (module, &experts) in layout.modules.iter_mut().zip(experts) {
            if experts == 0 || !module.rank.is_multiple_of(experts) {
                let (rank, name) = (module.rank, Quoted(&module.name));
                let text = format!("{rank} rows of {name} are not those of {experts} experts");
                return Err(Error::Setting(text));
            }
            module.rank /= experts;
            module.experts = experts;
        }
        Ok(Self { layout: Arc::new(layout), ..self.clone() })
    }

    /// The file's size and time of change when its header was read.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// # Errors
    /// It is DoRA, which `what` cannot take.
    pub(crate) fn plain(&self, what: &str) -> Result<()> {
        let Some(magnitude) = self.layout.modules.iter().find_map(|module| module.magnitude) else {
            return Ok(());
        };
        Err(Error::Tensor {
            path: self.path.clone(),
            tensor: self.layout.tensors[magnitude].name.clone(),
            reason: format!(
                "is a DoRA magnitude: it changes the base's whole weight, which {what} cannot \
                 hold; use `svd`"
            ),
        })
    }

    /// Open the file for its data.
    ///
    /// # Errors
    /// It has changed since its header was read.
    pub(crate) fn file(&self) -> Result<File> {
        let file = File::open(&self.path).at(&self.path)?;
        self.stamp.is_that_of(&file.metadata().at(&self.path)?, &self.path)?;
        Ok(file)
    }

    /// Look once more, when the data has been read.
    ///
    /// # Errors
    /// The file has changed since its header was read.
    pub(crate) fn still_unchanged(&self) -> Result<()> {
        self.stamp.still(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, folder};

    #[test]
    fn equal_layouts_are_shared() {
        let folder = folder();
        let same = Spec::default();
        let other = Spec { rank: 3, ..Spec::default() };
        let paths = [same.write(&folder, "a"), same.write(&folder, "b"), other.write(&folder, "c")];
        let opened: Vec<_> = Adapter::open_all(&paths, &Opening::default())
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert!(Arc::ptr_eq(&opened[0].layout, &opened[1].layout));
        assert!(!Arc::ptr_eq(&opened[0].layout, &opened[2].layout));
    }

    #[test]
    fn factors_without_numbers_are_named() {
        let folder = folder();
        for (spec, factor) in [
            (Spec { inner: 0, ..Spec::default() }, "lora_A"),
            (Spec { outer: 0, ..Spec::default() }, "lora_B"),
        ] {
            let error = Adapter::open(&spec.write(&folder, "a")).unwrap_err().to_string();
            assert!(error.contains(factor) && error.contains("has no numbers"), "{error}");
        }
    }

    #[test]
    fn a_change_is_noticed() {
        let folder = folder();
        let path = Spec::default().write(&folder, "a");
        let adapter = Adapter::open(&path).unwrap();
        adapter.file().unwrap();
        Spec { rank: 3, ..Spec::default() }.write(&folder, "a");
        assert!(matches!(adapter.file(), Err(Error::Changed { .. })));
        assert!(matches!(adapter.still_unchanged(), Err(Error::Changed { .. })));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = folder();
        assert!(Adapter::open(folder.path()).unwrap_err().to_string().contains("a folder"));
        assert!(matches!(Adapter::open(Path::new("gone")), Err(Error::Io { .. })));
    }
}
