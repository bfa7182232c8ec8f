//! `ties` and `dare_ties` beside `soup` of the same bank, in turns in one run, on a bank that
//! `benches/bank.py` wrote:
//!
//! ```sh
//! python benches/bank.py /tmp/bank --members 64
//! cargo bench --bench sparse -- /tmp/bank [--density 0.2] [--io mmap] [--threads 2]
//! ```
//!
//! The answer of `ties` is checked first, against a plain loop in float64 after a full sort.

use std::{
    error::Error,
    hint::black_box,
    path::{Path, PathBuf},
    time::Instant,
};

use lorameta::{
    Adapter, Dtype, Io, Majority, Opening, Options, Rule, Soup, Sparse, Sparsity, Terms, Watch,
    kernels::widest,
};

const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let (mut bank, mut density, mut options) = (PathBuf::new(), 0.2, Options::default());
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let mut next = || words.next().ok_or(format!("{word} needs a value"));
        match &word[..] {
            "--density" => density = next()?.parse()?,
            "--threads" => options.threads = next()?.parse()?,
            "--memory" => options.memory = next()?.parse::<usize>()? << 20,
            "--io" => options.io = if next()? == "mmap" { Io::Mmap } else { Io::Read },
            _ => bank = word.into(),
        }
    }
    if !bank.is_dir() {
        return Err("usage: sparse BANK [--density 0.2] …".into());
    }
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&bank)?
        .map(|entry| entry.map(|entry| entry.path().join("adapter_model.safetensors")))
        .collect::<Result<_, _>>()?;
    paths.retain(|path| path.is_file());
    paths.sort();
    let adapters = Adapter::open_all(&paths, &Opening::default())
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let n = adapters.len();
    let weights: Vec<f64> = (0..n).map(|i| 1.0 - 0.01 * i as f64).collect();
    let terms = Terms::new(&adapters, &[weights.iter().map(|&w| vec![w]).collect()], None)?;
    let folder = tempfile::tempdir()?;
    let output = [folder.path().join("out")];
    let sparse = |rule| {
        let sparsity = Sparsity { rule, density, majority: Majority::Total, seed: 1 };
        Sparse::new(&terms, sparsity, options.clone())
    };
    let soup = Soup::new(&terms, options.clone())?;
    let jobs = [Rule::Ties, Rule::DareTies, Rule::MagnitudePrune, Rule::DareLinear]
        .map(|rule| sparse(rule).map(|job| (rule, job)))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let (_, ties) = &jobs[0];
    println!(
        "{n} adapters, {:.2} GB; ties: {} threads, {:.1} MiB planned, {:.2} GB to read",
        soup.plan().bytes as f64 / 1e9,
        ties.plan().threads,
        ties.plan().memory as f64 / f64::from(1 << 20),
        ties.plan().bytes as f64 / 1e9
    );
    let watch = Watch::default();
    ties.write(&output, Dtype::F32, &watch)?;
    assert_eq!(watch.done(), ties.plan().bytes);
    check(&adapters, &weights, density, &output[0])?;
    println!("ties checked against float64");

    let timed = |work: &dyn Fn() -> lorameta::Result<()>| -> Result<f64, Box<dyn Error>> {
        let start = Instant::now();
        work()?;
        Ok(black_box(start).elapsed().as_secs_f64())
    };
    let mut times = vec![Vec::new(); jobs.len() + 1];
    for _ in 0..ROUNDS {
        times[0].push(timed(&|| soup.write(&output, Dtype::F32, &Watch::default()))?);
        for ((_, job), times) in jobs.iter().zip(&mut times[1..]) {
            times.push(timed(&|| job.write(&output, Dtype::F32, &Watch::default()))?);
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    println!("soup            {:6.3} s", medians[0]);
    for ((rule, _), seconds) in jobs.iter().zip(&medians[1..]) {
        println!(
            "{:15} {seconds:6.3} s  {:5.2} times soup",
            format!("{rule:?}"),
            seconds / medians[0]
        );
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Compare the first and the last tensor with the definition.
fn check(
    adapters: &[Adapter],
    weights: &[f64],
    density: f64,
    output: &Path,
) -> Result<(), Box<dyn Error>> {
    let output = Adapter::open(output)?;
    let names: Vec<&str> = adapters[0].layout.tensors.iter().map(|t| &t.name[..]).collect();
    for name in [names[0], names[names.len() - 1]] {
        let got = tensor(&output, name)?;
        let members = adapters
            .iter()
            .map(|adapter| {
                let mut numbers = tensor(adapter, name)?;
                let mut order: Vec<usize> = (0..numbers.len()).collect();
                order.sort_by(|&i, &j| numbers[j].abs().total_cmp(&numbers[i].abs()));
                let kept = (density * numbers.len() as f64) as usize;
                order[kept..].iter().for_each(|&i| numbers[i] = 0.0);
                Ok(numbers)
            })
            .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        let (mut error, mut norm) = (0.0, 0.0);
        for (j, got) in got.iter().enumerate() {
            let column = || members.iter().map(|row| f64::from(row[j])).zip(weights);
            let positive = column().map(|(x, _)| x).sum::<f64>() >= 0.0;
            let agreed = || column().filter(|(x, _)| *x != 0.0 && (*x > 0.0) == positive);
            let sum: f64 = agreed().map(|(x, w)| x * w.signum() * w.abs().sqrt()).sum();
            let expected = sum / agreed().count().max(1) as f64;
            norm += expected * expected;
            error += (f64::from(*got) - expected).powi(2);
        }
        // Weights are positive, so that A and B are weighted alike.
        assert!(error.sqrt() <= 1e-6 * norm.sqrt(), "{name}: {error} of {norm}");
    }
    Ok(())
}

fn tensor(adapter: &Adapter, name: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    let found = adapter.layout.tensors.iter().find(|tensor| tensor.name == name);
    let found = found.ok_or("no such tensor")?;
    let bytes = std::fs::read(&adapter.path)?;
    let mut numbers = vec![0.0; found.len()];
    let range = found.bytes.start as usize..found.bytes.end as usize;
    (widest().widen)(found.dtype, &bytes[range], &mut numbers);
    Ok(numbers)
}
