//! What the tensors of a file are: the two factors of each LoRA module, found by name.

mod names;

use std::collections::BTreeMap;

use crate::{container::Opening, error::Quoted, tensor::Tensor};
use names::{Part, is_beyond_plain, magnitude_of, not_a_factor, suspicious};

/// What every PEFT tensor name begins with.
pub(crate) const PREFIX: &str = "base_model.model.";

/// How a module's factors make its ΔW.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// ΔW = B A.
    Linear,
    /// ΔW = (B A)ᵀ, a row for each token.
    Embedding,
    /// A convolution in one to three dimensions by A, then one by B of size 1.
    Conv,
}

/// One of a module's two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Factor {
    /// `lora_A`, r × in.
    A,
    /// `lora_B`, out × r; it carries the scaling.
    B,
}

/// A module that an adapter changes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Module {
    /// Its path in the base model, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// How its factors are to be read.
    pub kind: Kind,
    /// The rows of A and columns of B, for each of the experts.
    pub rank: usize,
    /// How many matrices the factors hold, one for each expert of a mixture; mostly one.
    pub experts: usize,
    /// `lora_A`, as an index into the layout's tensors.
    pub a: usize,
    /// `lora_B`, as an index into the layout's tensors.
    pub b: usize,
    /// `lora_magnitude_vector` of DoRA, likewise.
    pub magnitude: Option<usize>,
}

impl Module {
    /// The name PEFT writes a factor under.
    pub fn tensor_name(&self, factor: Factor) -> String {
        let suffix = match (self.kind, factor) {
            (Kind::Embedding, Factor::A) => "lora_embedding_A",
            (Kind::Embedding, Factor::B) => "lora_embedding_B",
            (_, Factor::A) => "lora_A.weight",
            (_, Factor::B) => "lora_B.weight",
        };
        format!("{PREFIX}{}.{suffix}", self.name)
    }

    /// Where a factor stands among the layout's tensors.
    pub fn tensor(&self, factor: Factor) -> usize {
        match factor {
            Factor::A => self.a,
            Factor::B => self.b,
        }
    }
}

/// The tensors of a file and the modules that they make up, in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The tensors, in the order of their data.
    pub tensors: Vec<Tensor>,
    /// The modules.
    pub modules: Vec<Module>,
    /// What is odd about the names or shapes, but does no harm.
    pub notes: Vec<String>,
}

/// A tensor's name and what is wrong with it.
pub(crate) struct Fault {
    pub(crate) tensor: String,
    pub(crate) reason: String,
}

