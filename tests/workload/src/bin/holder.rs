//! Holds what a checkpoint keeps only if CRIU is told to, and tells whether it still has it.
//!
//! ```text
//! holder NEED...
//!   lock              flock on /data/lock
//!   ghost=BYTES       an open file without a name
//!   link              an open file that lost the name it was opened by, and has another
//!   datagrams=PATH    a unix datagram socket connected to PATH; sends on every tick
//!   receive=PATH      one bound to PATH; how many bytes have come is in PATH.received
//!   renamed=PATH      a unix socket that listens there, bound to PATH.new and renamed; is connected to on every tick
//!   moved=PATH        the same, bound in a directory PATH.d that is removed
//!   forgotten=PATH    a unix socket that listens, and is connected to; its file PATH/s and PATH are gone
//!   linked=PATH       the same as renamed, with PATH linked to PATH.new, and PATH.new removed
//!   tcp=PORT          a connection to itself over localhost; passes a byte on every tick
//!   echo=ADDRESS      listens there, and sends back what comes
//!   peer=ADDRESS      a connection to one that does; passes a byte on every tick
//!   in-flight=PORT    a connection to itself that it never accepts
//! ```
//!
//! and those of `rare`, which CRIU cannot dump, of `odd`, which it restores as something else, and of `shared`.
//!
//! On every tick it replaces `/data/state`, a line a need and the number of the tick last:
//!
//! ```text
//! ghost ok
//! tcp Connection reset by peer (os error 104)
//! tick 12
//! ```

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::ExitCode;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

#[path = "holder/odd.rs"]
mod odd;
#[path = "holder/options.rs"]
mod options;
#[path = "holder/rare.rs"]
mod rare;
#[path = "holder/shared.rs"]
mod shared;

const TICK: Duration = Duration::from_millis(50);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
const BLOCK: usize = 4096;

enum Held {
    Lock(#[expect(dead_code, reason = "it is held")] Flock<File>),
    Ghost(File, usize),
    Link(File),
    Datagrams(UnixDatagram),
    Receive(UnixDatagram, String, usize),
    Listens(UnixListener, String),
    Forgotten(UnixListener, UnixStream, UnixStream),
    Tcp(TcpStream, TcpStream),
    Echo,
    Peer(TcpStream),
    InFlight(
        #[expect(dead_code, reason = "it is held")] TcpListener,
        #[expect(dead_code, reason = "it is held")] TcpStream,
    ),
    Rare(rare::Rare),
    Odd(odd::Odd),
    Options(options::Options),
    Shared(shared::Shared),
}

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holder: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(needs: impl Iterator<Item = String>) -> io::Result<()> {
    let mut held = Vec::new();
    for need in needs {
        held.push((take(&need)?, need));
    }
    for tick in 0_u64.. {
        let mut state = String::new();
        for (held, need) in &mut held {
            let name = need.split('=').next().unwrap_or_default();
            let said = match check(held) {
                Ok(()) => "ok".to_owned(),
                Err(error) => error.to_string(),
            };
            writeln!(state, "{name} {said}").map_err(io::Error::other)?;
        }
        fs::write("/data/state.new", format!("{state}tick {tick}\n"))?;
        fs::rename("/data/state.new", "/data/state")?;
        std::thread::sleep(TICK);
    }
    Ok(())
}

fn take(need: &str) -> io::Result<Held> {
    let (name, value) = need.split_once('=').unwrap_or((need, ""));
    let number = || value.parse::<usize>().map_err(io::Error::other);
    let port = || value.parse::<u16>().map_err(io::Error::other);
    let open = |path: &str| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
    };
    Ok(match name {
        "lock" => {
            let lock = Flock::lock(open("/data/lock")?, FlockArg::LockExclusiveNonblock);
            Held::Lock(lock.map_err(|(_, errno)| errno)?)
        }
        "ghost" => {
            let mut file = open("/data/ghost")?;
            let blocks = number()? / BLOCK;
            for block in 0..blocks {
                file.write_all(&pattern(block))?;
            }
            fs::remove_file("/data/ghost")?;
            Held::Ghost(file, blocks)
        }
        "link" => {
            let file = open("/data/first-name")?;
            fs::hard_link("/data/first-name", "/data/second-name")?;
            fs::remove_file("/data/first-name")?;
            Held::Link(file)
        }
        "datagrams" => {
            let socket = UnixDatagram::unbound()?;
            socket.connect(value)?;
            Held::Datagrams(socket)
        }
        "receive" => {
            let socket = UnixDatagram::bind(value)?;
            socket.set_nonblocking(true)?;
            Held::Receive(socket, format!("{value}.received"), 0)
        }
        "renamed" | "linked" => {
            let first = format!("{value}.new");
            let listener = UnixListener::bind(&first)?;
            if name == "renamed" {
                fs::rename(first, value)?;
            } else {
                fs::hard_link(&first, value)?;
                fs::remove_file(first)?;
            }
            Held::Listens(listener, value.to_owned())
        }
        "forgotten" => {
            fs::create_dir(value)?;
            let path = format!("{value}/s");
            let listener = UnixListener::bind(&path)?;
            let client = UnixStream::connect(&path)?;
            let server = listener.accept()?.0;
            fs::remove_file(path)?;
            fs::remove_dir(value)?;
            Held::Forgotten(listener, client, server)
        }
        "moved" => {
            let (directory, first) = (format!("{value}.d"), format!("{value}.d/first"));
            fs::create_dir(&directory)?;
            let listener = UnixListener::bind(&first)?;
            fs::rename(first, value)?;
            fs::remove_dir(directory)?;
            Held::Listens(listener, value.to_owned())
        }
        "tcp" => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port()?))?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            Held::Tcp(client, listener.accept()?.0)
        }
        "echo" => {
            let listener = TcpListener::bind(value)?;
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    // Until the other end goes.
                    drop(io::copy(&mut &stream, &mut &stream));
                }
            });
            Held::Echo
        }
        "peer" => {
            let stream = TcpStream::connect(value)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Held::Peer(stream)
        }
        "options" => Held::Options(options::Options::take()?),
        "in-flight" => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port()?))?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            Held::InFlight(listener, client)
        }
        _ => {
            let unknown = || io::Error::other(format!("unknown need {need}"));
            if let Some(rare) = rare::take(name, value)? {
                Held::Rare(rare)
            } else if let Some(odd) = odd::take(name, value)? {
                Held::Odd(odd)
            } else {
                Held::Shared(shared::take(name)?.ok_or_else(unknown)?)
            }
        }
    })
}

