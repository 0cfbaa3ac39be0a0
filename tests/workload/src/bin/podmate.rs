//! Three containers of one pod that miss nothing of each other: what they share is checked at every
//! step, and the first thing that is wrong ends the program with a line that begins with `BAD`.
//!
//! ```text
//! podmate server|client|sharer
//! podmate listener|connector          ends of a unix stream, see `hold_stream`
//!
//!           127.0.0.1:7100, one connection for all time: n --> server, n <-- server
//!  client ------------------------------------------------> server
//!     \       /work/mate.sock, datagrams "<role> <n>"         /
//!      `-----------------------> sharer <--------------------'
//!  all three: a slot each in a System V segment and in /dev/shm/podmate
//! ```
//!
//! Each counts its own slots up and knows what must be in them; the sharer checks that no datagram
//! is missing or repeated, counts a System V semaphore up and keeps a message in a System V queue.
//! Each step is a line on stdout:
//!
//! ```text
//! <n> peer=<last number over TCP, or datagrams> sysv=<slots of all> posix=<slots of all>
//! ```
//!
//! SIGUSR1 makes it take 200 MB, SIGTERM ends it with exit code 7.

#![expect(clippy::exit, reason = "a thread ends the whole program")]

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

const TICK: Duration = Duration::from_millis(20);
const ADDRESS: &str = "127.0.0.1:7100";
const SOCKET: &str = "/work/mate.sock";
const ROLES: [&str; 3] = ["server", "client", "sharer"];

fn main() -> ExitCode {
    let role = std::env::args().nth(1).unwrap_or_default();
    if let "listener" | "connector" = role.as_str() {
        hold_stream(role == "listener");
    }
    let Some(own) = ROLES.iter().position(|known| *known == role) else {
        eprintln!("usage: podmate server|client|sharer");
        return ExitCode::FAILURE;
    };
    // Before any thread, so that all of them have it blocked.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGUSR1);
    if signals.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    std::thread::spawn(move || obey(&signals));
    match run(own) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("BAD {error}");
            ExitCode::FAILURE
        }
    }
}

/// One end of a stream of /work/stream.sock, which nobody writes to; the one that connects makes
/// /work/connected.
fn hold_stream(listens: bool) -> ! {
    const STREAM: &str = "/work/stream.sock";
    let held = if listens {
        UnixListener::bind(STREAM).and_then(|listener| listener.accept().map(|(end, _)| end))
    } else {
        let end = retry(|| UnixStream::connect(STREAM));
        std::fs::write("/work/connected", "").map(|()| end)
    };
    loop {
        std::thread::sleep(TICK);
        std::hint::black_box(&held);
    }
}

fn obey(signals: &SigSet) {
    let mut taken = Vec::new();
    loop {
        match signals.wait() {
            Ok(Signal::SIGUSR1) => taken.push(vec![7_u8; 200 << 20]),
            _ => std::process::exit(7),
        }
    }
}

fn run(own: usize) -> io::Result<()> {
    let sysv = shared::System5::open(own == 2)?;
    let posix = shared::posix()?;
    let memories = [sysv.slots, posix];
    let heard = Arc::new(AtomicU64::new(0));
    let mut mate: Box<dyn FnMut(u64) -> io::Result<u64>> = match own {
        0 => Box::new(serve(&heard)?),
        1 => Box::new(connect()?),
        _ => Box::new(listen(&heard)?),
    };
    let datagrams = UnixDatagram::unbound()?;
    let mut stdout = io::stdout().lock();
    for n in 1.. {
        std::thread::sleep(TICK);
        for memory in memories {
            let before = memory[own].fetch_add(1, Ordering::SeqCst);
            if before != n - 1 {
                return Err(io::Error::other(format!("slot holds {before} at {n}")));
            }
        }
        if own == 2 {
            sysv.check(n)?;
        } else {
            tell(&datagrams, format!("{own} {n}").as_bytes());
        }
        let peer = mate(n)?;
        let of = |memory: &[AtomicU64; 3]| {
            let slots = memory.iter().map(|slot| slot.load(Ordering::SeqCst));
            slots
                .map(|slot| slot.to_string())
                .collect::<Vec<_>>()
                .join(",")
        };
        writeln!(
            stdout,
            "{n} peer={peer} sysv={} posix={}",
            of(memories[0]),
            of(memories[1])
        )?;
    }
    Ok(())
}

