//! One adapter in another format, streamed: names and the order of numbers are the format's, the
//! scaling is folded into B.

use std::{collections::HashSet, path::Path};

use crate::{
    Dtype,
    adapter::Adapter,
    blocks::{Options, Plan},
    container::{Container, Heads},
    dtype::BLOCK,
    error::{Error, Quoted, Result},
    gguf::{self, Metadata, Value, names},
    joint::{Joint, Reader, each_on_threads, joint_modules},
    layout::{Factor, Kind},
    tensor::Order,
    watch::Watch,
    writer::Writer,
};

/// What a thread holds of a factor at a time, in numbers.
const PART: usize = 1 << 18;

/// What is to become of an adapter.
#[derive(Debug, Clone)]
pub struct Conversion<'a> {
    /// The format.
    pub container: Container,
    /// The type of the numbers. Of `Q8_0`, for GGUF, only A is, where its rows are whole blocks; the
    /// rest is float16.
    pub dtype: Dtype,
    /// What B is multiplied with, for each module of the adapter's layout.
    pub strengths: &'a [f64],
    /// The rank to which modules are filled up with zeros; their own without it.
    pub rank: Option<usize>,
    /// The architecture's name, for GGUF.
    pub architecture: Option<&'a str>,
    /// Alpha, for GGUF; 0 where B carries all of the scaling.
    pub alpha: f64,
    /// The base model's heads, for GGUF.
    pub heads: Option<Heads>,
    /// More keys, for GGUF.
    pub metadata: Metadata,
}

/// One factor of the output.
struct Output<'a> {
    joint: &'a Joint,
    factor: Factor,
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    /// How the file has what PEFT has row by row.
    order: Order,
}

/// Write `adapter` to the file `out`, in another format; it appears whole or not at all.
///
/// # Errors
/// The adapter has a module that the format cannot express, or whose heads are not known; a setting
/// is out of range; a file cannot be read or written, or changed meanwhile; a number is not finite;
/// `watch` said to stop.
pub fn convert(
    adapter: &Adapter,
    out: &Path,
    conversion: &Conversion<'_>,
    options: &Options,
    watch: &Watch,
) -> Result<()> {
    adapter.plain("another format")?;
    check_conversion(adapter, conversion)?;
    let joints = joint_modules(&[adapter])?;
    let outputs = outputs(&joints, conversion)?;
    let need = outputs.iter().map(Output::need).max().unwrap_or(0);
    let plan = Plan::of_modules(&[adapter], &joints, |_| [1, 1], need, options)?;
    let reader = Reader::open(&[adapter], options.io, options.allow_nan, watch)?;
    let writer = create(out, &outputs, conversion)?;
    each_on_threads(outputs.len(), plan.threads, watch, Buffers::default, |buffers, index| {
        let output = &outputs[index];
        let strength = match output.factor {
            Factor::A => 1.0,
            Factor::B => conversion.strengths[output.joint.holders[0].module] as f32,
        };
        output.copy(&reader, &writer, index, strength, options.allow_nan, buffers)
    })?;
    reader.still_unchanged()?;
    Writer::finish(vec![writer], watch)
}

/// See that the format can express `adapter`, before there is work to lose.
///
/// # Errors
/// As `convert`, of modules and settings.
pub fn check_conversion(adapter: &Adapter, conversion: &Conversion<'_>) -> Result<()> {
    let modules = adapter.layout.modules.len();
    let strengths = conversion.strengths;
    if strengths.len() != modules || !strengths.iter().all(|s| (*s as f32).is_finite()) {
        return setting(format!("expected {modules} finite strengths, one for each module"));
    }
    if conversion.dtype == Dtype::Q8_0 && conversion.container != Container::Gguf {
        let name = conversion.container.name();
        return setting(format!("dtype is q8_0, which is for gguf alone, not for {name}"));
    }
    outputs(&joint_modules(&[adapter])?, conversion).map(drop)
}

fn setting<T>(reason: String) -> Result<T> {
    Err(Error::Setting(reason))
}

