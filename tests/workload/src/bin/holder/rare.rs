//! What keeps a container from being moved: each need makes one of the conditions that
//! `transship check` tells of.
//!
//! ```text
//!   mptcp             a Multipath TCP socket; an ordinary one where there are none
//!   vsock             a socket of another kind
//!   io-uring          a ring; nothing where that is forbidden
//!   uffd              a file of a kind of its own (userfaultfd)
//!   watch=PATH        inotify; how many bytes of events have come is in /data/events
//!   semaphore         memory of a named semaphore, opened as glibc does in the process that makes it
//!   opened-semaphore  the same, opened by its name
//!   queue=/NAME       a POSIX message queue
//!   device=PATH       an open device
//!   shared-code       shared memory that can be executed and not written, before all other code
//!   unshared          a child in another UTS namespace
//!   thread-unshared   a thread in another UTS namespace
//!   children-unshared the next child will be in a PID namespace of its own
//!   deadline          SCHED_DEADLINE: 1 ms of each 100
//!   traced            a child that is traced
//!   signals           counts each SIGCONT, and each SIGCHLD of a child that was stopped or went on
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
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::ptrace;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;

const MPTCP: i32 = 262;
const SEMAPHORE: &str = "/dev/shm/sem.holder";
/// How often two processes may get into each other's way.
const TRIES: usize = 1000;

/// What is held, and what a tick does with it.
pub(super) enum Rare {
    Held(#[expect(dead_code, reason = "it is held")] Box<dyn Any>),
    Watch(File),
    Signals(#[expect(dead_code, reason = "it sleeps")] Child),
    /// Its memory.
    Semaphore(*mut u8),
}

/// How many have come.
static CONTINUED: AtomicUsize = AtomicUsize::new(0);
static CHILD_CONTINUED: AtomicUsize = AtomicUsize::new(0);
/// Bytes of events of all watches.
static EVENTS: AtomicUsize = AtomicUsize::new(0);

/// None for a need that is none of these.
pub(super) fn take(name: &str, value: &str) -> io::Result<Option<Rare>> {
    let held: Box<dyn Any> = match name {
        // As Go's servers do.
        "mptcp" => Box::new(
            socket(libc::AF_INET, MPTCP).or_else(|_| socket(libc::AF_INET, libc::IPPROTO_TCP))?,
        ),
        "vsock" => Box::new(socket(libc::AF_VSOCK, 0)?),
        "io-uring" => match ring() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Box::new(()),
            other => Box::new(other?),
        },
        "uffd" => Box::new(user_faults()?),
        "watch" => return Ok(Some(Rare::Watch(watch(value)?))),
        "semaphore" => return Ok(Some(Rare::Semaphore(semaphore()?))),
        "opened-semaphore" => {
            let file = OpenOptions::new().read(true).write(true).open(SEMAPHORE)?;
            return Ok(Some(Rare::Semaphore(mapped(&file)?)));
        }
        "queue" => Box::new(queue(value)?),
        "device" => Box::new(File::open(value)?),
        "shared-code" => Box::new(shared_code()?),
        "unshared" => Box::new(Command::new("/proc/self/exe").arg("in-new-uts").spawn()?),
        "thread-unshared" => Box::new(thread_in_new_uts()?),
        "children-unshared" => Box::new(unshare(CloneFlags::CLONE_NEWPID)?),
        "deadline" => Box::new(deadline()?),
        "traced" => Box::new(traced()?),
        "signals" => return Ok(Some(Rare::Signals(count_signals()?))),
        "asleep" => loop {
            std::thread::park();
        },
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
    let file = match rare {
        Rare::Held(_) => return Ok(()),
        Rare::Signals(_) => {
            let counts = [&CONTINUED, &CHILD_CONTINUED].map(|it| it.load(Ordering::Relaxed));
            return (counts == [0, 0]).then_some(()).ok_or_else(|| {
                io::Error::other(format!("SIGCONT and SIGCHLD came {counts:?} times"))
            });
        }
        Rare::Semaphore(memory) => return is_of_file(*memory),
        Rare::Watch(file) => file,
    };
    let mut buffer = [0; 4096];
    while let Ok(length) = file.read(&mut buffer) {
        EVENTS.fetch_add(length, Ordering::Relaxed);
    }
    // As a whole: who reads it sees a number.
    fs::write(
        "/data/events.new",
        EVENTS.load(Ordering::Relaxed).to_string(),
    )?;
    fs::rename("/data/events.new", "/data/events")
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

/// It is there when the thread has left.
fn thread_in_new_uts() -> io::Result<()> {
    let (told, tells) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        // Who asked waits for it.
        told.send(unshare(CloneFlags::CLONE_NEWUTS)).ok();
        loop {
            std::thread::park();
        }
    })?;
    Ok(tells.recv().map_err(io::Error::other)??)
}

fn deadline() -> io::Result<()> {
    const POLICY: u64 = 6;
    const MILLISECOND: u64 = 1_000_000;
    // `struct sched_attr`: size and policy, flags, nice and priority, runtime, deadline, period.
    let size: u64 = 48;
    let (runtime, period) = (MILLISECOND, 100 * MILLISECOND);
    let attributes: [u64; 6] = [size | POLICY << 32, 0, 0, runtime, period, period];
    // SAFETY: it has 48 bytes, as it says.
    let answer = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, attributes.as_ptr(), 0) };
    (answer == 0)
        .then_some(())
        .ok_or_else(io::Error::last_os_error)
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

