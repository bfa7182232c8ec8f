use super::*;
use crate::{
    Adapter, Cat, Io,
    testing::{Spec, Tensors, folder, read},
};
use faer::Mat;
use tempfile::TempDir;

struct Case {
    folder: TempDir,
    adapters: Vec<Adapter>,
}

type Outcomes = Vec<(usize, Vec<Kept>)>;

const PREFIX: &str = "base_model.model.";

impl Case {
    fn new(specs: &[Spec]) -> Self {
        let folder = folder();
        let open = |(i, spec): (usize, &Spec)| {
            Adapter::open(&spec.write(&folder, &format!("in{i}"))).unwrap()
        };
        let adapters = specs.iter().enumerate().map(open).collect();
        Self { folder, adapters }
    }

    fn terms(&self, coefficients: &[Vec<f64>]) -> Terms<'_> {
        let one_each = |row: &Vec<f64>| row.iter().map(|&c| vec![c]).collect();
        let coefficients: Vec<_> = coefficients.iter().map(one_each).collect();
        let strength = |adapter: &Adapter| vec![1.5; adapter.layout.modules.len()];
        let strengths: Vec<_> = self.adapters.iter().map(strength).collect();
        Terms::new(&self.adapters, &coefficients, Some(&strengths)).unwrap()
    }

    fn outputs(&self, targets: usize) -> Vec<PathBuf> {
        (0..targets).map(|k| self.folder.path().join(format!("out{k}"))).collect()
    }

    fn svd(
        &self,
        terms: &Terms<'_>,
        rank: Rank,
        options: Options,
    ) -> Result<(Vec<Tensors>, Outcomes)> {
        let outputs = self.outputs(terms.targets());
        let svd = Svd::new(terms, rank, 3, 2, options)?;
        let watch = Watch::default();
        let kept = svd.write(&outputs, Dtype::F32, &watch)?;
        assert_eq!(watch.done(), svd.plan().bytes);
        Ok((outputs.iter().map(read).collect(), kept))
    }

    fn cat(&self, terms: &Terms<'_>) -> Vec<Tensors> {
        let outputs = self.outputs(terms.targets());
        let cat = Cat::new(terms, Options::default()).unwrap();
        cat.write(&outputs, Dtype::F32, &Watch::default()).unwrap();
        outputs.iter().map(read).collect()
    }

    /// Σ c s B A in float64.
    fn exact(&self, specs: &[Spec], coefficients: &[f64], module: &str) -> Mat<f64> {
        let mut sum = Mat::zeros(specs[0].outer, specs[0].inner);
        for (spec, c) in specs.iter().zip(coefficients) {
            let Some(at) = spec.modules.iter().position(|name| *name == module) else { continue };
            let matrix = |tensor: usize| {
                let [rows, columns] = spec.tensors()[tensor].1;
                let numbers = spec.numbers(tensor);
                Mat::from_fn(rows, columns, |i, j| f64::from(numbers[i * columns + j]))
            };
            sum += 1.5 * *c * matrix(2 * at + 1) * matrix(2 * at);
        }
        sum
    }
}

fn of(tensors: &Tensors, module: &str) -> Mat<f64> {
    let tensor = |factor: &str| {
        let name = format!("{PREFIX}{module}.lora_{factor}.weight");
        &tensors.iter().find(|(found, _)| *found == name).unwrap().1
    };
    let (a, b) = (tensor("A"), tensor("B"));
    let rank = a.len() / 37;
    let a = Mat::from_fn(rank, 37, |i, j| f64::from(a[i * 37 + j]));
    Mat::from_fn(b.len() / rank, rank, |i, j| f64::from(b[i * rank + j])) * a
}

fn specs() -> Vec<Spec> {
    (0..5)
        .map(|i| Spec {
            rank: [2, 3, 1, 3, 2][i],
            modules: if i == 2 { vec!["v"] } else { vec!["q", "v"] },
            seed: i as u32 + 1,
            ..Spec::default()
        })
        .collect()
}

const COEFFICIENTS: [[f64; 5]; 2] = [[0.4, -0.3, 1.0, 0.0, 0.2], [0.0, 0.1, 0.1, 2.0, 0.0]];

