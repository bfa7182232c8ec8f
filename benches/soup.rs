//! The weighted sum beside what limits it, on a bank that `benches/bank.py` wrote:
//!
//! ```sh
//! python benches/bank.py /tmp/bank --members 64
//! cargo bench --bench soup -- /tmp/bank [--targets 32] [--dtype float16] [--io mmap] [--cold | --written]
//! ```
//!
//! The limit is reading alone: the mapped files, their numbers added up; of many targets a
//! multiplication of matrices, if that takes longer. So the sum writes to memory (`--out` names
//! another folder than `/dev/shm`), and writing the same bytes plainly is timed beside it, as are
//! a copy out of the page cache and the job with its output on the disk.
//!
//! Files that were just written lie in the page cache in pieces of 4 KiB, and are slower to read than
//! those that were read from the disk; so they are dropped and read first, as after a start of the
//! machine. `--written` leaves them as they are.
//!
//! The answer is checked first, against a plain loop in float64. Then all of it takes turns, because
//! these machines are shared; the fastest of each is shown, because neighbours only slow it down.

#![expect(
    unsafe_code,
    reason = "the plain loops that are the limit: a map, and wider registers; a call"
)]

use std::{
    error::Error,
    fs::File,
    hint::black_box,
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

use lorameta::{
    Adapter, Dtype, Io, Opening, Options, Order, Soup, Terms, Watch,
    kernels::widest,
    layout::{Factor, Module},
};
use memmap2::Mmap;

const ROUNDS: usize = 9;

struct Arguments {
    bank: PathBuf,
    out: PathBuf,
    targets: usize,
    dtype: Dtype,
    io: Io,
    cold: bool,
    written: bool,
    threads: usize,
    memory: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    let paths = members(&arguments.bank)?;
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
    let (folder, disk) = (tempfile::tempdir_in(&arguments.out)?, tempfile::tempdir()?);
    let within =
        |folder: &Path| (0..arguments.targets).map(|k| folder.join(k.to_string())).collect();
    let (outputs, on_disk): (Vec<_>, Vec<_>) = (within(folder.path()), within(disk.path()));
    let plan = soup.plan();
    let gigabytes = plan.bytes as f64 / 1e9;
    println!(
        "{n} adapters, {gigabytes:.2} GB, {} targets, {} threads, {:.0} MiB planned",
        arguments.targets,
        plan.threads,
        plan.memory as f64 / f64::from(1 << 20)
    );
    let threads = std::thread::available_parallelism()?.get();
    if !arguments.written {
        each(&paths, threads, |path| drop_from_cache(path).and_then(|()| read_file(path)))?;
    }
    let watch = Watch::default();
    soup.write(&outputs, arguments.dtype, &watch)?;
    assert_eq!(watch.done(), plan.bytes, "each byte is read once");
    check(&adapters, &coefficients, &outputs)?;
    println!("checked against float64; bank read once: {:.2} GB", watch.done() as f64 / 1e9);

    let size = std::fs::metadata(&outputs[0])?.len() as usize;
    let written = (size * outputs.len()) as f64 / 1e9;
    let cold = if arguments.cold { &paths[..] } else { &[] };
    let sum = |outputs: &[PathBuf]| soup.write(outputs, arguments.dtype, &Watch::default());
    let many = arguments.targets > 1;
    let elements: f64 = adapters.iter().map(|a| numbers(a) as f64).sum();
    let work = 2.0 * arguments.targets as f64 * elements;
    let mut best = [f64::INFINITY; 7];
    for _ in 0..ROUNDS {
        let round = [
            timed(cold, || each(&paths, threads, add_file))?,
            timed(cold, || each(&paths, threads, read_file))?,
            timed(cold, || sum(&outputs))?,
            timed(cold, || sum(&on_disk))?,
            timed(cold, || each(&outputs, threads, |path| write_file(path, size)))?,
            timed(cold, || each(&on_disk, threads, |path| write_file(path, size)))?,
            if many { multiplication(threads, work) } else { 0.0 },
        ];
        for (best, seconds) in best.iter_mut().zip(round) {
            *best = best.min(seconds);
        }
        // Before the next round: to give back what is written over is no part of a sum.
        for folder in [&folder, &disk] {
            for file in std::fs::read_dir(folder.path())? {
                std::fs::remove_file(file?.path())?;
            }
        }
    }
    let [add, copy, job, disk_job, put, disk_put, multiply] = best;
    let line = |what: &str, seconds: f64, gigabytes: f64| {
        println!("{what:34} {seconds:6.3} s  {:6.2} GB/s", gigabytes / seconds);
    };
    line("sum, written to memory", job, gigabytes);
    line("sum, written to the disk", disk_job, gigabytes);
    line("plain read, mapped and added up", add, gigabytes);
    line("plain read, copied and not added", copy, gigabytes);
    line("plain write to memory", put, written);
    line("plain write to the disk, flushed", disk_put, written);
    let mut limit = if arguments.cold { copy } else { add };
    let mut name = if arguments.cold { "plain cold read" } else { "mapped read" };
    if many {
        let rate = work / multiply / 1e9;
        println!("{:34} {multiply:6.3} s  {rate:6.0} GFLOP/s", "plain multiplication");
        if multiply > limit {
            (limit, name) = (multiply, "multiplication");
        }
    }
    println!("{name} / sum                      {:.2}", limit / job);
    println!("{name} / (sum − write)            {:.2}", limit / (job - put));
    println!("({name} + write) / sum            {:.2}", (limit + put) / job);
    println!("({name} + write) / sum, of disk   {:.2}", (limit + disk_put) / disk_job);
    Ok(())
}

/// The adapters of a bank, of PEFT or GGUF.
fn members(bank: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for folder in std::fs::read_dir(bank)? {
        let folder = folder?.path();
        let files = ["adapter_model.safetensors", "adapter.gguf"].map(|name| folder.join(name));
        paths.extend(files.into_iter().find(|path| path.is_file()));
    }
    paths.sort();
    Ok(paths)
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let memory = PathBuf::from("/dev/shm");
    let mut found = Arguments {
        bank: PathBuf::new(),
        out: if memory.is_dir() { memory } else { std::env::temp_dir() },
        targets: 1,
        dtype: Dtype::F32,
        io: Io::Read,
        cold: false,
        written: false,
        threads: 0,
        memory: 64,
    };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let mut next = || words.next().ok_or(format!("{word} needs a value"));
        match &word[..] {
            "--targets" => found.targets = next()?.parse()?,
            "--dtype" => found.dtype = Dtype::from_name(&next()?).ok_or("float32, float16 …")?,
            "--threads" => found.threads = next()?.parse()?,
            "--memory" => found.memory = next()?.parse()?,
            "--io" => found.io = if next()? == "mmap" { Io::Mmap } else { Io::Read },
            "--out" => found.out = next()?.into(),
            "--cold" => found.cold = true,
            "--written" => found.written = true,
            _ => found.bank = word.into(),
        }
    }
    if found.bank.is_dir() { Ok(found) } else { Err("usage: soup BANK [--targets K] …".into()) }
}

