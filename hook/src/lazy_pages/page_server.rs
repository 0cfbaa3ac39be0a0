//! The pages that `criu lazy-pages` asks its page server for.
//!
//! ```text
//!  request   CRIU before 4.2   cmd:u32  pages:u32            address:u64  pid:u64
//!            from 4.2 on       cmd:u32  4 bytes   pages:u64  address:u64  pid:u64     the machine's byte order
//!            cmd  7 get;  0x1023, 0x1024 the end
//!  answer    the request, with as many pages as come (fewer than wanted are fine), then the pages
//!            to the end: status:i32, 0
//! ```
//!
//! CRIU waits for the answers in the order of its requests (criu/page-xfer.c). The two forms are told from each other by
//! the second word of 8 bytes: it is an address, which is no less than a page, or a count, of which CRIU wants no more
//! than 1024.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::criu_images::lazy_memory::{Found, LazyMemory};
use transship_checkpoint::wire::missing_pages::{self, MOST_PAGES, SOCKET, Wanted};

use crate::one_line;

const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;
/// The low half of a command; flags are above.
const COMMAND: u32 = 0xffff;

/// The memory of one restore.
#[derive(Debug)]
pub(super) struct Memory {
    /// By the process ids in the container.
    processes: BTreeMap<u32, LazyMemory>,
    /// Who has what is not here.
    source: Option<UnixStream>,
    /// Bytes of a page.
    page: usize,
}

impl Memory {
    /// That in the images, which are made such that CRIU asks for all of it that may come late.
    ///
    /// # Errors
    /// An image is damaged or cannot be read, or nobody has what is not in them.
    pub(super) fn open(images: &Path) -> io::Result<Self> {
        let (page, mut processes) = (rustix::param::page_size(), BTreeMap::new());
        for entry in fs::read_dir(images)? {
            let name = entry?.file_name();
            let pid = { name.to_str() }
                .and_then(|name| name.strip_prefix("pagemap-")?.strip_suffix(".img"))
                .and_then(|pid| pid.parse().ok());
            // Shared memory (`pagemap-shmem-`) comes with the restore.
            let Some(pid) = pid else { continue };
            let memory = LazyMemory::open(images, pid, page as u64);
            if let Some((memory, served)) = memory.map_err(damaged)? {
                processes.insert(pid, memory);
                served.replace(&images.join(&name)).map_err(damaged)?;
            }
        }
        // Who waits there hears of the end also when nothing is missing.
        let source = match connect(images) {
            Err(_) if processes.values().all(LazyMemory::is_whole) => None,
            source => Some(source?),
        };
        Ok(Self {
            processes,
            source,
            page,
        })
    }

    /// Fills the buffer with as many of the pages as lie together.
    fn read(&mut self, wanted: Wanted, pages: &mut Vec<u8>) -> io::Result<()> {
        let nowhere = || {
            let Wanted { pid, start, .. } = wanted;
            io::Error::other(format!("no image has the page {start:#x} of process {pid}"))
        };
        let memory = self.processes.get(&wanted.pid).ok_or_else(nowhere)?;
        let at_most = |there: u64| wanted.pages.min(u32::try_from(there).unwrap_or(u32::MAX));
        match memory.find(wanted.start).ok_or_else(nowhere)? {
            Found::File {
                file,
                offset,
                pages: there,
            } => {
                let count = usize::try_from(at_most(there)).map_err(io::Error::other)?;
                pages.resize(count * self.page, 0);
                file.read_exact_at(pages, offset)
            }
            Found::Process { pages: there } => {
                let source = self.source.as_mut().ok_or_else(nowhere)?;
                let wanted = Wanted {
                    pages: at_most(there),
                    ..wanted
                };
                let asked = missing_pages::ask(source, wanted, pages);
                asked.map_err(|error| {
                    let message = format!("memory that is still on the source is lost: {error}");
                    io::Error::other(message)
                })
            }
        }
    }

    /// Nothing is missing any more.
    fn end(&mut self) -> io::Result<()> {
        self.source.as_mut().map_or(Ok(()), missing_pages::end)
    }
}

fn damaged(error: ImageError) -> io::Error {
    io::Error::other(one_line(&error))
}

/// What stands beside the images, whose path may be longer than the 107 bytes of a socket's.
fn connect(images: &Path) -> io::Result<UnixStream> {
    let beside = images.parent().unwrap_or(Path::new("/"));
    let dir = open(beside, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(SOCKET);
    UnixStream::connect(path).map_err(|error| {
        let message = format!("pages are on another node, and nobody brings them: {error}");
        io::Error::other(message)
    })
}

/// One request.
#[derive(Debug, Clone, Copy)]
struct Request {
    command: u32,
    wanted: Wanted,
    /// Whether CRIU counts pages in 64 bits.
    is_wide: bool,
}

impl Request {
    fn read(from: &mut impl Read) -> io::Result<Self> {
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
        let half = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_ne_bytes);
        let mut bytes = [0; 32];
        from.read_exact(&mut bytes[..24])?;
        let command = half(&bytes[..4]) & COMMAND;
        let is_wide = word(&bytes[8..16]) <= MOST_PAGES.into();
        let (pages, start, pid) = if is_wide && command == GET {
            from.read_exact(&mut bytes[24..])?;
            let pages = u32::try_from(word(&bytes[8..16])).unwrap_or(u32::MAX);
            (pages, word(&bytes[16..24]), word(&bytes[24..]))
        } else {
            let pages = half(&bytes[4..8]);
            (pages, word(&bytes[8..16]), word(&bytes[16..24]))
        };
        Ok(Self {
            command,
            wanted: Wanted {
                pid: u32::try_from(pid).map_err(io::Error::other)?,
                start,
                pages: pages.min(MOST_PAGES),
            },
            is_wide,
        })
    }

    /// The head of an answer with so many pages.
    fn answer(self, pages: usize) -> Vec<u8> {
        let count = pages as u64;
        let mut head = GET.to_ne_bytes().to_vec();
        if self.is_wide {
            head.extend([0; 4]);
            head.extend(count.to_ne_bytes());
        } else {
            head.extend(u32::try_from(count).unwrap_or(0).to_ne_bytes());
        }
        head.extend(self.wanted.start.to_ne_bytes());
        head.extend(u64::from(self.wanted.pid).to_ne_bytes());
        head
    }
}