fn rows() -> Vec<Vec<f64>> {
    COEFFICIENTS.iter().map(|row| row.to_vec()).collect()
}

#[test]
fn cat_is_the_exact_sum_also_where_ranks_differ_and_modules_are_missing() {
    let specs = specs();
    let case = Case::new(&specs);
    let terms = case.terms(&rows());
    assert_eq!(Cat::new(&terms, Options::default()).unwrap().ranks(), [8, 7]);
    for (tensors, coefficients) in case.cat(&terms).iter().zip(rows()) {
        for module in ["q", "v"] {
            let exact = case.exact(&specs, &coefficients, module);
            let error = (of(tensors, module) - &exact).norm_l2();
            assert!(error <= 1e-6 * exact.norm_l2(), "{module}: {error}");
        }
    }
}

#[test]
fn each_rank_is_the_best_approximation_and_what_it_keeps_is_said() {
    let specs = specs();
    let case = Case::new(&specs);
    let terms = case.terms(&rows());
    for rank in 1..=12 {
        let (found, kept) = case.svd(&terms, Rank::Fixed(rank), Options::default()).unwrap();
        let targets = found.iter().zip(&kept).zip(rows()).zip([8, 7]);
        for (((tensors, kept), coefficients), most) in targets {
            assert_eq!(kept.0, rank.min(most));
            for (module, kept) in ["q", "v"].iter().zip(&kept.1) {
                let exact = case.exact(&specs, &coefficients, module);
                let svd = exact.thin_svd().unwrap();
                let s = svd.S().column_vector();
                let rank = rank.min(s.nrows());
                let best = Mat::from_fn(exact.nrows(), rank, |i, j| svd.U()[(i, j)] * s[j])
                    * svd.V().subcols(0, rank).transpose();
                let norm = exact.norm_l2();
                let error = (of(tensors, module) - best).norm_l2();
                assert!(error <= 2e-6 * norm, "{module}, rank {rank}: {error} of {norm}");
                let wanted: f64 = s.iter().take(rank).map(|s| s * s).sum();
                assert!(kept.exact && kept.module == *module);
                assert!((kept.energy - norm * norm).abs() <= 1e-9 * norm * norm);
                assert!((kept.kept - wanted).abs() <= 1e-9 * norm * norm);
            }
        }
    }
}

#[test]
fn a_share_of_the_energy_chooses_the_rank_that_every_module_needs() {
    let specs = specs();
    let case = Case::new(&specs);
    let terms = case.terms(&rows());
    for share in [0.3, 0.9, 1.0] {
        let (_, kept) = case.svd(&terms, Rank::Energy(share), Options::default()).unwrap();
        for ((rank, kept), coefficients) in kept.iter().zip(rows()) {
            let needed = |module: &&str| needed(&case.exact(&specs, &coefficients, module), share);
            assert_eq!(*rank, ["q", "v"].iter().map(needed).max().unwrap(), "{share}");
            assert!(kept.iter().all(|k| k.kept >= share * k.energy * (1.0 - 1e-9)));
        }
    }
}

/// The least rank that keeps a share of a matrix's energy.
fn needed(matrix: &Mat<f64>, share: f64) -> usize {
    let s: Vec<f64> = matrix.singular_values().unwrap();
    let total: f64 = s.iter().map(|s| s * s).sum();
    let mut sum = 0.0;
    let enough = |s: &f64| {
        sum += s * s;
        sum >= share * total * (1.0 - 1e-9)
    };
    s.iter().position(enough).unwrap() + 1
}

