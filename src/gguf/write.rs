//! The header of a GGUF file that is to be written.

use super::{ALIGNMENT, MAGIC, Metadata, Value};
use crate::{
    Dtype,
    writer::{Head, Place},
};

/// The header of a file of version 3 with these keys and tensors: names, shapes and types.
pub(crate) fn head<'a>(
    metadata: &Metadata,
    tensors: impl Iterator<Item = (&'a str, &'a [usize], Dtype)> + Clone,
) -> Head {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.clone().count() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut bytes, key);
        put_value(&mut bytes, value);
    }
    let mut places: Vec<Place> = Vec::new();
    let mut end = 0u64;
    for (name, shape, dtype) in tensors {
        let start = end.next_multiple_of(ALIGNMENT);
        end = start + dtype.size(shape.iter().product()) as u64;
        places.push((start, dtype));
        put_text(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        bytes.extend(shape.iter().rev().flat_map(|&length| (length as u64).to_le_bytes()));
        bytes.extend(number(dtype).to_le_bytes());
        bytes.extend(start.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
    let data = bytes.len() as u64;
    places.iter_mut().for_each(|(start, _)| *start += data);
    Head { bytes, places, size: data + end.next_multiple_of(ALIGNMENT) }
}

/// The number of a type that is written.
fn number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F16 => 1,
        Dtype::Q8_0 => 8,
        Dtype::BF16 => 30,
        _ => 0,
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A value in the type that readers ask for: integers in 32 bits where they fit.
fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    let mut put = |kind: u32, value: &[u8]| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    };
    match value {
        Value::Text(text) => {
            put(8, &[]);
            put_text(bytes, text);
        }
        Value::Integer(integer) => match u32::try_from(*integer) {
            Ok(small) => put(4, &small.to_le_bytes()),
            Err(_) => put(11, &(*integer as i64).to_le_bytes()),
        },
        Value::Number(number) => put(6, &(*number as f32).to_le_bytes()),
        Value::Flag(flag) => put(7, &[u8::from(*flag)]),
        Value::List(_) => unreachable!("lists are not kept, so none is written"),
    }
}
