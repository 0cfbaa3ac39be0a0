//! `--raw`: the directory of a snapshot as it lies on disk, copied within one node by reflink.
//!
//! A raw copy has overlay's own marks in it (whiteout devices, `trusted.overlay.*`), so it is good only
//! over the same parent and with the same kind of mount; a layer is good everywhere. What it has instead
//! is that it takes no room and next to no time, whatever the files hold.
//!
//! Hard links are not offered: overlayfs writes to the files of an upperdir in place, and a linked copy
//! would change with them. `cp` does the walk: it keeps owners, modes, times, links, devices and
//! attributes, and refuses as a whole with `--reflink=always` where the file system shares no blocks.

use std::path::Path;

use tokio::process::Command;
use transship_layer::remove_contents;

use crate::error::{Context, Error, Result};
use crate::interrupt::Interrupt;

/// Copies what is in `from` into the empty directory `to`, and its attributes too. What was copied when
/// it fails is removed.
pub(super) async fn copy_tree(from: &Path, to: &Path, interrupt: &Interrupt) -> Result<()> {
    let mut cp = Command::new("cp");
    cp.args(["--archive", "--reflink=always", "--no-target-directory"])
        .args([from, to])
        .env("LC_ALL", "C")
        .kill_on_drop(true);
    let copied = tokio::select! {
        output = cp.output() => output.context("cannot run cp").and_then(|output| {
            if output.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&output.stderr);
            let message = format!(
                "{} cannot be copied to {} by reflink: {}",
                from.display(),
                to.display(),
                said.lines().next().unwrap_or("cp failed")
            );
            Err(Error::refused(message)
                .hint("both must lie on one XFS or btrfs; without --raw it becomes a layer"))
        }),
        interrupted = interrupt.wait() => Err(interrupted.into()),
    };
    if copied.is_err() {
        remove_contents(to).with_context(|| format!("cannot empty {}", to.display()))?;
    }
    copied
}
