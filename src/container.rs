//! The formats that adapters come in, and how each names and orders its tensors.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Seek},
    path::Path,
};

use crate::{
    error::{At, Error, Result},
    gguf::{self, Metadata, Value, names},
    header,
    layout::PREFIX,
    tensor::{Order, Tensor},
};

/// A format of adapter files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// Safetensors with PEFT's names; or with others, of which the caller says what they mean.
    Peft,
    /// Llama.cpp's.
    Gguf,
    /// Safetensors with the names of mlx-lm, whose factors are transposed.
    Mlx,
}

impl Container {
    /// The format of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Peft, Self::Gguf, Self::Mlx].into_iter().find(|container| container.name() == name)
    }

    /// `peft`, `gguf` or `mlx`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Peft => "peft",
            Self::Gguf => "gguf",
            Self::Mlx => "mlx",
        }
    }
}

/// Numbers of heads: of queries, and of keys and values.
pub type Heads = (usize, usize);

/// How adapters are to be read.
#[derive(Debug, Clone, Default)]
pub struct Opening {
    /// Leave out what makes an adapter more than plain LoRA, instead of refusing it.
    pub drop_unsupported: bool,
    /// The heads of the base model, for GGUF files that do not say them and need them.
    pub heads: Option<Heads>,
    /// The PEFT names of tensors that the file calls otherwise; no others are read then.
    pub names: Option<HashMap<String, String>>,
    /// Take the magnitudes of DoRA, which need the base's weights.
    pub dora: bool,
}

/// What the header of an adapter file says.
pub(crate) struct Contents {
    pub(crate) container: Container,
    pub(crate) metadata: Metadata,
    /// The tensors in the order of their data, each with its PEFT name.
    pub(crate) tensors: Vec<(String, Tensor)>,
    pub(crate) notes: Vec<String>,
}

/// The tensors of a safetensors file, in the order of their data.
///
/// # Errors
/// The file cannot be read, or its header does not hold.
pub fn file_tensors(path: &Path) -> Result<Vec<Tensor>> {
    safetensors(path).map(|(_, tensors)| tensors)
}

/// A safetensors file, and its tensors in the order of their data.
///
/// # Errors
/// The file cannot be read, or its header does not hold.
pub(crate) fn safetensors(path: &Path) -> Result<(File, Vec<Tensor>)> {
    let (mut file, size) = open(path)?;
    let read = header::read(&mut file, size).at(path)?;
    let (tensors, _) = read.map_err(|reason| Error::File { path: path.to_owned(), reason })?;
    Ok((file, tensors))
}

/// The keys of a GGUF file, which may be any model.
///
/// # Errors
/// The file cannot be read, or its header does not hold.
pub fn gguf_metadata(path: &Path) -> Result<Metadata> {
    let (file, size) = open(path)?;
    let read = gguf::metadata(&mut BufReader::new(file), size).at(path)?;
    read.map_err(|reason| Error::File { path: path.to_owned(), reason })
}

/// A regular file, and its size.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    // Asked before opening: opening a FIFO would wait for a writer.
    let metadata = std::fs::metadata(path).at(path)?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "a folder" } else { "not a regular file" };
        let reason = format!("is {kind}, expected a safetensors or GGUF file");
        return Err(Error::File { path: path.to_owned(), reason });
    }
    let file = File::open(path).at(path)?;
    let size = file.metadata().at(path)?.len();
    Ok((file, size))
}

/// What the header of `file` says, of `size` bytes and at `path`.
pub(crate) fn read(path: &Path, mut file: File, size: u64, opening: &Opening) -> Result<Contents> {
    let invalid = |reason| {
        let reason = format!("{reason}\ncopy the file again, or save it again");
        Error::File { path: path.to_owned(), reason }
    };
    let mut start = [0; 4];
    let got = header::read_up_to(&mut file, &mut start).at(path)?;
    file.rewind().at(path)?;
    if &start[..got] == gguf::MAGIC {
        let read = gguf::read(&mut BufReader::new(file), size).at(path)?;
        let (metadata, tensors) = read.map_err(invalid)?;
        return of_gguf(path, metadata, tensors, opening);
    }
    let (tensors, notes) = header::read(&mut file, size).at(path)?.map_err(invalid)?;
    let is_mlx = |tensor: &Tensor| {
        let name = &tensor.name;
        name.ends_with(".lora_a") || name.ends_with(".lora_b")
    };
    let (container, tensors) = match &opening.names {
        Some(names) => {
            let one = |tensor: Tensor| Some((names.get(&tensor.name)?.clone(), tensor));
            (Container::Peft, tensors.into_iter().filter_map(one).collect())
        }
        None if !tensors.is_empty() && tensors.iter().all(is_mlx) => {
            (Container::Mlx, tensors.into_iter().map(of_mlx).collect())
        }
        None => {
            let one = |tensor: Tensor| (tensor.name.clone(), tensor);
            (Container::Peft, tensors.into_iter().map(one).collect())
        }
    };
    Ok(Contents { container, metadata: Metadata::new(), tensors, notes })
}

