//! A disk of its own for what makes and removes hundreds of thousands of files.
//!
//! Disks of virtual machines are often ext4 without a journal. There the kernel passes over every inode
//! that was deleted within the last minutes, one after the other, each time it makes a file
//! (`recently_deleted` in fs/ext4/ialloc.c): what runs second takes ten times as long. Nodes have
//! a journal, so this is an ext4 with one, in a file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Most that it can hold; the file is sparse.
const BYTES: u64 = 40 << 30;

/// A mounted file system, gone with this value.
#[derive(Debug)]
pub(crate) struct Disk {
    dir: PathBuf,
    image: PathBuf,
}

impl Disk {
    /// Makes and mounts one beside `work_dir`: in it, another testbed would sweep it away.
    ///
    /// # Errors
    /// Without root, loop devices or `mkfs.ext4`.
    pub(crate) fn make(work_dir: &Path) -> Result<Disk> {
        let name = format!("transship-bench-disk-{}", std::process::id());
        let disk = Disk {
            dir: work_dir.with_file_name(&name),
            image: work_dir.with_file_name(name + ".img"),
        };
        let making = || format!("cannot make {}", disk.image.display());
        fs::create_dir_all(&disk.dir).with_context(making)?;
        let image = File::create(&disk.image).and_then(|file| file.set_len(BYTES));
        image.with_context(making)?;
        let lazy = "lazy_itable_init=0,lazy_journal_init=0";
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-E", lazy])
            .arg(&disk.image))?;
        // Past the page cache: else each sync in it waits for all of the file that is not written yet.
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--direct-io=on"]);
        let device = run(losetup.arg(&disk.image))?;
        let device = device.trim();
        let mounted = run(Command::new("mount").arg(device).arg(&disk.dir));
        // While it is mounted, this only says that it goes with the mount.
        run(Command::new("losetup").args(["--detach", device]))?;
        mounted?;
        Ok(disk)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What is not mounted any more, or never was, is removed all the same.
        drop(run(Command::new("umount").arg(&self.dir)));
        drop(fs::remove_dir(&self.dir));
        drop(fs::remove_file(&self.image));
    }
}

/// What the command said on stdout.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output();
    let output = output.with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
