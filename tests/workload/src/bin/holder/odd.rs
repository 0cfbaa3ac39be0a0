//! What CRIU restores without a word as something else, and more of what it does not dump or restore: each need makes one
//! of the conditions that `transship check` tells of, but for the last seven: what was not read
//! is lost and told, the others come along.
//!
//! ```text
//!   personality       ADDR_NO_RANDOMIZE
//!   semaphore-eventfd EFD_SEMAPHORE
//!   protection-key    memory with a key
//!   sealed            memory that is sealed
//!   memory-policy     memory that is interleaved
//!   multicast         a socket that has joined 239.1.2.3
//!   keyring           a key in the session keyring
//!   packet-pipe       a pipe with O_DIRECT
//!   thread-pidfd      a pidfd of a thread
//!   alarm-timerfd     a timerfd of CLOCK_BOOTTIME_ALARM
//!   backlog=PATH      a unix connection to itself at PATH, with data, that it does not accept
//!   thread-file       an open file of a thread in /proc
//!   descriptors=FREE  so many descriptors are left of those that it may have
//!   memfd             goes on as a program that lies in memory alone
//!   unread-events     an event of inotify that it does not read
//!   named-deleted     an open file whose name ends with " (deleted)"
//!   nameless          an open file that never had a name (O_TMPFILE)
//!   listener=PORT     TCP_DEFER_ACCEPT, TCP_USER_TIMEOUT, TCP_FASTOPEN and a congestion control
//!   encapsulated      a UDP socket from which the kernel takes ESP (UDP_ENCAP)
//!   core-filter       another coredump_filter
//!   huge              a huge page
//!   udp=PORT          a UDP socket connected to another one over localhost; a datagram on every tick
//! ```

#![expect(
    unsafe_code,
    reason = "these calls have no safe wrapper; what they make lives as long as the program"
)]

use std::any::Any;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::raw::c_long;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::mpsc;

use nix::sys::socket::sockopt::{TcpCongestion, TcpUserTimeout};
use nix::sys::socket::{getsockopt, setsockopt};
use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};

pub(super) const PAGE: usize = 4096;
/// The default one of x86 and, with pages of 4 KiB, of ARM.
const HUGE_PAGE: usize = 2 << 20;
const NAMED_DELETED: &str = "/data/x (deleted)";
const CORE_FILTER: &str = "/proc/self/coredump_filter";
const USER_TIMEOUT: u32 = 30_000;
/// Every kernel has it.
const CONGESTION: &str = "reno";

/// From `linux/udp.h`; libc does not have them.
const UDP_ENCAP: libc::c_int = 100;
const ESP_IN_UDP: u32 = 2;

sockopt_impl!(UdpEncap, Both, libc::IPPROTO_UDP, UDP_ENCAP, u32);
sockopt_impl!(
    TcpDeferAccept,
    Both,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    u32
);
sockopt_impl!(
    TcpFastOpen,
    Both,
    libc::IPPROTO_TCP,
    libc::TCP_FASTOPEN,
    u32
);

