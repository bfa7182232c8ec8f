//! What a thread does with a block: it sums strips of the members' rows for every target, and writes.

use std::ops::Range;

use bytemuck::Zeroable;

use super::{Row, Soup};
use crate::{
    Dtype,
    bank::Holder,
    blocks::{LINE, Line, Piece, REUSED, Run, STRIP, joined},
    error::{Error, Result, not_finite},
    kernels::{Kernel, widest},
    source::Source,
    watch::Watch,
    writer::Writer,
};

/// How far apart widened strips begin, in elements: a cache line more than they are long, so that rows
/// do not share the same places of a cache.
const APART: usize = STRIP + LINE;

/// One thread's share: its buffers, kept from block to block.
pub(super) struct Worker<'a> {
    soup: &'a Soup<'a>,
    sources: &'a [Source],
    watch: &'a Watch,
    kernel: Kernel,
    /// The block's sums, one row a target.
    sums: Vec<Line>,
    /// A strip of each row of a group that must become float32 first.
    widened: Vec<Line>,
    /// What positional reads fill.
    read: Vec<Line>,
    /// Bytes of a file that has another order.
    bytes: Vec<u8>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(soup: &'a Soup<'a>, sources: &'a [Source], watch: &'a Watch) -> Self {
        let widened = vec![Line::zeroed(); soup.plan.group * APART / LINE];
        let (sums, read, bytes) = (vec![], vec![], vec![]);
        Self { soup, sources, watch, kernel: widest(), sums, widened, read, bytes }
    }

    /// Sum a block for every target, and write it.
    pub(super) fn write(&mut self, block: &[Run], writers: &[Writer], dtype: Dtype) -> Result<()> {
        let everyone = 0..self.soup.bank.adapters.len();
        let targets = writers.len();
        let allow_nan = self.soup.options.allow_nan;
        let finite = self.sum(block, 0..targets, std::slice::from_ref(&everyone))?;
        if !finite && allow_nan && targets > 1 {
            // 0 · NaN is NaN: a target must not take NaN from an adapter that is not its own.
            for (target, writer) in writers.iter().enumerate() {
                let own = |i: &usize| !self.soup.terms.is_without(target, *i);
                let own: Vec<_> = everyone.clone().filter(own).map(|i| i..i + 1).collect();
                let finite = self.sum(block, target..target + 1, &own)?;
                write_block(block, numbers(&self.sums), finite, writer)?;
            }
            return Ok(());
        }
        for (sums, writer) in numbers(&self.sums).chunks(stride(block)).zip(writers) {
            match write_block(block, sums, finite, writer)? {
                Some(piece) if !allow_nan => return Err(self.blame(&piece, dtype)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sum a block over `adapters` for some targets, into `self.sums`. Answers whether all sums are
    /// finite.
    fn sum(
        &mut self,
        block: &[Run],
        targets: Range<usize>,
        adapters: &[Range<usize>],
    ) -> Result<bool> {
        let mut finite = true;
        let stride = stride(block);
        self.sums.resize(targets.len() * stride / LINE, Line::zeroed());
        let mut start = 0;
        for run in block {
            let mut begin = vec![true; run.pieces.len()];
            for group in adapters.iter().flat_map(|range| groups(range, self.soup.plan.group)) {
                self.each_range(run, &group, Source::announce);
                let mut at = start;
                for (piece, begin) in run.pieces.iter().zip(&mut begin) {
                    if let Some(all) = self.add(piece, at, stride, &targets, &group, *begin)? {
                        *begin = false;
                        finite &= all;
                    }
                    at += piece.len;
                }
                self.each_range(run, &group, Source::release);
            }
            for (piece, begin) in run.pieces.iter().zip(begin) {
                if begin {
                    let rows = numbers_mut(&mut self.sums).chunks_mut(stride);
                    rows.for_each(|row| row[start..start + piece.len].fill(0.0));
                }
                start += piece.len;
            }
        }
        Ok(finite)
    }

    /// Add a piece of a group of adapters to the sums, of which a row is `stride` long and the
    /// piece begins at `at`; they may `begin` with it. Answers whether they are finite; `None`
    /// where no adapter of the group has the piece.
    fn add(
        &mut self,
        piece: &Piece,
        at: usize,
        stride: usize,
        targets: &Range<usize>,
        group: &Range<usize>,
        begin: bool,
    ) -> Result<Option<bool>> {
        let soup = self.soup;
        let slot = &soup.bank.slots[piece.slot];
        let holders = soup.holders(slot, group);
        if holders.is_empty() {
            return Ok(None);
        }
        let weights: Vec<f32> = holders
            .iter()
            .flat_map(|holder| targets.clone().map(|target| soup.weight(target, slot, *holder)))
            .collect();
        // A cache line apart, as widened strips are.
        let room = |holder: &Holder| soup.room(piece, *holder) + 1;
        let needed = holders.iter().map(room).sum();
        if self.read.len() < needed {
            self.read.resize(needed, Line::zeroed());
        }
        let mut free = &mut self.read[..];
        let mut rows = Vec::with_capacity(holders.len());
        for holder in holders {
            self.watch.go_on()?;
            let (buffer, rest) = free.split_at_mut(room(holder));
            rows.push(soup.row(self.sources, *holder, piece, buffer, &mut self.bytes)?);
            free = rest;
        }
        let dtype = summed_as(rows.iter().map(|(dtype, _)| *dtype), targets.len());
        let mut finite = true;
        for start in (0..piece.len).step_by(STRIP) {
            self.watch.go_on()?;
            let strip = start..piece.len.min(start + STRIP);
            let strips: Vec<&[u8]> = rows
                .iter()
                .zip(numbers_mut(&mut self.widened).chunks_mut(APART))
                .map(|(row, free)| ready(row, dtype, &strip, free, self.kernel))
                .collect();
            let sums = &mut numbers_mut(&mut self.sums)[at + start..];
            finite &= (self.kernel.add_products)(sums, stride, dtype, &strips, &weights, begin);
        }
        let size = |holder: &Holder| soup.bank.tensor(*holder).dtype.size(piece.len);
        self.watch.advance(holders.iter().map(size).sum());
        Ok(Some(finite))
    }

    /// What a group of adapters has of a run, as few ranges of each as it is, to `tell`.
    fn each_range(&self, run: &Run, group: &Range<usize>, tell: fn(&Source, &Range<u64>)) {
        for adapter in group.clone() {
            let mut range = 0..0;
            for piece in &run.pieces {
                let slot = &self.soup.bank.slots[piece.slot];
                let own = adapter..adapter + 1;
                let Some(holder) = self.soup.holders(slot, &own).first() else { continue };
                let next = self.soup.span(piece, *holder);
                if next.start == range.end {
                    range.end = next.end;
                } else {
                    tell(&self.sources[adapter], &range);
                    range = next;
                }
            }
            tell(&self.sources[adapter], &range);
        }
    }

    /// Whose fault it is that the sum of a piece is not finite.
    fn blame(&mut self, piece: &Piece, dtype: Dtype) -> Error {
        let soup = self.soup;
        let slot = &soup.bank.slots[piece.slot];
        for holder in &slot.holders {
            let adapter = soup.bank.adapters[holder.adapter];
            let tensor = soup.bank.tensor(*holder);
            self.read.resize(soup.room(piece, *holder), Line::zeroed());
            let row = match soup.row(self.sources, *holder, piece, &mut self.read, &mut self.bytes)
            {
                Ok(row) => row,
                Err(error) => return error,
            };
            for start in (0..piece.len).step_by(STRIP) {
                let strip = start..piece.len.min(start + STRIP);
                let bytes = &row.1[row.0.size(strip.start)..row.0.size(strip.end)];
                let numbers = &mut numbers_mut(&mut self.widened)[..strip.len()];
                (self.kernel.widen)(row.0, bytes, numbers);
                if let Some(number) = numbers.iter().find(|number| !number.is_finite()) {
                    return Error::NotFinite {
                        path: adapter.path.clone(),
                        tensor: tensor.name.clone(),
                        value: not_finite(*number),
                    };
                }
            }
        }
        Error::Overflow { tensor: slot.name.clone(), dtype }
    }
}

fn numbers(lines: &[Line]) -> &[f32] {
    bytemuck::cast_slice(lines)
}

fn numbers_mut(lines: &mut [Line]) -> &mut [f32] {
    bytemuck::cast_slice_mut(lines)
}

/// How far apart a block's rows of sums begin: a cache line more than a row is long, so that the
/// rows of many targets do not share the same places of a cache.
fn stride(block: &[Run]) -> usize {
    block.iter().map(|run| run.len).sum::<usize>().next_multiple_of(LINE) + LINE
}

/// `range` in parts of `length`; the last one may be shorter.
fn groups(range: &Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(length).map(move |start| start..end.min(start + length))
}

/// Write a target's sums of a block, which may be known to be `finite`; answers a piece that is not,
/// in the file's type.
fn write_block(
    block: &[Run],
    sums: &[f32],
    finite: bool,
    writer: &Writer,
) -> Result<Option<Piece>> {
    let write = if finite { Writer::write_finite } else { Writer::write };
    let mut at = 0;
    let mut faulty = None;
    for piece in joined(block) {
        let finite = write(writer, piece.slot, piece.start, &sums[at..at + piece.len])?;
        at += piece.len;
        faulty = faulty.or((!finite).then_some(piece));
    }
    Ok(faulty)
}

/// The type in which rows of these types go into the sums: their own where they have one and it is
/// converted once or twice, else float32.
fn summed_as(mut dtypes: impl Iterator<Item = Dtype>, targets: usize) -> Dtype {
    let first = dtypes.next().unwrap_or(Dtype::F32);
    let narrow = matches!(first, Dtype::F16 | Dtype::BF16 | Dtype::Q8_0);
    if narrow && targets < REUSED && dtypes.all(|dtype| dtype == first) {
        first
    } else {
        Dtype::F32
    }
}

/// A strip of a row as `wanted`: in place where it lies ready, else widened into `free`.
fn ready<'b>(
    (dtype, bytes): &Row<'b>,
    wanted: Dtype,
    strip: &Range<usize>,
    free: &'b mut [f32],
    kernel: Kernel,
) -> &'b [u8] {
    let bytes = &bytes[dtype.size(strip.start)..dtype.size(strip.end)];
    if *dtype == wanted {
        return bytes;
    }
    let free = &mut free[..strip.len()];
    (kernel.widen)(*dtype, bytes, free);
    bytemuck::cast_slice(free)
}