/// The factors of all modules as the format has them.
fn outputs<'a>(joints: &'a [Joint], conversion: &Conversion<'_>) -> Result<Vec<Output<'a>>> {
    let mut names = HashSet::new();
    let mut outputs = Vec::with_capacity(2 * joints.len());
    for joint in joints {
        for factor in [Factor::A, Factor::B] {
            let output = output(joint, factor, conversion)?;
            if !names.insert(output.name.clone()) {
                return setting(format!("two modules would be {}", Quoted(&output.name)));
            }
            outputs.push(output);
        }
    }
    Ok(outputs)
}

fn output<'a>(joint: &'a Joint, factor: Factor, conversion: &Conversion<'_>) -> Result<Output<'a>> {
    let module = &joint.module;
    let quoted = Quoted(&module.name);
    let rank = conversion.rank.unwrap_or(module.rank);
    if rank < module.rank {
        return setting(format!("rank is {rank}, {quoted} has {}", module.rank));
    }
    if module.experts > 1 && (conversion.container != Container::Peft || rank != module.rank) {
        return setting(format!(
            "{quoted} has a matrix for each of {} experts, which is not written as {} of rank {rank}",
            module.experts,
            conversion.container.name()
        ));
    }
    let mut shape = joint.shape(factor, rank);
    let letter = if factor == Factor::A { "a" } else { "b" };
    let (name, order) = match conversion.container {
        Container::Peft => (module.tensor_name(factor), Order::Rows),
        _ if module.kind == Kind::Conv => {
            let format = conversion.container.name();
            return setting(format!("{quoted} is a convolution, which {format} cannot express"));
        }
        Container::Mlx => (format!("{}.lora_{letter}", module.name), Order::Columns),
        Container::Gguf => {
            let Some(weight) = names::tensor_name(&module.name) else {
                return setting(format!("{quoted} has no name in GGUF that is known"));
            };
            let order = match (module.kind, factor) {
                (Kind::Embedding, Factor::A) => Order::Columns,
                (_, Factor::A) => Order::Rows,
                (_, Factor::B) => grouping(&weight, joint, conversion)?,
            };
            (format!("{weight}.weight.lora_{letter}"), order)
        }
    };
    if order == Order::Columns {
        shape.reverse();
    }
    let packed = factor == Factor::A && shape.last().is_some_and(|row| row % BLOCK == 0);
    let dtype = match conversion.dtype {
        Dtype::Q8_0 if !packed || order == Order::Columns => Dtype::F16,
        dtype => dtype,
    };
    Ok(Output { joint, factor, name, shape, dtype, order })
}

/// How llama.cpp orders the rows of a weight, and so those of its B.
fn grouping(weight: &str, joint: &Joint, conversion: &Conversion<'_>) -> Result<Order> {
    let architecture = conversion.architecture.unwrap_or_default();
    let Some(by) = names::grouped(weight) else { return Ok(Order::Rows) };
    if !names::permutes(architecture).map_err(Error::Setting)? {
        return Ok(Order::Rows);
    }
    let Some(heads) = conversion.heads else {
        return setting(format!(
            "llama.cpp regroups the rows of {} by heads in `{architecture}` models: say how many \
             heads and key/value heads the base model has",
            Quoted(&joint.module.name)
        ));
    };
    let rows = by.rows(heads, joint.outer);
    let named = |reason| Error::Setting(format!("{} {reason}", Quoted(&joint.module.name)));
    Ok(Order::Heads(rows.map_err(named)?))
}

/// The file, begun with its header.
fn create(out: &Path, outputs: &[Output<'_>], conversion: &Conversion<'_>) -> Result<Writer> {
    if conversion.container != Container::Gguf {
        let tensors = outputs.iter().map(|output| (&output.name[..], &output.shape[..]));
        return Writer::create(out, conversion.dtype, tensors);
    }
    let Some(architecture) = conversion.architecture else {
        return setting("architecture: GGUF has to name the base model's".to_owned());
    };
    let mut metadata = conversion.metadata.clone();
    let mut set = |key: &str, value| drop(metadata.insert(key.to_owned(), value));
    set("general.architecture", Value::Text(architecture.to_owned()));
    set("general.type", Value::Text("adapter".to_owned()));
    set("adapter.type", Value::Text("lora".to_owned()));
    set("adapter.lora.alpha", Value::Number(conversion.alpha));
    if let Some((heads, key_heads)) = conversion.heads {
        set("lorameta.head_count", Value::Integer(heads as i128));
        set("lorameta.head_count_kv", Value::Integer(key_heads as i128));
    }
    let tensors = outputs.iter().map(|output| (&output.name[..], &output.shape[..], output.dtype));
    Writer::begin(out, gguf::head(&metadata, tensors))
}

/// What a thread keeps from factor to factor.
#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    read: Vec<f32>,
    turned: Vec<f32>,
}

