//! The modules that adapters change, and whole factors of them: for sums of ΔW, where adapters may
//! differ in rank.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use rayon::ThreadPoolBuilder;

use crate::{
    Io,
    adapter::Adapter,
    error::{At, Error, Result, not_finite},
    experts::Held,
    kernels::widest,
    layout::{Factor, Kind, Module},
    source::Source,
    terms::Terms,
    watch::Watch,
};

/// One module, in every adapter that has it.
#[derive(Debug, Clone)]
pub(crate) struct Joint {
    /// As the first of its adapters has it.
    pub(crate) module: Module,
    /// The shape of A without its rows: the rank comes before it.
    pub(crate) inner: Vec<usize>,
    /// The rows of B, and the shape behind its columns: 1 × 1 for a convolution.
    pub(crate) outer: usize,
    pub(crate) behind: Vec<usize>,
    /// In the order of the bank. An adapter that is not among them counts as zero.
    pub(crate) holders: Vec<Share>,
    /// Whether any of them is DoRA there.
    pub(crate) dora: bool,
}

/// What one adapter has of a joint module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// As an index into the bank.
    pub(crate) adapter: usize,
    /// As an index into the adapter's layout.
    pub(crate) module: usize,
    pub(crate) rank: usize,
    /// Which of the module's experts, where one is taken as a module of its own.
    pub(crate) expert: Option<usize>,
}

impl Joint {
    /// The columns of A, the kernel of a convolution among them.
    pub(crate) fn columns(&self) -> usize {
        self.inner.iter().product()
    }

    /// The sum of the adapters' ranks.
    pub(crate) fn ranks(&self) -> usize {
        self.holders.iter().map(|share| share.rank).sum()
    }

    /// Those ranks for a target alone: of the adapters that it takes.
    pub(crate) fn ranks_of(&self, terms: &Terms<'_>, target: usize) -> usize {
        let taken = self.holders.iter().filter(|share| terms.takes(target, share));
        taken.map(|share| share.rank).sum()
    }

    /// A factor's shape at another rank.
    pub(crate) fn shape(&self, factor: Factor, rank: usize) -> Vec<usize> {
        match factor {
            Factor::A => [&[rank * self.module.experts][..], &self.inner].concat(),
            Factor::B => [&[self.outer, rank * self.module.experts][..], &self.behind].concat(),
        }
    }
}

/// The modules of all adapters, in the order of their names.
///
/// # Errors
/// A module fits another base in one adapter than in another.
pub(crate) fn joint_modules(adapters: &[&Adapter]) -> Result<Vec<Joint>> {
    // Linear and convolution factors have the same names, and their shapes tell them apart.
    let mut found: BTreeMap<(&str, bool), Joint> = BTreeMap::new();
    for (adapter, opened) in adapters.iter().enumerate() {
        let layout = &opened.layout;
        for (index, module) in layout.modules.iter().enumerate() {
            let shape = |factor| &layout.tensors[module.tensor(factor)].shape[..];
            let (a, b) = (shape(Factor::A), shape(Factor::B));
            let share = Share { adapter, module: index, rank: module.rank, expert: None };
            let joint =
                found.entry((&module.name, module.kind == Kind::Embedding)).or_insert_with(|| {
                    Joint {
                        module: module.clone(),
                        inner: a[1..].to_vec(),
                        outer: b[0],
                        behind: b[2..].to_vec(),
                        holders: vec![],
                        dora: false,
                    }
                });
            for (factor, shape) in [(Factor::A, a), (Factor::B, b)] {
                if *shape != joint.shape(factor, module.rank) {
                    return Err(Error::Shape {
                        path: opened.path.clone(),
                        tensor: module.tensor_name(factor),
                        found: shape.to_vec(),
                        other: adapters[joint.holders[0].adapter].path.clone(),
                        expected: joint.shape(factor, joint.module.rank),
                    });
                }
            }
            joint.holders.push(share);
            joint.dora |= module.magnitude.is_some();
        }
    }
    Ok(found.into_values().collect())
}

/// Adapters that are open for whole factors to be read.
pub(crate) struct Reader<'a> {
    pub(crate) adapters: Vec<&'a Adapter>,
    sources: Arc<[Source]>,
    held: Option<Held>,
    allow_nan: bool,
    pub(crate) watch: &'a Watch,
}

impl<'a> Reader<'a> {
    /// # Errors
    /// A file cannot be opened, or has changed.
    pub(crate) fn open(
        adapters: &[&'a Adapter],
        io: Io,
        allow_nan: bool,
        watch: &'a Watch,
    ) -> Result<Self> {
        #[cfg(unix)]
        if io == Io::Read {
            // One descriptor for each adapter, and what a process has anyway. Where the system
            // refuses, opening the files will say so.
            let _ = rlimit::increase_nofile_limit(adapters.len() as u64 + 128);
        }
        let open = |adapter: &&Adapter| Source::new(adapter.file()?, io).at(&adapter.path);
        let sources = adapters.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { adapters: adapters.to_vec(), sources, held: None, allow_nan, watch })
    }

