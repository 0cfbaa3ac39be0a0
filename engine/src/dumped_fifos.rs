//! FIFOs that several containers of a pod have open.
//!
//! ```text
//!  /work/fifo   unread bytes ──┬── open in "reader"  ──> its images: the bytes
//!                              `── open in "writer"  ──> its images: nothing
//! ```
//!
//! CRIU dumps one container without knowing of the others, and puts what lies unread in a FIFO into the images of each
//! that has it open. All of them would put it back, into the one FIFO of the volume that they share. So it stays in
//! the images of the first alone: containers of a pod are held until all are there, and the FIFO lives as long as one has it open.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use procfs::process::FDTarget;
use transship_checkpoint::criu_images::pipe_data;

use crate::conditions::Processes;
use crate::error::{Context as _, Error, Result};

/// The FIFOs of the containers that are dumped already, by device and inode.
#[derive(Debug, Default)]
pub(crate) struct DumpedFifos(BTreeSet<(u64, u64)>);

impl DumpedFifos {
    /// Adds those of a container that stands still. Gives the numbers by which CRIU knows those of them that are in the
    /// images of another one.
    pub(crate) fn add(&mut self, init: u32, pids: &[u32]) -> BTreeSet<u32> {
        let processes = Processes::read(init, pids);
        let fifos: BTreeSet<(u64, u64)> = { processes.descriptors() }
            .filter(|(_, _, target)| matches!(target, FDTarget::Path(_)))
            .filter_map(|(seen, number, _)| fs::metadata(seen.descriptor(number)).ok())
            .filter(|file| file.file_type().is_fifo())
            .map(|file| (file.dev(), file.ino()))
            .collect();
        let id = |(_, inode): &(u64, u64)| number_of(*inode);
        let others: BTreeSet<u32> = fifos.intersection(&self.0).map(id).collect();
        // CRIU takes two of one number for one.
        let own: BTreeSet<u32> = fifos.difference(&self.0).map(id).collect();
        self.0.extend(fifos);
        &others - &own
    }
}

/// CRIU keeps the lower half.
fn number_of(inode: u64) -> u32 {
    let [a, b, c, d, ..] = inode.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Takes what lies in these FIFOs out of the images.
///
/// # Errors
/// The images cannot be read or replaced.
pub(crate) async fn leave_out(images: &Path, fifos: BTreeSet<u32>) -> Result<()> {
    if fifos.is_empty() {
        return Ok(());
    }
    let dir = images.to_path_buf();
    let removed = tokio::task::spawn_blocking(move || pipe_data::remove_fifos(&dir, &fifos));
    let failed = || format!("cannot edit the FIFOs in {}", images.display());
    removed
        .await?
        .map_err(Error::caused_by)
        .with_context(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use nix::libc::O_NONBLOCK;
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn the_second_container_leaves_out_what_the_first_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut options = fs::File::options();
        let fifo = { options.read(true).custom_flags(O_NONBLOCK) }
            .open(&path)
            .unwrap();
        let number = number_of(fifo.metadata().unwrap().ino());
        let own = std::process::id();
        let mut dumped = DumpedFifos::default();
        assert!(!dumped.add(own, &[own]).contains(&number));
        assert!(dumped.add(own, &[own]).contains(&number));
        drop(fifo);
        assert!(!dumped.add(own, &[own]).contains(&number));
    }
}