#[test]
fn a_sketch_comes_near_the_best_and_its_energy_near_the_whole() {
    let specs: Vec<Spec> = (0..60)
        .map(|i| Spec { rank: 9, inner: 37, outer: 41, seed: i, ..Spec::default() })
        .collect();
    let case = Case::new(&specs);
    let weights: Vec<f64> = (0..60).map(|i| 0.8f64.powi(i)).collect();
    let terms = case.terms(std::slice::from_ref(&weights));
    let svd = Svd::new(&terms, Rank::Fixed(5), 3, 2, Options::default()).unwrap();
    assert!(!svd.is_exact() && svd.plan().bytes == 6 * 60 * 9 * (37 + 41) * 2 * 4);
    let (found, kept) = case.svd(&terms, Rank::Fixed(5), Options::default()).unwrap();
    for (module, kept) in ["q", "v"].iter().zip(&kept[0].1) {
        let exact = case.exact(&specs, &weights, module);
        let s: Vec<f64> = exact.singular_values().unwrap();
        let best = s[5..].iter().map(|s| s * s).sum::<f64>().sqrt();
        let error = (of(&found[0], module) - &exact).norm_l2();
        assert!(error <= 1.02 * best, "{error} {best}");
        let energy = exact.squared_norm_l2();
        assert!(!kept.exact && (kept.energy / energy - 1.0).abs() < 0.05, "{kept:?} {energy}");
    }
    // All of the energy of matrices of at most 96 rows or columns is in the sketch.
    let share = 0.9;
    let (_, kept) = case.svd(&terms, Rank::Energy(share), Options::default()).unwrap();
    let needed = |module: &&str| needed(&case.exact(&specs, &weights, module), share);
    assert_eq!(kept[0].0, ["q", "v"].iter().map(needed).max().unwrap());
    for threads in [1, 3] {
        for io in [Io::Read, Io::Mmap] {
            let options = Options { threads, io, ..Options::default() };
            assert_eq!(case.svd(&terms, Rank::Fixed(5), options).unwrap().0, found);
        }
    }
}

#[test]
fn results_do_not_depend_on_threads_or_other_targets() {
    let case = Case::new(&specs());
    let terms = case.terms(&rows());
    let one = Options { threads: 1, ..Options::default() };
    let (found, _) = case.svd(&terms, Rank::Fixed(4), one.clone()).unwrap();
    let (again, _) =
        case.svd(&terms, Rank::Fixed(4), Options { threads: 5, ..one.clone() }).unwrap();
    assert_eq!(found, again);
    let all = vec![vec![1.0; 5], vec![0.5, 1.0, -1.0, 2.0, 0.1]];
    let both = case.svd(&case.terms(&all), Rank::Fixed(4), one.clone()).unwrap().0;
    for (row, found) in all.iter().zip(&both) {
        let alone = case.svd(&case.terms(std::slice::from_ref(row)), Rank::Fixed(4), one.clone());
        assert_eq!(alone.unwrap().0[0], *found);
    }
}

#[test]
fn an_adapter_of_zeros_gives_zeros_and_faults_are_named() {
    let case = Case::new(&specs()[..1]);
    let terms = Terms::new(&case.adapters, &[vec![vec![1.0]]], Some(&[vec![0.0, 0.0]])).unwrap();
    let (found, kept) = case.svd(&terms, Rank::Fixed(2), Options::default()).unwrap();
    assert!(found[0].iter().all(|(_, numbers)| numbers.iter().all(|&x| x == 0.0)));
    assert_eq!((kept[0].1[0].energy, kept[0].1[0].kept), (0.0, 0.0));
    case.svd(&terms, Rank::Energy(0.9), Options::default()).unwrap();
    for rank in [Rank::Fixed(0), Rank::Energy(0.0), Rank::Energy(f64::NAN)] {
        assert!(matches!(
            case.svd(&terms, rank, Options::default()).unwrap_err(),
            Error::Setting(_)
        ));
    }
    let bad = Spec { first: Some(f32::NAN), ..Spec::default() };
    let case = Case::new(&[Spec::default(), bad]);
    let terms = case.terms(&[vec![1.0, 1.0]]);
    let error = case.svd(&terms, Rank::Fixed(2), Options::default()).unwrap_err().to_string();
    assert!(error.contains("in1") && error.contains("NaN"), "{error}");
    let other = Spec { inner: 38, ..Spec::default() };
    let case = Case::new(&[Spec::default(), other]);
    let error = case.svd(&case.terms(&[vec![1.0, 1.0]]), Rank::Fixed(2), Options::default());
    assert!(matches!(error.unwrap_err(), Error::Shape { .. }));
}
