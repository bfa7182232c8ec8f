//! The weighted sum beside what limits it, on a bank that `benches/bank.py` wrote:
//!
//! ```sh
//! python benches/bank.py /tmp/bank --members 64
//! cargo bench --bench soup -- /tmp/bank [--targets 32] [--io read] [--cold] [--threads 2]
//! ```
//!
//! Rounds of job and limits take turns, because these machines are shared; the ratio is that of the
//! medians. The answer is checked first, against a plain loop in float64.

#![expect(unsafe_code, reason = "the plain loops that are the limit: a map, and wider registers")]

use std::{
    error::Error,
    fs::File,
    hint::black_box,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

use lorameta::{Adapter, Dtype, Io, Opening, Options, Soup, Terms, Watch, kernels::widest};
use memmap2::Mmap;

const ROUNDS: usize = 9;

struct Arguments {
    bank: PathBuf,
    targets: usize,
    io: Io,
    cold: bool,
    threads: usize,
    memory: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&arguments.bank)?
        .map(|entry| entry.map(|entry| entry.path().join("adapter_model.safetensors")))
        .collect::<Result<_, _>>()?;
    paths.sort();
    let adapters = Adapter::open_all(&paths, &Opening::default())
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let n = adapters.len();
    let weight = |k: usize, i: usize| 1.0 / (n as f64) + 1e-3 * (k as f64) - 1e-4 * (i as f64);
    let coefficients: Vec<Vec<f64>> =
        (0..arguments.targets).map(|k| (0..n).map(|i| weight(k, i)).collect()).collect();
    let options = Options {
        io: arguments.io,
        threads: arguments.threads,
        memory: arguments.memory << 20,
        ..Options::default()
    };
    let one_each = |row: &Vec<f64>| row.iter().map(|&c| vec![c]).collect();
    let terms =
        Terms::new(&adapters, &coefficients.iter().map(one_each).collect::<Vec<_>>(), None)?;
    let soup = Soup::new(&terms, options)?;
    let folder = tempfile::tempdir()?;
    let outputs: Vec<PathBuf> =
        (0..arguments.targets).map(|k| folder.path().join(k.to_string())).collect();
    let plan = soup.plan();
    let gigabytes = plan.bytes as f64 / 1e9;
    println!(
        "{n} adapters, {gigabytes:.2} GB, {} targets, {} threads, {:.0} MiB planned",
        arguments.targets,
        plan.threads,
        plan.memory as f64 / f64::from(1 << 20)
    );
    let watch = Watch::default();
    soup.write(&outputs, Dtype::F32, &watch)?;
    assert_eq!(watch.done(), plan.bytes, "each byte is read once");
    check(&adapters, &coefficients, &outputs)?;
    println!("checked against float64; bank read once: {:.2} GB", watch.done() as f64 / 1e9);

    let threads = std::thread::available_parallelism()?.get();
    let mut job = Vec::new();
    let mut read = Vec::new();
    let mut multiply = Vec::new();
    let mut put = Vec::new();
    let output = numbers(&adapters[0]) * 4;
    for _ in 0..if arguments.cold { 3 } else { ROUNDS } {
        read.push(timed(&arguments, || read_all(&paths, threads, arguments.cold))?);
        job.push(timed(&arguments, || soup.write(&outputs, Dtype::F32, &Watch::default()))?);
        put.push(timed(&arguments, || write_all(&outputs, output, threads))?);
        if arguments.targets > 1 {
            multiply.push(multiply_rate(threads));
        }
    }
    let (job, read, put) = (median(&mut job), median(&mut read), median(&mut put));
    let plain = if arguments.cold { "plain cold read" } else { "mapped read and add" };
    println!("job                  {job:6.3} s  {:6.2} GB/s", gigabytes / job);
    println!("{plain:20} {read:6.3} s  {:6.2} GB/s", gigabytes / read);
    println!(
        "plain write, flushed {put:6.3} s  {:6.2} GB/s",
        (output * outputs.len()) as f64 / put / 1e9
    );
    println!("read / job           {:.2}", read / job);
    println!("(read + write) / job {:.2}", (read + put) / job);
    if arguments.targets > 1 {
        let elements: f64 = adapters.iter().map(|a| numbers(a) as f64).sum();
        let work = 2.0 * arguments.targets as f64 * elements / 1e9;
        let rate = median(&mut multiply);
        println!("matrix multiply      {:6.3} s  {rate:.0} GFLOP/s", work / rate);
        println!("(max(read, multiply) + write) / job {:.2}", (read.max(work / rate) + put) / job);
    }
    Ok(())
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let mut found = Arguments {
        bank: PathBuf::new(),
        targets: 1,
        io: Io::Read,
        cold: false,
        threads: 0,
        memory: 64,
    };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let mut next = || words.next().ok_or(format!("{word} needs a value"));
        match &word[..] {
            "--targets" => found.targets = next()?.parse()?,
            "--threads" => found.threads = next()?.parse()?,
            "--memory" => found.memory = next()?.parse()?,
            "--io" => found.io = if next()? == "mmap" { Io::Mmap } else { Io::Read },
            "--cold" => found.cold = true,
            _ => found.bank = word.into(),
        }
    }
    if found.bank.is_dir() { Ok(found) } else { Err("usage: soup BANK [--targets K] …".into()) }
}

