//! The daemon as a process of its own, on a root and a socket below a temporary directory.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::client::{self, Client};

/// A root directory that outlives the daemons that are started on it.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
}

impl Site {
    /// A site in memory: a killed process loses nothing that it wrote to any file system, and 300
    /// kills need not wait for a disk.
    pub fn in_memory() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("transship-sn-")
            .tempdir_in("/dev/shm")
            .unwrap();
        Self { dir }
    }

    pub fn new() -> Self {
        Self {
            dir: tempfile::Builder::new()
                .prefix("transship-sn-")
                .tempdir()
                .unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn root(&self) -> PathBuf {
        self.path().join("root")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.root().join("snapshots")
    }

    pub fn socket(&self) -> PathBuf {
        self.path().join("run/s.sock")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    pub fn open_log(&self) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.path().join("log"))
            .unwrap()
    }

    /// The daemon's command with its root and socket.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_transship-snapshotter"));
        command.arg("--root").arg(self.root());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.open_log());
        command
    }

    /// Starts a daemon and waits until it listens.
    pub fn start(&self, flags: &[&str]) -> Daemon {
        let mut daemon = self.start_unready(flags);
        let socket = self.socket();
        super::wait_until("the daemon listens", || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("the daemon ended at once ({status}):\n{}", self.log());
            }
            UnixStream::connect(&socket).is_ok()
        });
        daemon
    }

    /// Starts a daemon that may not live long enough to listen.
    pub fn start_unready(&self, flags: &[&str]) -> Daemon {
        let mut command = self.command();
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--log-level", "info"])
            .args(flags);
        Daemon {
            child: command.spawn().unwrap(),
            socket: self.socket(),
        }
    }

    /// Directory names in `snapshots/`, sorted.
    pub fn directories(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.snapshots())
            .map(|entries| {
                entries
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect()
            })
            .unwrap_or_default();
        names.sort_unstable();
        names
    }
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    pub async fn client(&self) -> Client {
        client::connect(&self.socket, "transship").await.unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// SIGKILL, and gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.child.wait().unwrap()
    }

    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only for a daemon that is gone already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs the daemon's binary on the site until it ends.
pub fn run(site: &Site, arguments: &[&str]) -> Output {
    site.command()
        .stderr(Stdio::piped())
        .args(arguments)
        .output()
        .unwrap()
}

/// What it says when it refuses to run so.
pub fn refusal(site: &Site, arguments: &[&str]) -> String {
    let output = run(site, arguments);
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}
