//! Memory that comes when it is touched: the server of the pages of one restore.
//!
//! ```text
//!  front ── transship-lazy-pages IMAGES WORK ──> guard ──> criu lazy-pages ── userfaultfd ─> tasks
//!    │   <-- ready, or why not                     │  socket in WORK: the restore hands over
//!    │ runc restore --lazy-pages                   │  the descriptors
//!    │   --> pid of the container                  │  takes copies of the descriptors
//!    └── <-- held, or why not; the front goes      │  waits for the server
//!                                                  └─ page_server: the pages themselves
//! ```
//!
//! The pages lie in the images on this node; of a migration that brings them late some are on the source, which
//! `transship receive` asks for them at a socket beside the images. All of them have been copied when the server ends,
//! also those that nobody has touched.
//!
//! When the last descriptor of a userfaultfd is closed, the kernel gives its tasks pages of zeros
//! from then on, and tells nobody. A server that is killed (out of memory, by mistake) would turn
//! into wrong memory. So the guard keeps copies of the descriptors: the tasks then wait, and it
//! kills them.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SndBufForce;
use rustix::process::setsid;
use transship_sandbox::{DescriptorsOf, leave_cgroup_of_caller};

use crate::descendants::Process;

mod page_server;

use page_server::Memory;

/// First argument of the front as guard.
pub const ROLE: &str = "transship-lazy-pages";
/// In the work directory; CRIU has no option for it.
const SOCKET: &str = "lazy-pages.socket";
/// The server's log, in the work directory.
pub(crate) const LOG: &str = "lazy-pages.log";
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const READY: &str = "ready";
const HELD: &str = "held";
/// Bytes that what CRIU asks for may take: it does not wait for room, and fails where there is none. Each thread that waits
/// for a page has asked for one, which takes some 800 bytes of the kernel; what is not used is not taken.
const REQUESTS: usize = 64 << 20;
/// How long the server may take to read the images' tables.
const PATIENCE: Duration = Duration::from_secs(30);

/// The guard of one restore, as its front has it.
#[derive(Debug)]
pub(crate) struct LazyPages {
    guard: Child,
}

impl LazyPages {
    /// Starts the server for the images.
    ///
    /// # Errors
    /// It does not come up; the text says why.
    pub(crate) fn start(front: &Path, images: &Path, work: &Path) -> Result<Self, String> {
        drop(fs::remove_file(work.join(SOCKET)));
        let guard = Command::new(front)
            .arg(ROLE)
            .args([images, work])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", front.display()))?;
        let mut lazy = Self { guard };
        match lazy.listen() {
            Some(word) if word == READY => Ok(lazy),
            other => Err(reason(other)),
        }
    }

    /// Hands over to the guard, which lives as long as pages are missing. The container's first
    /// process is `pid`.
    ///
    /// # Errors
    /// The server is gone, and the memory with it.
    pub(crate) fn guard(mut self, pid: i32) -> Result<(), String> {
        let told = self
            .guard
            .stdin
            .take()
            .map(|mut stdin| writeln!(stdin, "{pid}"));
        match (told, self.listen()) {
            (Some(Ok(())), Some(word)) if word == HELD => Ok(()),
            (_, other) => Err(reason(other)),
        }
    }

    /// Ends the server of a restore that has failed.
    pub(crate) fn stop(mut self) {
        drop(self.guard.stdin.take());
        // It has nothing to say; what it could not do is in its log.
        drop(self.guard.wait());
    }

    fn listen(&mut self) -> Option<String> {
        let mut line = String::new();
        let stdout = self.guard.stdout.as_mut()?;
        // A byte at a time: what comes after the line is for the next call.
        let mut byte = [0];
        while stdout.read(&mut byte).ok()? == 1 && byte != *b"\n" {
            line.push(byte[0].into());
        }
        Some(line)
    }
}

/// What a guard has said instead of its word.
fn reason(said: Option<String>) -> String {
    let said = said.filter(|said| !said.is_empty());
    said.unwrap_or_else(|| "criu lazy-pages does not serve (see `transship check`)".to_owned())
}

/// The guard. `args`: the images and the work directory.
///
/// # Errors
/// What cannot be done. The front, as long as it is there, has heard it.
pub fn serve(args: &[OsString]) -> io::Result<()> {
    let [images, work] = args else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let served = serve_restore(Path::new(images), Path::new(work));
    if let Err(error) = &served {
        // One line; the front may have gone.
        drop(say(&error.to_string().replace('\n', " ")));
    }
    served
}