/// Seconds of one run; cold: with an empty page cache.
fn timed<T, E: Into<Box<dyn Error>>>(
    arguments: &Arguments,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<f64, Box<dyn Error>> {
    if arguments.cold {
        Command::new("sync").status()?;
        std::fs::write("/proc/sys/vm/drop_caches", "3")
            .map_err(|error| format!("--cold needs the right to drop the page cache: {error}"))?;
    }
    let start = Instant::now();
    black_box(work().map_err(Into::into)?);
    Ok(start.elapsed().as_secs_f64())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn numbers(adapter: &Adapter) -> usize {
    adapter.layout.tensors.iter().map(|tensor| tensor.len()).sum()
}

/// The limit: every file read once by `threads` threads, its numbers added up. Mapped, or, for a
/// cold read, by positional reads of 1 MiB.
fn read_all(paths: &[PathBuf], threads: usize, cold: bool) -> std::io::Result<f32> {
    let next = AtomicUsize::new(0);
    let one = || {
        let mut total = 0.0;
        while let Some(path) = paths.get(next.fetch_add(1, Relaxed)) {
            total += if cold { read_file(path)? } else { add_file(path)? };
        }
        Ok(total)
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or(Ok(0.0))).sum()
    })
}

fn read_file(path: &Path) -> std::io::Result<f32> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(f32::from(buffer[0]))
}

fn add_file(path: &Path) -> std::io::Result<f32> {
    let file = File::open(path)?;
    // SAFETY: the benchmark's own file, which nobody writes to.
    let map = unsafe { Mmap::map(&file)? };
    Ok(add(&map))
}

/// Add up the bytes as float32 whatever they are: the fastest loop that looks at each of them.
fn add(bytes: &[u8]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just detected.
        return unsafe { add_avx512(bytes) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: just detected.
        return unsafe { add_avx2(bytes) };
    }
    add_plain(bytes)
}

#[inline(always)]
fn add_plain(bytes: &[u8]) -> f32 {
    let mut sums = [0.0; 64];
    for chunk in bytes.as_chunks::<256>().0 {
        for (sum, x) in sums.iter_mut().zip(chunk.as_chunks::<4>().0) {
            *sum += f32::from_le_bytes(*x);
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_avx512(bytes: &[u8]) -> f32 {
    add_plain(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_avx2(bytes: &[u8]) -> f32 {
    add_plain(bytes)
}

/// The other limit: as many bytes as the job writes, by plain writes of 1 MiB, and flushed.
fn write_all(paths: &[PathBuf], size: usize, threads: usize) -> std::io::Result<()> {
    let next = AtomicUsize::new(0);
    let one = || {
        let buffer = vec![1; 1 << 20];
        while let Some(path) = paths.get(next.fetch_add(1, Relaxed)) {
            let mut file = File::create(path)?;
            for start in (0..size).step_by(buffer.len()) {
                file.write_all(&buffer[..buffer.len().min(size - start)])?;
            }
            file.sync_all()?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        handles.into_iter().try_for_each(|handle| handle.join().unwrap_or(Ok(())))
    })
}

/// GFLOP/s of a float32 matrix product that a maintained library computes.
fn multiply_rate(threads: usize) -> f64 {
    const SIZE: usize = 2048;
    let a = faer::Mat::<f32>::from_fn(SIZE, SIZE, |i, j| (i ^ j) as f32);
    let mut c = faer::Mat::<f32>::zeros(SIZE, SIZE);
    let start = Instant::now();
    faer::linalg::matmul::matmul(
        c.as_mut(),
        faer::Accum::Replace,
        a.as_ref(),
        a.as_ref(),
        1.0,
        faer::Par::rayon(threads),
    );
    black_box(&c);
    2.0 * (SIZE as f64).powi(3) / start.elapsed().as_secs_f64() / 1e9
}

/// Compare the first, a middle and the last tensor of the first and last target with float64.
fn check(
    adapters: &[Adapter],
    coefficients: &[Vec<f64>],
    outputs: &[PathBuf],
) -> Result<(), Box<dyn Error>> {
    let names: Vec<&str> = adapters[0].layout.tensors.iter().map(|t| &t.name[..]).collect();
    for target in [0, outputs.len() - 1] {
        let output = Adapter::open(&outputs[target])?;
        for name in [names[0], names[names.len() / 2], names[names.len() - 1]] {
            let got = tensor(&output, name)?;
            let mut sums = vec![0.0; got.len()];
            for (adapter, c) in adapters.iter().zip(&coefficients[target]) {
                for (sum, x) in sums.iter_mut().zip(tensor(adapter, name)?) {
                    *sum += c * f64::from(x);
                }
            }
            let norm = sums.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error =
                sums.iter().zip(&got).map(|(x, &y)| (x - f64::from(y)).powi(2)).sum::<f64>();
            assert!(error.sqrt() <= 1e-6 * norm, "{name}: {} of {norm}", error.sqrt());
        }
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