    /// The same, for the experts that are held.
    pub(crate) fn holding(&self, held: Held) -> Self {
        let (adapters, sources) = (self.adapters.clone(), Arc::clone(&self.sources));
        Self { adapters, sources, held: Some(held), ..*self }
    }

    /// The elements in `range` of a factor, counted row by row, into `numbers`; `bytes` is made as
    /// large as it needs to be.
    ///
    /// # Errors
    /// The file cannot be read; a number is not finite, and that is not allowed; the watch said to
    /// stop.
    pub(crate) fn read(
        &self,
        share: Share,
        factor: Factor,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
    ) -> Result<()> {
        let layout = &self.adapters[share.adapter].layout;
        let module = &layout.modules[share.module];
        let tensor = module.tensor(factor);
        let Some(expert) = share.expert else {
            return self.tensor(share.adapter, tensor, range, bytes, numbers);
        };
        let length = layout.tensors[tensor].len() / module.experts;
        match (factor, &self.held) {
            (Factor::B, Some(held)) => {
                self.watch.go_on()?;
                let own = held.read(share.adapter, expert, length, range);
                numbers[..own.len()].copy_from_slice(own);
                Ok(())
            }
            // Its rows lie together.
            _ => {
                let place = expert * length + range.start..expert * length + range.end;
                self.tensor(share.adapter, tensor, place, bytes, numbers)
            }
        }
    }

    /// The magnitudes of a DoRA module's rows; none of a plain one.
    ///
    /// # Errors
    /// As `read`.
    pub(crate) fn magnitude(&self, share: Share, bytes: &mut Vec<u8>) -> Result<Option<Vec<f64>>> {
        let layout = &self.adapters[share.adapter].layout;
        let read = |tensor: usize| {
            let mut numbers = vec![0.0; layout.tensors[tensor].len()];
            let all = 0..numbers.len();
            self.tensor(share.adapter, tensor, all, bytes, &mut numbers)?;
            Ok(numbers.into_iter().map(f64::from).collect())
        };
        layout.modules[share.module].magnitude.map(read).transpose()
    }

    fn tensor(
        &self,
        adapter: usize,
        tensor: usize,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
    ) -> Result<()> {
        self.watch.go_on()?;
        let source = &self.sources[adapter];
        let adapter = self.adapters[adapter];
        let tensor = &adapter.layout.tensors[tensor];
        let numbers = &mut numbers[..range.len()];
        tensor.read(source, range.clone(), bytes, numbers).at(&adapter.path)?;
        source.release(&tensor.span(&range));
        // Without a branch first, so that the loop is widened.
        if !self.allow_nan
            && !(widest().finite)(numbers)
            && let Some(&number) = numbers.iter().find(|number| !number.is_finite())
        {
            return Err(Error::NotFinite {
                path: adapter.path.clone(),
                tensor: tensor.name.clone(),
                value: not_finite(number),
            });
        }
        self.watch.advance(tensor.dtype.size(range.len()));
        Ok(())
    }

    /// # Errors
    /// The watch said to stop.
    pub(crate) fn go_on(&self) -> Result<()> {
        self.watch.go_on()
    }

    /// # Errors
    /// A file is not what it was when its header was read.
    pub(crate) fn still_unchanged(&self) -> Result<()> {
        self.adapters.iter().try_for_each(|adapter| adapter.still_unchanged())
    }
}

/// Stops the other threads of a job where one panics: they may wait for its turn.
struct StopOnPanic<'a>(&'a Watch);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// `work` for the indices below `count`, each on one of `threads` threads that has a state of its
/// own, made by `state`. The first fault stops all.
pub(crate) fn each_on_threads<S>(
    count: usize,
    threads: usize,
    watch: &Watch,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::Setting(error.to_string()))?;
    let next = AtomicUsize::new(0);
    let turns = || {
        let _guard = StopOnPanic(watch);
        let mut state = state();
        loop {
            let index = next.fetch_add(1, Relaxed);
            if index >= count {
                return Ok(());
            }
            if let Err(error) = work(&mut state, index) {
                watch.stop(); // the other threads need not finish theirs
                return Err(error);
            }
        }
    };
    // The fault itself comes before the `Stopped` of the threads that it stopped.
    let (stopped, done): (Vec<_>, Vec<_>) = pool
        .broadcast(|_| turns())
        .into_iter()
        .partition(|result| matches!(result, Err(Error::Stopped)));
    done.into_iter().chain(stopped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_one_thread_stops_those_that_wait_for_it() {
        let watch = Watch::default();
        let work = |(): &mut (), index: usize| {
            assert!(index > 0, "the first one fails");
            loop {
                watch.go_on()?;
            }
        };
        let run = || each_on_threads(2, 2, &watch, || (), work);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
    }
}
