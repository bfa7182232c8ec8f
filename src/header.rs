//! The header of a safetensors file, checked in full before a byte of data is used.
//!
//! The `safetensors` crate keeps one of two equal names and does not say which tensor is at
//! fault; a header that comes from a stranger needs both, so it is read here.

use std::{
    collections::HashSet,
    fmt,
    io::{self, Read},
    ops::Range,
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{
    Dtype,
    error::Quoted,
    tensor::{Order, Tensor},
};

/// The longest header that is read. The format allows 100 MB; two hundred thousand tensors, more
/// than any adapter has, need a fifth of this.
pub(crate) const LONGEST: u64 = 64 << 20;

/// The tensors and notes of a header, or what is wrong with it.
type Checked = Result<(Vec<Tensor>, Vec<String>), String>;

/// Read the header of a file of `size` bytes: its tensors in the order of their data, and notes
/// on what is odd but harmless.
///
/// # Errors
/// The file cannot be read; or, within, what is wrong with it, in words that follow its name.
pub(crate) fn read(file: &mut impl Read, size: u64) -> io::Result<Checked> {
    let mut start = [0; 8];
    let got = read_up_to(file, &mut start)?;
    let length = u64::from_le_bytes(start);
    let possible = got == 8 && length <= LONGEST && length <= size.saturating_sub(8);
    let mut json = Vec::new();
    if possible {
        // At most LONGEST, just compared: the cast cannot lose anything.
        json.resize(length as usize, 0);
        file.read_exact(&mut json)?;
    }
    Ok(check(&start[..got], possible.then_some(&json[..]), size))
}

/// What the header says, from the file's first bytes and, if its length can be, its text.
fn check(start: &[u8], json: Option<&[u8]>, size: u64) -> Checked {
    let Some(json) = json else {
        if let Some(kind) = foreign(start) {
            return Err(format!("the file is {kind}, not safetensors"));
        }
        let Ok(length) = start.try_into().map(u64::from_le_bytes) else {
            return Err(format!("the file holds {size} bytes, too few for a safetensors header"));
        };
        let size = size.max(8);
        let room = (size - 8).min(LONGEST);
        return Err(format!(
            "the header claims {length} bytes, at most {room} are possible: not a safetensors \
             file, or one cut short"
        ));
    };
    let mut notes = Vec::new();
    if json.first().is_some_and(u8::is_ascii_whitespace) {
        notes.push("the header begins with white space, not with `{`".to_owned());
    }
    let Entries(mut tensors) =
        serde_json::from_slice(json).map_err(|error| format!("the header: {error}"))?;
    place(&mut tensors, 8 + json.len() as u64, size)?;
    Ok((tensors, notes))
}

/// What else is often found under the name, once it is known not to be a header's length.
fn foreign(start: &[u8]) -> Option<&'static str> {
    const PICKLE: &str = "a pickle (which is never opened)";
    let known: [(&[u8], &str); 8] = [
        (b"version", "a Git LFS pointer (run `git lfs pull`)"),
        (b"<", "an HTML or XML page"),
        (b"\x1f\x8b", "gzip-compressed"),
        (b"PK\x03\x04", "a torch archive (a pickle, which is never opened)"),
        (b"\x80\x02", PICKLE),
        (b"\x80\x03", PICKLE),
        (b"\x80\x04", PICKLE),
        (b"\x80\x05", PICKLE),
    ];
    known.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, kind)| *kind)
}

/// Fill as much of `buffer` as the file has.
pub(crate) fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..])? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

/// Turn offsets into places in the file; the tensors must fill the data without gap or overlap.
fn place(tensors: &mut [Tensor], data: u64, size: u64) -> Result<(), String> {
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let room = size - data;
    let mut end = 0;
    for tensor in tensors {
        let (name, found) = (Quoted(&tensor.name), tensor.bytes.clone());
        if found.end > room {
            return Err(format!(
                "the header: {name} ends at byte {} of the data, the file has {room}: cut short?",
                found.end
            ));
        }
        if found.start != end {
            let fault = if found.start < end { "an overlap" } else { "a gap" };
            return Err(format!(
                "the header: {name} begins at byte {} of the data, expected {end}: {fault}",
                found.start
            ));
        }
        end = found.end;
        tensor.bytes = data + found.start..data + found.end;
    }
    if end != room {
        return Err(format!("the file has {} bytes after the last tensor", room - end));
    }
    Ok(())
}