fn check(held: &mut Held) -> io::Result<()> {
    match held {
        Held::Lock(_) | Held::InFlight(..) | Held::Echo => Ok(()),
        Held::Ghost(file, blocks) => {
            let mut found = [0; BLOCK];
            for block in 0..*blocks {
                file.read_exact_at(&mut found, (block * BLOCK) as u64)?;
                if found != pattern(block) {
                    return Err(io::Error::other(format!("block {block} is another")));
                }
            }
            Ok(())
        }
        Held::Link(file) => {
            let (open, named) = (file.metadata()?, fs::metadata("/data/second-name")?);
            if (open.dev(), open.ino(), open.nlink()) != (named.dev(), named.ino(), 1) {
                let (open, named) = ((open.ino(), open.nlink()), (named.ino(), named.nlink()));
                return Err(io::Error::other(format!("{open:?} is not {named:?}")));
            }
            Ok(())
        }
        Held::Datagrams(socket) => socket.send(b"tick\n").map(drop),
        Held::Receive(socket, path, bytes) => {
            let mut datagram = [0; 16];
            while let Ok(length) = socket.recv(&mut datagram) {
                *bytes += length;
            }
            fs::write(path, bytes.to_string())
        }
        Held::Listens(listener, path) => {
            let client = UnixStream::connect(path)?;
            let (server, _) = listener.accept()?;
            pass(&mut &client, &mut &server)
        }
        Held::Forgotten(listener, client, server) => {
            listener.local_addr()?;
            pass(client, server)
        }
        Held::Tcp(client, server) => pass(client, server),
        Held::Peer(stream) => pass(&mut &*stream, &mut &*stream),
        Held::Rare(rare) => rare::check(rare),
        Held::Odd(odd) => odd::check(odd),
        Held::Options(options) => options.check(),
        Held::Shared(shared) => shared::check(shared),
    }
}

fn pass(from: &mut impl Write, to: &mut impl Read) -> io::Result<()> {
    from.write_all(b"x")?;
    let mut byte = [0];
    to.read_exact(&mut byte)?;
    (byte == *b"x")
        .then_some(())
        .ok_or_else(|| io::Error::other(format!("{byte:?} came")))
}

fn pattern(block: usize) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (block * 31 + at * 7).to_le_bytes()[0];
    }
    bytes
}
