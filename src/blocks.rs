//! The plan of a job: the tensors cut into runs of columns, small enough for the memory budget.

use bytemuck::{Pod, Zeroable};

use crate::{
    adapter::Adapter,
    bank::{Bank, Holder},
    dtype::BLOCK,
    error::{Error, Result},
    joint::{Joint, Share},
    source::{HUGE, Io},
    tensor::Tensor,
    writer::NARROWED,
};

/// How a job is to be run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Worker threads; 0 for one a core, or two where files are read, so that one can sum while
    /// another waits for a disk.
    pub threads: usize,
    /// The memory budget, in bytes: what the job allocates and what it keeps mapped at a time.
    pub memory: usize,
    /// How files are read.
    pub io: Io,
    /// Sum NaN and infinity like other numbers, instead of refusing them.
    pub allow_nan: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: 0, memory: 64 << 20, io: Io::Read, allow_nan: false }
    }
}

impl Options {
    pub(crate) fn threads(&self) -> usize {
        match (self.threads, self.io) {
            (0, Io::Read) => 2 * self.cores(),
            _ => self.cores(),
        }
    }

    /// Threads for work that is all arithmetic.
    pub(crate) fn cores(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

/// A run of elements of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) slot: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
}

/// Pieces that follow each other, read of one adapter after another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) pieces: Vec<Piece>,
    /// The number of elements in all pieces.
    pub(crate) len: usize,
}

/// How a job is cut, and what it takes.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What is read from the adapters, in bytes.
    pub bytes: u64,
    /// What the job allocates and keeps mapped at most, in bytes.
    pub memory: usize,
    /// Worker threads.
    pub threads: usize,
    /// How many adapters are summed in one pass over the sums.
    pub(crate) group: usize,
    /// How files are read.
    pub(crate) io: Io,
    runs: Vec<Run>,
    /// How many runs are written in one go.
    together: usize,
}

/// Columns that go through the registers between two looks at the next row: two pages of each
/// float32 row. Shorter, the start of each run costs; longer, rows leave the L2 cache before the
/// last target has used them.
pub(crate) const STRIP: usize = 2048;

/// From so many targets on a row is used again and again, and is worth widening once.
pub(crate) const REUSED: usize = 4;

/// The longest run, in elements. Of mapped files, 4 MiB of each adapter: giving pages back costs
/// by the call, and longer runs gain nothing.
const LONGEST: usize = 1 << 20;

/// What a thread reads of a group's rows before it sums them, in bytes: they should still be in a
/// near cache when they are used.
const NEAR: usize = 2 << 20;

/// The sums that a thread writes in one go, in bytes: they should still be in a cache then.
const SUMMED: usize = 4 << 20;

/// The shortest run that is worth a read, and what runs are a multiple of: whole cache lines, and
/// whole tiles of the widest kernel.
const SHORTEST: usize = 1024;
const TILE: usize = 64;

/// A cache line, in elements.
pub(crate) const LINE: usize = 16;

/// What fills a cache line, from its beginning: vectors of numbers that lie across two lines take
/// twice the time to load, which is a fifth of a sum for many targets.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; LINE]);

/// What one write should have at least, in elements.
const WRITTEN: usize = 1 << 16;

