//! Pages of memory that come while the copy runs: whoever serves them to it asks here, and they are asked for at the
//! source.
//!
//! ```text
//!  guard of the restore (transship-runc) ──> <checkpoint>/<container>/pages.socket ──> here ══> migrate on the source
//! ```
//!
//! When the source does not answer any more, the guard finds its connection ended, and ends the copy.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinSet;
use transship_checkpoint::wire::missing_pages::{SOCKET, answer, ask, confirm_end, end};

use crate::data_channel::{Connection, EndAtDrop};
use crate::error::{Context, Error, Result};

/// Brings pages as long as it is there.
#[derive(Debug)]
pub(super) struct PageRelay {
    relay: JoinSet<Result<()>>,
    _end: EndAtDrop,
}

impl PageRelay {
    /// Waits in the directory of the container for whoever serves its memory. The source may take as long as `patience`
    /// for each answer.
    ///
    /// # Errors
    /// There is no connection, or the socket cannot be made.
    pub(super) fn bring(
        dir: &Path,
        link: Option<(Connection, EndAtDrop)>,
        patience: Duration,
    ) -> Result<Self> {
        let (link, end) = link.ok_or_else(|| {
            Error::failed("the source brings pages late, and has no connection for them")
        })?;
        end.read_within(patience)
            .context("cannot set a deadline for pages")?;
        let listener = listen(dir);
        let listener = listener.with_context(|| format!("cannot listen in {}", dir.display()))?;
        let mut relay = JoinSet::new();
        relay.spawn(relay_pages(listener, link));
        Ok(Self { relay, _end: end })
    }

    /// Waits until all of them are there.
    ///
    /// # Errors
    /// The copy is lost: the source or who serves its memory is gone.
    pub(super) async fn all(mut self) -> Result<()> {
        match self.relay.join_next().await {
            Some(ended) => ended?,
            None => Ok(()),
        }
    }
}

/// The path may be longer than the 107 bytes that a socket's has.
fn listen(dir: &Path) -> std::io::Result<tokio::net::UnixListener> {
    let opened = File::open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd())).join(SOCKET);
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

async fn relay_pages(listener: tokio::net::UnixListener, mut link: Connection) -> Result<()> {
    let failed = "the rest of the copy's memory cannot be brought";
    let (guard, _) = listener.accept().await.context(failed)?;
    let mut guard = guard.into_std().context(failed)?;
    guard.set_nonblocking(false).context(failed)?;
    let relay = move || {
        answer(&mut guard, None, |wanted, pages| {
            ask(&mut link, wanted, pages)
        })?;
        end(&mut link)?;
        confirm_end(&mut guard)
    };
    tokio::task::spawn_blocking(relay).await?.context(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use transship_checkpoint::wire::missing_pages::Wanted;

    use super::*;
    use crate::data_channel::Identity;

    #[tokio::test]
    async fn pages_come_from_the_other_node() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let here = [std::net::Ipv4Addr::LOCALHOST.into()];
        let listener = target.listen(&here, source.public(), 1).unwrap();
        let addresses = listener.addresses().unwrap();
        let accepting = std::thread::spawn(|| listener.accept());
        let mut there = source.connect(&addresses, target.public(), 1).unwrap();
        let (mut process, ends) = there.take_last().unwrap();
        let link = accepting.join().unwrap().unwrap().take_last();
        let serving = std::thread::spawn(move || {
            answer(&mut process, None, |wanted, pages| {
                pages.resize(4096, u8::try_from(wanted.pid).unwrap());
                Ok(())
            })?;
            confirm_end(&mut process)
        });

        let dir = tempfile::tempdir().unwrap();
        let patience = Duration::from_secs(20);
        assert!(PageRelay::bring(dir.path(), None, patience).is_err());
        let late = PageRelay::bring(dir.path(), link, patience).unwrap();
        let socket = dir.path().join(SOCKET);
        let guard = std::thread::spawn(move || {
            let mut asking = UnixStream::connect(socket)?;
            let wanted = Wanted {
                pid: 7,
                start: 4096,
                pages: 3,
            };
            let mut pages = Vec::new();
            ask(&mut asking, wanted, &mut pages)?;
            end(&mut asking).map(|()| pages)
        });
        late.all().await.unwrap();
        assert_eq!(guard.join().unwrap().unwrap(), [7; 4096]);
        serving.join().unwrap().unwrap();
        drop(ends);
    }
}
