//! The machine's disks: its root, with a kernel and systemd, and one for each node tree.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::recipe::{Part, Recipe, make_once};
use crate::run::CommandRun as _;
use crate::tree::CRIU_PACKAGES;
use crate::{DebianImage, Settings, TestbedError, Tree};
use transship_path_error::During as _;

/// What makes a tree a machine. Trixie's kernel 6.12, cloud flavour (virtio, no other hardware).
const PACKAGES: [&str; 7] = [
    "dbus",
    "initramfs-tools",
    "kmod",
    "linux-image-cloud-amd64",
    "systemd",
    "systemd-sysv",
    "udev",
];

/// The initramfs gets the drivers of the root disk alone. The tests start by themselves; nothing
/// else does that they do not start. Without a machine id systemd takes a boot for the first one, and
/// enables everything.
const HOOKS: [&str; 3] = [
    "--essential-hook=mkdir -p \"$1\"/etc/initramfs-tools/conf.d
echo MODULES=list >\"$1\"/etc/initramfs-tools/conf.d/transship
printf 'virtio_pci\\nvirtio_blk\\next4\\n' >>\"$1\"/etc/initramfs-tools/modules",
    "--customize-hook=cat >\"$1\"/etc/systemd/system/transship-vm.service <<'END'
[Unit]
Description=Tests of transship
After=basic.target systemd-udev-trigger.service

[Service]
Type=exec
Environment=HOME=/root LANG=C.UTF-8
ExecStartPre=/usr/bin/udevadm wait --timeout=120 /dev/disk/by-id/virtio-payload /dev/virtio-ports/transship.tests
ExecStartPre=/usr/bin/mkdir /opt/transship-vm
ExecStartPre=/usr/bin/tar -xf /dev/disk/by-id/virtio-payload -C /opt/transship-vm
ExecStart=/opt/transship-vm/run
ExecStopPost=/usr/bin/systemctl --force --no-block poweroff
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
END
touch \"$1\"/etc/transship-vm
chroot \"$1\" systemctl enable transship-vm.service
chroot \"$1\" systemctl disable containerd.service ssh.service ssh.socket
chroot \"$1\" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer getty.target serial-getty@ttyS0.service systemd-timesyncd.service",
    "--customize-hook=echo 7472616e7373686970207465737473ff >\"$1\"/etc/machine-id
echo transship-vm >\"$1\"/etc/hostname
printf '127.0.0.1 localhost\\n127.0.1.1 transship-vm\\n' >\"$1\"/etc/hosts",
];

/// Size of the root's file system; its image is sparse.
const ROOT_BYTES: u64 = 12 << 30;

/// The root disk and what boots it.
#[derive(Debug)]
pub(super) struct MachineRoot {
    pub(super) disk: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

/// Gives the machine's root, built when it is not cached.
pub(super) fn machine_root(cache_dir: &Path) -> Result<MachineRoot, TestbedError> {
    let recipe = Recipe {
        name: "machine".to_owned(),
        parts: vec![
            Part::Base {
                suite: "trixie",
                more: &PACKAGES,
                hooks: &HOOKS,
            },
            Part::Packages {
                suite: "forky",
                names: &CRIU_PACKAGES,
            },
        ],
    };
    let tree = recipe.ensure(cache_dir)?;
    let disk = image_path(&tree);
    make_once(&disk, "machine-image", |new| {
        make_image(&tree, new, ROOT_BYTES)
    })?;
    Ok(MachineRoot {
        disk,
        kernel: find_in(&tree.join("boot"), "vmlinuz-")?,
        initramfs: find_in(&tree.join("boot"), "initrd.img-")?,
    })
}

/// The disk of one node tree.
#[derive(Debug)]
pub(super) struct TreeImage {
    /// The serial number by which the machine knows the disk.
    pub(super) serial: String,
    /// What the tree's directory is called in the cache.
    pub(super) dir_name: String,
    pub(super) disk: PathBuf,
}

/// Gives the disks of all node trees and of the images of Debian that the cases in the machine use, built
/// when they are not cached.
pub(super) fn tree_images(settings: &Settings) -> Result<Vec<TreeImage>, TestbedError> {
    let mut trees = Vec::new();
    for tree in Tree::ALL {
        trees.push((tree.to_string(), tree.ensure(&settings.cache_dir)?));
    }
    for image in [DebianImage::SERVERS, DebianImage::POSTGRESQL] {
        trees.push((image.name.to_owned(), image.tree(settings)?));
    }
    trees
        .into_iter()
        .map(|(serial, path)| {
            let disk = image_path(&path);
            make_once(&disk, &format!("{serial}-image"), |new| {
                make_image(&path, new, size_for(&path)?)
            })?;
            let dir_name = path.file_name().unwrap_or_default();
            Ok(TreeImage {
                serial,
                dir_name: dir_name.to_string_lossy().into_owned(),
                disk,
            })
        })
        .collect()
}

fn image_path(tree: &Path) -> PathBuf {
    let mut image = tree.as_os_str().to_owned();
    image.push(".ext4");
    image.into()
}

/// A file system image with the content of a directory; needs neither a mount nor a loop device.
fn make_image(dir: &Path, image: &Path, bytes: u64) -> Result<(), TestbedError> {
    File::create(image)
        .and_then(|file| file.set_len(bytes))
        .during("make", image)?;
    Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(dir)
        .arg(image)
        .run()
}

/// Room for the tree, its directories, its inode tables and a journal.
fn size_for(tree: &Path) -> Result<u64, TestbedError> {
    let text = Command::new("du")
        .args(["--summarize", "--block-size=1M"])
        .arg(tree)
        .read()?;
    let megabytes: Option<u64> = text
        .split_whitespace()
        .next()
        .and_then(|size| size.parse().ok());
    let Some(megabytes) = megabytes else {
        let what = "size of a tree";
        return Err(TestbedError::Unexpected { what, text });
    };
    Ok((megabytes * 5 / 4 + 128) << 20)
}

fn find_in(dir: &Path, prefix: &str) -> Result<PathBuf, TestbedError> {
    let entries = fs::read_dir(dir).during("read", dir)?;
    let found = entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    found
        .map(|entry| entry.path())
        .ok_or_else(|| TestbedError::Missing {
            what: format!("{prefix}* in {}", dir.display()),
            remedy: "remove this tree, and it is built again".to_owned(),
        })
}