/// What is held, and what a tick does with it.
pub(super) enum Odd {
    Held(#[expect(dead_code, reason = "it is held")] Box<dyn Any>),
    Listener(TcpListener, u32),
    CoreFilter,
    Udp(UdpSocket, UdpSocket),
}

/// None for a need that is none of these.
pub(super) fn take(name: &str, value: &str) -> io::Result<Option<Odd>> {
    let port = || value.parse::<u16>().map_err(io::Error::other);
    let held: Box<dyn Any> = match name {
        "personality" => Box::new(call(libc::SYS_personality, [0x0004_0000, 0, 0, 0, 0])?),
        "semaphore-eventfd" => Box::new(call(
            libc::SYS_eventfd2,
            [3, libc::EFD_SEMAPHORE.into(), 0, 0, 0],
        )?),
        "protection-key" => Box::new(keyed()?),
        "sealed" => Box::new(call(
            SYS_MSEAL,
            [page()?, PAGE.cast_signed() as c_long, 0, 0, 0],
        )?),
        "memory-policy" => Box::new(interleaved()?),
        "huge" => Box::new(map(HUGE_PAGE, libc::MAP_HUGETLB | libc::MAP_POPULATE)?),
        "multicast" => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.join_multicast_v4(&Ipv4Addr::new(239, 1, 2, 3), &Ipv4Addr::LOCALHOST)?;
            Box::new(socket)
        }
        "encapsulated" => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            setsockopt(&socket, UdpEncap, &ESP_IN_UDP)?;
            Box::new(socket)
        }
        "keyring" => Box::new(key()?),
        "packet-pipe" => Box::new(nix::unistd::pipe2(nix::fcntl::OFlag::O_DIRECT)?),
        "thread-pidfd" => {
            let thread = c_long::from(new_thread()?);
            Box::new(call(
                libc::SYS_pidfd_open,
                [thread, libc::O_EXCL.into(), 0, 0, 0],
            )?)
        }
        "alarm-timerfd" => Box::new(call(
            libc::SYS_timerfd_create,
            [libc::CLOCK_BOOTTIME_ALARM.into(), 0, 0, 0, 0],
        )?),
        "backlog" => {
            let listener = UnixListener::bind(value)?;
            let client = UnixStream::connect(value)?;
            io::Write::write_all(&mut &client, b"hello")?;
            Box::new((listener, client))
        }
        "thread-file" => {
            let thread = new_thread()?;
            Box::new(File::open(format!("/proc/self/task/{thread}/status"))?)
        }
        "descriptors" => {
            use nix::sys::resource::{Resource, getrlimit, setrlimit};
            let free: u64 = value.parse().map_err(io::Error::other)?;
            // The directory is one of them while it is read.
            let open = fs::read_dir("/proc/self/fd")?.count() as u64 - 1;
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            Box::new(setrlimit(Resource::RLIMIT_NOFILE, open + free, hard)?)
        }
        "nameless" => {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true);
            Box::new(options.custom_flags(libc::O_TMPFILE).open("/data")?)
        }
        "memfd" => Box::new(from_memory()?),
        "unread-events" => Box::new(unread_events()?),
        "named-deleted" => {
            let mut options = OpenOptions::new();
            Box::new(
                options
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(NAMED_DELETED)?,
            )
        }
        "listener" => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port()?))?;
            setsockopt(&listener, TcpDeferAccept, &5)?;
            setsockopt(&listener, TcpUserTimeout, &USER_TIMEOUT)?;
            setsockopt(&listener, TcpFastOpen, &16)?;
            setsockopt(&listener, TcpCongestion, &CONGESTION.into())?;
            // The kernel rounds it to when it sends again.
            let defer = getsockopt(&listener, TcpDeferAccept)?;
            return Ok(Some(Odd::Listener(listener, defer)));
        }
        "core-filter" => {
            fs::write(CORE_FILTER, "0x7f")?;
            return Ok(Some(Odd::CoreFilter));
        }
        "udp" => {
            let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, port()?))?;
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            client.connect(server.local_addr()?)?;
            return Ok(Some(Odd::Udp(client, server)));
        }
        _ => return Ok(None),
    };
    Ok(Some(Odd::Held(held)))
}

pub(super) fn check(odd: &Odd) -> io::Result<()> {
    let as_it_was = |what: &str, good: bool| {
        let other = || io::Error::other(format!("{what} is another one"));
        good.then_some(()).ok_or_else(other)
    };
    match odd {
        Odd::Held(_) => Ok(()),
        Odd::Listener(listener, defer) => {
            as_it_was("defer", getsockopt(listener, TcpDeferAccept)? == *defer)?;
            as_it_was(
                "timeout",
                getsockopt(listener, TcpUserTimeout)? == USER_TIMEOUT,
            )?;
            as_it_was("fast open", getsockopt(listener, TcpFastOpen)? == 16)?;
            as_it_was(
                "congestion",
                getsockopt(listener, TcpCongestion)? == CONGESTION,
            )
        }
        Odd::CoreFilter => {
            let filter = fs::read_to_string(CORE_FILTER)?;
            as_it_was("filter", filter.trim() == "0000007f")
        }
        Odd::Udp(client, server) => {
            client.send(b"x")?;
            let mut byte = [0];
            server.recv(&mut byte)?;
            as_it_was("datagram", byte == *b"x")
        }
    }
}

