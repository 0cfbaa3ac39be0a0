//! The container program that is moved about: everything that must survive the journey can be read
//! off its answers and its files.
//!
//! ```text
//! counter [--memory-mb 200] [--rewrite-mb-per-second 0] [--port 7000] [--interval-ms 50] [--data /data]
//! ```
//!
//! At the start it deletes `<data>/delete-me`, makes `<data>/made/` with a file in it and fills its
//! memory with a pattern that does not compress. Then, every interval, it adds one to its counter
//! and appends the value as a line to `<data>/counts`: a missing or repeated line is a missing or
//! repeated step. So many megabytes of memory a second are written again, round and round, each word
//! grown by one: then words differ from the pattern by as many rounds, or by one or two more. To each
//! connection it answers one line of JSON and closes:
//!
//! ```text
//! {"count":12,"hostname":"n","local_ip":"10.88.0.2","memory_ok":true,"memory_mb":200,"pid":1}
//! ```
//!
//! Plain threads, plain reads and writes, sleeps by `clock_nanosleep`: nothing that CRIU cannot
//! restore on an old kernel.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const WORDS_PER_MB: usize = 1024 * 1024 / size_of::<u64>();

struct Options {
    memory_mb: usize,
    rewrite_mb: usize,
    port: u16,
    interval: Duration,
    data: PathBuf,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1))
        .and_then(|options| run(&options).map_err(|error| format!("counter: {error}")))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        memory_mb: 200,
        rewrite_mb: 0,
        port: 7000,
        interval: Duration::from_millis(50),
        data: PathBuf::from("/data"),
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        let number = || {
            value
                .parse::<u32>()
                .map_err(|error| format!("{name} {value}: {error}"))
        };
        match name.as_str() {
            "--memory-mb" => options.memory_mb = number()? as usize,
            "--rewrite-mb-per-second" => options.rewrite_mb = number()? as usize,
            "--port" => {
                options.port = value
                    .parse()
                    .map_err(|error| format!("--port {value}: {error}"))?;
            }
            "--interval-ms" => options.interval = Duration::from_millis(number()?.into()),
            "--data" => options.data = value.into(),
            _ => return Err(format!("unknown option {name}")),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> io::Result<()> {
    fs::remove_file(options.data.join("delete-me"))?;
    fs::create_dir(options.data.join("made"))?;
    fs::write(options.data.join("made/note"), "made at the start\n")?;
    let words = pattern().take(options.memory_mb * WORDS_PER_MB);
    let memory: Arc<Vec<AtomicU64>> = Arc::new(words.map(AtomicU64::new).collect());
    let counts = OpenOptions::new()
        .append(true)
        .open(options.data.join("counts"))?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, options.port))?;
    let count = Arc::new(AtomicU64::new(0));
    let shown = Arc::clone(&count);
    let is_rewritten = options.rewrite_mb > 0;
    if is_rewritten {
        let (memory, words) = (Arc::clone(&memory), options.rewrite_mb * WORDS_PER_MB);
        std::thread::spawn(move || keep_rewriting(&memory, words));
    }
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // One asker that goes away must not end the counter.
            if let Err(error) =
                stream.and_then(|stream| answer(stream, &shown, &memory, is_rewritten))
            {
                eprintln!("counter: cannot answer: {error}");
            }
        }
    });
    keep_counting(&count, counts, options.interval)
}

fn keep_counting(count: &AtomicU64, mut counts: File, interval: Duration) -> io::Result<()> {
    loop {
        std::thread::sleep(interval);
        // Only this thread writes; the line is on its way before anyone can be told the value.
        let next = count.load(Ordering::Relaxed) + 1;
        counts.write_all(format!("{next}\n").as_bytes())?;
        count.store(next, Ordering::Relaxed);
    }
}

/// A hundredth of them each hundredth of a second.
fn keep_rewriting(memory: &[AtomicU64], words_per_second: usize) {
    for (count, word) in memory.iter().cycle().enumerate() {
        if count.is_multiple_of((words_per_second / 100).max(1)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Only this thread writes.
        let grown = word.load(Ordering::Relaxed).wrapping_add(1);
        word.store(grown, Ordering::Relaxed);
    }
}

/// Whether the words are the pattern, or as many rounds from it, or one or two more.
fn is_whole(memory: &[AtomicU64], is_rewritten: bool) -> bool {
    let rounds = memory.iter().zip(pattern());
    let rounds = rounds.map(|(word, old)| word.load(Ordering::Relaxed).wrapping_sub(old));
    let (least, most) = rounds.fold((u64::MAX, 0), |(least, most), it| {
        (it.min(least), it.max(most))
    });
    match is_rewritten {
        true => most.saturating_sub(least) <= 2,
        false => most == 0,
    }
}

fn answer(
    mut stream: TcpStream,
    count: &AtomicU64,
    memory: &[AtomicU64],
    is_rewritten: bool,
) -> io::Result<()> {
    let memory_ok = is_whole(memory, is_rewritten);
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let line = format!(
        "{{\"count\":{},\"hostname\":\"{}\",\"local_ip\":\"{}\",\"memory_ok\":{memory_ok},\"memory_mb\":{},\"pid\":{}}}\n",
        count.load(Ordering::Relaxed),
        hostname.trim(),
        stream.local_addr()?.ip(),
        memory.len() / WORDS_PER_MB,
        std::process::id(),
    );
    stream.write_all(line.as_bytes())
}

/// Marsaglia's xorshift64: no two pages alike, nothing for a compressor to find.
fn pattern() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(0x9e37_79b9_7f4a_7c15_u64), |&x| {
        let x = x ^ (x << 13);
        let x = x ^ (x >> 7);
        Some(x ^ (x << 17))
    })
}