impl Plan {
    /// Cut the job of summing all of `bank` for `targets` targets.
    ///
    /// # Errors
    /// Even the shortest runs do not fit into the budget.
    pub(crate) fn new(bank: &Bank<'_>, targets: usize, options: &Options) -> Result<Self> {
        let threads = options.threads();
        // With more targets the sums are the larger part, and are worth more rows at a time.
        let group = (2 * targets).clamp(4, 64).min(bank.adapters.len());
        let held = || bank.slots.iter().flat_map(|slot| &slot.holders);
        let size = |holder: &Holder| {
            let range = &bank.tensor(*holder).bytes;
            range.end - range.start
        };
        let bytes: u64 = held().map(size).sum();
        let io = options.io;
        let widest = held().map(|holder| bank.tensor(*holder).width()).max().unwrap_or(4);
        let total: usize = bank.slots.iter().map(|slot| slot.len()).sum();
        // Of each thread, in bytes: per element of a run the rows of a group; per element of what
        // is written together the sums.
        let (row, sum) = (group * widest, targets * 4);
        let extra = held().map(|holder| bank.tensor(*holder).extra()).max().unwrap_or(0);
        let fixed = group * (STRIP * 4 + 128) + targets * 2 * LINE * 4 + NARROWED * 2 + extra;
        let share = options.memory / threads;
        // Of mapped files also what is mapped before and behind a run; by less of it, in a small budget.
        let mapped = if io == Io::Mmap { (group * HUGE).min(share / 2) } else { 0 };
        let fits = share.saturating_sub(fixed + mapped) / (row + sum);
        if fits < SHORTEST.min(total) {
            let least = fixed + SHORTEST * (row + sum);
            let mapped = if io == Io::Mmap { least.min(group * HUGE) } else { 0 };
            let needed = threads * (least + mapped);
            return Err(Error::Memory {
                given: options.memory >> 20,
                needed: needed.div_ceil(1 << 20),
            });
        }
        // What an element of all rows of a group takes in their files.
        let elements: usize = bank.slots.iter().map(|slot| slot.len() * slot.holders.len()).sum();
        let stored = (bytes as usize * group).div_ceil(elements.max(1));
        let longest = match io {
            Io::Mmap => LONGEST,
            Io::Read => (NEAR / stored.max(1)).max(SHORTEST),
        };
        // Eight turns for each thread, if that leaves enough for a write, keep all busy to the end.
        let turn = total.div_ceil(8 * threads).max(WRITTEN).next_multiple_of(TILE);
        let length = fits.min(longest).min(turn);
        let length = length - length % TILE.min(length.max(1));
        let room = share.saturating_sub(fixed + mapped + length * row) / (sum * length.max(1));
        let near = SUMMED / (sum * length.max(1));
        let together = (turn / length.max(1)).min(near).clamp(1, room.max(1));
        Ok(Self {
            bytes,
            memory: threads * (fixed + mapped + length * row + together * length * sum),
            threads,
            group,
            io,
            runs: cut(bank.slots.iter().map(|slot| slot.len()), length),
            together,
        })
    }

    /// A job that goes through whole modules, a thread with one at a time, for which it holds
    /// `need` bytes at most. A module's A and B are read `times` times.
    ///
    /// # Errors
    /// Not even one module at a time fits into the budget.
    pub(crate) fn of_modules(
        adapters: &[&Adapter],
        joints: &[Joint],
        times: impl Fn(&Joint) -> [u64; 2],
        need: usize,
        options: &Options,
    ) -> Result<Self> {
        let tensors = adapters.iter().flat_map(|adapter| &adapter.layout.tensors);
        let need = need + tensors.map(Tensor::extra).max().unwrap_or(0);
        if need > options.memory {
            return Err(Error::Memory {
                given: options.memory >> 20,
                needed: need.div_ceil(1 << 20),
            });
        }
        let threads = options.cores().min(options.memory / need.max(1)).min(joints.len()).max(1);
        let size = |share: &Share, [a, b]: [u64; 2]| {
            let layout = &adapters[share.adapter].layout;
            let module = &layout.modules[share.module];
            let bytes = |tensor: usize| &layout.tensors[tensor].bytes;
            let size = |tensor: usize| bytes(tensor).end - bytes(tensor).start;
            a * size(module.a) + b * size(module.b)
        };
        let of = |joint: &Joint| {
            let times = times(joint);
            joint.holders.iter().map(|share| size(share, times)).sum::<u64>()
        };
        Ok(Self {
            bytes: joints.iter().map(of).sum(),
            memory: threads * need,
            threads,
            group: 1,
            io: options.io,
            runs: vec![],
            together: 1,
        })
    }

    /// The number of blocks: what one thread sums and writes in one go.
    pub(crate) fn blocks(&self) -> usize {
        self.runs.len().div_ceil(self.together)
    }

    /// The runs of a block.
    pub(crate) fn block(&self, index: usize) -> &[Run] {
        let start = index * self.together;
        &self.runs[start..self.runs.len().min(start + self.together)]
    }
}