/// Seconds of one run, with nothing of `cold` files in the page cache.
fn timed<T, E: Into<Box<dyn Error>>>(
    cold: &[PathBuf],
    work: impl FnOnce() -> Result<T, E>,
) -> Result<f64, Box<dyn Error>> {
    cold.iter().try_for_each(|path| drop_from_cache(path))?;
    let start = Instant::now();
    black_box(work().map_err(Into::into)?);
    Ok(start.elapsed().as_secs_f64())
}

fn numbers(adapter: &Adapter) -> usize {
    adapter.layout.tensors.iter().map(|tensor| tensor.len()).sum()
}

/// `work` for every file, by `threads` threads.
fn each(
    paths: &[PathBuf],
    threads: usize,
    work: impl Fn(&Path) -> std::io::Result<f32> + Sync,
) -> std::io::Result<f32> {
    let next = AtomicUsize::new(0);
    let one = || {
        let mut total = 0.0;
        while let Some(path) = paths.get(next.fetch_add(1, Relaxed)) {
            total += work(path)?;
        }
        Ok(total)
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or(Ok(0.0))).sum()
    })
}

/// Have nothing of a file in the page cache, where the system can be asked for that.
fn drop_from_cache(path: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let file = File::open(path)?;
        file.sync_all()?; // what is still to be written stays
        // SAFETY: the descriptor is open, and no memory is involved.
        let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
    let _ = path;
    Ok(())
}

/// By reads of 1 MiB.
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

/// By plain writes of 1 MiB, and flushed.
fn write_file(path: &Path, size: usize) -> std::io::Result<f32> {
    let buffer = vec![1; 1 << 20];
    let mut file = File::create(path.with_extension("plain"))?;
    for start in (0..size).step_by(buffer.len()) {
        file.write_all(&buffer[..buffer.len().min(size - start)])?;
    }
    file.sync_all()?;
    Ok(0.0)
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

/// Seconds that so many floating-point operations take in a float32 matrix product of a maintained
/// library.
fn multiplication(threads: usize, work: f64) -> f64 {
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
    start.elapsed().as_secs_f64() * work / (2.0 * (SIZE as f64).powi(3))
}

/// Compare the first, a middle and the last tensor of the first and last target with float64.
fn check(
    adapters: &[Adapter],
    coefficients: &[Vec<f64>],
    outputs: &[PathBuf],
) -> Result<(), Box<dyn Error>> {
    let factors = |module: &Module| [Factor::A, Factor::B].map(|f| module.tensor_name(f));
    let names: Vec<_> = adapters[0].layout.modules.iter().flat_map(factors).collect();
    for target in [0, outputs.len() - 1] {
        let output = Adapter::open(&outputs[target])?;
        for name in [&names[0], &names[names.len() / 2], &names[names.len() - 1]] {
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
            let rounding = match output.layout.tensors[0].dtype {
                Dtype::F16 => 1e-3,
                Dtype::BF16 => 1e-2,
                _ => 1e-6,
            };
            assert!(error.sqrt() <= rounding * norm, "{name}: {} of {norm}", error.sqrt());
        }
    }
    Ok(())
}

/// A tensor's numbers, in the order that PEFT has.
fn tensor(adapter: &Adapter, name: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    let layout = &adapter.layout;
    let named = |factor| move |module: &&Module| module.tensor_name(factor) == name;
    let index = [Factor::A, Factor::B]
        .into_iter()
        .find_map(|f| layout.modules.iter().find(named(f)).map(|module| module.tensor(f)));
    let found = &layout.tensors[index.ok_or("no such tensor")?];
    let bytes = std::fs::read(&adapter.path)?;
    let mut stored = vec![0.0; found.len()];
    let range = found.bytes.start as usize..found.bytes.end as usize;
    (widest().widen)(found.dtype, &bytes[range], &mut stored);
    let Order::Heads(rows) = found.order else { return Ok(stored) };
    // Of each head's rows, the file has those of the two halves in turns.
    let mut numbers = stored.clone();
    let row = found.shape[1];
    for (index, values) in stored.chunks_exact(row).enumerate() {
        let (head, within) = (index / rows, index % rows);
        let place = head * rows + within % 2 * (rows / 2) + within / 2;
        numbers[place * row..][..row].copy_from_slice(values);
    }
    Ok(numbers)
}
