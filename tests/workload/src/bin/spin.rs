//! A program that never pauses: its first process sleeps, and each of its children counts.
//!
//! ```text
//! spin N DIR        starts N children and sleeps
//! spin count FILE   writes 00000000000000000001, 2, 3, ... over and over to the beginning of FILE
//! ```
//!
//! A child that executes anything at all changes its file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.as_slice() {
        [word, file] if word == "count" => count(Path::new(file)),
        [number, dir] => start(number, Path::new(dir)),
        _ => Err(io::Error::other("spin N DIR")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("spin: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(number: &str, dir: &Path) -> io::Result<()> {
    let number: u32 = number.parse().map_err(io::Error::other)?;
    for child in 0..number {
        Command::new("/proc/self/exe")
            .arg("count")
            .arg(dir.join(child.to_string()))
            .spawn()?;
    }
    loop {
        std::thread::park();
    }
}

fn count(path: &Path) -> io::Result<()> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    for value in 1_u64.. {
        file.write_all_at(format!("{value:020}").as_bytes(), 0)?;
    }
    Ok(())
}