/// Whether the memory is that of the semaphore that has this name now.
fn is_of_file(memory: *mut u8) -> io::Result<()> {
    let file = File::open(SEMAPHORE)?;
    for _ in 0..TRIES {
        let mut byte = [0];
        // SAFETY: it is mapped as long as the program lives; other processes write to it, too.
        let before = unsafe { memory.read_volatile() };
        file.read_exact_at(&mut byte, 0)?;
        // Another process may have written between the two.
        if byte == [before] {
            // SAFETY: as above.
            unsafe { memory.write_volatile(before.wrapping_add(1)) };
            return Ok(());
        }
    }
    Err(io::Error::other("its memory is another one"))
}

fn semaphore() -> io::Result<*mut u8> {
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open("/dev/shm/sem.made")?;
    made.set_len(32)?;
    let memory = mapped(&made)?;
    fs::hard_link("/dev/shm/sem.made", SEMAPHORE)?;
    fs::remove_file("/dev/shm/sem.made")?;
    Ok(memory)
}

fn shared_code() -> io::Result<()> {
    const LOW: usize = 0x1000_0000;
    // SAFETY: nothing else is at such an address of a program that lies anywhere, and nobody uses it.
    let memory = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(LOW),
            1 << 16,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    match memory == libc::MAP_FAILED {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

fn mapped(file: &File) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            32,
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

fn queue(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    let none = std::ptr::null::<libc::mq_attr>();
    // SAFETY: the name ends with a zero, and without attributes the kernel has its own.
    file(unsafe { libc::mq_open(name.as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o600, none) }.into())
}

fn traced() -> io::Result<u32> {
    let child = Command::new("/proc/self/exe").arg("asleep").spawn()?;
    ptrace::attach(Pid::from_raw(child.id().cast_signed()))?;
    Ok(child.id())
}

fn count_signals() -> io::Result<Child> {
    extern "C" fn continued(_: i32) {
        CONTINUED.fetch_add(1, Ordering::Relaxed);
    }
    extern "C" fn child(_: i32, about: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel gives one to a handler with SA_SIGINFO.
        let code = unsafe { (*about).si_code };
        if [libc::CLD_STOPPED, libc::CLD_CONTINUED].contains(&code) {
            CHILD_CONTINUED.fetch_add(1, Ordering::Relaxed);
        }
    }
    let flags = SaFlags::SA_RESTART;
    for (signal, handler, flags) in [
        (Signal::SIGCONT, SigHandler::Handler(continued), flags),
        (
            Signal::SIGCHLD,
            SigHandler::SigAction(child),
            flags | SaFlags::SA_SIGINFO,
        ),
    ] {
        let action = SigAction::new(handler, flags, SigSet::empty());
        // SAFETY: the handlers touch nothing but atomic numbers.
        unsafe { sigaction(signal, &action) }?;
    }
    Command::new("/proc/self/exe").arg("asleep").spawn()
}
