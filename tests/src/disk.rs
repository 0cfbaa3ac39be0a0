//! A disk of its own, in a file, for nodes that need a file system which the machine's disk may not have.
//!
//! Disks of virtual machines are often ext4 without a journal. There the kernel passes over every inode
//! that was deleted within the last minutes, one after the other, each time it makes a file
//! (`recently_deleted` in fs/ext4/ialloc.c): what runs second takes ten times as long. Nodes have
//! a journal.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Whence, lseek};

use crate::TestbedError;
use crate::run::CommandRun as _;
use transship_path_error::During as _;

/// Block size of all these file systems.
const BLOCK: usize = 4096;
/// Most that it can hold; the file is sparse.
const BYTES: u64 = 40 << 30;

/// What a disk is formatted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// With a journal.
    Ext4,
    /// Copies by reflink.
    Btrfs,
}

impl FileSystem {
    fn make_command(self) -> Command {
        let (program, arguments): (_, &[&str]) = match self {
            FileSystem::Ext4 => {
                let eager = "lazy_itable_init=0,lazy_journal_init=0";
                ("mkfs.ext4", &["-q", "-F", "-E", eager])
            }
            FileSystem::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
        };
        let mut command = Command::new(program);
        command.args(arguments);
        command
    }
}

/// A mounted file system, gone with this value.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    image: PathBuf,
}

impl Disk {
    /// Makes and mounts one beside `work_dir`: in it, another testbed would sweep it away.
    ///
    /// # Errors
    /// Without root, loop devices or the program that formats it.
    pub fn make(work_dir: &Path, file_system: FileSystem) -> Result<Disk, TestbedError> {
        let name = format!("transship-disk-{}", std::process::id());
        let disk = Disk {
            dir: work_dir.with_file_name(&name),
            image: work_dir.with_file_name(name + ".img"),
        };
        fs::create_dir_all(&disk.dir).during("make directory", &disk.dir)?;
        File::create(&disk.image)
            .and_then(|file| file.set_len(BYTES))
            .during("make", &disk.image)?;
        file_system.make_command().arg(&disk.image).run()?;
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> Result<(), TestbedError> {
        // Past the page cache: else each sync in it waits for all of the file that is not written yet.
        let device = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(&self.image)
            .read()?;
        let device = device.trim();
        let mounted = Command::new("mount").arg(device).arg(&self.dir).run();
        // While it is mounted, this only says that it goes with the mount.
        Command::new("losetup").args(["--detach", device]).run()?;
        mounted
    }

    /// From now on ext4 writes nothing by itself for ten minutes, but what it is told to sync.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn write_late(&self) -> Result<(), TestbedError> {
        let options = ["-o", "remount,commit=600"];
        Command::new("mount").args(options).arg(&self.dir).run()
    }

    /// What would be found if the power were cut now: a copy of all that the disk has been given, mounted.
    ///
    /// # Errors
    /// Without room for the copy, or when it cannot be mounted.
    pub fn after_power_cut(&self) -> Result<Disk, TestbedError> {
        let disk = Disk {
            dir: self.dir.with_extension("cut"),
            image: self.image.with_extension("cut.img"),
        };
        Command::new("cp")
            .arg("--sparse=always")
            .args([&self.image, &disk.image])
            .run()?;
        fs::create_dir_all(&disk.dir).during("make directory", &disk.dir)?;
        disk.mount()?;
        Ok(disk)
    }

    /// Destroys every block that holds `text`, behind the back of the file system: one that keeps
    /// checksums of data (btrfs) answers with EIO when such a block is read. Gives how many there were.
    /// What is to be read so must be on disk and in no cache.
    ///
    /// # Errors
    /// I/O errors of the image file.
    pub fn spoil(&self, text: &[u8]) -> Result<usize, TestbedError> {
        let image = File::options().read(true).write(true).open(&self.image);
        let image = image.during("open", &self.image)?;
        let mut spoiled = 0;
        let mut block = vec![0; BLOCK];
        let mut at = 0;
        // The image is sparse: from data to data.
        while let Ok(data) = lseek(&image, at, Whence::SeekData) {
            let start = data.cast_unsigned() / BLOCK as u64 * BLOCK as u64;
            image
                .read_exact_at(&mut block, start)
                .during("read", &self.image)?;
            if block.windows(text.len()).any(|found| found == text) {
                image
                    .write_all_at(&[0; BLOCK], start)
                    .during("write", &self.image)?;
                spoiled += 1;
            }
            at = (start + BLOCK as u64).cast_signed();
        }
        image.sync_all().during("sync", &self.image)?;
        Ok(spoiled)
    }

    /// Where it is mounted: a `work_dir` for a testbed.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What is not mounted any more, or never was, is removed all the same.
        drop(Command::new("umount").arg(&self.dir).run());
        drop(fs::remove_dir(&self.dir));
        drop(fs::remove_file(&self.image));
    }
}
