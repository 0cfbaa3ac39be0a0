//! What this kernel and this file system need, asked once at start.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use transship_layer::in_user_namespace;
use transship_path_error::During as _;

use crate::error::{Result, SnapshotError};

/// The options of every overlay mount: the configured ones, then `userxattr` and `index=off` where
/// they are needed and not configured.
///
/// `index=off`: with the index on, an upperdir cannot be used in another overlay than its first, which
/// is what snapshotters do. `userxattr`: in a user namespace overlayfs cannot use `trusted.*`
/// (Linux 5.11).
///
/// # Errors
/// I/O errors while probing.
pub(crate) fn overlay_options(configured: &[String], root: &Path) -> Result<Vec<String>> {
    let mut options = configured.to_vec();
    let has = |options: &[String], name: &str| {
        options
            .iter()
            .any(|option| option.split('=').next() == Some(name))
    };
    if !has(&options, "userxattr") && is_in_user_namespace()? && mounts_with_userxattr(root)? {
        options.push("userxattr".to_owned());
    }
    let index = Path::new("/sys/module/overlay/parameters/index");
    let known = index.try_exists().during("look for", index)?;
    if !has(&options, "index") && known {
        options.push("index=off".to_owned());
    }
    Ok(options)
}

/// Refuses a file system whose directory entries have no type (XFS with ftype=0): overlayfs needs it.
///
/// # Errors
/// Such a file system, I/O errors.
pub(crate) fn require_entry_types(root: &Path) -> Result<()> {
    let probe = tempfile_dir(root)?;
    let outcome = (|| {
        fs::create_dir(probe.join("d")).during("create directory", &probe)?;
        let mut dir = nix::dir::Dir::open(
            &probe,
            nix::fcntl::OFlag::O_DIRECTORY,
            nix::sys::stat::Mode::empty(),
        )
        .during("open", &probe)?;
        let typed = dir
            .iter()
            .all(|entry| entry.is_ok_and(|entry| entry.file_type().is_some()));
        if typed {
            return Ok(());
        }
        Err(SnapshotError::Invalid {
            reason: format!(
                "the file system of {} stores no types in directories, which overlayfs needs (XFS: \
                 make it with ftype=1)",
                root.display()
            ),
        })
    })();
    crate::disk::delete_tree(&probe)?;
    outcome
}

fn is_in_user_namespace() -> Result<bool> {
    Ok(in_user_namespace().during("read", "/proc/self/uid_map")?)
}

fn mounts_with_userxattr(root: &Path) -> Result<bool> {
    let probe = tempfile_dir(root)?;
    let outcome = (|| {
        for name in ["lower", "upper", "work", "merged"] {
            let dir = probe.join(name);
            fs::create_dir(&dir).during("create directory", dir)?;
        }
        let at = |name: &str| probe.join(name).display().to_string();
        let data = format!(
            "lowerdir={},upperdir={},workdir={},userxattr",
            at("lower"),
            at("upper"),
            at("work")
        );
        let merged = probe.join("merged");
        let mounted = mount(
            Some("overlay"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(&*data),
        );
        if mounted.is_ok() {
            umount2(&merged, MntFlags::MNT_DETACH).during("unmount", merged)?;
        }
        Ok(mounted.is_ok())
    })();
    crate::disk::delete_tree(&probe)?;
    outcome
}

/// A directory of this process for a probe, below `root`.
fn tempfile_dir(root: &Path) -> Result<std::path::PathBuf> {
    let dir = root.join(format!("probe-{}", std::process::id()));
    crate::disk::delete_tree(&dir)?;
    fs::create_dir(&dir).during("create directory", &dir)?;
    Ok(dir)
}