/// Until the sharer is there to hear it.
fn tell(socket: &UnixDatagram, text: &[u8]) {
    while socket.send_to(text, SOCKET).is_err() {
        std::thread::sleep(TICK);
    }
}

/// The server's numbers: the client's, in a thread of its own.
fn serve(heard: &Arc<AtomicU64>) -> io::Result<impl FnMut(u64) -> io::Result<u64> + use<>> {
    let listener = TcpListener::bind(ADDRESS)?;
    let told = Arc::clone(heard);
    std::thread::spawn(move || {
        let result = listener
            .accept()
            .and_then(|(stream, _)| answer(stream, &told));
        println!("BAD connection: {result:?}");
        std::process::exit(1);
    });
    let heard = Arc::clone(heard);
    Ok(move |_| Ok(heard.load(Ordering::SeqCst)))
}

fn answer(mut stream: TcpStream, heard: &AtomicU64) -> io::Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    for line in lines {
        let number: u64 = line?.parse().map_err(io::Error::other)?;
        let before = heard.swap(number, Ordering::SeqCst);
        if number != before + 1 {
            return Err(io::Error::other(format!("{number} follows {before}")));
        }
        stream.write_all(format!("{number}\n").as_bytes())?;
    }
    Err(io::Error::other("the client is gone"))
}

/// The client's numbers: one more for every step, answered by the server.
fn connect() -> io::Result<impl FnMut(u64) -> io::Result<u64>> {
    let mut stream = retry(|| TcpStream::connect(ADDRESS));
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    Ok(move |n: u64| {
        stream.write_all(format!("{n}\n").as_bytes())?;
        let answer = lines
            .next()
            .unwrap_or_else(|| Err(io::Error::other("the server is gone")))?;
        if answer != n.to_string() {
            return Err(io::Error::other(format!("{answer} is the answer to {n}")));
        }
        Ok(n)
    })
}

/// The sharer's numbers: datagrams of the others, none missing and none twice.
fn listen(heard: &Arc<AtomicU64>) -> io::Result<impl FnMut(u64) -> io::Result<u64> + use<>> {
    let socket = UnixDatagram::bind(SOCKET)?;
    let told = Arc::clone(heard);
    std::thread::spawn(move || {
        let mut last = [0_u64; 2];
        let mut buffer = [0; 64];
        loop {
            let result = socket.recv(&mut buffer).and_then(|len| {
                let text = String::from_utf8_lossy(&buffer[..len]);
                let (role, n) = text.split_once(' ').unwrap_or_default();
                let role: usize = role.parse().map_err(io::Error::other)?;
                let n: u64 = n.parse().map_err(io::Error::other)?;
                if n != last[role] + 1 {
                    let missed = format!("{} says {n} after {}", ROLES[role], last[role]);
                    return Err(io::Error::other(missed));
                }
                last[role] = n;
                Ok(())
            });
            if let Err(error) = result {
                println!("BAD datagram: {error}");
                std::process::exit(1);
            }
            told.fetch_add(1, Ordering::SeqCst);
        }
    });
    let heard = Arc::clone(heard);
    Ok(move |_| Ok(heard.load(Ordering::SeqCst)))
}

fn retry<T>(mut attempt: impl FnMut() -> io::Result<T>) -> T {
    loop {
        match attempt() {
            Ok(it) => return it,
            Err(_) => std::thread::sleep(TICK),
        }
    }
}

