//! Adapters side by side: the same factor of the same module, found by name in each.

use std::collections::{BTreeMap, btree_map::Entry};

use crate::{
    adapter::Adapter,
    error::{Error, Result},
    layout::{Factor, Kind},
    tensor::Tensor,
};

/// Adapters that are to be combined, and the factors that any of them has.
pub(crate) struct Bank<'a> {
    pub(crate) adapters: Vec<&'a Adapter>,
    pub(crate) slots: Vec<Slot>,
}

/// One factor of one module, in every adapter that has it.
pub(crate) struct Slot {
    /// Its PEFT name.
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) factor: Factor,
    /// In the order of the bank. An adapter that is not among them counts as zero.
    pub(crate) holders: Vec<Holder>,
}

/// Where an adapter has a slot's factor.
#[derive(Clone, Copy)]
pub(crate) struct Holder {
    /// The adapter, as an index into the bank.
    pub(crate) adapter: usize,
    /// The module, as an index into the adapter's layout.
    pub(crate) module: usize,
    /// The tensor, likewise.
    tensor: usize,
}

impl Slot {
    /// How many numbers the factor has.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl<'a> Bank<'a> {
    /// Match the adapters' tensors by name.
    ///
    /// # Errors
    /// A tensor has another shape in one adapter than in another.
    pub(crate) fn new(adapters: Vec<&'a Adapter>) -> Result<Self> {
        // Linear and convolution factors have the same names, and their shapes tell them apart.
        let mut slots: BTreeMap<(&str, bool, Factor), Slot> = BTreeMap::new();
        for (index, adapter) in adapters.iter().enumerate() {
            let layout = &adapter.layout;
            for (number, module) in layout.modules.iter().enumerate() {
                for factor in [Factor::A, Factor::B] {
                    let tensor = module.tensor(factor);
                    let shape = &layout.tensors[tensor].shape;
                    let holder = Holder { adapter: index, module: number, tensor };
                    match slots.entry((&module.name, module.kind == Kind::Embedding, factor)) {
                        Entry::Vacant(place) => drop(place.insert(Slot {
                            name: module.tensor_name(factor),
                            shape: shape.clone(),
                            factor,
                            holders: vec![holder],
                        })),
                        Entry::Occupied(mut place) => {
                            let slot = place.get_mut();
                            if slot.shape != *shape {
                                return Err(Error::Shape {
                                    path: adapter.path.clone(),
                                    tensor: slot.name.clone(),
                                    found: shape.clone(),
                                    other: adapters[slot.holders[0].adapter].path.clone(),
                                    expected: slot.shape.clone(),
                                });
                            }
                            slot.holders.push(holder);
                        }
                    }
                }
            }
        }
        Ok(Self { adapters, slots: slots.into_values().collect() })
    }

    /// The tensor in which an adapter keeps a slot's factor.
    pub(crate) fn tensor(&self, holder: Holder) -> &'a Tensor {
        &self.adapters[holder.adapter].layout.tensors[holder.tensor]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, folder};

    fn open(specs: &[Spec]) -> Vec<Adapter> {
        let folder = folder();
        let open = |(i, spec): (usize, &Spec)| {
            Adapter::open(&spec.write(&folder, &i.to_string())).unwrap()
        };
        specs.iter().enumerate().map(open).collect()
    }

    #[test]
    fn tensors_are_matched_by_name_and_may_be_missing() {
        let all = Spec::default();
        let only_v = Spec { modules: vec!["v"], ..all.clone() };
        let adapters = open(&[only_v, all]);
        let bank = Bank::new(adapters.iter().collect()).unwrap();
        let holders: Vec<(&str, Vec<usize>)> = bank
            .slots
            .iter()
            .map(|slot| (&slot.name[..], slot.holders.iter().map(|h| h.adapter).collect()))
            .collect();
        assert_eq!(
            holders,
            [
                ("base_model.model.q.lora_A.weight", vec![1]),
                ("base_model.model.q.lora_B.weight", vec![1]),
                ("base_model.model.v.lora_A.weight", vec![0, 1]),
                ("base_model.model.v.lora_B.weight", vec![0, 1]),
            ]
        );
        for slot in &bank.slots {
            for holder in &slot.holders {
                assert_eq!(bank.tensor(*holder).name, slot.name);
            }
        }
    }

    #[test]
    fn another_rank_is_refused_with_both_shapes() {
        let adapters = open(&[Spec::default(), Spec { rank: 3, ..Spec::default() }]);
        let error = Bank::new(adapters.iter().collect()).err().unwrap().to_string();
        assert!(error.contains("[3, 37]") && error.contains("[2, 37]"), "{error}");
    }
}