fn serve_restore(images: &Path, work: &Path) -> io::Result<()> {
    // Before anything that takes time: a front that has died is another process later.
    let front = Process::open(std::os::unix::process::parent_id().cast_signed())?;
    // The front's caller waits for the end of what it has started.
    setsid()?;
    // The memory is gone with the server, and what ends its caller's unit or session does not end the container. Where
    // that cannot be done it serves all the same.
    drop(leave_cgroup_of_caller());
    let memory = Memory::open(images)?;
    let (pages, for_criu) = UnixStream::pair()?;
    setsockopt(&for_criu, SndBufForce, &REQUESTS)?;
    let pages = std::thread::spawn(move || page_server::serve(pages, memory));
    let mut server = Command::new("criu")
        .args(["lazy-pages", "--images-dir"])
        .arg(images)
        .arg("--work-dir")
        .arg(work)
        .args(["-o", LOG, "--page-server", "--ps-socket", "0"])
        .stdin(OwnedFd::from(for_criu))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Of its own: what is sent to a group of ours must not end it alone.
        .process_group(0)
        .spawn()?;
    let guarded = guard(&mut server, &front, work);
    let Err(error) = guarded else {
        return Ok(());
    };
    drop(server.kill());
    drop(server.wait());
    // The first one to fail knows most.
    if let Ok(Err(error)) = pages.join() {
        return Err(error);
    }
    let said = transship_checkpoint::criu_log::first_error_of(&work.join(LOG));
    Err(said.ok().flatten().map_or(error, io::Error::other))
}

fn guard(server: &mut Child, front: &Process, work: &Path) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !work.join(SOCKET).try_exists()? {
        if server.try_wait()?.is_some() || Instant::now() > deadline {
            return Err(io::Error::other("the server does not listen"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    say(READY)?;
    let line = wait_for_restore(server, front)?;
    // Without a number the restore has failed.
    let root = Process::open(line.trim().parse().map_err(io::Error::other)?)?;
    let copies = match server.try_wait()? {
        // It may have served all before the restore was told; it has no number any more then.
        Some(status) if status.success() => Vec::new(),
        Some(_) => return Err(io::Error::other("the server has ended")),
        None => userfaultfds(server)?,
    };
    say(HELD)?;
    close_streams()?;
    let served = server.wait()?.success();
    if !served {
        // Its memory is incomplete.
        root.kill_tree()?;
    }
    drop(copies);
    Ok(())
}

/// The front's word about the restore. It would wait for ever for pages of a server that has gone:
/// then what restores is killed, and the front tells the failure.
fn wait_for_restore(server: &mut Child, front: &Process) -> io::Result<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        // Nobody listens when the server has gone first.
        drop(
            sender.send(
                BufReader::new(io::stdin())
                    .read_line(&mut line)
                    .map(|_| line),
            ),
        );
    });
    loop {
        match receiver.recv_timeout(LOOK_AGAIN) {
            Ok(line) => return line,
            Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if server.try_wait()?.is_some_and(|status| !status.success()) {
            front.kill_below(&[std::process::id().cast_signed()])?;
            return Err(io::Error::other("the server has ended"));
        }
    }
}

fn say(word: &str) -> io::Result<()> {
    let mut stdout = io::stdout();
    writeln!(stdout, "{word}")?;
    stdout.flush()
}

/// Nobody may wait for the end of these; the working directory may be the bundle.
fn close_streams() -> io::Result<()> {
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    std::env::set_current_dir("/")
}

/// Copies of the server's descriptors of userfaultfds; none when it has served all already.
fn userfaultfds(server: &Child) -> io::Result<Vec<OwnedFd>> {
    let pid = i32::try_from(server.id()).map_err(io::Error::other)?;
    let descriptors = DescriptorsOf::process(pid)?;
    let mut copies = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", server.id()))? {
        let entry = entry?;
        // One that it has just closed is one that is served.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if target.to_string_lossy() != "anon_inode:[userfaultfd]" {
            continue;
        }
        let number = entry.file_name().to_string_lossy().parse();
        if let Ok(copy) = descriptors.get(number.map_err(io::Error::other)?) {
            copies.push(copy);
        }
    }
    Ok(copies)
}