/// The header's object; `bytes` are still relative to the data.
struct Entries(Vec<Tensor>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries, M::Error> {
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let about = |error: M::Error| M::Error::custom(format!("{}: {error}", Quoted(&name)));
            if !names.insert(name.clone()) {
                return Err(M::Error::custom(format!("{} stands there twice", Quoted(&name))));
            }
            if name == "__metadata__" {
                map.next_value::<Option<Metadata>>().map_err(about)?;
                continue;
            }
            let entry = map.next_value::<Entry>().map_err(about)?;
            let bytes = entry
                .bytes()
                .map_err(|why| M::Error::custom(format!("{}: {why}", Quoted(&name))))?;
            let (dtype, shape) = (entry.dtype, entry.shape);
            tensors.push(Tensor { name, dtype, shape, bytes, order: Order::Rows });
        }
        Ok(Entries(tensors))
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Entry {
    /// The tensor's bytes within the data, which its shape and type must account for.
    fn bytes(&self) -> Result<Range<u64>, String> {
        let (start, end) = self.data_offsets;
        let needed = self
            .shape
            .iter()
            .try_fold(1u64, |product, &n| product.checked_mul(n as u64))
            .and_then(|elements| elements.checked_mul(self.dtype.bits()))
            .ok_or_else(|| format!("the shape {:?} is too large", self.shape))?;
        let given = end
            .checked_sub(start)
            .ok_or_else(|| format!("the data ends at {end}, before it begins at {start}"))?;
        if needed % 8 != 0 {
            return Err(format!(
                "shape {:?} of {} takes {needed} bits, which fill no whole bytes",
                self.shape, self.dtype
            ));
        }
        if needed / 8 != given {
            return Err(format!(
                "shape {:?} of {} takes {} bytes, the offsets give {given}",
                self.shape,
                self.dtype,
                needed / 8
            ));
        }
        Ok(start..end)
    }
}

/// `__metadata__`, of which only the form is checked.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Metadata, M::Error> {
                while map.next_entry::<String, String>()?.is_some() {}
                Ok(Metadata)
            }
        }
        deserializer.deserialize_map(Strings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header and `data` zero bytes behind it.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Vec<Tensor>, String> {
        read(&mut &bytes[..], bytes.len() as u64).unwrap().map(|(tensors, _)| tensors)
    }

    #[test]
    fn a_good_header_is_read_in_the_order_of_the_data() {
        let header = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},
                         "a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},
                         "__metadata__":{"format":"pt"}}"#;
        let tensors = parse(&file(header, 12)).unwrap();
        assert_eq!(tensors.iter().map(|t| &t.name[..]).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(tensors[0].bytes, 8 + header.len() as u64..12 + header.len() as u64);
    }

    #[test]
    fn faults_name_the_tensor() {
        let one = |entry: &str| format!(r#"{{"t":{entry}}}"#);
        for (header, data, expected) in [
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#), 4, "`t` ends at byte 8"),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#), 12, "a gap"),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), 8, "before it begins"),
            (one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), 8, "takes 12 bytes"),
            (one(r#"{"dtype":"f32","shape":[2],"data_offsets":[0,8]}"#), 8, "`f32`"),
            (one(r#"{"dtype":"F32","data_offsets":[0,8]}"#), 8, "`shape`"),
            (
                one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#),
                0,
                "too large",
            ),
            (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, "`__metadata__`"),
            ("{}".to_owned(), 8, "after the last tensor"),
        ] {
            let error = parse(&file(&header, data)).unwrap_err();
            assert!(error.contains(expected), "{header}: {error}");
        }
        let twice = r#"{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
                        "t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        assert!(parse(&file(twice, 0)).unwrap_err().contains("`t` stands there twice"));
    }

    #[test]
    fn a_length_that_lies_allocates_nothing() {
        let mut bytes = file("{}", 0);
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse(&bytes).unwrap_err().contains("claims 18446744073709551615 bytes"));
        assert!(parse(b"").unwrap_err().contains("0 bytes"));
    }

    #[test]
    fn other_content_is_called_by_its_name() {
        assert!(parse(b"version https://git-lfs").unwrap_err().contains("Git LFS"));
        assert!(parse(b"\x80\x02}q\x00(X\x01\x00").unwrap_err().contains("pickle"));
        // 128 and 60 bytes are lengths like any other.
        for length in [128, 60] {
            assert_eq!(parse(&file(&format!("{:length$}", "{}"), 0)), Ok(vec![]));
        }
    }

    #[test]
    fn nesting_ends_in_an_error() {
        let deep = format!(r#"{{"t":{{"x":{}}}}}"#, "[".repeat(20_000));
        assert!(parse(&file(&deep, 0)).is_err());
    }
}