impl Layout {
    /// Pair the tensors up by their PEFT names, one for each.
    ///
    /// # Errors
    /// The first tensor that is no LoRA factor, lacks its other half, or does not fit it.
    pub(crate) fn of(
        named: Vec<(String, Tensor)>,
        mut notes: Vec<String>,
        opening: &Opening,
    ) -> Result<Self, Fault> {
        let left_out = |(name, _): &(String, Tensor)| {
            opening.drop_unsupported
                && is_beyond_plain(name)
                && !(opening.dora && magnitude_of(name).is_some())
        };
        let (left_out, kept): (Vec<_>, Vec<_>) = named.into_iter().partition(left_out);
        if let Some((first, _)) = left_out.first() {
            let (count, first) = (left_out.len(), Quoted(first));
            notes.push(format!("{count} tensors beyond plain LoRA left out, first {first}"));
        }
        let (names, tensors): (Vec<String>, Vec<Tensor>) = kept.into_iter().unzip();
        // By the module's name, and whether it is an embedding.
        let mut halves: BTreeMap<(String, bool), [Option<usize>; 2]> = BTreeMap::new();
        let mut magnitudes: BTreeMap<String, usize> = BTreeMap::new();
        let mut unprefixed = false;
        let mut adapter_name = None;
        for (index, (name, tensor)) in names.iter().zip(&tensors).enumerate() {
            let fault = |reason| Fault { tensor: tensor.name.clone(), reason };
            let path = name.strip_prefix(PREFIX).unwrap_or_else(|| {
                unprefixed = true;
                name
            });
            let magnitude = magnitude_of(path).filter(|_| opening.dora);
            let part = Part::of(path);
            if part.is_none() && magnitude.is_none() {
                return Err(fault(not_a_factor(path)));
            }
            if !tensor.dtype.is_float() {
                return Err(fault(format!(
                    "has type {}, expected F32, F16, BF16 or F64",
                    tensor.dtype
                )));
            }
            let Some(part) = part else {
                let module = magnitude.unwrap_or_default();
                if magnitudes.insert(module.to_owned(), index).is_some() {
                    return Err(fault(format!("is a second magnitude of {}", Quoted(module))));
                }
                continue;
            };
            let dimensions = tensor.shape.len();
            if !(2..=if part.embedding { 2 } else { 5 }).contains(&dimensions) {
                return Err(fault(format!(
                    "has {dimensions} dimensions ({:?}), expected 2, or 3 to 5 for a convolution",
                    tensor.shape
                )));
            }
            adapter_name = adapter_name.or(part.adapter);
            let half = &mut halves.entry((part.module.to_owned(), part.embedding)).or_default();
            if half[part.factor as usize].replace(index).is_some() {
                return Err(fault(format!("is a second factor for {}", Quoted(part.module))));
            }
        }
        if unprefixed && !halves.is_empty() {
            notes.push(format!("tensor names without the prefix `{PREFIX}`; read as if with it"));
        }
        if let Some(name) = adapter_name {
            notes.push(format!("tensor names carry the adapter's name {}", Quoted(name)));
        }
        let mut modules = Vec::with_capacity(halves.len());
        for ((name, embedding), factors) in halves {
            let magnitude = magnitudes.remove(&name);
            modules.push(module(name, embedding, factors, magnitude, &tensors)?);
        }
        if let Some((name, tensor)) = magnitudes.pop_first() {
            let reason = format!("the module {} has no lora_A and lora_B", Quoted(&name));
            return Err(Fault { tensor: tensors[tensor].name.clone(), reason });
        }
        if let Some(odd) = modules.iter().find(|module| suspicious(&module.name)) {
            notes.push(format!("the module name {} is odd", Quoted(&odd.name)));
        }
        let oversized = modules.iter().find(|module| {
            let outer = |tensor: usize, axis: usize| tensors[tensor].shape[axis];
            let inner: usize = tensors[module.a].shape[1..].iter().product();
            module.rank > inner.min(outer(module.b, 0))
        });
        if let Some(module) = oversized {
            notes.push(format!(
                "{} has rank {}, more than the matrix that it changes",
                Quoted(&module.name),
                module.rank
            ));
        }
        Ok(Self { tensors, modules, notes })
    }
}