/// Cut slots of these lengths into runs of `length` elements, or a few less where a packed block
/// would be divided; the last one may be shorter.
fn cut(slots: impl Iterator<Item = usize>, length: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut run = Run::default();
    for (slot, len) in slots.enumerate() {
        let mut start = 0;
        while start < len {
            let mut taken = (len - start).min(length - run.len);
            if start + taken < len {
                taken -= taken % BLOCK;
            }
            if taken == 0 {
                runs.push(std::mem::take(&mut run));
                continue;
            }
            run.pieces.push(Piece { slot, start, len: taken });
            run.len += taken;
            start += taken;
            if run.len == length {
                runs.push(std::mem::take(&mut run));
            }
        }
    }
    if run.len > 0 {
        runs.push(run);
    }
    runs
}

/// The pieces of several runs, those that continue each other as one.
pub(crate) fn joined(runs: &[Run]) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in runs.iter().flat_map(|run| &run.pieces) {
        match joined.last_mut() {
            Some(last) if last.slot == piece.slot => last.len += piece.len,
            _ => joined.push(*piece),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, folder};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_element_is_in_one_run_and_in_order(
            slots in prop::collection::vec(0usize..500, 0..12),
            length in BLOCK..300,
        ) {
            let runs = cut(slots.iter().copied(), length);
            let elements = |pieces: &[Piece]| -> Vec<(usize, usize)> { pieces
                .iter()
                .flat_map(|piece| (piece.start..piece.start + piece.len).map(|i| (piece.slot, i)))
                .collect() };
            let expected: Vec<(usize, usize)> = slots
                .iter()
                .enumerate()
                .flat_map(|(slot, &len)| (0..len).map(move |i| (slot, i)))
                .collect();
            let pieces: Vec<Piece> = runs.iter().flat_map(|run| run.pieces.clone()).collect();
            prop_assert_eq!(elements(&pieces), expected.clone());
            prop_assert_eq!(elements(&joined(&runs)), expected);
            for (i, run) in runs.iter().enumerate() {
                let sum: usize = run.pieces.iter().map(|piece| piece.len).sum();
                prop_assert_eq!(run.len, sum);
                prop_assert!(run.len <= length);
                prop_assert!(run.len > length - BLOCK || i + 1 == runs.len());
                prop_assert!(run.pieces.iter().all(|piece| piece.start % BLOCK == 0));
            }
        }
    }

    #[test]
    fn the_plan_keeps_to_the_budget_or_says_what_it_needs() {
        let folder = folder();
        let spec = Spec { inner: 4000, outer: 3000, ..Spec::default() };
        let adapter = Adapter::open(&spec.write(&folder, "a")).unwrap();
        let bank = Bank::new(vec![&adapter; 20]).unwrap();
        for targets in [1, 3, 40] {
            for (memory, io) in
                [1, 2, 8, 64].into_iter().flat_map(|m| [(m, Io::Mmap), (m, Io::Read)])
            {
                let memory_bytes = memory << 20;
                let options =
                    Options { threads: 1, memory: memory_bytes, io, ..Options::default() };
                match Plan::new(&bank, targets, &options) {
                    Ok(plan) => {
                        assert!(plan.memory <= options.memory, "{targets} {memory}: {plan:?}");
                        assert_eq!(plan.bytes, 20 * 28_000 * 4);
                    }
                    Err(error) => assert!(memory == 1, "{error}"),
                }
            }
        }
        let options = Options { memory: 1 << 10, ..Options::default() };
        let error = Plan::new(&bank, 1, &options).unwrap_err();
        assert!(error.to_string().contains("at least 1 MiB"), "{error}");
        for io in [Io::Mmap, Io::Read] {
            let of = |memory| Options { threads: 8, memory, io, ..Options::default() };
            let Err(Error::Memory { needed, .. }) = Plan::new(&bank, 64, &of(1 << 20)) else {
                panic!("1 MiB is not enough for 64 targets");
            };
            assert!(Plan::new(&bank, 64, &of(needed << 20)).is_ok(), "{io:?}: {needed} MiB");
        }
    }
}
