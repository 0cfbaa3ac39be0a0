//! Files that had no name any more: CRIU makes them again, or removes the name that it has given them at the dump.
//!
//! It does both as root of the node, and makes a mount that is read-only writable for it. For a moment the file has a
//! name then, in a volume for all that mount it: it is one that the container could have made there itself.

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag};
use transship_checkpoint::criu_images::ghost_files::Ghost;
use transship_checkpoint::criu_images::mounts::flags;
use transship_checkpoint::criu_images::named_files::NamedFile;

use super::allowance::Allowance;
use super::files::{mount_of, with_id};
use super::threads::compare_ids;
use super::{Admission, Refusal, Restored};

/// What CRIU calls a file that it keeps by another name; its number follows.
const LINK: &str = "link_remap.";

/// Compares each.
pub(super) fn compare(restored: &Restored, allowed: &Allowance, admission: &mut Admission) {
    for remap in &restored.remaps {
        let Some(file) = with_id(restored, remap.file) else {
            admission.refuse(Refusal::Damaged {
                what: format!("there is no file {}, which has no name", remap.file),
            });
            continue;
        };
        let read_only = mount_of(restored, file)
            .is_some_and(|mount| (mount.flags | mount.fs_flags) & flags::READ_ONLY != 0);
        if read_only {
            let why = match remap.ghost {
                Some(_) => "to be made again on a mount that is read-only",
                None => "to be removed from a mount that is read-only",
            };
            refuse(file, why, admission);
        }
        if let Some(id) = remap.linked {
            let link = with_id(restored, id);
            if let Some(link) = link.filter(|link| !link.path.ends_with(format!("{LINK}{id}"))) {
                let why = "to be removed, and it is no link that CRIU has made";
                refuse(link, why, admission);
            }
        }
        if let Some(ghost) = &remap.ghost {
            compare_ghost(file, ghost, allowed, admission);
        }
    }
    for (device, inode) in &restored.watched_inodes {
        // Of these CRIU has the file, and opens nothing.
        let is_ghost = { restored.remaps.iter() }
            .filter_map(|remap| remap.ghost)
            .any(|ghost| ghost.is_found_by((*device, *inode)));
        if !is_ghost {
            admission.refuse(Refusal::Watch {
                device: *device,
                inode: *inode,
            });
        }
    }
}

fn compare_ghost(file: &NamedFile, ghost: &Ghost, allowed: &Allowance, admission: &mut Admission) {
    let kind = ghost.mode & SFlag::S_IFMT.bits();
    let itself = (OFlag::O_PATH | OFlag::O_NOFOLLOW).bits().cast_unsigned();
    let why = match SFlag::from_bits_truncate(kind) {
        SFlag::S_IFREG | SFlag::S_IFDIR | SFlag::S_IFIFO => None,
        SFlag::S_IFLNK if file.flags & itself == itself => None,
        SFlag::S_IFLNK => Some("to be made again as a symbolic link that is followed"),
        _ => Some("to be made again as a device, or as what is no file"),
    };
    if let Some(why) = why {
        refuse(file, why, admission);
    }
    // Of a directory it says whose group its files get.
    let is_dir = kind == SFlag::S_IFDIR.bits();
    if sets_id(ghost.mode) && !is_dir && !allowed.any_user {
        let why = "to be made again with a set-user-id or set-group-id bit";
        refuse(file, why, admission);
    }
    let who = format!("the deleted file {:?}", file.path);
    compare_ids(
        &who,
        [ghost.uid].iter(),
        [ghost.gid].iter(),
        allowed,
        admission,
    );
}

/// Whether whoever executes the file becomes its owner, or one of its group.
pub(super) fn sets_id(mode: u32) -> bool {
    mode & (Mode::S_ISUID | Mode::S_ISGID).bits() != 0
}

fn refuse(file: &NamedFile, why: &'static str, admission: &mut Admission) {
    let path = file.path.clone();
    admission.refuse(Refusal::File { path, why });
}
