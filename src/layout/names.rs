//! What PEFT's tensor names say: which module and factor, or what else a tensor is.

use super::Factor;

/// A tensor name taken apart.
pub(super) struct Part<'a> {
    pub(super) module: &'a str,
    pub(super) factor: Factor,
    pub(super) embedding: bool,
    pub(super) adapter: Option<&'a str>,
}

impl<'a> Part<'a> {
    /// `module.lora_A.weight`, `module.lora_embedding_A`, and both with the adapter's name before
    /// the end, as old or hand-made files have it.
    pub(super) fn of(path: &'a str) -> Option<Self> {
        let find = |stem: &str| path.rfind(stem).map(|at| (&path[..at], &path[at + stem.len()..]));
        for (stem, factor) in [(".lora_A.", Factor::A), (".lora_B.", Factor::B)] {
            let Some((module, rest)) = find(stem) else { continue };
            let adapter = match rest.strip_suffix("weight")? {
                "" => None,
                name => Some(name.strip_suffix('.').filter(|name| !name.contains('.'))?),
            };
            return Some(Self { module, factor, embedding: false, adapter });
        }
        for (stem, factor) in [(".lora_embedding_A", Factor::A), (".lora_embedding_B", Factor::B)] {
            let Some((module, rest)) = find(stem) else { continue };
            let adapter = match rest {
                "" => None,
                _ => Some(rest.strip_prefix('.').filter(|name| !name.contains('.'))?),
            };
            return Some(Self { module, factor, embedding: true, adapter });
        }
        None
    }
}

/// The module whose DoRA magnitude a tensor is; old files have `.weight` or the adapter's name, or
/// both, at the end.
pub(super) fn magnitude_of(path: &str) -> Option<&str> {
    let (module, rest) = path.rsplit_once(".lora_magnitude_vector")?;
    let rest = rest.strip_suffix(".weight").unwrap_or(rest);
    let plain = rest.is_empty() || rest.starts_with('.') && !rest[1..].contains('.');
    plain.then_some(module)
}

/// Why a tensor cannot be summed as half of a LoRA module.
pub(super) fn not_a_factor(path: &str) -> String {
    let kind = if path.contains("lora_magnitude_vector") {
        "a DoRA magnitude, which no sum of factors can hold (use_dora): `svd` takes it with \
         --base-weights"
    } else if path.contains("lora_B.bias") || path.contains("lora_A.bias") {
        "a bias of a factor (lora_bias)"
    } else if path.contains("lora_down") || path.contains("lora_up") || path.ends_with(".alpha") {
        "a kohya or diffusers name, which does not say its module: `convert` may know it"
    } else if path.ends_with(".lora_a") || path.ends_with(".lora_b") {
        "an MLX name among others"
    } else if path.ends_with(".weight") || path.ends_with(".bias") {
        "a weight of the model itself, not a LoRA factor"
    } else {
        "not a LoRA factor"
    };
    format!("is {kind}")
}

/// Whether a tensor is a part of an adapter that is more than plain LoRA: a DoRA magnitude, a bias,
/// a weight of the model itself, or a trained token.
pub(super) fn is_beyond_plain(name: &str) -> bool {
    let other_format = name.contains("lora_down") || name.contains("lora_up");
    let of_model = name.ends_with(".weight") || name.ends_with(".bias");
    Part::of(name).is_none()
        && !other_format
        && (of_model
            || name.contains("lora_magnitude_vector")
            || name.contains("trainable_tokens_delta"))
}

/// Whether a module's name looks made to be used as something else.
pub(super) fn suspicious(name: &str) -> bool {
    name.contains("../") || name.contains(char::is_control)
}
