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
const CHUNK: usize = 128 << 10;

impl Tensor {
    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no number at all.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The type of its numbers in memory: its own where whole rows of it can be used as they lie.
    pub(crate) fn held_as(&self) -> Dtype {
        if self.order == Order::Columns { Dtype::F32 } else { self.dtype }
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
            Order::Columns => {
                // What lies within one row is spread over some of the file's rows, not all.
                let (first, row) = (range.start % self.row(), self.row());
                let columns =
                    if first + range.len() <= row { first..first + range.len() } else { 0..row };
                columns.start * self.shape[0]..columns.end * self.shape[0]
            }
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

    /// The bytes of the numbers in `range`, whole blocks of a packed type, into `held`: in the order
    /// of rows what a file has in that of `Heads`. `bytes` is made as large as it needs to be.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn read_heads(
        &self,
        source: &Source,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        held: &mut [u8],
    ) -> io::Result<()> {
        let (row, size) = (self.row(), |count: usize| self.dtype.size(count));
        let (span, row_size) = (self.span(&range), size(row));
        let step = (CHUNK / row_size).max(1) * row_size;
        for start in span.clone().step_by(step) {
            let place = start..span.end.min(start + step as u64);
            let read = fetch(source, place, bytes)?;
            let first = (start - self.bytes.start) as usize / row_size;
            for (index, values) in read.chunks_exact(row_size).enumerate() {
                let own = self.row_at(first + index) * row;
                let (from, to) = (own.max(range.start), (own + row).min(range.end));
                if from < to {
                    held[size(from - range.start)..size(to - range.start)]
                        .copy_from_slice(&values[size(from - own)..size(to - own)]);
                }
            }
        }
        Ok(())
    }

    fn read_rows(
        &self,
        source: &Source,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        numbers: &mut [f32],
    ) -> io::Result<()> {
        if self.dtype == Dtype::F32 {
            // What a file has lies in memory likewise, but on big-endian machines.
            source.read(self.span(&range), bytemuck::cast_slice_mut(numbers))?;
            numbers.iter_mut().for_each(|x| *x = f32::from_bits(u32::from_le(x.to_bits())));
            return Ok(());
        }
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
        if let Order::Heads(_) = self.order {
            let own = self.row_at(index) * row;
            let from = own.max(range.start);
            let to = (own + row).min(range.end);
            if from < to {
                numbers[from - range.start..to - range.start]
                    .copy_from_slice(&values[from - own..to - own]);
            }
            return;
        }
        // The file's row is the column `index`: some of its numbers are in the range, one a row.
        let rows_before = |end: usize| end.saturating_sub(index).div_ceil(row);
        for at in rows_before(range.start)..rows_before(range.end) {
            numbers[at * row + index - range.start] = values[at];
        }
    }

    /// Which row the file has in this place.
    fn row_at(&self, index: usize) -> usize {
        let Order::Heads(rows) = self.order else { return index };
        let (head, within) = (index / rows, index % rows);
        head * rows + within % 2 * (rows / 2) + within / 2
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::{Io, testing::narrowed};

    /// Where in the file the number in this place of the matrix is.
    fn place(order: Order, [rows, columns]: [usize; 2], row: usize, column: usize) -> usize {
        match order {
            Order::Rows => row * columns + column,
            Order::Columns => column * rows + row,
            Order::Heads(of) => {
                let (half, within) = (row % of / (of / 2), row % (of / 2));
                (row / of * of + 2 * within + half) * columns + column
            }
        }
    }

    proptest! {
        #[test]
        fn any_range_is_read_in_the_order_that_peft_has(
            order in prop_oneof![
                Just(Order::Rows), Just(Order::Columns), (1usize..5).prop_map(|n| Order::Heads(2 * n)),
            ],
            dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::BF16), Just(Dtype::Q8_0)],
            [heads, columns] in [1usize..4, 1usize..80],
            many in prop::bool::ANY,
            cut: [prop::sample::Index; 2],
            io in prop_oneof![Just(Io::Read), Just(Io::Mmap)],
        ) {
            // Rows of a packed file are whole blocks; and some are more than is read at a time.
            let unit = if dtype == Dtype::Q8_0 { BLOCK } else { 1 };
            let long = if many { 300 } else { 1 };
            let shape = match order {
                Order::Rows => [heads, columns * unit],
                Order::Heads(of) => [heads * of * long, columns * unit],
                Order::Columns => [heads * unit, columns * long],
            };
            let len = shape[0] * shape[1];
            let numbers: Vec<f32> = (0..len).map(|i| (i * 7919 % 1009) as f32 - 500.0).collect();
            let bytes = narrowed(dtype, &numbers);
            let mut held = vec![0.0; len];
            (widest().widen)(dtype, &bytes, &mut held);
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&[&[0; 3], &bytes[..]].concat()).unwrap();
            let tensor = Tensor {
                name: String::new(),
                dtype,
                shape: shape.to_vec(),
                bytes: 3..3 + bytes.len() as u64,
                order,
            };
            let source = Source::new(file.reopen().unwrap(), io).unwrap();
            let [start, end] = cut.map(|cut| cut.index(len + 1));
            let range = start.min(end)..start.max(end);
            let mut got = vec![f32::NAN; range.len()];
            tensor.read(&source, range.clone(), &mut vec![], &mut got).unwrap();
            let wanted: Vec<f32> =
                range.map(|i| held[place(order, shape, i / shape[1], i % shape[1])]).collect();
            prop_assert_eq!(got, wanted);
            if let Order::Heads(_) = order {
                let blocks = (start.min(end) / unit * unit)..start.max(end) / unit * unit;
                let mut held_bytes = vec![0; dtype.size(blocks.len())];
                tensor.read_heads(&source, blocks.clone(), &mut vec![], &mut held_bytes).unwrap();
                let mut got = vec![f32::NAN; blocks.len()];
                (widest().widen)(dtype, &held_bytes, &mut got);
                let wanted: Vec<f32> =
                    blocks.map(|i| held[place(order, shape, i / shape[1], i % shape[1])]).collect();
                prop_assert_eq!(got, wanted);
            }
        }
    }
}
