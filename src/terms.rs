//! What each target takes of each adapter.

use crate::{
    adapter::Adapter,
    base::Base,
    error::{Error, Result},
    joint::Share,
};

/// The terms of sums over adapters, one sum for each target: Σ_i c_i s_i (what adapter i has).
/// Coefficients and strengths may differ from module to module.
pub struct Terms<'a> {
    /// The adapters that any target has a coefficient for; no other is ever read.
    pub(crate) adapters: Vec<&'a Adapter>,
    /// For each target and adapter of `adapters` its coefficient: one number, or one a module.
    coefficients: Vec<Vec<Vec<f64>>>,
    /// For each adapter of `adapters` the scaling of ΔW in each module of its layout.
    strengths: Option<Vec<Vec<f64>>>,
    /// The base's weights, which DoRA changes.
    pub(crate) base: Option<&'a Base>,
}

impl<'a> Terms<'a> {
    /// Sums of `adapters`: `coefficients` has for each target and adapter one number, or one for
    /// each module of the adapter's layout; `strengths`, where given, has for each adapter and
    /// module the scaling of ΔW beside the coefficient. Adapters that no target uses are left out.
    ///
    /// # Errors
    /// The numbers are not as many as they should be, or not finite; a target has none but zeros.
    pub fn new(
        adapters: &'a [Adapter],
        coefficients: &[Vec<Vec<f64>>],
        strengths: Option<&[Vec<f64>]>,
    ) -> Result<Self> {
        let fault = |what: &str| Err(Error::Setting(what.to_owned()));
        let modules = |i: usize| adapters[i].layout.modules.len();
        let one_each = |row: &Vec<Vec<f64>>| {
            row.len() == adapters.len()
                && row.iter().enumerate().all(|(i, c)| c.len() == 1 || c.len() == modules(i))
        };
        if coefficients.is_empty() || !coefficients.iter().all(one_each) {
            return fault("expected a coefficient for each adapter and target");
        }
        let most = f64::from(f32::MAX);
        if !coefficients.iter().flatten().flatten().all(|c| c.abs() <= most) {
            return fault("a coefficient is not a finite number of float32");
        }
        if coefficients.iter().any(|row| row.iter().flatten().all(|&c| c == 0.0)) {
            return fault("all coefficients of a target are zero");
        }
        let used = |i: &usize| coefficients.iter().any(|row| row[*i].iter().any(|&c| c != 0.0));
        let chosen: Vec<usize> = (0..adapters.len()).filter(used).collect();
        if let Some(all) = strengths {
            let fits = |i: &usize| {
                let own = all.get(*i);
                own.is_some_and(|s| s.len() == modules(*i) && s.iter().all(|s| s.is_finite()))
            };
            if !chosen.iter().all(fits) {
                return fault("expected a finite strength for each adapter and module");
            }
        }
        let of_chosen = |row: &[Vec<f64>]| chosen.iter().map(|&i| row[i].clone()).collect();
        Ok(Self {
            adapters: chosen.iter().map(|&i| &adapters[i]).collect(),
            coefficients: coefficients.iter().map(|row| of_chosen(row)).collect(),
            strengths: strengths.map(of_chosen),
            base: None,
        })
    }

    /// The same with the base's weights, without which no sum takes DoRA.
    pub fn with_base(self, base: Option<&'a Base>) -> Self {
        Self { base, ..self }
    }

    /// # Errors
    /// An adapter is DoRA, which `method` cannot take.
    pub(crate) fn plain(&self, method: &str) -> Result<()> {
        self.adapters.iter().try_for_each(|adapter| adapter.plain(&format!("`{method}`")))
    }

    /// The number of sums.
    pub fn targets(&self) -> usize {
        self.coefficients.len()
    }

    /// A target's coefficient for a module of an adapter.
    pub(crate) fn coefficient(&self, target: usize, adapter: usize, module: usize) -> f64 {
        let own = &self.coefficients[target][adapter];
        if own.len() == 1 { own[0] } else { own[module] }
    }

    /// Whether a target takes anything of a module of an adapter.
    pub(crate) fn takes(&self, target: usize, share: &Share) -> bool {
        self.coefficient(target, share.adapter, share.module) != 0.0
    }

    /// The scaling of an adapter's ΔW in a module, beside the coefficient.
    pub(crate) fn strength(&self, adapter: usize, module: usize) -> f64 {
        self.strengths.as_ref().map_or(1.0, |strengths| strengths[adapter][module])
    }

    /// What a target multiplies B A with.
    pub(crate) fn product(&self, target: usize, adapter: usize, module: usize) -> f64 {
        self.coefficient(target, adapter, module) * self.strength(adapter, module)
    }

    /// Whether a target takes nothing of an adapter.
    pub(crate) fn is_without(&self, target: usize, adapter: usize) -> bool {
        self.coefficients[target][adapter].iter().all(|&c| c == 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, folder};

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let folder = folder();
        let adapters = [Spec::default(), Spec::default()]
            .map(|spec| Adapter::open(&spec.write(&folder, "a")).unwrap());
        let one = |row: &[f64]| row.iter().map(|&c| vec![c]).collect::<Vec<_>>();
        let short: &[Vec<f64>] = &[vec![1.0], vec![1.0]];
        for (coefficients, strengths) in [
            (vec![], None),
            (vec![one(&[1.0])], None),
            (vec![one(&[0.0, 0.0])], None),
            (vec![one(&[1.0, f64::NAN])], None),
            (vec![one(&[1.0, 1e39])], None),
            (vec![vec![vec![1.0; 3], vec![1.0]]], None),
            (vec![one(&[1.0, 1.0])], Some(short)),
        ] {
            let error = Terms::new(&adapters, &coefficients, strengths).err().unwrap();
            assert!(matches!(error, Error::Setting(_)), "{error}");
        }
        let terms = Terms::new(&adapters, &[vec![vec![0.0], vec![2.0, 3.0]]], None).unwrap();
        assert_eq!(terms.adapters.len(), 1);
        assert_eq!((terms.coefficient(0, 0, 1), terms.strength(0, 1)), (3.0, 1.0));
    }
}
