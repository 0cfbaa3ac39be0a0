//! A dump that begins while the tasks still run, and leaves the pages of memory in their processes until they have been read
//! there.
//!
//! Runtime and CRIU look at a good deal before they look at the tasks: their own versions, what the kernel can do, the spec.
//! So they are started before the freeze, and CRIU waits for it in the script that it runs first (`ACT_PRE_DUMP`, before
//! `collect_pstree`). It has touched no task there: one that nobody lets go on is killed.
//!
//! CRIU copies all memory into files, and a migration reads it from them. With `--lazy-pages` it writes everything
//! but the pages, which a server of its own would give to the restore. That server is not wanted: it listens to
//! whoever comes first. Between the two moments CRIU runs a script, and tasks and parasite stand still:
//!
//! ```text
//!  CRIU                                      who freezes, and reads
//!   script pre-dump:   makes "ready"     ──> freezes the tasks, makes "frozen"
//!                      waits for "begin" <── unlocks it (the kernel does when this program ends)
//!                      without "frozen" it kills CRIU
//!   all images but the pages
//!   script post-dump:  makes "dumped"    ──> reads /proc/<pid>/mem
//!                      waits for "lock"  <── unlocks it (so does the kernel)
//!   server, script status-ready: makes "ended", and fails, before anybody is accepted
//!   gives up the server, takes its parasite out, says that the dump has failed
//! ```
//!
//! So a dump that has come to "ended" is a good one, whatever CRIU and the runtime say of it. Its files are whole some
//! time before: CRIU still has to take back its lock of the network, for which it runs five programs of iptables where it
//! has no nftables.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::time::sleep;

use crate::error::{Context, Result};
use crate::exported_layer::Layer;
use crate::version::Version;

/// CRIU before it does not run scripts beside the RPC of the runtimes in all of these places.
const SINCE: Version = Version(4, 0, 0);
/// How often it is looked whether the images are there.
const LOOK: Duration = Duration::from_millis(1);
/// Begins the name of its directory, which no container has.
const PREFIX: &str = ".hold-";

/// Holds a dump until its tasks are frozen, and while its memory is read.
#[derive(Debug)]
pub struct DumpHold {
    dir: PathBuf,
    /// Until the tasks are frozen.
    begin: Mutex<Option<Flock<File>>>,
    /// Until memory has been read.
    lock: Mutex<Option<Flock<File>>>,
    /// There when all files are whole but those of memory.
    layer: OnceLock<Layer>,
}

/// Whether memory can come to a restored process when it is touched.
pub(crate) fn has_userfaultfd() -> bool {
    Command::new("criu")
        .args(["check", "--feature", "uffd-noncoop"])
        .output()
        .is_ok_and(|output| output.status.success())
}

impl DumpHold {
    /// Whether dumps can be held on this node: by its CRIU, and with userfaultfd, which runc asks for at every lazy
    /// dump.
    pub fn is_possible() -> bool {
        Version::of_criu().is_some_and(|version| version >= SINCE) && has_userfaultfd()
    }

    /// A hold for the dump of a container below `draft`, which nobody else writes to.
    ///
    /// # Errors
    /// A system call failed.
    pub fn make(draft: &Path, container: &str) -> Result<Self> {
        let dir = draft.join(format!("{PREFIX}{container}"));
        let lock = |name| -> io::Result<Mutex<Option<Flock<File>>>> {
            let lock = Flock::lock(
                File::create_new(dir.join(name))?,
                FlockArg::LockExclusiveNonblock,
            );
            Ok(Mutex::new(Some(lock.map_err(|(_, errno)| errno)?)))
        };
        let make = || {
            DirBuilder::new().mode(0o700).create(&dir)?;
            Ok::<_, io::Error>((lock("begin")?, lock("lock")?))
        };
        let (begin, lock) =
            make().with_context(|| format!("cannot make and lock {}", dir.display()))?;
        Ok(Self {
            begin,
            lock,
            layer: OnceLock::new(),
            dir,
        })
    }

    /// Waits until CRIU waits for the freeze.
    pub(crate) async fn ready(&self) {
        while self.dir.join("ready").symlink_metadata().is_err() {
            sleep(LOOK).await;
        }
    }

    /// The tasks are frozen: the dump goes on, whether it has come to that or not; not at all where it was given up.
    ///
    /// # Errors
    /// It cannot be told.
    pub(crate) fn begin(&self) -> Result<()> {
        if let Some(begin) = take(&self.begin) {
            let frozen = self.dir.join("frozen");
            File::create_new(&frozen)
                .with_context(|| format!("cannot make {}", frozen.display()))?;
            drop(begin);
        }
        Ok(())
    }

    /// Whether all images but the pages are there, and the processes wait.
    pub fn is_dumped(&self) -> bool {
        self.dir.join("dumped").symlink_metadata().is_ok()
    }

    /// Waits for that.
    pub(crate) async fn dumped(&self) {
        while !self.is_dumped() {
            sleep(LOOK).await;
        }
    }

    /// All files are whole but those of memory, and this is the layer among them.
    pub(crate) fn complete(&self, layer: Layer) {
        // Said once.
        drop(self.layer.set(layer));
    }

    /// The layer, when all files are whole but those of memory.
    pub fn layer(&self) -> Option<&Layer> {
        self.layer.get()
    }

    /// Whether the dump waits for nobody but who reads.
    pub fn is_held(&self) -> bool {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock.is_some() && self.is_dumped()
    }

    /// Whether the dump has come to its end.
    pub fn has_ended_well(&self) -> bool {
        self.dir.join("ended").symlink_metadata().is_ok()
    }

    /// Memory has been read, or nobody reads it: the dump goes on. One that has not begun is given up.
    pub fn release(&self) {
        drop(take(&self.begin));
        drop(take(&self.lock));
    }

    /// What the runtime's `checkpoint` is told.
    ///
    /// # Errors
    /// No port is free.
    pub(crate) fn flags(&self) -> Result<Vec<String>> {
        // CRIU wants one, and nobody is served there.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|it| it.local_addr());
        let free = free.context("cannot find a free port")?;
        Ok(vec![
            "--lazy-pages".to_owned(),
            "--page-server".to_owned(),
            free.to_string(),
        ])
    }

    /// What the script runs at `pre-dump`, at `status-ready`, at the beginning of `post-dump`, and at its end.
    pub(crate) fn script_parts(&self, quoted: impl Fn(&Path) -> String) -> [String; 4] {
        let file = |name| quoted(&self.dir.join(name));
        [
            format!(
                // `:` would end the shell where it cannot make the file. Who has started it may have ended meanwhile.
                "true >{}; flock -s {} test -e {} && exit 0; set -- $(cat /proc/$$/stat); \
                 [ \"$4\" != $PPID ] || ! grep -qx criu /proc/$PPID/comm || kill -KILL $PPID; exit 1",
                file("ready"),
                file("begin"),
                file("frozen")
            ),
            format!(": >{}; exit 1", file("ended")),
            format!(": >{} || exit 1", file("dumped")),
            format!("exec flock -s {} true", file("lock")),
        ]
    }
}

/// Takes a lock; who drops it unlocks, by closing its descriptor.
fn take(lock: &Mutex<Option<Flock<File>>>) -> Option<Flock<File>> {
    lock.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl Drop for DumpHold {
    fn drop(&mut self) {
        self.release();
        // Of a draft, which goes as well.
        drop(fs::remove_dir_all(&self.dir));
    }
}