/// Answers CRIU until it has all, or is gone.
///
/// # Errors
/// A page cannot be read. CRIU finds its connection ended then.
pub(super) fn serve(mut criu: UnixStream, mut memory: Memory) -> io::Result<()> {
    let mut pages = Vec::new();
    loop {
        let request = match Request::read(&mut criu) {
            // It says itself why it has ended.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            request => request?,
        };
        match request.command {
            GET => {
                memory.read(request.wanted, &mut pages)?;
                criu.write_all(&request.answer(pages.len() / memory.page))?;
                criu.write_all(&pages)?;
            }
            CLOSE | FORCE_CLOSE => {
                memory.end()?;
                return criu.write_all(&0_i32.to_ne_bytes());
            }
            command => {
                let message = format!("criu lazy-pages has asked for {command:#x}");
                return Err(io::Error::other(message));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{self, JoinHandle};

    use transship_checkpoint::criu_images::pagemap::{PagePlace, PageRun, Pagemap};

    use super::*;

    const START: u64 = 0x7f00_0000_0000;

    /// Images of a process with a page in a file, and one on another node.
    fn images(dir: &Path) -> PathBuf {
        let images = dir.join("images");
        fs::create_dir(&images).unwrap();
        let page = rustix::param::page_size();
        let run = |number: u64, place| PageRun {
            start: START + number * page as u64,
            pages: 1,
            place,
            lazy: true,
        };
        let pagemap = Pagemap {
            pages_id: 1,
            runs: vec![run(0, PagePlace::File), run(1, PagePlace::Process)],
        };
        fs::write(images.join("pagemap-3.img"), pagemap.to_bytes()).unwrap();
        fs::write(images.join("pages-1.img"), vec![7; page]).unwrap();
        images
    }

    /// One that serves, and the end of CRIU.
    fn serving(memory: Memory) -> (UnixStream, JoinHandle<io::Result<()>>) {
        let (criu, server) = UnixStream::pair().unwrap();
        (criu, thread::spawn(move || serve(server, memory)))
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn both_forms_of_a_request_are_answered() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::open(&images(dir.path()));
        let refused = memory.unwrap_err().to_string();
        assert!(refused.contains("nobody brings them"), "{refused}");
        let socket = dir.path().join(SOCKET);
        let receive = std::os::unix::net::UnixListener::bind(socket).unwrap();
        let memory = Memory::open(&dir.path().join("images")).unwrap();
        let (mut relay, _) = receive.accept().unwrap();
        let source = thread::spawn(move || {
            missing_pages::answer(&mut relay, None, |wanted, pages| {
                assert_eq!((wanted.pid, wanted.pages), (3, 1));
                pages.resize(4096, 9);
                Ok(())
            })?;
            missing_pages::confirm_end(&mut relay)
        });

        let (mut criu, server) = serving(memory);
        let page = rustix::param::page_size();
        let head = |narrow: u32| words(&[u64::from(GET) | u64::from(narrow) << 32]);
        // Up to 4.1: two pages are wanted, and one is there.
        criu.write_all(&[head(2), words(&[START, 3])].concat())
            .unwrap();
        let mut answer = vec![0; 24 + page];
        criu.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..24], [head(1), words(&[START, 3])].concat());
        assert!(answer[24..].iter().all(|byte| *byte == 7));
        // From 4.2 on.
        let next = START + page as u64;
        criu.write_all(&[head(0), words(&[5, next, 3])].concat())
            .unwrap();
        let mut answer = vec![0; 32 + 4096];
        criu.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..32], [head(0), words(&[1, next, 3])].concat());
        assert!(answer[32..].iter().all(|byte| *byte == 9));
        criu.write_all(&words(&[FORCE_CLOSE.into(), 0, 0, 0]))
            .unwrap();
        let mut status = [1; 4];
        criu.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4]);
        server.join().unwrap().unwrap();
        source.join().unwrap().unwrap();
    }

    #[test]
    fn what_is_nowhere_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let images = images(dir.path());
        drop(std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET)).unwrap());
        assert!(Memory::open(&images).is_err(), "nobody listens any more");
        let all = Pagemap::read(&images.join("pagemap-3.img")).unwrap();
        let local = Pagemap {
            runs: all.runs[..1].to_vec(),
            ..all
        };
        fs::write(images.join("pagemap-3.img"), local.to_bytes()).unwrap();
        for (at, pid) in [(START - 4096, 3), (START, 4)] {
            let (mut criu, server) = serving(Memory::open(&images).unwrap());
            criu.write_all(&words(&[GET.into(), 1, at, pid])).unwrap();
            let failed = server.join().unwrap().unwrap_err().to_string();
            assert!(failed.contains("no image has"), "{failed}");
        }
    }
}
