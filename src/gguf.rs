//! The header of a GGUF file, checked in full before a byte of data is used.
//!
//! Version 2 or 3: the magic, the numbers of tensors and of keys, the keys with their values, the
//! tensors with their places; then, aligned, the data. Every length in it is a stranger's claim,
//! and nothing is allocated for one that the file has no room for.

pub mod names;
mod write;

use std::{
    collections::{BTreeMap, HashSet},
    io::{self, BufRead},
};

use crate::{
    Dtype,
    dtype::BLOCK,
    error::Quoted,
    header::LONGEST,
    tensor::{Order, Tensor},
};
pub(crate) use write::head;

/// What a GGUF file begins with.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";

/// The alignment of the data where no key says otherwise.
const ALIGNMENT: u64 = 32;

/// The longest text that is kept; chat templates are longer, and nobody's business here.
const LONGEST_TEXT: u64 = 4096;

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text, of at most 4 KiB: longer ones are left out.
    Text(String),
    /// An integer of any width.
    Integer(i128),
    /// A floating-point number; of float32 in files that are written here.
    Number(f64),
    /// A truth value.
    Flag(bool),
    /// A list of so many values, which are not kept.
    List(u64),
}

/// The keys of a file and their values.
pub type Metadata = BTreeMap<String, Value>;

/// The text under a key.
pub(crate) fn text<'a>(metadata: &'a Metadata, key: &str) -> Option<&'a str> {
    match metadata.get(key) {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    }
}

/// The positive integer under a key.
pub(crate) fn count(metadata: &Metadata, key: &str) -> Option<usize> {
    match metadata.get(key) {
        Some(Value::Integer(count)) => usize::try_from(*count).ok().filter(|&count| count > 0),
        _ => None,
    }
}