mod shared {
    //! Memory that is shared between processes.
    #![expect(
        unsafe_code,
        reason = "System V IPC and mmap have no safe wrapper; the memory lives as long as the program"
    )]

    use std::fs::OpenOptions;
    use std::io;
    use std::os::fd::AsRawFd as _;
    use std::sync::atomic::AtomicU64;

    use nix::libc;

    const KEY: libc::key_t = 0x7368_6970;
    const LEN: usize = 4096;
    const MESSAGE: [u8; 4] = *b"keep";

    /// The System V objects.
    pub(super) struct System5 {
        pub(super) slots: &'static [AtomicU64; 3],
        semaphore: i32,
        queue: i32,
    }

    #[repr(C)]
    struct Message {
        kind: libc::c_long,
        text: [u8; 4],
    }

    fn ok(result: i32) -> io::Result<i32> {
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }

    impl System5 {
        /// Makes the objects, or waits until somebody has.
        pub(super) fn open(make: bool) -> io::Result<Self> {
            let flags = if make {
                libc::IPC_CREAT | libc::IPC_EXCL
            } else {
                0
            } | 0o600;
            let get = || {
                // SAFETY: plain numbers.
                ok(unsafe { libc::shmget(KEY, LEN, flags) })
            };
            let id = if make { get()? } else { super::retry(get) };
            // SAFETY: the kernel chooses the address; the segment is zeroed and aligned to a page.
            let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
            if address as isize == -1 {
                return Err(io::Error::last_os_error());
            }
            let (mut semaphore, mut queue) = (0, 0);
            if make {
                // SAFETY: plain numbers.
                semaphore = ok(unsafe { libc::semget(KEY, 1, flags) })?;
                // SAFETY: plain numbers.
                queue = ok(unsafe { libc::msgget(KEY, flags) })?;
            }
            // SAFETY: it stays attached, and everybody uses it as atomics.
            let slots = unsafe { &*address.cast::<[AtomicU64; 3]>() };
            Ok(Self {
                slots,
                semaphore,
                queue,
            })
        }

        /// The semaphore's value is the step, and the queue has the message of the step before.
        pub(super) fn check(&self, n: u64) -> io::Result<()> {
            let mut up = libc::sembuf {
                sem_num: 0,
                sem_op: 1,
                sem_flg: 0,
            };
            // SAFETY: one operation.
            ok(unsafe { libc::semop(self.semaphore, &raw mut up, 1) })?;
            // SAFETY: GETVAL has no further argument.
            let value = ok(unsafe { libc::semctl(self.semaphore, 0, libc::GETVAL) })?;
            if u64::try_from(value) != Ok(n) {
                return Err(io::Error::other(format!(
                    "the semaphore is at {value}, not {n}"
                )));
            }
            let mut message = Message {
                kind: 1,
                text: MESSAGE,
            };
            if n > 1 {
                message.text = [0; 4];
                // SAFETY: the message has room for four bytes.
                let len = unsafe {
                    libc::msgrcv(
                        self.queue,
                        (&raw mut message).cast(),
                        4,
                        1,
                        libc::IPC_NOWAIT,
                    )
                };
                if len != 4 || message.text != MESSAGE {
                    return Err(io::Error::other("the message is gone"));
                }
            }
            // SAFETY: the message has four bytes.
            ok(unsafe { libc::msgsnd(self.queue, (&raw const message).cast(), 4, 0) }).map(drop)
        }
    }

    /// Memory of the file /dev/shm/podmate, as `shm_open` makes it.
    pub(super) fn posix() -> io::Result<&'static [AtomicU64; 3]> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false);
        let file = file.open("/dev/shm/podmate")?;
        file.set_len(LEN as u64)?;
        // SAFETY: the kernel chooses the address.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The file stays open, as with many programs.
        std::mem::forget(file);
        // SAFETY: it stays mapped, and everybody uses it as atomics.
        Ok(unsafe { &*address.cast::<[AtomicU64; 3]>() })
    }
}
