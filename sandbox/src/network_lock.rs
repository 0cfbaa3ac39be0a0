//! Rules of nft in a network namespace, and the lock of a network whose container moves.
//!
//! ```text
//!  source   lock ── freeze ── dump, CNI DEL ── killed, and its network goes      (given up: unlock, thaw)
//!  target              CNI ADD, lock ── sockets are made again, held ── unlock, thaw, announced
//! ```
//!
//! The kernel answers for a socket whatever stands still: what it has acknowledged after the dump nobody would send
//! again, and what it has acknowledged for a copy that is given up neither. CRIU's own lock is there during the dump
//! and the restore only.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use transship_program_output::output_within;

use crate::error::SandboxError;
use crate::pins::in_network;

/// How long nft may take: somebody stands still meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
const TABLE: &str = "inet transship-migration";

/// Keeps all packets from and to others in a network namespace, until they are let go or the namespace goes.
///
/// # Errors
/// There is no nft, or the kernel has no nf_tables.
pub fn lock_network(namespace: &Path) -> Result<(), SandboxError> {
    // Declared first, a table can be deleted whether it was there or not.
    let script = format!(
        "table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{
         chain input {{ type filter hook input priority -300; policy drop; iif lo accept; }}
         chain output {{ type filter hook output priority -300; policy drop; oif lo accept; }}\n}}\n"
    );
    nft("lock the network", namespace, &script)
}

/// Lets them go; also where they were not kept.
///
/// # Errors
/// As [`lock_network`].
pub fn unlock_network(namespace: &Path) -> Result<(), SandboxError> {
    let script = format!("table {TABLE}\ndelete table {TABLE}\n");
    nft("unlock the network", namespace, &script)
}

/// Runs a script of nft in a network namespace. One that takes too long is killed.
///
/// # Errors
/// `act` failed, or took too long, with the first line that nft has said.
pub fn nft(act: &'static str, namespace: &Path, script: &str) -> Result<(), SandboxError> {
    in_network(act, namespace, || {
        let nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("nft: {error}")))?;
        let output = output_within(PATIENCE, nft, script.to_owned())?.ok_or_else(|| {
            let seconds = PATIENCE.as_secs();
            io::Error::other(format!("nft: it has taken more than {seconds} s"))
        })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().next().unwrap_or("no reason given");
        Err(io::Error::other(format!("nft: {first}")))
    })
}
