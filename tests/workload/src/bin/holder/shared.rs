//! What processes and threads share, or do not, otherwise than fork and pthreads make it, and files that CRIU cannot
//! tell from others.
//!
//! ```text
//!   thread-timer      a POSIX timer that signals the first thread; waits for it on every tick
//!   exit-signal       a child that sends SIGUSR1 at its end
//!   speculation       no speculative store bypass
//!   thread-directory  a thread with a directory of its own
//!   thread-files      a thread with descriptors of its own
//!   locked-on-fault   memory that is locked when it is touched
//!   shared-directory  a child that shares its directory
//!   epoll-target      an epoll that waits for a file which only its child has still open
//!   vforks            a thread that makes one process after the other, and waits for each to leave its memory
//!   credentials       a message with credentials that it does not read
//!   long-path         a directory with a path of more than 4095 bytes
//!   chroot            another root
//!   covered           an open file of a mount that another one is on
//!   unmounted         an open file of a mount that is gone
//!   byte-names        names that are no UTF-8, of a thread, a directory, a mapped file and a unix socket that is
//!                     connected to on every tick
//! ```

#![expect(
    unsafe_code,
    reason = "these calls have no safe wrapper; what they make lives as long as the program"
)]

use std::any::Any;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::raw::c_long;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{setsockopt, sockopt};

use super::odd::{PAGE, call, page};

/// The timer's: nothing else uses it here.
const TIMER_SIGNAL: i32 = libc::SIGUSR2;

