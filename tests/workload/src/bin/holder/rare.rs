//! What keeps a container from being moved: each need makes one of the conditions that
//! `transship check` tells of.
//!
//! ```text
//!   mptcp             a Multipath TCP socket
//!   vsock             a socket of another kind
//!   io-uring          a ring
//!   uffd              a file of a kind of its own (userfaultfd)
//!   watch=PATH        inotify; how many events have come is in /data/events
//!   semaphore         memory of a named semaphore, opened as glibc does in the process that makes it
//!   thread-timer      a POSIX timer that signals a thread
//!   queue=/NAME       a POSIX message queue
//!   device=PATH       an open device
//!   unshared          a child in another UTS namespace
//!   traced            a child that is traced
//! ```

#![expect(
    unsafe_code,
    reason = "these calls have no safe wrapper; what they make lives as long as the program"
)]

use std::any::Any;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::raw::c_long;
use std::process::Command;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::ptrace;
use nix::unistd::Pid;

const MPTCP: i32 = 262;

/// What is held, and what a tick does with it.
pub(super) enum Rare {
    Held(#[expect(dead_code, reason = "it is held")] Box<dyn Any>),
    Watch(File, usize),
}

/// None for a need that is none of these.
pub(super) fn take(name: &str, value: &str) -> io::Result<Option<Rare>> {
    let held: Box<dyn Any> = match name {
        "mptcp" => Box::new(socket(libc::AF_INET, MPTCP)?),
        "vsock" => Box::new(socket(libc::AF_VSOCK, 0)?),
        "io-uring" => Box::new(ring()?),
        "uffd" => Box::new(user_faults()?),
        "watch" => return Ok(Some(Rare::Watch(watch(value)?, 0))),
        "semaphore" => Box::new(semaphore()?),
        "thread-timer" => Box::new(thread_timer()?),
        "queue" => Box::new(queue(value)?),
        "device" => Box::new(File::open(value)?),
        "unshared" => Box::new(Command::new("/proc/self/exe").arg("in-new-uts").spawn()?),
        "traced" => Box::new(traced()?),
        "in-new-uts" => {
            unshare(CloneFlags::CLONE_NEWUTS)?;
            loop {
                std::thread::park();
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(Rare::Held(held)))
}

pub(super) fn check(rare: &mut Rare) -> io::Result<()> {
    let Rare::Watch(file, events) = rare else {
        return Ok(());
    };
    let mut buffer = [0; 4096];
    while let Ok(length) = file.read(&mut buffer) {
        *events += length;
    }
    fs::write("/data/events", events.to_string())
}

fn file(descriptor: c_long) -> io::Result<File> {
    match i32::try_from(descriptor) {
        // SAFETY: the kernel has just made it, and nobody else has it.
        Ok(number) if number >= 0 => Ok(unsafe { File::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn socket(family: i32, protocol: i32) -> io::Result<File> {
    // SAFETY: plain numbers.
    file(unsafe { libc::socket(family, libc::SOCK_STREAM, protocol) }.into())
}

fn ring() -> io::Result<File> {
    let mut parameters = [0_u8; 120];
    // SAFETY: `struct io_uring_params` has 120 bytes, and all zeros are valid.
    file(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) })
}

fn user_faults() -> io::Result<File> {
    const USER_MODE_ONLY: i32 = 1;
    // SAFETY: plain numbers.
    file(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) })
}

fn watch(path: &str) -> io::Result<File> {
    let path = CString::new(path)?;
    // SAFETY: plain numbers.
    let watch = file(unsafe { libc::inotify_init1(libc::IN_NONBLOCK) }.into())?;
    // SAFETY: the path ends with a zero.
    let added =
        unsafe { libc::inotify_add_watch(watch.as_raw_fd(), path.as_ptr(), libc::IN_ATTRIB) };
    (added >= 0)
        .then_some(watch)
        .ok_or_else(io::Error::last_os_error)
}

fn semaphore() -> io::Result<usize> {
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open("/dev/shm/sem.made")?;
    made.set_len(32)?;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            32,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            made.as_raw_fd(),
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    fs::hard_link("/dev/shm/sem.made", "/dev/shm/sem.holder")?;
    fs::remove_file("/dev/shm/sem.made")?;
    Ok(memory as usize)
}

fn thread_timer() -> io::Result<usize> {
    // SAFETY: all zeros are a valid `sigevent`.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGRTMIN();
    // SAFETY: a plain number.
    event.sigev_notify_thread_id = unsafe { libc::gettid() };
    let mut timer: libc::timer_t = std::ptr::null_mut();
    // SAFETY: both live until the call comes back.
    match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } {
        0 => Ok(timer as usize),
        _ => Err(io::Error::last_os_error()),
    }
}

fn queue(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    let none = std::ptr::null::<libc::mq_attr>();
    // SAFETY: the name ends with a zero, and without attributes the kernel has its own.
    file(unsafe { libc::mq_open(name.as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o600, none) }.into())
}

fn traced() -> io::Result<u32> {
    let child = Command::new("/bin/sleep").arg("100000").spawn()?;
    ptrace::attach(Pid::from_raw(child.id().cast_signed()))?;
    Ok(child.id())
}