/// What ends the reading of a header: the system, or what is wrong with it.
enum Fault {
    Io(io::Error),
    Header(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What is asked of a header, or what is wrong with it.
type Checked<T> = io::Result<Result<T, String>>;

fn checked<T>(result: Result<T, Fault>) -> Checked<T> {
    match result {
        Ok(found) => Ok(Ok(found)),
        Err(Fault::Header(reason)) => Ok(Err(reason)),
        Err(Fault::Io(error)) => Err(error),
    }
}

/// The keys of a file of `size` bytes, whatever its tensors are.
///
/// # Errors
/// The file cannot be read; or, within, what is wrong with it, in words that follow its name.
pub(crate) fn metadata(file: &mut impl BufRead, size: u64) -> Checked<Metadata> {
    checked(Header { file, at: 0, size }.keys().map(|(_, metadata)| metadata))
}

/// The keys and the tensors of a file of `size` bytes, in the order of their data.
///
/// # Errors
/// As [`metadata`].
pub(crate) fn read(file: &mut impl BufRead, size: u64) -> Checked<(Metadata, Vec<Tensor>)> {
    checked(Header { file, at: 0, size }.all())
}

/// A header that is being read.
struct Header<'a, R> {
    file: &'a mut R,
    at: u64,
    size: u64,
}

impl<R: BufRead> Header<'_, R> {
    fn all(mut self) -> Result<(Metadata, Vec<Tensor>), Fault> {
        let (count, metadata) = self.keys()?;
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..count {
            let tensor = self.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return fault(format!("the tensor {} stands there twice", Quoted(&tensor.name)));
            }
            tensors.push(tensor);
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Integer(given))
                if u32::try_from(*given).is_ok_and(u32::is_power_of_two) =>
            {
                *given as u64
            }
            Some(_) => return fault("`general.alignment` is not a power of two".to_owned()),
        };
        let data = self.at.next_multiple_of(alignment);
        place(&mut tensors, data, alignment, self.size).map_err(Fault::Header)?;
        Ok((metadata, tensors))
    }

    /// The number of tensors, and the keys.
    fn keys(&mut self) -> Result<(u64, Metadata), Fault> {
        let magic = self.take::<4>("the magic")?;
        if &magic != MAGIC {
            return fault("the file is not GGUF".to_owned());
        }
        let version = u32::from_le_bytes(self.take("the version")?);
        if !matches!(version, 2 | 3) {
            let swapped = matches!(version.swap_bytes(), 1..=3);
            let why = if swapped { " of a big-endian machine" } else { "" };
            return fault(format!("GGUF version {version}{why}, expected 2 or 3"));
        }
        let tensors = self.claim("tensors", 8 + 1 + 4 + 8 + 4 + 8)?;
        let keys = self.claim("keys", 8 + 1 + 4 + 1)?;
        let mut metadata = Metadata::new();
        let mut names = HashSet::new();
        for _ in 0..keys {
            let key = self.text("a key", LONGEST_TEXT)?;
            if !names.insert(key.clone()) {
                return fault(format!("the key {} stands there twice", Quoted(&key)));
            }
            if let Some(value) = self.value(&key)? {
                metadata.insert(key, value);
            }
        }
        Ok((tensors, metadata))
    }

    /// A number of things that take at least `least` bytes each.
    fn claim(&mut self, what: &str, least: u64) -> Result<u64, Fault> {
        let count = u64::from_le_bytes(self.take(what)?);
        let room = (self.size - self.at) / least;
        if count > room {
            return fault(format!(
                "the header claims {count} {what}, the file has room for {room}: cut short?"
            ));
        }
        Ok(count)
    }

    fn value(&mut self, key: &str) -> Result<Option<Value>, Fault> {
        let what = &Quoted(key).to_string();
        let kind = u32::from_le_bytes(self.take(what)?);
        Ok(Some(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.take(what)?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.take(what)?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.take(what)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.take(what)?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.take(what)?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.take(what)?).into()),
            6 => Value::Number(f32::from_le_bytes(self.take(what)?).into()),
            7 => match self.take(what)? {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                [other] => return fault(format!("{what} is {other}, expected 0 or 1")),
            },
            8 => {
                let length = u64::from_le_bytes(self.take(what)?);
                if length > LONGEST_TEXT {
                    self.skip(what, length)?;
                    return Ok(None);
                }
                Value::Text(self.letters(what, length)?)
            }
            9 => Value::List(self.skip_list(what)?),
            10 => Value::Integer(u64::from_le_bytes(self.take(what)?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.take(what)?).into()),
            12 => Value::Number(f64::from_le_bytes(self.take(what)?)),
            _ => return fault(format!("{what} has a value of the unknown type {kind}")),
        }))
    }

    /// Pass a list by, and answer its length.
    fn skip_list(&mut self, what: &str) -> Result<u64, Fault> {
        let kind = u32::from_le_bytes(self.take(what)?);
        let count = u64::from_le_bytes(self.take(what)?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..count {
                    let length = u64::from_le_bytes(self.take(what)?);
                    self.skip(what, length)?;
                }
                return Ok(count);
            }
            9 => return fault(format!("{what} is a list of lists, which is not read")),
            _ => return fault(format!("{what} is a list of the unknown type {kind}")),
        };
        self.skip(what, count.saturating_mul(size))?;
        Ok(count)
    }

    fn tensor(&mut self) -> Result<Tensor, Fault> {
        let name = self.text("a tensor's name", LONGEST_TEXT)?;
        let what = &Quoted(&name).to_string();
        let dimensions = u32::from_le_bytes(self.take(what)?);
        if !(1..=4).contains(&dimensions) {
            return fault(format!("{what} has {dimensions} dimensions, expected 1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let length = u64::from_le_bytes(self.take(what)?);
            shape.push(usize::try_from(length).map_err(|_| too_large(what))?);
        }
        shape.reverse();
        let dtype = dtype(u32::from_le_bytes(self.take(what)?))
            .map_err(|found| Fault::Header(format!("{what} has the type {found}")))?;
        let start = u64::from_le_bytes(self.take(what)?);
        let packed = dtype == Dtype::Q8_0;
        let row = shape.last().copied().unwrap_or(1);
        if packed && row % BLOCK != 0 {
            return fault(format!(
                "{what} has rows of {row} numbers in blocks of {BLOCK}: expected a multiple"
            ));
        }
        // At most 8 bytes a number: what fits into an i64 then, fits into everything.
        let size = shape
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n))
            .filter(|count| *count <= (i64::MAX / 8) as usize)
            .map(|count| dtype.size(count) as u64)
            .ok_or_else(|| too_large(what))?;
        let end = start.checked_add(size).ok_or_else(|| too_large(what))?;
        if shape.len() == 1 {
            // Dimensions of 1 at the end are not always written.
            shape.insert(0, 1);
        }
        Ok(Tensor { name, dtype, shape, bytes: start..end, order: Order::Rows })
    }

    /// The next bytes, which `what` takes.
    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        self.advance(what, N as u64)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn text(&mut self, what: &str, longest: u64) -> Result<String, Fault> {
        let length = u64::from_le_bytes(self.take(what)?);
        if length > longest {
            return fault(format!("{what} claims {length} bytes, at most {longest} are read"));
        }
        self.letters(what, length)
    }

    fn letters(&mut self, what: &str, length: u64) -> Result<String, Fault> {
        self.advance(what, length)?;
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes)?;
        String::from_utf8(bytes).or_else(|_| fault(format!("{what} is not UTF-8")))
    }

    fn skip(&mut self, what: &str, length: u64) -> Result<(), Fault> {
        self.advance(what, length)?;
        let mut left = length;
        while left > 0 {
            let there = self.file.fill_buf()?.len();
            if there == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let taken = there.min(usize::try_from(left).unwrap_or(usize::MAX));
            self.file.consume(taken);
            left -= taken as u64;
        }
        Ok(())
    }

    /// See that there is room for what comes next, and count it.
    fn advance(&mut self, what: &str, length: u64) -> Result<(), Fault> {
        let left = self.size - self.at;
        if length > left {
            return fault(format!(
                "the header ends early: {what} takes {length} bytes, {left} are left"
            ));
        }
        self.at += length;
        if self.at > LONGEST {
            return fault(format!("the header is longer than {} MiB", LONGEST >> 20));
        }
        Ok(())
    }
}

