use std::{collections::BTreeMap, path::Path};

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::{
    Adapter, first_match,
    kernels::widest,
    testing::{Spec, Tensors, folder, read},
};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/peft_combine");
const PREFIX: &str = "base_model.model.";

/// The scaling of each module, from `adapter_config.json`.
fn strengths(folder: &Path, adapter: &Adapter) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let names: Vec<String> = adapter.layout.modules.iter().map(|m| m.name.clone()).collect();
    let own = |key: &str, otherwise: &str| {
        let patterns = config[key].as_object().unwrap();
        let keys: Vec<String> = patterns.keys().cloned().collect();
        let found = first_match(&keys, &names).unwrap();
        let value = |at: Option<usize>| at.map_or(&config[otherwise], |at| &patterns[&keys[at]]);
        found.into_iter().map(|at| value(at).as_f64().unwrap()).collect::<Vec<_>>()
    };
    let root = config["use_rslora"].as_bool().unwrap();
    let one = |(alpha, rank): (f64, f64)| alpha / if root { rank.sqrt() } else { rank };
    own("alpha_pattern", "lora_alpha").into_iter().zip(own("rank_pattern", "r")).map(one).collect()
}

struct Members {
    adapters: Vec<Adapter>,
    strengths: Vec<Vec<f64>>,
}

impl Members {
    fn of(case: &Value) -> Self {
        let names = case["adapters"].as_array().unwrap().iter();
        let folders: Vec<PathBuf> = names
            .map(|name| Path::new(GOLDEN).join("adapters").join(name.as_str().unwrap()))
            .collect();
        let paths: Vec<PathBuf> =
            folders.iter().map(|folder| folder.join("adapter_model.safetensors")).collect();
        let adapters: Vec<Adapter> =
            paths.iter().map(|path| Adapter::open(path).unwrap()).collect();
        let strengths =
            folders.iter().zip(&adapters).map(|(folder, adapter)| strengths(folder, adapter));
        Self { strengths: strengths.collect(), adapters }
    }

    fn terms(&self, weights: &[f64]) -> Terms<'_> {
        let weights = weights.iter().map(|&w| vec![w]).collect();
        Terms::new(&self.adapters, &[weights], Some(&self.strengths)).unwrap()
    }
}

fn rule(name: &str) -> Rule {
    match name.trim_end_matches("_svd") {
        "linear" => Rule::Linear,
        "magnitude_prune" => Rule::MagnitudePrune,
        "ties" => Rule::Ties,
        "dare_linear" => Rule::DareLinear,
        _ => Rule::DareTies,
    }
}

fn sparsity(case: &Value) -> Sparsity {
    Sparsity {
        rule: rule(case["combination_type"].as_str().unwrap()),
        density: case["density"].as_f64().unwrap_or(0.5),
        majority: match case["majority_sign_method"].as_str() {
            Some("frequency") => Majority::Frequency,
            _ => Majority::Total,
        },
        seed: 0,
    }
}

/// The masks that PEFT drew: module by module, all A before all B.
fn recorded(case: &Value, members: &Members) -> Option<Masks> {
    if !sparsity(case).rule.is_random() {
        return None;
    }
    let bytes = std::fs::read(Path::new(GOLDEN).join(case["extra"].as_str().unwrap())).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let dense = case["combination_type"].as_str().unwrap().ends_with("_svd");
    let factors: &[_] = if dense { &[None] } else { &[Some(Factor::A), Some(Factor::B)] };
    let mut masks = BTreeMap::new();
    for module in case["module_order"].as_array().unwrap() {
        let module = module.as_str().unwrap();
        for factor in factors {
            for (i, adapter) in members.adapters.iter().enumerate() {
                if adapter.layout.modules.iter().any(|own| own.name == module) {
                    let mask = file.tensor(&format!("mask/{:03}", masks.len())).unwrap();
                    // Eight numbers a byte.
                    let bits =
                        mask.data().iter().flat_map(|byte| (0..8).map(move |i| byte >> i & 1));
                    masks.insert((module.to_owned(), *factor, i), bits.collect::<Vec<u8>>());
                }
            }
        }
    }
    assert_eq!(masks.len() as u64, case["mask_count"].as_u64().unwrap());
    let given = move |module: &str, factor, i| masks[&(module.to_owned(), factor, i)].clone();
    Some(Masks::Given(Box::new(given)))
}