/// Of Linux 6.10 and later; libc does not name it everywhere.
const SYS_MSEAL: c_long = 462;

pub(super) fn call(number: c_long, arguments: [c_long; 5]) -> io::Result<c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: plain numbers; the memory that some of them are addresses of is the kernel's or lives as long as the program.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e) };
    (answer >= 0)
        .then_some(answer)
        .ok_or_else(io::Error::last_os_error)
}

/// The address of a new page.
pub(super) fn page() -> io::Result<c_long> {
    map(PAGE, 0)
}

fn map(bytes: usize, flags: libc::c_int) -> io::Result<c_long> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, -1, 0) };
    match page == libc::MAP_FAILED {
        true => Err(io::Error::last_os_error()),
        false => Ok(page.expose_provenance().cast_signed() as c_long),
    }
}

/// Nothing where the processor has no keys.
fn keyed() -> io::Result<Option<c_long>> {
    let Ok(key) = call(libc::SYS_pkey_alloc, [0; 5]) else {
        return Ok(None);
    };
    let length = PAGE.cast_signed() as c_long;
    let arguments = [page()?, length, libc::PROT_READ.into(), key, 0];
    call(libc::SYS_pkey_mprotect, arguments).map(Some)
}

fn interleaved() -> io::Result<c_long> {
    static NODES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(1);
    let nodes = NODES.as_ptr().expose_provenance().cast_signed() as c_long;
    let length = PAGE.cast_signed() as c_long;
    // SAFETY: the address is that of a static.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            page()?,
            length,
            libc::MPOL_INTERLEAVE,
            nodes,
            64,
            0,
        )
    };
    (answer == 0)
        .then_some(answer)
        .ok_or_else(io::Error::last_os_error)
}

fn unread_events() -> io::Result<c_long> {
    let address =
        |text: &'static std::ffi::CStr| text.as_ptr().expose_provenance().cast_signed() as c_long;
    let watch = call(libc::SYS_inotify_init1, [0; 5])?;
    let created = c_long::from(libc::IN_CREATE);
    call(
        libc::SYS_inotify_add_watch,
        [watch, address(c"/data"), created, 0, 0],
    )?;
    File::create("/data/unread")?;
    Ok(watch)
}

fn key() -> io::Result<c_long> {
    const SESSION_KEYRING: c_long = -3;
    let address =
        |text: &'static std::ffi::CStr| text.as_ptr().expose_provenance().cast_signed() as c_long;
    let arguments = [
        address(c"user"),
        address(c"secret"),
        address(c"x"),
        1,
        SESSION_KEYRING,
    ];
    call(libc::SYS_add_key, arguments)
}

/// The id of a thread that sleeps.
fn new_thread() -> io::Result<i32> {
    let (told, tells) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        // Who asked waits for it.
        told.send(nix::unistd::gettid().as_raw()).ok();
        loop {
            std::thread::park();
        }
    })?;
    tells.recv().map_err(io::Error::other)
}

fn from_memory() -> io::Result<()> {
    let own = fs::read_link("/proc/self/exe")?;
    if own.to_string_lossy().starts_with("/memfd:") {
        return Ok(());
    }
    // SAFETY: the name ends with a zero.
    let number = unsafe { libc::memfd_create(c"holder".as_ptr(), 0) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    let mut program = unsafe { File::from_raw_fd(number) };
    io::copy(&mut File::open(own)?, &mut program)?;
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    Err(Command::new(path).args(std::env::args_os().skip(1)).exec())
}