fn fault<T>(reason: String) -> Result<T, Fault> {
    Err(Fault::Header(reason))
}

fn too_large(what: &str) -> Fault {
    Fault::Header(format!("{what} is too large"))
}

/// The type of a tensor by its number, or what it is called.
fn dtype(kind: u32) -> Result<Dtype, String> {
    const NAMES: [&str; 16] = [
        "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K",
        "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K",
    ];
    match kind {
        0 => Ok(Dtype::F32),
        1 => Ok(Dtype::F16),
        8 => Ok(Dtype::Q8_0),
        28 => Ok(Dtype::F64),
        30 => Ok(Dtype::BF16),
        _ => {
            let name = NAMES.get(kind as usize).map_or(String::new(), |name| format!(" ({name})"));
            Err(format!("{kind}{name}, expected F32, F16, BF16 or Q8_0"))
        }
    }
}

/// Turn offsets into places in the file; the tensors must follow each other as they are aligned.
fn place(tensors: &mut [Tensor], data: u64, alignment: u64, size: u64) -> Result<(), String> {
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let room = size.saturating_sub(data);
    let mut next = 0;
    for tensor in tensors {
        let (name, found) = (Quoted(&tensor.name), tensor.bytes.clone());
        if found.end > room {
            return Err(format!(
                "{name} ends at byte {} of the data, the file has {room}: cut short?",
                found.end
            ));
        }
        if found.start != next {
            let fault = if found.start < next { "an overlap" } else { "a gap" };
            return Err(format!(
                "{name} begins at byte {} of the data, expected {next}, a multiple of {alignment}: \
                 {fault}",
                found.start
            ));
        }
        next = found.end.next_multiple_of(alignment);
        tensor.bytes = data + found.start..data + found.end;
    }
    if room > next {
        return Err(format!("the file has {} bytes after the last tensor", room - next));
    }
    Ok(())
}