/// The PEFT name of an mlx-lm tensor, and the tensor as PEFT has it.
fn of_mlx(tensor: Tensor) -> (String, Tensor) {
    let (module, factor) = tensor.name.rsplit_once('.').unwrap_or_default();
    let name = peft_name(module, factor);
    (name, transposed(tensor))
}

/// The PEFT name of a module's `lora_a` or `lora_b`.
fn peft_name(module: &str, factor: &str) -> String {
    let factor = if factor == "lora_a" { "A" } else { "B" };
    match module.rsplit('.').next() {
        Some("embed_tokens" | "wte") => format!("{PREFIX}{module}.lora_embedding_{factor}"),
        _ => format!("{PREFIX}{module}.lora_{factor}.weight"),
    }
}

/// A tensor that lies in the file as the transpose of what PEFT has.
fn transposed(mut tensor: Tensor) -> Tensor {
    if tensor.shape.len() == 2 {
        tensor.shape.reverse();
        tensor.order = Order::Columns;
    }
    tensor
}

/// The tensors of llama.cpp's adapter as PEFT has them.
fn of_gguf(
    path: &Path,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    opening: &Opening,
) -> Result<Contents> {
    let invalid = |reason: String| Error::File { path: path.to_owned(), reason };
    let mut notes = Vec::new();
    let architecture = gguf::text(&metadata, "general.architecture")
        .ok_or_else(|| invalid("`general.architecture` is missing".to_owned()))?;
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let found = gguf::text(&metadata, key).unwrap_or("missing");
        if found != expected {
            return Err(invalid(format!("{key} is `{found}`, expected `{expected}`")));
        }
    }
    match metadata.get("adapter.lora.alpha") {
        None => {}
        Some(Value::Number(alpha)) if alpha.is_finite() => {}
        Some(_) => {
            let text = "`adapter.lora.alpha` is not a finite number".to_owned();
            return Err(invalid(text));
        }
    }
    const TOKENS: &str = "adapter.alora.invocation_tokens";
    if metadata.contains_key(TOKENS) {
        if !opening.drop_unsupported {
            let text = format!("`{TOKENS}`: an activated LoRA works only after its tokens");
            return Err(invalid(text));
        }
        notes.push(format!("`{TOKENS}` left out"));
    }
    let heads = heads(&metadata, architecture).or(opening.heads);
    let mut named = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if tensor.name.ends_with("_norm.weight") {
            notes.push(format!("`{}` is no LoRA factor; llama.cpp ignores it too", tensor.name));
            continue;
        }
        let fault = |reason: String| Error::Tensor {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            reason,
        };
        let (weight, factor) = ["lora_a", "lora_b"]
            .into_iter()
            .find_map(|factor| {
                Some((tensor.name.strip_suffix(&format!(".weight.{factor}"))?, factor))
            })
            .ok_or_else(|| fault("is not a LoRA factor".to_owned()))?;
        let module = names::module_name(weight, architecture).ok_or_else(|| {
            fault(format!("no module of `{architecture}` models is known to be this"))
        })?;
        let name = peft_name(&module, factor);
        let grouped = names::grouped(weight).filter(|_| factor == "lora_b");
        if let Some(by) = grouped
            && names::permutes(architecture).map_err(fault)?
        {
            let heads = heads.ok_or_else(|| {
                fault(format!(
                    "llama.cpp regroups these rows by heads in `{architecture}` models, and the \
                     file does not say how many there are: give the base as `--base-config`, or its \
                     `heads` and `kv_heads` in `[base]` of a bank's `bank.toml`"
                ))
            })?;
            let rows = by.rows(heads, tensor.shape[0]).map_err(fault)?;
            named.push((name, Tensor { order: Order::Heads(rows), ..tensor }));
        } else if weight == "token_embd" && factor == "lora_a" {
            named.push((name, transposed(tensor)));
        } else {
            named.push((name, tensor));
        }
    }
    Ok(Contents { container: Container::Gguf, metadata, tensors: named, notes })
}

/// The heads that a file speaks of itself.
fn heads(metadata: &Metadata, architecture: &str) -> Option<Heads> {
    let both = |prefix: &str| {
        let heads = gguf::count(metadata, &format!("{prefix}.head_count"))?;
        let key = format!("{prefix}.head_count_kv");
        Some((heads, gguf::count(metadata, &key).unwrap_or(heads)))
    };
    both("lorameta").or_else(|| both(&format!("{architecture}.attention")))
}
