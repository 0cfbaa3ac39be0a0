//! What a daemon in a node uses: memory and processor time, from /proc (proc(5)).

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use transship_testbed::{Node, poll_until};

/// The kernel's unit of `utime` and `stime`: 100 a second on every Linux (`getconf CLK_TCK`).
const TICK: Duration = Duration::from_millis(10);
/// How long a daemon must be idle to count as settled, and how long that is waited for.
const IDLE: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(120);

/// A process, by its directory in the node's /proc.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    dir: PathBuf,
}

impl Process {
    /// The daemon that `Node::start_daemon` started under this name.
    pub(crate) fn of_daemon(node: &Node, name: &str) -> Result<Process> {
        let pid = node.read_file(&format!("/run/{name}.pid"))?;
        let pid = String::from_utf8_lossy(&pid);
        Ok(Process {
            dir: node.path_from_outside(&format!("/proc/{}", pid.trim())),
        })
    }

    /// The process that listens on a Unix socket.
    pub(crate) fn behind(socket: &Path) -> Result<Process> {
        let connection = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let peer = getsockopt(&connection, PeerCredentials).context("cannot ask for the peer")?;
        Ok(Process {
            dir: PathBuf::from(format!("/proc/{}", peer.pid())),
        })
    }

    /// This program.
    pub(crate) fn itself() -> Process {
        Process {
            dir: PathBuf::from("/proc/self"),
        }
    }

    fn open(&self) -> Result<procfs::process::Process> {
        procfs::process::Process::new_with_root(self.dir.clone())
            .with_context(|| format!("cannot open {}", self.dir.display()))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "these daemons have names that are text"
    )]
    fn status(&self) -> Result<procfs::process::Status> {
        let status = self.open()?.status();
        status.context("cannot read the memory")
    }

    /// Bytes that lie in memory now.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        let kilobytes = self.status()?.vmrss;
        Ok(kilobytes.context("a kernel thread has no memory")? * 1024)
    }

    /// The most bytes that lay in memory since the start or [`Process::reset_peak`].
    pub(crate) fn peak_bytes(&self) -> Result<u64> {
        let kilobytes = self.status()?.vmhwm;
        Ok(kilobytes.context("a kernel thread has no memory")? * 1024)
    }

    /// Lets the peak begin at what lies in memory now.
    pub(crate) fn reset_peak(&self) -> Result<()> {
        let path = self.dir.join("clear_refs");
        fs::write(&path, "5").with_context(|| format!("cannot write {}", path.display()))
    }

    /// Processor time of all its threads so far.
    pub(crate) fn processor_time(&self) -> Result<Duration> {
        let stat = self.open()?.stat().context("cannot read the times")?;
        let ticks = u32::try_from(stat.utime + stat.stime).context("centuries of work")?;
        Ok(TICK * ticks)
    }

    /// Waits until it has nothing to do, so that the next turn begins on a quiet machine.
    pub(crate) fn settle(&self) -> Result<()> {
        let mut last = self.processor_time()?;
        let mut since = std::time::Instant::now();
        poll_until("a daemon to be idle", PATIENCE, || {
            let now = self
                .processor_time()
                .map_err(|error| format!("{error:#}"))?;
            // A tick in that time is the timers of a runtime, not work.
            if now > last + TICK {
                (last, since) = (now, std::time::Instant::now());
            }
            if since.elapsed() >= IDLE {
                Ok(())
            } else {
                Err(format!("{now:?} of processor time so far"))
            }
        })?;
        Ok(())
    }
}
