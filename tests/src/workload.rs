//! The programs that run inside containers, and what the counter answers.
//!
//! They are built apart from the rest, linked statically (an image then needs no libc), optimised
//! (the counter checks hundreds of megabytes per answer), by cargo into a target directory of their own.

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::run::CommandRun as _;
use crate::{Settings, TestbedError};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// One of our container programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Counts, holds memory, writes files, answers on TCP: workload/src/bin/counter.rs.
    Counter,
    /// Holds what CRIU keeps only if it is told to: workload/src/bin/holder.rs.
    Holder,
    /// Sleeps until SIGTERM: workload/src/bin/sandbox.rs.
    Sandbox,
    /// One of three containers that share all that a pod can share: workload/src/bin/podmate.rs.
    Podmate,
    /// Counts in several processes without a pause: workload/src/bin/spin.rs.
    Spin,
    /// Changes large files in turn: workload/src/bin/writer.rs.
    Writer,
    /// Serves on tokio: workload/src/bin/tokio.rs.
    Tokio,
}

impl Workload {
    /// Those of the cases that every run has.
    pub(crate) const ALL: [Workload; 6] = [
        Workload::Counter,
        Workload::Holder,
        Workload::Sandbox,
        Workload::Podmate,
        Workload::Spin,
        Workload::Writer,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Workload::Counter => "counter",
            Workload::Holder => "holder",
            Workload::Sandbox => "sandbox",
            Workload::Podmate => "podmate",
            Workload::Spin => "spin",
            Workload::Writer => "writer",
            Workload::Tokio => "tokio",
        }
    }

    /// Builds the program if its source is newer and gives its path.
    ///
    /// # Errors
    /// When cargo fails.
    pub fn build(self, settings: &Settings) -> Result<PathBuf, TestbedError> {
        if let Some(dir) = &settings.built_workloads {
            return Ok(dir.join(self.name()));
        }
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/workload/Cargo.toml");
        Command::new(&settings.cargo)
            .args([
                "build",
                "--quiet",
                "--release",
                "--bin",
                self.name(),
                "--target",
                TARGET,
            ])
            .args((self == Workload::Tokio).then_some("--features=tokio"))
            .args(["--manifest-path", manifest, "--target-dir"])
            .arg(&settings.workload_target_dir)
            // Above all other sources of flags; with --target it leaves build scripts alone.
            .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
            .run()?;
        Ok(settings
            .workload_target_dir
            .join(TARGET)
            .join("release")
            .join(self.name()))
    }
}

/// One answer of the counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterReply {
    /// The counter now.
    pub count: u64,
    /// The hostname as the program sees it.
    pub hostname: String,
    /// The address on which this answer was asked for.
    pub local_ip: String,
    /// True if all of its memory holds what was written there at the start.
    pub memory_ok: bool,
    /// How much memory that is.
    pub memory_mb: u64,
    /// The program's own PID, as it sees it.
    pub pid: u32,
}

impl CounterReply {
    /// Asks the counter at `address` from the caller's own network namespace.
    ///
    /// # Errors
    /// Text for [`crate::poll_until`].
    pub fn ask(address: SocketAddr) -> Result<CounterReply, String> {
        let wait = Duration::from_secs(10);
        let mut stream = TcpStream::connect_timeout(&address, wait).map_err(|e| e.to_string())?;
        stream
            .set_read_timeout(Some(wait))
            .map_err(|e| e.to_string())?;
        let mut text = String::new();
        stream
            .read_to_string(&mut text)
            .map_err(|e| e.to_string())?;
        CounterReply::parse(&text)
    }

    fn parse(text: &str) -> Result<CounterReply, String> {
        serde_json::from_str(text).map_err(|error| format!("{error} in {text:?}"))
    }
}

impl crate::Node {
    /// Asks the counter at `address` ("10.88.0.2:7000") from inside this node.
    ///
    /// # Errors
    /// Text for [`crate::poll_until`].
    pub fn ask_counter(&self, address: &str) -> Result<CounterReply, String> {
        let Some((host, port)) = address.rsplit_once(':') else {
            return Err(format!("no port in {address:?}"));
        };
        let text = self
            .command("busybox")
            .args(["nc", "-w", "10", host, port])
            .read()
            .map_err(|error| error.to_string())?;
        CounterReply::parse(&text)
    }
}