/// What is held, and what a tick does with it.
pub(super) enum Shared {
    Held(#[expect(dead_code, reason = "it is held")] Box<dyn Any>),
    Timer,
    ByteNames(UnixListener, PathBuf),
}

/// None for a need that is none of these.
pub(super) fn take(name: &str) -> io::Result<Option<Shared>> {
    let held: Box<dyn Any> = match name {
        "thread-timer" => {
            thread_timer()?;
            return Ok(Some(Shared::Timer));
        }
        "byte-names" => return Ok(Some(byte_names()?)),
        "exit-signal" => Box::new(cloned(libc::SIGUSR1)?),
        "speculation" => {
            // PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE
            Box::new(call(libc::SYS_prctl, [53, 0, 4, 0, 0])?)
        }
        "thread-directory" => Box::new(thread_with(libc::CLONE_FS, || {
            std::env::set_current_dir("/usr")
        })?),
        "thread-files" => Box::new(thread_with(libc::CLONE_FILES, || {
            File::open("/").map(std::mem::forget)
        })?),
        "locked-on-fault" => {
            // MLOCK_ONFAULT
            let length = PAGE.cast_signed() as c_long;
            Box::new(call(libc::SYS_mlock2, [page()?, length, 1, 0, 0])?)
        }
        "vforks" => Box::new(std::thread::spawn(vforks)),
        "shared-directory" => Box::new(cloned(libc::CLONE_FS | libc::SIGCHLD)?),
        "epoll-target" => Box::new(waits_for_what_is_closed()?),
        "credentials" => {
            let (sender, receiver) = UnixStream::pair()?;
            setsockopt(&receiver, sockopt::PassCred, &true)?;
            { &sender }.write_all(b"x")?;
            Box::new((sender, receiver))
        }
        "long-path" => {
            let name = "d".repeat(200);
            for _ in 0..22 {
                fs::create_dir(&name)?;
                std::env::set_current_dir(&name)?;
            }
            Box::new(())
        }
        "covered" => {
            let file = file_of_mount("/data/covered")?;
            tmpfs("/data/covered")?;
            Box::new(file)
        }
        "unmounted" => {
            let file = file_of_mount("/data/unmounted")?;
            umount2("/data/unmounted", MntFlags::MNT_DETACH)?;
            Box::new(file)
        }
        "chroot" | "chroot-to-mount" => {
            fs::create_dir_all("/data/data")?;
            if name == "chroot-to-mount" {
                let none = None::<&str>;
                mount(Some("/data"), "/data", none, MsFlags::MS_BIND, none)?;
            }
            std::os::unix::fs::chroot("/data")?;
            Box::new(std::env::set_current_dir("/")?)
        }
        _ => return Ok(None),
    };
    Ok(Some(Shared::Held(held)))
}

pub(super) fn check(shared: &Shared) -> io::Result<()> {
    match shared {
        Shared::Held(_) => Ok(()),
        Shared::Timer => {
            let mut signals = SigSet::empty();
            signals.add(TIMER_SIGNAL.try_into()?);
            // One that has come while nobody waited, or the next.
            Ok(signals.wait().map(drop)?)
        }
        Shared::ByteNames(listener, path) => {
            let client = UnixStream::connect(path)?;
            listener.accept()?;
            let name = fs::read("/proc/thread-self/comm")?;
            let good = name == NO_UTF8 && std::env::current_dir()?.ends_with(byte_name());
            drop(client);
            let other = || io::Error::other(format!("{name:?} in another directory"));
            good.then_some(()).ok_or_else(other)
        }
    }
}

fn file_of_mount(at: &str) -> io::Result<File> {
    fs::create_dir(at)?;
    tmpfs(at)?;
    File::create(format!("{at}/file"))
}

fn tmpfs(at: &str) -> io::Result<()> {
    let none = None::<&str>;
    Ok(mount(
        Some("none"),
        at,
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )?)
}

/// As a name of more than 15 bytes is cut.
const NO_UTF8: &[u8] = b"m\xc3\xbcller \xff\xfe w\xc3\n";

fn byte_name() -> PathBuf {
    PathBuf::from(OsString::from_vec(b"w\xc3 \xff".to_vec()))
}

fn byte_names() -> io::Result<Shared> {
    fs::write("/proc/thread-self/comm", NO_UTF8.trim_ascii_end())?;
    let directory = PathBuf::from("/data").join(byte_name());
    fs::create_dir(&directory)?;
    std::env::set_current_dir(&directory)?;
    let mapped = directory.join(byte_name());
    fs::write(&mapped, [7; PAGE])?;
    let file = File::options().read(true).write(true).open(mapped)?;
    let descriptor = file.as_raw_fd().into();
    // mmap(PROT_READ | PROT_WRITE, MAP_SHARED)
    let length = PAGE.cast_signed() as c_long;
    let protection = (libc::PROT_READ | libc::PROT_WRITE).into();
    mapping(length, protection, descriptor)?;
    let socket = directory.join(OsString::from_vec(b"s\xff".to_vec()));
    Ok(Shared::ByteNames(UnixListener::bind(&socket)?, socket))
}

fn mapping(length: c_long, protection: c_long, descriptor: c_long) -> io::Result<c_long> {
    let flags: c_long = libc::MAP_SHARED.into();
    // SAFETY: a new mapping at an address that the kernel chooses.
    let answer =
        unsafe { libc::syscall(libc::SYS_mmap, 0, length, protection, flags, descriptor, 0) };
    (answer >= 0)
        .then_some(answer)
        .ok_or_else(io::Error::last_os_error)
}

fn thread_timer() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(TIMER_SIGNAL.try_into()?);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    // SAFETY: all zeros are a valid `sigevent`.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = TIMER_SIGNAL;
    // SAFETY: a plain number.
    event.sigev_notify_thread_id = unsafe { libc::gettid() };
    let every = libc::timespec {
        tv_sec: 0,
        tv_nsec: 10_000_000,
    };
    let times = libc::itimerspec {
        it_interval: every,
        it_value: every,
    };
    let mut timer: libc::timer_t = std::ptr::null_mut();
    // SAFETY: all of them live until the calls come back.
    let answer = unsafe {
        match libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) {
            0 => libc::timer_settime(timer, 0, &raw const times, std::ptr::null_mut()),
            failed => failed,
        }
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A child that sleeps, and has or does what `flags` say.
fn cloned(flags: i32) -> io::Result<c_long> {
    // As fork: with its own copy of the stack.
    let child = call(libc::SYS_clone, [flags.into(), 0, 0, 0, 0])?;
    if child == 0 {
        loop {
            std::thread::park();
        }
    }
    Ok(child)
}

/// As vfork: until the child ends, both have one memory. Most of the time there is one.
fn vforks() -> io::Result<()> {
    extern "C" fn child(_: *mut libc::c_void) -> libc::c_int {
        std::thread::sleep(std::time::Duration::from_millis(200));
        0
    }
    loop {
        let mut stack = vec![0_u8; 1 << 16];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let top = stack.as_mut_ptr_range().end;
        // SAFETY: this thread goes on when the child, which has the stack alone, has ended.
        let pid = unsafe { libc::clone(child, top.cast(), flags, std::ptr::null_mut()) };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None)?;
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// A thread that leaves what `shared` says, does something and sleeps.
fn thread_with(
    shared: i32,
    act: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let (told, tells) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        let left = call(libc::SYS_unshare, [shared.into(), 0, 0, 0, 0]);
        // Who asked waits for it.
        told.send(left.and_then(|_| act())).ok();
        loop {
            std::thread::park();
        }
    })?;
    tells.recv().map_err(io::Error::other)?
}

fn waits_for_what_is_closed() -> io::Result<(c_long, io::PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    let epoll = call(libc::SYS_epoll_create1, [0; 5])?;
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN.cast_unsigned(),
        u64: 0,
    };
    let of = i32::try_from(epoll).map_err(io::Error::other)?;
    // SAFETY: the event lives until the call comes back.
    let added =
        unsafe { libc::epoll_ctl(of, libc::EPOLL_CTL_ADD, reader.as_raw_fd(), &raw mut event) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // The child has a descriptor of the pipe; this process has none when it is dropped.
    Command::new("/proc/self/exe")
        .arg("asleep")
        .stdin(reader)
        .spawn()?;
    Ok((epoll, writer))
}
