//! What GGUF calls a model's modules, and which architectures have the rows of q and k in another
//! order: as llama.cpp's converter has it.

/// Modules of architectures that share their names.
struct Family {
    /// Their names in GGUF; none for the many that call their modules as Llama does.
    architectures: &'static [&'static str],
    /// What comes before a layer's number.
    layers: &'static str,
    /// Modules outside of layers.
    outside: &'static [(&'static str, &'static str)],
    /// Modules of a layer.
    inside: &'static [(&'static str, &'static str)],
}

const OUTSIDE: &[(&str, &str)] = &[("model.embed_tokens", "token_embd"), ("lm_head", "output")];

/// The last one is for all architectures that no other names.
const FAMILIES: &[Family] = &[
    Family {
        architectures: &["gpt2"],
        layers: "transformer.h.",
        outside: &[("transformer.wte", "token_embd"), ("lm_head", "output")],
        inside: &[
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ],
    },
    Family {
        architectures: &["phi2"],
        layers: "model.layers.",
        outside: OUTSIDE,
        inside: &[
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.dense", "attn_output"),
            ("mlp.fc1", "ffn_up"),
            ("mlp.fc2", "ffn_down"),
        ],
    },
    Family {
        architectures: &["phi3", "glm4"],
        layers: "model.layers.",
        outside: OUTSIDE,
        inside: &[
            ("self_attn.qkv_proj", "attn_qkv"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ],
    },
    Family {
        architectures: &["starcoder2"],
        layers: "model.layers.",
        outside: OUTSIDE,
        inside: &[
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ],
    },
    Family {
        architectures: &[],
        layers: "model.layers.",
        outside: OUTSIDE,
        inside: &[
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            // The router of Mixtral, whose architecture is `llama`, then that of most others.
            ("block_sparse_moe.gate", "ffn_gate_inp"),
            ("mlp.gate", "ffn_gate_inp"),
            ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
            ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
            ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
            ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
        ],
    },
];

/// Architectures whose rows of q and k are regrouped, head by head, from halves to neighbours.
const PERMUTED: [&str; 12] = [
    "llama",
    "llama-embed",
    "mistral3",
    "llada",
    "minicpm",
    "olmo",
    "arcee",
    "smollm3",
    "chameleon",
    "granite",
    "granitemoe",
    "granitehybrid",
];

/// Architectures whose rows of q and k are moved in other ways: split out of one matrix, or by heads
/// that differ from layer to layer.
const OTHERWISE: [&str; 5] = ["baichuan", "deci", "internlm2", "plamo", "xverse"];

/// The GGUF name of a module's weight without `.weight`, such as `blk.0.attn_q`, if it has one.
pub fn tensor_name(module: &str) -> Option<String> {
    // The language model within one of several media.
    let module = module
        .strip_prefix("language_model.")
        .map(str::to_owned)
        .or_else(|| {
            module.strip_prefix("model.language_model.").map(|rest| format!("model.{rest}"))
        })
        .unwrap_or_else(|| module.to_owned());
    FAMILIES.iter().find_map(|family| {
        if let Some((_, name)) = family.outside.iter().find(|(own, _)| *own == module) {
            return Some((*name).to_owned());
        }
        let (layer, inside) = module.strip_prefix(family.layers)?.split_once('.')?;
        let (_, name) = family.inside.iter().find(|(own, _)| *own == inside)?;
        is_number(layer).then(|| format!("blk.{layer}.{name}"))
    })
}

/// The module that a GGUF name, without `.weight`, stands for in an architecture.
pub fn module_name(tensor: &str, architecture: &str) -> Option<String> {
    let own = |family: &&Family| family.architectures.contains(&architecture);
    let family = FAMILIES.iter().find(own).or(FAMILIES.last())?;
    if let Some((name, _)) = family.outside.iter().find(|(_, theirs)| *theirs == tensor) {
        return Some((*name).to_owned());
    }
    let (layer, inside) = tensor.strip_prefix("blk.")?.split_once('.')?;
    // All but `llama` call their router `mlp.gate`: it is the later of two.
    let mut found = family.inside.iter().filter(|(_, theirs)| *theirs == inside);
    let (name, _) = if architecture == "llama" { found.next() } else { found.next_back() }?;
    is_number(layer).then(|| format!("{}{layer}.{name}", family.layers))
}

fn is_number(layer: &str) -> bool {
    !layer.is_empty() && layer.bytes().all(|digit| digit.is_ascii_digit())
}

/// Whether llama.cpp regroups the rows of q and k in `architecture`, by heads.
///
/// # Errors
/// The architecture's rows are moved in a way that is not known here.
pub fn permutes(architecture: &str) -> Result<bool, String> {
    if OTHERWISE.contains(&architecture) {
        return Err(format!(
            "llama.cpp moves the rows of q and k of `{architecture}` models in a way that is not \
             supported"
        ));
    }
    Ok(PERMUTED.contains(&architecture))
}

/// What the rows of a GGUF weight are grouped by where they are permuted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// Query heads.
    Heads,
    /// Heads of keys and values.
    KeyHeads,
}

impl By {
    /// How many rows a head has, of `rows` in all.
    ///
    /// # Errors
    /// They are not that many heads of two halves.
    pub(crate) fn rows(
        self,
        (heads, key_heads): (usize, usize),
        rows: usize,
    ) -> Result<usize, String> {
        let (count, what) = match self {
            Self::Heads => (heads, "heads"),
            Self::KeyHeads => (key_heads, "key/value heads"),
        };
        if count == 0 || !rows.is_multiple_of(2 * count) {
            return Err(format!("has {rows} rows, which are not those of {count} {what}"));
        }
        Ok(rows / count)
    }
}

/// What the rows of a weight of this name, without `.weight`, are grouped by, if they are q or k.
pub(crate) fn grouped(tensor: &str) -> Option<By> {
    match tensor.rsplit_once('.')?.1 {
        "attn_q" => Some(By::Heads),
        "attn_k" => Some(By::KeyHeads),
        _ => None,
    }
}