impl Rule {
    fn is_random(self) -> bool {
        matches!(self, Rule::DareLinear | Rule::DareTies)
    }
}

fn cases(kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(Path::new(GOLDEN).join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    manifest[kind].as_array().unwrap().clone()
}

fn weights(case: &Value) -> Vec<f64> {
    case["weights"].as_array().unwrap().iter().filter_map(Value::as_f64).collect()
}

/// Cases that mean something: not those in which PEFT took what it should have refused. It then
/// ignored weights silently (`x__fewer_weights`, `x__more_weights`: `Terms` says that they are not
/// as many as the adapters), took NaN for a weight, DoRA for a plain LoRA, or left out modules that
/// were to be saved; and a density of 0 (`ties__density_0`, `x__dare_density_0`), of which nothing
/// or NaN is left, or above 1, is refused: see `densities_out_of_range_are_refused`.
fn meaningful(case: &Value, dense: bool) -> bool {
    let (id, kind) = (case["id"].as_str().unwrap(), case["combination_type"].as_str().unwrap());
    !matches!(kind, "cat" | "svd")
        && kind.ends_with("_svd") == dense
        && !id.starts_with("x__")
        && id != "ties__density_0"
}

fn golden(case: &Value) -> Tensors {
    read(&Path::new(GOLDEN).join(case["tensors"].as_str().unwrap()))
}

#[test]
fn factors_equal_those_of_peft() {
    let (mut seen, mut ties, mut all) = (0, 0, 0);
    for case in cases("cases").iter().filter(|case| meaningful(case, false)) {
        let id = case["id"].as_str().unwrap();
        let members = Members::of(case);
        let terms = members.terms(&weights(case));
        let mut job = Sparse::new(&terms, sparsity(case), Options::default()).unwrap();
        job.masks = recorded(case, &members).unwrap_or(job.masks);
        let folder = folder();
        let output = folder.path().join("out");
        let watch = Watch::default();
        job.write(std::slice::from_ref(&output), Dtype::F32, &watch).unwrap();
        assert_eq!(watch.done(), job.plan().bytes, "{id}");
        // The numbers are those of PEFT also where the first adapter is rsLoRA, but there PEFT's
        // config keeps `use_rslora`, and its result is √8 too strong (`result_scaling`). Ours has
        // a scaling of 1, always.
        let (got, expected) = (read(&output), golden(case));
        assert_eq!(got.len(), expected.len(), "{id}");
        for ((name, got), (other, expected)) in got.iter().zip(&expected) {
            assert_eq!(name, other, "{id}");
            // Two adapters with the same patterns: PEFT's file keeps the modules' own ranks beside
            // a config of one rank, and cannot be loaded. Ours is padded with zeros to one rank.
            let expected = padded(expected, got.len(), name);
            let free = free_ties(&members.adapters, name, job.sparsity, folder.path());
            for (j, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let same = (got - expected).abs() <= 1e-6;
                assert!(same || free.contains(&j), "{id}, {name}: {got} {expected}");
            }
            ties += free.len();
            all += got.len();
        }
        seen += 1;
    }
    assert_eq!(seen, 33);
    assert!(ties * 100 < all, "{ties} of {all} numbers may differ");
}

/// Where it is not said which of equal magnitudes is kept: `torch.topk` takes any, ours the first.
/// Only 16-bit members have such.
fn free_ties(adapters: &[Adapter], name: &str, sparsity: Sparsity, folder: &Path) -> Vec<usize> {
    if !sparsity.rule.prunes() {
        return vec![];
    }
    let of = |adapter: &Adapter| {
        let tensors = read(&as_f32(folder, adapter));
        let Some((_, numbers)) = tensors.iter().find(|(found, _)| found == name) else {
            return vec![];
        };
        let mut sorted: Vec<f32> = numbers.iter().map(|x| x.abs()).collect();
        sorted.sort_by(|x, y| y.total_cmp(x));
        let kept = sparsity.kept(sorted.len());
        if kept == sorted.len() || sorted[kept - 1] != sorted[kept] {
            return vec![];
        }
        (0..sorted.len()).filter(|&j| numbers[j].abs() == sorted[kept]).collect()
    };
    adapters.iter().flat_map(of).collect()
}

/// Rows of A or columns of B up to rank 8, which all of these results have.
fn padded(numbers: &[f32], length: usize, name: &str) -> Vec<f32> {
    let rank = 8 * numbers.len() / length;
    if name.contains("_A") {
        [numbers, &vec![0.0; length - numbers.len()]].concat()
    } else {
        numbers.chunks(rank).flat_map(|row| [row, &vec![0.0; 8 - rank]].concat()).collect()
    }
}

/// B A of each module.
fn products(tensors: &Tensors, rank: usize) -> Vec<(String, Vec<f64>)> {
    let half = |name: &str| tensors.iter().find(|(found, _)| found == name).map(|(_, x)| x);
    let one = |(name, a): &(String, Vec<f32>)| {
        let b = half(&name.replace("lora_A", "lora_B"))?;
        let columns = a.len() / rank;
        let mut product = vec![0.0; b.len() / rank * columns];
        for (row, b) in product.chunks_mut(columns).zip(b.chunks(rank)) {
            for (b, a) in b.iter().zip(a.chunks(columns)) {
                row.iter_mut().zip(a).for_each(|(x, a)| *x += f64::from(*b) * f64::from(*a));
            }
        }
        let module = name.strip_prefix(PREFIX)?.strip_suffix(".lora_A.weight")?;
        Some((module.to_owned(), product))
    };
    tensors.iter().filter(|(name, _)| name.contains("lora_A")).filter_map(one).collect()
}

#[test]
fn dense_products_equal_those_of_peft() {
    let mut seen = [0, 0];
    for case in cases("cases").iter().filter(|case| meaningful(case, true)) {
        let id = case["id"].as_str().unwrap();
        let members = Members::of(case);
        let terms = members.terms(&weights(case));
        let rank = case["result"]["r"].as_u64().unwrap() as usize;
        let options = Options::default();
        let mut job = Dense::new(&terms, sparsity(case), rank, options.clone()).unwrap();
        job.masks = recorded(case, &members).unwrap_or(job.masks);
        let folder = folder();
        let output = folder.path().join("out");
        job.write(std::slice::from_ref(&output), Dtype::F32, &Watch::default()).unwrap();
        let (got, expected) = (products(&read(&output), rank), products(&golden(case), rank));
        assert_eq!(got.len(), expected.len(), "{id}");
        for ((name, got), (other, expected)) in got.iter().zip(&expected) {
            assert_eq!(name, other, "{id}");
            for (got, expected) in got.iter().zip(expected) {
                assert!((got - expected).abs() <= 1e-5, "{id}, {name}: {got} {expected}");
            }
        }
        seen[0] += 1;
        let Some(extra) = case["extra"].as_str().map(|extra| Path::new(GOLDEN).join(extra)) else {
            continue;
        };
        let Ok(bytes) = std::fs::read(extra) else { continue };
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let watch = Watch::default();
        let reader = Reader::open(&terms.adapters, options.io, false, &watch).unwrap();
        for (joint, sum) in job.merged(&reader) {
            let Ok(view) = file.tensor(&format!("pre_svd/{joint}")) else { continue };
            let mut expected = vec![0.0; sum.len()];
            (widest().widen)(Dtype::F32, view.data(), &mut expected);
            for (got, expected) in sum.iter().zip(&expected) {
                assert!((got - expected).abs() <= 1e-5, "{id}, {joint}: {got} {expected}");
            }
            seen[1] += 1;
        }
    }
    assert_eq!(seen, [25, 4 * 8]);
}

#[test]
fn what_peft_cannot_stack_is_refused_by_name() {
    let mut seen = 0;
    for case in cases("rejected") {
        let id = case["id"].as_str().unwrap();
        if !id.ends_with("diff_ranks") && !id.contains("rank_pattern") {
            continue;
        }
        let members = Members::of(&case);
        let terms = members.terms(&weights(&case));
        let error = Sparse::new(&terms, sparsity(&case), Options::default()).err().unwrap();
        let text = error.to_string();
        assert!(text.contains(".lora_A.weight") && text.contains("svd"), "{id}: {text}");
        seen += 1;
    }
    assert_eq!(seen, 7);
}

#[test]
fn densities_out_of_range_are_refused() {
    let case = &cases("cases")[0];
    let members = Members::of(case);
    let terms = members.terms(&[0.5, 0.5]);
    for density in [0.0, -0.1, 1.5, f64::NAN] {
        let sparsity = Sparsity { rule: Rule::Ties, density, ..sparsity(case) };
        let error = Sparse::new(&terms, sparsity, Options::default()).err().unwrap();
        assert!(error.to_string().contains("(0, 1]"), "{error}");
        assert!(Dense::new(&terms, sparsity, 2, Options::default()).is_err());
    }
    let linear = Sparsity { rule: Rule::Linear, density: 0.0, ..sparsity(case) };
    assert!(Sparse::new(&terms, linear, Options::default()).is_ok());
    assert!(Dense::new(&terms, linear, 0, Options::default()).is_err());
    let small = Options { memory: 1 << 10, ..Options::default() };
    let error = Dense::new(&terms, linear, 2, small).err().unwrap();
    assert!(matches!(error, Error::Memory { given: 0, needed: 1.. }), "{error}");
}

/// The sum of one tensor's members, in float64 and by the definition.
fn oracle(members: &[Vec<f32>], weights: &[f64], sparsity: &Sparsity) -> Vec<f64> {
    let count = members[0].len();
    let thinned: Vec<Vec<f64>> = members
        .iter()
        .map(|numbers| {
            let mut order: Vec<usize> = (0..count).collect();
            if sparsity.rule != Rule::Linear {
                order.sort_by(|&i, &j| {
                    numbers[j].abs().total_cmp(&numbers[i].abs()).then(i.cmp(&j))
                });
                order.truncate(sparsity.kept(count));
            }
            let mut kept = vec![0.0; count];
            order.iter().for_each(|&i| kept[i] = f64::from(numbers[i]));
            kept
        })
        .collect();
    let column = |j: usize| {
        let all = || thinned.iter().map(|row| row[j]).zip(weights);
        if sparsity.rule != Rule::Ties {
            return all().map(|(x, w)| x * w).sum();
        }
        let signed = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
        let vote: f64 = match sparsity.majority {
            Majority::Total => all().map(|(x, _)| x).sum(),
            Majority::Frequency => all().map(|(x, _)| signed(x)).sum(),
        };
        let elected = if vote >= 0.0 { 1.0 } else { -1.0 };
        let agreed = || all().filter(|(x, _)| signed(*x) == elected);
        agreed().map(|(x, w)| x * w).sum::<f64>() / agreed().count().max(1) as f64
    };
    (0..count).map(column).collect()
}

struct Case {
    folder: tempfile::TempDir,
    adapters: Vec<Adapter>,
}

impl Case {
    fn new(specs: &[Spec]) -> Self {
        let folder = folder();
        let open = |(i, spec): (usize, &Spec)| {
            Adapter::open(&spec.write(&folder, &format!("in{i}"))).unwrap()
        };
        Self { adapters: specs.iter().enumerate().map(open).collect(), folder }
    }

    fn terms(&self, weights: &[Vec<f64>]) -> Terms<'_> {
        let one_each = |row: &Vec<f64>| row.iter().map(|&w| vec![w]).collect();
        let weights: Vec<_> = weights.iter().map(one_each).collect();
        let strength = |adapter: &Adapter| vec![1.5; adapter.layout.modules.len()];
        let strengths: Vec<_> = self.adapters.iter().map(strength).collect();
        Terms::new(&self.adapters, &weights, Some(&strengths)).unwrap()
    }

    fn run(
        &self,
        weights: &[Vec<f64>],
        write: impl Fn(&Terms<'_>, &[PathBuf]) -> Result<()>,
    ) -> Vec<Tensors> {
        let output = |k: usize| self.folder.path().join(format!("out{k}"));
        let outputs: Vec<PathBuf> = (0..weights.len()).map(output).collect();
        write(&self.terms(weights), &outputs).unwrap();
        outputs.iter().map(read).collect()
    }
}

fn rules() -> impl Strategy<Value = Sparsity> {
    use Rule::{Linear, MagnitudePrune, Ties};
    let density = prop_oneof![Just(1.0), 0.01f64..1.0];
    let majority = prop_oneof![Just(Majority::Total), Just(Majority::Frequency)];
    (prop_oneof![Just(Linear), Just(MagnitudePrune), Just(Ties)], density, majority)
        .prop_map(|(rule, density, majority)| Sparsity { rule, density, majority, seed: 0 })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn factors_equal_the_definition(
        sparsity in rules(),
        weights in proptest::collection::vec(prop_oneof![-2.0f64..-0.1, 0.1f64..2.0], 2..12),
        (inner, outer, rank) in (1usize..40, 1usize..40, 1usize..5),
        halves: bool,
    ) {
        // As bfloat16 with zeros, so that magnitudes are often equal.
        let dtype = if halves { Dtype::BF16 } else { Dtype::F32 };
        let first = halves.then_some(0.0);
        let specs: Vec<Spec> = (0..weights.len() as u32)
            .map(|seed| Spec { inner, outer, rank, dtype, seed, first, ..Spec::default() })
            .collect();
        let case = Case::new(&specs);
        let got = case.run(std::slice::from_ref(&weights), |terms, outputs| {
            Sparse::new(terms, sparsity, Options::default())?
                .write(outputs, Dtype::F32, &Watch::default())
        });
        for (tensor, (name, got)) in got[0].iter().enumerate() {
            let members: Vec<Vec<f32>> =
                case.adapters.iter().map(|adapter| read(&as_f32(case.folder.path(), adapter))[tensor].1.clone()).collect();
            let factors: Vec<f64> = weights
                .iter()
                .map(|w| (1.5 * w).abs().sqrt() * if name.contains("_A") { w.signum() } else { 1.0 })
                .collect();
            for (got, expected) in got.iter().zip(oracle(&members, &factors, &sparsity)) {
                prop_assert!((f64::from(*got) - expected).abs() < 3e-6, "{name}: {got} {expected}");
            }
        }
    }
}

/// The same numbers in a float32 file: a sum of nothing but itself.
fn as_f32(folder: &Path, adapter: &Adapter) -> PathBuf {
    let path = folder.join("wide");
    let adapters = [adapter.clone()];
    let terms = Terms::new(&adapters, &[vec![vec![1.0]]], None).unwrap();
    let soup = crate::Soup::new(&terms, Options::default()).unwrap();
    soup.write(std::slice::from_ref(&path), Dtype::F32, &Watch::default()).unwrap();
    path
}

const RULES: [Rule; 5] =
    [Rule::Linear, Rule::MagnitudePrune, Rule::Ties, Rule::DareLinear, Rule::DareTies];

#[test]
fn targets_and_threads_change_no_bit() {
    // A is read twice for all targets, and once for one.
    let spec = |seed| Spec { inner: 8001, outer: 2003, rank: 5, seed, ..Spec::default() };
    let case = Case::new(&(0..5).map(spec).collect::<Vec<_>>());
    // All vote; the same with other weights; without one; one alone.
    let weights = [
        vec![0.4, 0.3, 0.2, 0.1, -0.2],
        vec![1.0, 0.5, -0.5, 0.1, 0.1],
        vec![0.0, 0.3, 0.2, 0.1, 0.2],
        vec![0.0, 0.0, 0.0, 0.7, 0.0],
    ];
    for rule in RULES {
        let sparsity = Sparsity { rule, density: 0.3, majority: Majority::Total, seed: 7 };
        let run = |weights: &[Vec<f64>], threads, io| {
            let options = Options { threads, io, ..Options::default() };
            case.run(weights, |terms, outputs| {
                Sparse::new(terms, sparsity, options.clone())?.write(
                    outputs,
                    Dtype::F32,
                    &Watch::default(),
                )
            })
        };
        let together = run(&weights, 1, Io::Read);
        assert!(run(&weights, 2, Io::Mmap) == together, "{rule:?}");
        assert!(run(&weights, 5, Io::Read) == together, "{rule:?}");
        for (weights, together) in weights.iter().zip(&together) {
            let alone = run(std::slice::from_ref(weights), 2, Io::Read);
            assert!(alone[0] == *together, "{rule:?} {weights:?}");
        }
        // A single adapter is taken whole.
        let (got, numbers) = (&together[3][1].1, read(&case.adapters[3].path)[1].1.clone());
        let root = (0.7f64 * 1.5).sqrt() as f32;
        assert!(got.iter().zip(&numbers).all(|(got, x)| *got == x * root), "{rule:?}");
    }
}

#[test]
fn dense_sums_of_many_targets_on_many_threads_equal_single_ones() {
    let spec =
        |seed| Spec { inner: 61, outer: 83, rank: 3 + seed as usize, seed, ..Spec::default() };
    let case = Case::new(&(0..3).map(spec).collect::<Vec<_>>());
    let weights = [vec![0.4, 0.3, -0.2], vec![0.0, 0.5, 0.5], vec![0.9, 0.0, 0.0]];
    for rule in RULES {
        let sparsity = Sparsity { rule, density: 0.4, majority: Majority::Frequency, seed: 7 };
        let run = |weights: &[Vec<f64>], threads| {
            let options = Options { threads, ..Options::default() };
            case.run(weights, |terms, outputs| {
                Dense::new(terms, sparsity, 12, options.clone())?.write(
                    outputs,
                    Dtype::F32,
                    &Watch::default(),
                )
            })
        };
        let together = run(&weights, 1);
        assert!(run(&weights, 5) == together, "{rule:?}");
        for (weights, together) in weights.iter().zip(&together) {
            assert!(run(std::slice::from_ref(weights), 2)[0] == *together, "{rule:?}");
        }
        if rule == Rule::Linear {
            // Of rank 12 at most, so that nothing is lost: the exact sum.
            let terms = case.terms(&weights[..1]);
            let output = case.folder.path().join("cat");
            let cat = crate::Cat::new(&terms, Options::default()).unwrap();
            cat.write(std::slice::from_ref(&output), Dtype::F32, &Watch::default()).unwrap();
            let expected = products(&read(&output), 12);
            for (got, expected) in products(&together[0], 12).iter().zip(&expected) {
                let near = |(x, y): (&f64, &f64)| (x - y).abs() < 1e-5;
                assert!(got.1.iter().zip(&expected.1).all(near));
            }
        }
    }
}

#[test]
fn sums_beyond_the_output_type_are_refused() {
    let large = Spec { first: Some(6e4), ..Spec::default() };
    let case = Case::new(&[large.clone(), large]);
    let terms = case.terms(&[vec![3.0, 3.0]]);
    let sparsity =
        Sparsity { rule: Rule::Linear, density: 1.0, majority: Majority::Total, seed: 0 };
    let job = Sparse::new(&terms, sparsity, Options::default()).unwrap();
    let output = case.folder.path().join("out");
    let error =
        job.write(std::slice::from_ref(&output), Dtype::F16, &Watch::default()).unwrap_err();
    assert!(matches!(error, Error::Overflow { .. }), "{error}");
    assert!(!output.exists());
}
