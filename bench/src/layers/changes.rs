//! Changed containers: active snapshots over the images, changed through a real overlay mount.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use containerd_client::types::Mount;
use transship_testbed::CommandRun as _;

use super::Bench;
use super::big_image::BigImage;
use crate::namespace::KEPT;

const MOUNT_POINT: &str = "/mnt/changed";
/// Changed files in the case of few changes.
pub(super) const FEW: u32 = 100;

/// An active snapshot with changes.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) key: String,
    /// The committed snapshot below.
    pub(super) parent: &'static str,
    pub(super) upperdir: PathBuf,
    /// Nearest first.
    pub(super) lowerdirs: Vec<PathBuf>,
}

/// All changed snapshots.
#[derive(Debug)]
pub(super) struct Changed {
    /// The large image as it is.
    pub(super) nothing: Snapshot,
    /// 100 changed files and one removed directory over the large image.
    pub(super) few: Snapshot,
    /// The same over the small image.
    pub(super) few_small: Snapshot,
    /// Half of the large image's files, each replaced by a small one.
    pub(super) many: Snapshot,
    /// One large file, new.
    pub(super) large: Snapshot,
}

impl Changed {
    pub(super) fn make(bench: &mut Bench<'_>, [large, small]: [BigImage; 2]) -> Result<Changed> {
        let (many, bytes) = (bench.sizes.many_changes, bench.sizes.large_file_bytes);
        Ok(Changed {
            nothing: bench.change("nothing", "large", |_| Ok(()))?,
            few: bench.change("few", "large", |root| change_few(root, large))?,
            few_small: bench.change("few-small", "small", |root| change_few(root, small))?,
            many: bench.change("many", "large", |root| change_many(root, large, many))?,
            large: bench.change("large-file", "large", |root| write_large(root, bytes))?,
        })
    }
}

/// Appends to files all over the image and removes a directory.
fn change_few(root: &Path, image: BigImage) -> io::Result<()> {
    // The last directory is the one to be removed.
    let step = (image.files - super::big_image::FILES_PER_DIR) / FEW;
    for i in 0..FEW {
        let path = root.join(BigImage::file(i * step));
        File::options()
            .append(true)
            .open(path)?
            .write_all(b"changed\n")?;
    }
    fs::remove_dir_all(root.join(format!("d{}", image.dirs() - 1)))
}

fn change_many(root: &Path, image: BigImage, count: u32) -> io::Result<()> {
    let step = image.files / count;
    for i in 0..count {
        fs::write(
            root.join(BigImage::file(i * step)),
            format!("changed, number {i}\n").repeat(20),
        )?;
    }
    Ok(())
}

fn write_large(root: &Path, bytes: u64) -> io::Result<()> {
    let mut file = File::create(root.join("large"))?;
    let piece: Vec<u8> = (0..1_u32 << 18)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    for _ in 0..bytes / piece.len() as u64 {
        file.write_all(&piece)?;
    }
    Ok(())
}

impl Bench<'_> {
    fn change(
        &mut self,
        name: &str,
        parent: &'static str,
        change: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Snapshot> {
        let key = format!("changed/{name}");
        let mounts = self
            .runtime
            .block_on(self.snapshots.prepare(&key, parent, KEPT))?;
        let [overlay] = &mounts[..] else {
            anyhow::bail!("one overlay mount was expected: {mounts:?}");
        };
        self.in_mount(overlay, change)
            .with_context(|| format!("cannot change {key}"))?;
        self.sync()?;
        let option = |name: &str| overlay.options.iter().find_map(|it| it.strip_prefix(name));
        let upperdir = option("upperdir=").context("the mount has no upperdir")?;
        let lowerdirs = option("lowerdir=").context("the mount has no lowerdir")?;
        Ok(Snapshot {
            upperdir: self.node.path_from_outside(upperdir),
            lowerdirs: lowerdirs
                .split(':')
                .map(|dir| self.node.path_from_outside(dir))
                .collect(),
            key,
            parent,
        })
    }

    /// Mounts the snapshot in the node, changes it from outside, and takes the mount away again.
    fn in_mount(
        &self,
        overlay: &Mount,
        change: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<()> {
        let options = overlay.options.join(",");
        self.node
            .shell(&format!(
                "mkdir -p {MOUNT_POINT} && mount -t overlay -o '{options}' overlay {MOUNT_POINT}"
            ))
            .run()?;
        let changed = change(&self.node.path_from_outside(MOUNT_POINT));
        self.node.command("umount").arg(MOUNT_POINT).run()?;
        Ok(changed?)
    }
}
