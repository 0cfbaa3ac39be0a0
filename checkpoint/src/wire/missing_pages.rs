//! Pages that a restored process still lacks, while it runs (`migrate --lazy`).
//!
//! ```text
//!  who serves the restore ──> pages.socket ──> receive ──> a direct connection ──> migrate, which reads the process
//!
//!  request   pid:u32le  pages:u32le  start:u64le    pages = 0: nothing is missing any more
//!  answer    pages:u32le  length:u32le  data        as many as wanted, or fewer; 0: none can be read, or the end
//! ```
//!
//! Data is the pages, or, where it is shorter, a zstd frame of them: over a slow link, see compression.rs.
//!
//! A request is answered before the next one is made. Whoever finds the connection ended before the end was said has
//! to take the process for lost.

use std::io::{self, Read, Write};

use super::Link;

/// Bytes of a page.
const PAGE: usize = 4096;
/// The most pages of one request: what `criu lazy-pages` asks for at most.
pub const MOST_PAGES: u32 = 1024;
/// In the directory of the container: where who restores it asks for pages.
pub const SOCKET: &str = "pages.socket";

/// The pages that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Process id in the container.
    pub pid: u32,
    /// Address of the first one.
    pub start: u64,
    /// How many, at most [`MOST_PAGES`].
    pub pages: u32,
}

impl Wanted {
    const END: Self = Self {
        pid: 0,
        start: 0,
        pages: 0,
    };

    fn write(self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.pid.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[8..].copy_from_slice(&self.start.to_le_bytes());
        to.write_all(&bytes)?;
        to.flush()
    }

    fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut bytes = [0; 16];
        from.read_exact(&mut bytes)?;
        let bytes = u128::from_le_bytes(bytes);
        let wanted = Self {
            pid: low(bytes),
            pages: low(bytes >> 32),
            start: u64::from(low(bytes >> 64)) | u64::from(low(bytes >> 96)) << 32,
        };
        match wanted.pages <= MOST_PAGES {
            true => Ok(wanted),
            false => Err(invalid("more pages are wanted at once than anybody needs")),
        }
    }
}

fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn low(bits: u128) -> u32 {
    let [a, b, c, d, ..] = bits.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn length(pages: u32) -> usize {
    // A request is at most 4 MiB.
    usize::try_from(pages).map_or(0, |pages| pages * PAGE)
}

/// Asks for pages; `pages` is those that came, at least one.
///
/// # Errors
/// None can be read where they are, or the connection has ended.
pub fn ask(to: &mut (impl Read + Write), wanted: Wanted, pages: &mut Vec<u8>) -> io::Result<()> {
    wanted.write(to)?;
    let (count, data) = (read_u32(to)?, read_u32(to)?);
    if count == 0 || count > wanted.pages {
        return Err(invalid("the other node cannot read the page"));
    }
    let (whole, data) = (length(count), usize::try_from(data).unwrap_or(usize::MAX));
    if data > whole {
        return Err(invalid("more has come than the pages that were wanted"));
    }
    pages.resize(data, 0);
    to.read_exact(pages)?;
    if data < whole {
        // Into a buffer of that size, and no other.
        *pages = zstd::bulk::decompress(pages, whole)?;
    }
    match pages.len() == whole {
        true => Ok(()),
        false => Err(invalid("compressed pages are not what they are said to be")),
    }
}

/// Says that nothing is missing any more, and waits until that is understood.
///
/// # Errors
/// The connection has ended.
pub fn end(to: &mut (impl Read + Write)) -> io::Result<()> {
    Wanted::END.write(to)?;
    match (read_u32(to)?, read_u32(to)?) {
        (0, 0) => Ok(()),
        _ => Err(invalid("pages came that nobody has asked for")),
    }
}

/// Answers until nothing is missing any more. `read` fills a buffer with the pages that are wanted, or with fewer; with
/// none where they cannot be read. `link` is the one to the other node; none: it is another program here that asks.
///
/// # Errors
/// Those of `read`; or the connection has ended.
pub fn answer(
    from: &mut (impl Read + Write),
    link: Option<&Link>,
    mut read: impl FnMut(Wanted, &mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let mut pages = Vec::new();
    loop {
        let wanted = Wanted::read(from)?;
        pages.clear();
        if wanted.pages == 0 {
            return Ok(());
        }
        read(wanted, &mut pages)?;
        pages.truncate(length(wanted.pages));
        give(from, link, &pages)?;
    }
}

/// Says that the end, which [`answer`] has come to, is understood.
///
/// # Errors
/// The connection has ended.
pub fn confirm_end(to: &mut impl Write) -> io::Result<()> {
    give(to, None, &[])
}

fn give(to: &mut impl Write, link: Option<&Link>, pages: &[u8]) -> io::Result<()> {
    let count = u32::try_from(pages.len() / PAGE).map_err(io::Error::other)?;
    let pages = &pages[..length(count)];
    let compressed = link.and_then(|link| link.compress(pages));
    let data = compressed.as_deref().unwrap_or(pages);
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    // Tells nothing of the link: each answer finds the kernel's buffer empty, because the one before has arrived.
    to.write_all(&count.to_le_bytes())?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(data)?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn pages_come_and_the_end_is_understood() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let other_node = thread::spawn(move || {
            let mut asked = Vec::new();
            answer(&mut there, None, |wanted, pages| {
                asked.push(wanted);
                let has = if wanted.start == 0 { 0 } else { 2 };
                pages.resize(has * PAGE, 7);
                Ok(())
            })
            .unwrap();
            confirm_end(&mut there).unwrap();
            asked
        });
        let wanted = |start, pages| Wanted {
            pid: 3,
            start,
            pages,
        };
        let mut pages = Vec::new();
        ask(&mut here, wanted(1 << 40, 5), &mut pages).unwrap();
        assert_eq!(pages, [7; 2 * PAGE], "fewer than were wanted");
        ask(&mut here, wanted(1 << 40, 1), &mut pages).unwrap();
        assert_eq!(pages.len(), PAGE, "and never more");
        assert!(ask(&mut here, wanted(0, 1), &mut pages).is_err());
        end(&mut here).unwrap();
        let asked = other_node.join().unwrap();
        assert_eq!(
            asked,
            [wanted(1 << 40, 5), wanted(1 << 40, 1), wanted(0, 1)]
        );
    }

    #[test]
    fn less_comes_over_a_slow_link() {
        let wanted = Wanted {
            pid: 3,
            start: 0,
            pages: 100,
        };
        for (rate, is_slow) in [(1000, true), (u64::MAX, false)] {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            let link = Link::of_rate(rate);
            let known = link.clone();
            let other_node = thread::spawn(move || {
                answer(&mut there, Some(&link), |_, pages| {
                    pages.resize(100 * PAGE, 7);
                    Ok(())
                })
                .unwrap();
                confirm_end(&mut there)
            });
            let mut pages = Vec::new();
            ask(&mut here, wanted, &mut pages).unwrap();
            assert_eq!(pages, vec![7; 100 * PAGE]);
            end(&mut here).unwrap();
            other_node.join().unwrap().unwrap();
            let compressed = known.0.compressed();
            assert_eq!(compressed.bytes, u64::from(is_slow) * 100 * PAGE as u64);
            assert!(compressed.sent <= 1000);
        }
    }

    #[test]
    fn answers_that_lie_are_refused() {
        let zeros = zstd::bulk::compress(&[0; 2 * PAGE], 1).unwrap();
        let wanted = Wanted {
            pid: 3,
            start: 0,
            pages: 2,
        };
        for (count, data, is_true) in [
            (2, &zeros[..], true),
            (1, &zeros, false),
            (2, &zeros[1..], false),
            (3, &zeros, false),
            (1, &[0; PAGE + 1], false),
        ] {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            let length = u32::try_from(data.len()).unwrap();
            let answer = [&u32::to_le_bytes(count)[..], &length.to_le_bytes(), data].concat();
            there.write_all(&answer).unwrap();
            let asked = ask(&mut here, wanted, &mut Vec::new());
            assert_eq!(asked.is_ok(), is_true, "{count} {length}");
        }
    }

    #[test]
    fn an_end_that_was_not_said_is_none() {
        let (mut here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert!(end(&mut here).is_err());
        let (here, mut there) = UnixStream::pair().unwrap();
        drop(here);
        assert!(answer(&mut there, None, |_, _| Ok(())).is_err());
        let (mut here, mut there) = UnixStream::pair().unwrap();
        here.write_all(&[0xff; 16]).unwrap();
        assert!(answer(&mut there, None, |_, _| Ok(())).is_err());
    }
}