/// Check that two factors belong together.
fn module(
    name: String,
    embedding: bool,
    factors: [Option<usize>; 2],
    magnitude: Option<usize>,
    tensors: &[Tensor],
) -> Result<Module, Fault> {
    let (a, b) = match factors {
        [Some(a), Some(b)] => (a, b),
        [Some(half), None] | [None, Some(half)] => {
            let missing = if factors[0].is_none() { "lora_A" } else { "lora_B" };
            return Err(Fault {
                tensor: tensors[half].name.clone(),
                reason: format!("the module {} has no {missing}", Quoted(&name)),
            });
        }
        [None, None] => unreachable!("a module is entered with a factor"),
    };
    let (kernel, behind) = (&tensors[a].shape[2..], &tensors[b].shape[2..]);
    if kernel.len() != behind.len() || behind.iter().any(|&size| size != 1) {
        return Err(Fault {
            tensor: tensors[a].name.clone(),
            reason: format!(
                "has shape {:?}, lora_B of {} has {:?}: that of a convolution has as many \
                 dimensions, and a kernel of ones",
                tensors[a].shape,
                Quoted(&name),
                tensors[b].shape
            ),
        });
    }
    let kind = match (embedding, kernel) {
        (true, _) => Kind::Embedding,
        (false, []) => Kind::Linear,
        (false, _) => Kind::Conv,
    };
    let (rank, columns) = (tensors[a].shape[0], tensors[b].shape[1]);
    let fault = |reason| Err(Fault { tensor: tensors[b].name.clone(), reason });
    if rank != columns {
        return fault(format!(
            "has {columns} columns, lora_A of {} has {rank} rows: both should be its rank \
             (a transposed file, or a grouped convolution?)",
            Quoted(&name)
        ));
    }
    if rank == 0 {
        return fault("has rank 0".to_owned());
    }
    if let Some(empty) = [a, b].map(|index| &tensors[index]).into_iter().find(|t| t.is_empty()) {
        let reason = format!("has no numbers: its shape is {:?}", empty.shape);
        return Err(Fault { tensor: empty.name.clone(), reason });
    }
    if let Some(magnitude) = magnitude {
        let fault = |reason| Err(Fault { tensor: tensors[magnitude].name.clone(), reason });
        let (found, rows) = (&tensors[magnitude].shape, tensors[b].shape[0]);
        if kind != Kind::Linear {
            let reason = "is DoRA of an embedding or a convolution; only that of linear modules is \
                          taken";
            return fault(reason.to_owned());
        }
        if *found != [rows] {
            return fault(format!("has shape {found:?}, expected [{rows}], the rows of lora_B"));
        }
    }
    Ok(Module { name, kind, rank, experts: 1, a, b, magnitude })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, tensor::Order};

    fn tensor(name: &str, shape: &[usize]) -> (String, Tensor) {
        let (dtype, shape, order) = (Dtype::F32, shape.to_vec(), Order::Rows);
        (name.to_owned(), Tensor { name: name.to_owned(), dtype, shape, bytes: 0..1, order })
    }

    fn layout(tensors: &[(&str, &[usize])]) -> Result<Layout, String> {
        let tensors = tensors.iter().map(|(name, shape)| tensor(name, shape)).collect();
        Layout::of(tensors, vec![], &Opening::default())
            .map_err(|fault| format!("{}: {}", fault.tensor, fault.reason))
    }

    #[test]
    fn factors_are_paired_by_name() {
        let layout = layout(&[
            ("base_model.model.m.q.lora_B.weight", &[6, 2]),
            ("base_model.model.m.e.lora_embedding_A", &[2, 9]),
            ("base_model.model.m.q.lora_A.weight", &[2, 4]),
            ("base_model.model.m.e.lora_embedding_B", &[4, 2]),
        ])
        .unwrap();
        let found: Vec<_> = layout.modules.iter().map(|m| (&m.name[..], m.a, m.b)).collect();
        assert_eq!(found, [("m.e", 1, 3), ("m.q", 2, 0)]);
        assert_eq!(layout.notes, Vec::<String>::new());
        let name = layout.modules[0].tensor_name(Factor::B);
        assert_eq!(name, "base_model.model.m.e.lora_embedding_B");
    }

    #[test]
    fn old_names_are_read_and_noted() {
        let layout =
            layout(&[("q.lora_A.default.weight", &[2, 4]), ("q.lora_B.default.weight", &[6, 2])])
                .unwrap();
        assert_eq!(layout.modules[0].tensor_name(Factor::A), "base_model.model.q.lora_A.weight");
        assert!(layout.notes[0].contains(PREFIX) && layout.notes[1].contains("`default`"));
    }

    #[test]
    fn what_is_beyond_plain_lora_can_be_left_out() {
        let beyond = [
            "m.q.lora_magnitude_vector",
            "m.q.lora_B.bias",
            "m.q.bias",
            "lm_head.weight",
            "m.embed.token_adapter.trainable_tokens_delta",
        ];
        let factors = [("m.q.lora_A.weight", [2, 4]), ("m.q.lora_B.weight", [6, 2])];
        let mut tensors: Vec<_> = beyond.iter().map(|name| tensor(name, &[6])).collect();
        tensors.extend(factors.iter().map(|(name, shape)| tensor(name, shape)));
        let drop = Opening { drop_unsupported: true, ..Opening::default() };
        let with_dora = Opening { dora: true, ..drop.clone() };
        let layout = Layout::of(tensors.clone(), vec![], &drop).ok().unwrap();
        assert_eq!((layout.modules.len(), layout.tensors.len()), (1, 2));
        assert!(layout.notes[0].contains("5 tensors beyond plain LoRA left out"));
        let layout = Layout::of(tensors.clone(), vec![], &with_dora).ok().unwrap();
        assert_eq!((layout.modules[0].magnitude, layout.tensors.len()), (Some(0), 3));
        assert!(Layout::of(tensors, vec![], &Opening::default()).is_err());
        for foreign in ["x.lora_down.weight", "x.lora_a", "mystery"] {
            assert!(Layout::of(vec![tensor(foreign, &[6, 2])], vec![], &drop).is_err());
        }
    }

    #[test]
    fn a_magnitude_goes_with_its_module() {
        let dora = |name: &str, shape: &[usize], inner: &[usize]| {
            let a = [&[2], inner].concat();
            let b = [&[6, 2][..], &vec![1; inner.len() - 1]].concat();
            let tensors = [("x.lora_A.weight", &a[..]), ("x.lora_B.weight", &b), (name, shape)]
                .map(|(name, shape)| tensor(name, shape));
            let dora = Opening { dora: true, ..Opening::default() };
            let found = Layout::of(tensors.into(), vec![], &dora);
            found.map(|layout| layout.modules[0].magnitude).map_err(|fault| fault.reason)
        };
        for end in ["", ".weight", ".default", ".default.weight"] {
            let name = format!("x.lora_magnitude_vector{end}");
            assert_eq!(dora(&name, &[6], &[4]), Ok(Some(2)), "{name}");
        }
        for (name, shape, inner, expected) in [
            ("x.lora_magnitude_vector", &[5][..], &[4][..], "expected [6]"),
            ("x.lora_magnitude_vector", &[6], &[4, 3, 3], "convolution"),
            ("y.lora_magnitude_vector", &[6], &[4], "`y` has no lora_A"),
            ("x.lora_magnitude_vectors", &[6], &[4], "is a DoRA magnitude"),
        ] {
            let reason = dora(name, shape, inner).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }

    #[test]
    fn faults_name_the_tensor() {
        for (tensors, expected) in [
            (&[("x.lora_B.weight", &[6, 2][..])][..], "`x` has no lora_A"),
            (&[("x.lora_A.weight", &[2, 6][..])][..], "`x` has no lora_B"),
            (&[("x.lora_A.weight", &[2, 4]), ("x.lora_B.weight", &[6, 3])], "3 columns"),
            (&[("x.lora_A.weight", &[2]), ("x.lora_B.weight", &[6, 2])], "1 dimensions"),
            (&[("x.lora_A.weight", &[2, 4, 3]), ("x.lora_B.weight", &[6, 2, 3])], "[6, 2, 3]"),
            (
                &[("x.lora_A.weight", &[2, 4, 3]), ("x.lora_B.weight", &[6, 2, 1, 1])],
                "[6, 2, 1, 1]",
            ),
            (&[("x.lora_magnitude_vector", &[6])], "use_dora"),
            (&[("lora_unet_x.lora_down.weight", &[6, 2])], "kohya"),
            (&[("x.lora_a", &[6, 2])], "MLX"),
            (&[("x.weight", &[6, 2])], "the model itself"),
            (&[("mystery", &[6, 2])], "mystery: is not a LoRA factor"),
            (&[("x.lora_A.weight", &[0, 4]), ("x.lora_B.weight", &[6, 0])], "rank 0"),
        ] {
            let error = layout(tensors).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
