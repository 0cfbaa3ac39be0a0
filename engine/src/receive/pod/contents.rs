//! The directories that take contents of large files before the freeze: one in each upperdir and emptyDir that gets its
//! files from the migration. What comes into them is given its place, by rename, when that is filled, and the directory goes.
//!
//! Those of upperdirs go with their snapshots. Those of emptyDirs are written down before they are made: the emptyDir may
//! have been there before, or be somebody else's who has made the pod. Nothing of the pod that is to be restored runs until its
//! files have come; but others may have the emptyDir, so that each is known by its descriptor, and what is in it is looked at
//! before it is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use transship_checkpoint::annotations::of_migration;
use transship_checkpoint::manifest::{CONTENTS_DIR, check_name, contents_in_filled};
use transship_checkpoint::shared_dirs::{SHARED_DIR, SharedDir};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::wire::{ContentsDir, Offer};
use transship_layer::remove_tree;
use transship_sandbox::shared_dirs::shared_mounts;

use super::super::arrival::{ArrivingPod, Locked};
use super::super::offered_files::require_room_for_files;
use super::containers::Made;
use super::{admission, pod_of};
use crate::error::{Context, Result};
use crate::restore::make_contents_dir;

/// Makes them, and gives each by its directory in the checkpoint.
///
/// # Errors
/// A system call failed, or there is no room; what is made is removed with the pod, and by [`remove`].
pub(super) fn make(
    offer: &Offer,
    made: &Made,
    locked: &mut Locked,
) -> Result<BTreeMap<String, ContentsDir>> {
    let name = contents_in_filled(&of_migration(&offer.migration));
    let mut contents = BTreeMap::new();
    // A container that somebody else will make has none yet.
    for container in &made.containers {
        require_room_for_files(container.upperdir(), offer)?;
        let dir = make_contents_dir(container.upperdir(), &name)?;
        contents.insert(format!("{}/{CONTENTS_DIR}", container.name), dir);
    }
    let volumes = volumes_here(offer, &pod_of(locked).uid);
    pod_of(locked).contents = volumes.values().map(|path| path.join(&name)).collect();
    locked.write()?;
    for (dir, path) in volumes {
        contents.insert(
            format!("{SHARED_DIR}/{dir}"),
            make_contents_dir(&path, &name)?,
        );
    }
    Ok(contents)
}

/// The emptyDirs that the offered containers have and that the pod `uid` has here, by their directories of contents in
/// [`SHARED_DIR`]. None where kubelet keeps its pods in another place.
fn volumes_here(offer: &Offer, uid: &str) -> BTreeMap<String, PathBuf> {
    if check_name("the pod's uid", uid).is_err() {
        return BTreeMap::new();
    }
    let specs = offer.containers.iter();
    let specs = specs.filter_map(|it| Spec::parse(it.spec.as_bytes()).ok());
    let dirs: BTreeSet<SharedDir> = specs
        // /dev/shm, which alone needs the name of the sandbox, takes none.
        .flat_map(|spec| shared_mounts(&spec, ""))
        .filter(|mount| !mount.part)
        .map(|mount| mount.dir)
        .collect();
    let is_dir = |path: &Path| path.symlink_metadata().is_ok_and(|it| it.is_dir());
    dirs.iter()
        .filter_map(|dir| {
            let SharedDir::EmptyDir(volume) = dir else {
                return None;
            };
            check_name("the volume", volume).ok()?;
            let path = admission::place_of_empty_dir(uid, volume);
            is_dir(&path).then_some((dir.contents_dir()?, path))
        })
        .collect()
}

/// Removes those of emptyDirs that are left, with what has come into them.
///
/// # Errors
/// The first that is still there.
pub(super) fn remove(pod: &ArrivingPod) -> Result<()> {
    for dir in &pod.contents {
        match remove_tree(dir) {
            // The emptyDir has gone, too.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.with_context(|| format!("cannot remove {}", dir.display()))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_come_goes_with_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let contents = dir.path().join("contents");
        std::fs::create_dir(&contents).unwrap();
        std::fs::write(contents.join("0"), "content").unwrap();
        let pod = ArrivingPod {
            contents: vec![dir.path().join("gone/contents"), contents.clone()],
            ..ArrivingPod::default()
        };
        remove(&pod).unwrap();
        assert!(!contents.try_exists().unwrap());
        remove(&pod).unwrap();
    }
}
