//! A program that changes large files in turn, every second one through memory, and looks whether each still has what was
//! written to it last.
//!
//! ```text
//! writer DIR     makes DIR/0 to DIR/79, of 512 KiB; every 50 ms it changes the next one of the first 60, and appends a
//!                line to DIR/counts; the others it looks at
//! ```
//!
//! Each is left alone for three seconds: so at any moment some of them have rested, and some of these are changed in the
//! next second. What is not as it was written ends the program.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use nix::libc;

const FILES: u64 = 80;
/// So many of them are changed.
const CHANGED: u64 = 60;
const LEN: usize = 512 << 10;
const INTERVAL: Duration = Duration::from_millis(50);
/// Words of memory, 128 MiB, that take some time to send: the files are changed meanwhile.
const BALLAST: u64 = 16 << 20;
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
/// Where the number is that changes.
const AT: usize = 3 * 4096;

fn main() -> ExitCode {
    let dir = std::env::args().nth(1).unwrap_or_default();
    match run(Path::new(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("writer: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One of the files.
struct Written {
    file: File,
    /// Its memory, where it is changed through that.
    memory: Option<*mut u8>,
    value: u64,
}

fn run(dir: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for number in 0..FILES {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.join(number.to_string()))?;
        file.write_all_at(&content(number, 0), 0)?;
        let is_mapped = number % 2 == 1 && number < CHANGED;
        files.push(Written {
            memory: is_mapped.then(|| mapped(&file)).transpose()?,
            file,
            value: 0,
        });
    }
    let ballast: Vec<u64> = (0..BALLAST).map(|at| at.wrapping_mul(MIX)).collect();
    let mut counts = File::create_new(dir.join("counts"))?;
    for (count, number) in (1_u64..).zip((0..FILES).cycle()) {
        if number >= CHANGED {
            look(dir, number, 0)?;
            continue;
        }
        std::thread::sleep(INTERVAL);
        std::hint::black_box(&ballast);
        let Some(written) = files.get_mut(usize::try_from(number).unwrap_or_default()) else {
            continue;
        };
        look(dir, number, written.value)?;
        written.value = count;
        written.write()?;
        counts.write_all(format!("{count}\n").as_bytes())?;
    }
    Ok(())
}

fn look(dir: &Path, number: u64, value: u64) -> io::Result<()> {
    let path = dir.join(number.to_string());
    if std::fs::read(&path)? == content(number, value) {
        return Ok(());
    }
    let message = format!("{} is not what was written to it", path.display());
    Err(io::Error::other(message))
}

impl Written {
    fn write(&self) -> io::Result<()> {
        let bytes = self.value.to_le_bytes();
        match self.memory {
            None => self.file.write_all_at(&bytes, AT as u64),
            Some(memory) => {
                store(memory, bytes);
                Ok(())
            }
        }
    }
}

fn content(number: u64, value: u64) -> Vec<u8> {
    let words = (0..LEN / 8).map(|at| number.wrapping_mul(MIX) ^ at as u64);
    let mut content: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    content.splice(AT..AT + 8, value.to_le_bytes());
    content
}

#[expect(
    unsafe_code,
    reason = "mmap has no safe wrapper; the memory lives as long as the program"
)]
fn mapped(file: &File) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address that the kernel chooses, as long as the file.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    match memory == libc::MAP_FAILED {
        true => Err(io::Error::last_os_error()),
        false => Ok(memory.cast()),
    }
}

#[expect(unsafe_code, reason = "the kernel reads it, too")]
fn store(memory: *mut u8, bytes: [u8; 8]) {
    for (at, byte) in (AT..).zip(bytes) {
        // SAFETY: within the mapping, which lives as long as the program.
        unsafe { memory.add(at).write_volatile(byte) };
    }
}