impl Output<'_> {
    /// The side that is not the rank: the columns of A, the rows of B.
    fn length(&self) -> usize {
        match self.factor {
            Factor::A => self.joint.columns(),
            Factor::B => self.joint.outer,
        }
    }

    /// The rows of A, or columns of B, that there are.
    fn own(&self) -> usize {
        self.joint.module.rank * self.joint.module.experts
    }

    /// The rank in the file.
    fn rank(&self) -> usize {
        self.shape.iter().product::<usize>() / self.length().max(1)
    }

    /// How much of the length is copied at a time: whole heads, and whole blocks.
    fn step(&self) -> usize {
        let unit = if let Order::Heads(rows) = self.order { rows } else { BLOCK };
        (PART / self.rank().max(1) / unit).max(1) * unit
    }

    /// What copying it takes, in bytes: the numbers read, as bytes too, turned, and narrowed.
    fn need(&self) -> usize {
        4 * 4 * self.rank() * self.step().min(self.length())
    }

    /// Whether a row of the file goes along the rank.
    fn is_tall(&self) -> bool {
        (self.factor == Factor::B) != (self.order == Order::Columns)
    }

    /// Copy it from the adapter to the file, where it is the tensor `index`, times `strength`.
    fn copy(
        &self,
        reader: &Reader<'_>,
        writer: &Writer,
        index: usize,
        strength: f32,
        allow_nan: bool,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (own, rank, length) = (self.own(), self.rank(), self.length());
        let put = |start: usize, numbers: &[f32]| {
            if writer.write(index, start, numbers)? || allow_nan {
                return Ok(());
            }
            Err(Error::Overflow { tensor: self.name.clone(), dtype: self.dtype })
        };
        for from in (0..length).step_by(self.step()) {
            let count = self.step().min(length - from);
            self.read(reader, from, count, buffers)?;
            let Buffers { read, turned, .. } = &mut *buffers;
            if strength != 1.0 {
                read.iter_mut().for_each(|x| *x *= strength);
            }
            // Along the rank as `at` has it: A lies the other way round than B.
            let at = |k: usize, i: usize| match self.factor {
                Factor::A => k * count + i,
                Factor::B => i * own + k,
            };
            if self.is_tall() {
                turned.clear();
                turned.resize(count * rank, 0.0);
                for (place, row) in turned.chunks_exact_mut(rank).enumerate() {
                    let i = self.source_row(place);
                    row.iter_mut().take(own).enumerate().for_each(|(k, x)| *x = read[at(k, i)]);
                }
                put(from * rank, turned)?;
                continue;
            }
            // What is left of the rank stays as a new file is: zero.
            for k in 0..own {
                turned.clear();
                turned.extend((0..count).map(|i| read[at(k, i)]));
                put(k * length + from, turned)?;
            }
        }
        Ok(())
    }

    /// The row of PEFT's that the file has in this place, within whole heads.
    fn source_row(&self, place: usize) -> usize {
        let Order::Heads(rows) = self.order else { return place };
        let within = place % rows;
        place - within + within % 2 * (rows / 2) + within / 2
    }

    /// Read the columns of A, or the rows of B, from `from` on.
    fn read(
        &self,
        reader: &Reader<'_>,
        from: usize,
        count: usize,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (rank, length, share) = (self.own(), self.length(), self.joint.holders[0]);
        let Buffers { bytes, read, .. } = buffers;
        read.clear();
        read.resize(rank * count, 0.0);
        if self.factor == Factor::B || count == length {
            let range = from * rank..(from + count) * rank;
            return reader.read(share, self.factor, range, bytes, read);
        }
        for (k, row) in read.chunks_exact_mut(count).enumerate() {
            let start = k * length + from;
            reader.read(share, self.factor, start..start + count, bytes, row)?;
        }
        Ok(())
    }
}
