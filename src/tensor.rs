//! One tensor of a file: what it is, where its numbers lie, and how they are read as PEFT has them.

use std::{io, ops::Range};

use crate::{Dtype, dtype::BLOCK, kernels::widest, source::Source};

/// One tensor as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape as PEFT has it; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub bytes: Range<u64>,
    /// In which order its numbers lie there.
    pub order: Order,
}

/// How a file orders the numbers of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// Row by row, as PEFT does.
    Rows,
    /// Row by row; but within each head, of so many rows, those of its two halves alternate:
    /// as llama.cpp has it, whose rotary embedding turns neighbours.
    Heads(usize),
    /// Column by column.
    Columns,
}

/// What is read of a file at a time, about, where its order is not that of the numbers; in bytes.
const CHUNK: usize = 64 << 10;

impl Tensor {
    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no number at all.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The type of its numbers in memory: its own where they can be used as they lie.
    pub(crate) fn held_as(&self) -> Dtype {
        if self.order == Order::Rows { self.dtype } else { Dtype::F32 }
    }

    /// The most that a number of it takes in memory while it is read, in bytes.
    pub(crate) fn width(&self) -> usize {
        self.held_as().size(BLOCK).div_ceil(BLOCK)
    }

    /// What it takes beside that to put them in order, in bytes.
    pub(crate) fn extra(&self) -> usize {
        match self.order {
            Order::Rows => 0,
            _ => CHUNK.max(self.dtype.size(self.file_row())) * 5,
        }
    }

    /// Where in the file the numbers in `range` lie, and perhaps others.
    pub(crate) fn span(&self, range: &Range<usize>) -> Range<u64> {
        let within = match self.order {
            Order::Rows => range.start - range.start % self.block()..range.end,
            Order::Heads(rows) => {
                let head = rows * self.row();
                let end = range.end.next_multiple_of(head).min(self.len());
                range.start - range.start % head..end
            }
            Order::Columns => 0..self.len(),
        };
        let at = |element: usize| self.bytes.start + self.dtype.size(element) as u64;
        at(within.start)..at(within.end)
    }

    /// The numbers in `range`, counted row by row, into `numbers`; `bytes` is made as large as it
    /// needs to be.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn read(
        &self,
        source: &Source,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
    ) -> io::Result<()> {
        let numbers = &mut numbers[..range.len()];
        match self.order {
            Order::Rows => self.read_rows(source, range, bytes, numbers),
            _ => self.read_ordered(source, range, bytes, numbers),
        }
    }

    fn read_rows(
        &self,
        source: &Source,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
    ) -> io::Result<()> {
        let widen = widest().widen;
        let read = fetch(source, self.span(&range), bytes)?;
        let before = range.start % self.block();
        if before == 0 {
            widen(self.dtype, read, numbers);
            return Ok(());
        }
        // Of a block that is begun in its middle, the numbers before it fall away.
        let (first, rest) = read.split_at(self.dtype.size(BLOCK));
        let mut block = [0.0; BLOCK];
        widen(self.dtype, first, &mut block);
        let taken = numbers.len().min(BLOCK - before);
        numbers[..taken].copy_from_slice(&block[before..before + taken]);
        widen(self.dtype, rest, &mut numbers[taken..]);
        Ok(())
    }

    fn read_ordered(
        &self,
        source: &Source,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
    ) -> io::Result<()> {
        // Whole rows of the file: of a packed type, rows are whole blocks.
        let row = self.file_row();
        let size = self.dtype.size(row) as u64;
        let span = self.span(&range);
        let mut widened = Vec::new();
        let step = (CHUNK as u64 / size).max(1) * size;
        for start in span.clone().step_by(step as usize) {
            let place = start..span.end.min(start + step);
            let read = fetch(source, place, bytes)?;
            widened.resize(self.dtype.count(read.len()), 0.0);
            (widest().widen)(self.dtype, read, &mut widened);
            let first = ((start - self.bytes.start) / size) as usize;
            for (index, values) in widened.chunks_exact(row).enumerate() {
                self.place(first + index, values, &range, numbers);
            }
        }
        Ok(())
    }

    /// Put one of the file's rows where its numbers belong among those of `range`.
    fn place(&self, index: usize, values: &[f32], range: &Range<usize>, numbers: &mut [f32]) {
        let row = self.row();
        if let Order::Heads(rows) = self.order {
            let (head, within) = (index / rows, index % rows);
            let own = (head * rows + within % 2 * (rows / 2) + within / 2) * row;
            let from = own.max(range.start);
            let to = (own + row).min(range.end);
            if from < to {
                numbers[from - range.start..to - range.start]
                    .copy_from_slice(&values[from - own..to - own]);
            }
            return;
        }
        for (column, value) in values.iter().enumerate() {
            let own = column * row + index;
            if range.contains(&own) {
                numbers[own - range.start] = *value;
            }
        }
    }

    /// The length of a row.
    fn row(&self) -> usize {
        self.shape.iter().skip(1).product::<usize>().max(1)
    }

    /// The length of what is a row in the file.
    fn file_row(&self) -> usize {
        if self.order == Order::Columns { self.shape[0] } else { self.row() }
    }

    fn block(&self) -> usize {
        if self.dtype == Dtype::Q8_0 { BLOCK } else { 1 }
    }
}

/// The bytes of `range`, in place or read into `buffer`, which is made large enough.
fn fetch<'a>(
    source: &'a Source,
    range: Range<u64>,
    buffer: &'a mut Vec<u8>,
) -> io::Result<&'a [u8]> {
    let length = (range.end - range.start) as usize;
    if matches!(source, Source::File(_)) && buffer.len() < length {
        buffer.resize(length, 0);
    }
    source.bytes(range, buffer)
}
