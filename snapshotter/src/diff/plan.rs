//! From mounts to directories: what a Diff has to export, where an Apply has to write. Nothing here
//! touches the file system.
//!
//! A snapshotter describes a snapshot by mounts, and for overlayfs they name its directories:
//!
//! ```text
//! overlay  upperdir=U,lowerdir=P:G     active, parents P (nearest) and G      [U, P, G]  writable
//! overlay  lowerdir=C:P:G              view of C                              [C, P, G]
//! bind     C                           view of C, which has no parent         [C]
//! bind     U                           active, no parent                      [U]        writable
//! ```
//!
//! When the right stack is the left one and one directory more, then that directory is the diff. An
//! empty parent is mounted as an empty directory. All else, this differ leaves to the next.

use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use transship_layer::OverlayXattrs;

/// The mounts do not say what this differ needs to know; another one has to look at the files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not for this differ: {reason}")]
pub(super) struct NotOurs {
    /// Why not.
    pub(super) reason: String,
}

impl NotOurs {
    pub(super) fn because(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
        }
    }
}

/// What a Diff exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerSource {
    /// The directory that is the diff.
    pub(super) dir: PathBuf,
    /// What lies below it, nearest first.
    pub(super) lowerdirs: Vec<PathBuf>,
    /// How the overlay is mounted.
    pub(super) overlay_xattrs: OverlayXattrs,
    /// The left side; when there is anything in it, then `dir` is not the diff.
    pub(super) must_be_empty: Option<PathBuf>,
}

/// Where an Apply writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerTarget {
    /// The directory to fill.
    pub(super) dir: PathBuf,
    /// What lies below it, nearest first.
    pub(super) lowerdirs: Vec<PathBuf>,
    /// How the overlay will be mounted.
    pub(super) overlay_xattrs: OverlayXattrs,
}

/// The directories that a snapshot's mounts name, topmost first.
struct Stack {
    dirs: Vec<PathBuf>,
    writable: bool,
    overlay_xattrs: OverlayXattrs,
}

/// Plans what distinguishes `right` from `left`.
///
/// # Errors
/// When the mounts do not tell.
pub(super) fn plan_diff(left: &[Mount], right: &[Mount]) -> Result<LayerSource, NotOurs> {
    // An empty list stands for an empty directory.
    let left = if left.is_empty() {
        None
    } else {
        let left = read_stack(left)?;
        if left.writable && left.dirs.len() > 1 {
            return Err(NotOurs::because("the left side can change"));
        }
        Some(left)
    };
    let mut right = read_stack(right)?;
    let dir = right.dirs.remove(0);
    let left_dirs = left.as_ref().map_or(&[][..], |left| &left.dirs);
    let must_be_empty = if right.dirs == left_dirs {
        None
    } else if let ([], [base]) = (&right.dirs[..], left_dirs)
        && *base != dir
    {
        Some(base.clone())
    } else {
        return Err(NotOurs::because(
            "the right side is not the left one and one layer more",
        ));
    };
    Ok(LayerSource {
        dir,
        lowerdirs: right.dirs,
        overlay_xattrs: right.overlay_xattrs,
        must_be_empty,
    })
}

/// Plans where a layer for `mounts` goes.
///
/// # Errors
/// When the mounts do not tell, or cannot be written to.
pub(super) fn plan_apply(mounts: &[Mount]) -> Result<LayerTarget, NotOurs> {
    let mut stack = read_stack(mounts)?;
    if !stack.writable {
        return Err(NotOurs::because("the mounts are read-only"));
    }
    Ok(LayerTarget {
        dir: stack.dirs.remove(0),
        lowerdirs: stack.dirs,
        overlay_xattrs: stack.overlay_xattrs,
    })
}

fn read_stack(mounts: &[Mount]) -> Result<Stack, NotOurs> {
    let [mount] = mounts else {
        return Err(NotOurs::because(format!("{} mounts", mounts.len())));
    };
    if !matches!(mount.target.as_str(), "" | "/") {
        return Err(NotOurs::because(format!("mounted on {:?}", mount.target)));
    }
    match mount.r#type.as_str() {
        "bind" => read_bind(mount),
        "overlay" => read_overlay(&mount.options),
        other => Err(NotOurs::because(format!("mounts of type {other:?}"))),
    }
}

fn read_bind(mount: &Mount) -> Result<Stack, NotOurs> {
    let unknown = |option: &&String| !matches!(option.as_str(), "bind" | "rbind" | "ro" | "rw");
    if let Some(option) = mount.options.iter().find(unknown) {
        return Err(NotOurs::because(format!("mount option {option:?}")));
    }
    Ok(Stack {
        dirs: vec![read_dir(&mount.source)?],
        writable: !mount.options.iter().any(|option| option == "ro"),
        overlay_xattrs: OverlayXattrs::default(),
    })
}

fn read_overlay(options: &[String]) -> Result<Stack, NotOurs> {
    let (mut upper, mut lower) = (None, None);
    let mut read_only = false;
    let mut overlay_xattrs = OverlayXattrs::Trusted;
    for option in options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("upperdir", dir) => upper = Some(read_dir(dir)?),
            ("lowerdir", dirs) => lower = Some(dirs.split(':').map(read_dir)),
            ("userxattr", _) => overlay_xattrs = OverlayXattrs::User,
            ("ro", _) => read_only = true,
            // These change how the kernel keeps its books, or are seen in the layer by themselves
            // (redirect_dir, metacopy). Others may change what the directories mean, as uidmap does.
            (
                "workdir" | "rw" | "index" | "volatile" | "fsync" | "xino" | "nfs_export" | "uuid"
                | "redirect_dir" | "metacopy" | "noatime" | "nodiratime" | "relatime",
                _,
            ) => {}
            _ => return Err(NotOurs::because(format!("mount option {option:?}"))),
        }
    }
    let Some(lower) = lower else {
        return Err(NotOurs::because("an overlay without lowerdir="));
    };
    Ok(Stack {
        writable: upper.is_some() && !read_only,
        dirs: upper
            .into_iter()
            .map(Ok)
            .chain(lower)
            .collect::<Result<_, _>>()?,
        overlay_xattrs,
    })
}

/// Refuses what overlayfs would not take literally: escapes, and the empty names around data-only
/// layers (`::`).
fn read_dir(dir: &str) -> Result<PathBuf, NotOurs> {
    if Path::new(dir).is_absolute() && !dir.contains('\\') {
        Ok(PathBuf::from(dir))
    } else {
        Err(NotOurs::because(format!("the directory {dir:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Vec<Mount> {
        text.split(" + ")
            .filter(|text| !text.is_empty())
            .map(|text| {
                let mut words = text.split(' ');
                Mount {
                    r#type: words.next().unwrap().to_owned(),
                    source: words.next().unwrap().to_owned(),
                    target: String::new(),
                    options: words
                        .flat_map(|word| word.split(','))
                        .map(str::to_owned)
                        .collect(),
                }
            })
            .collect()
    }

    /// dir | lowerdirs | must be empty
    fn said(plan: Result<LayerSource, NotOurs>) -> String {
        match plan {
            Ok(source) => format!(
                "{} | {} | {}{}",
                source.dir.display(),
                source
                    .lowerdirs
                    .iter()
                    .map(|dir| dir.display().to_string())
                    .collect::<Vec<_>>()
                    .join(":"),
                source
                    .must_be_empty
                    .map_or(String::new(), |dir| dir.display().to_string()),
                match source.overlay_xattrs {
                    OverlayXattrs::Trusted => "",
                    OverlayXattrs::User => " user",
                }
            ),
            Err(not_ours) => not_ours.reason,
        }
    }

    #[test]
    fn the_diff_is_the_one_directory_more() {
        let no = "the right side is not the left one and one layer more";
        for (left, right, plan) in [
            // Active snapshots over one parent (a view of one layer is a bind), two, none.
            (
                "bind /p ro,rbind",
                "overlay overlay index=off,workdir=/w,upperdir=/u,lowerdir=/p",
                "/u | /p | ",
            ),
            (
                "overlay overlay lowerdir=/p:/g,index=off",
                "overlay overlay workdir=/w,upperdir=/u,lowerdir=/p:/g,index=off",
                "/u | /p:/g | ",
            ),
            ("bind /e ro,rbind", "bind /u rw,rbind", "/u |  | /e"),
            ("", "bind /u rw,rbind", "/u |  | "),
            // Committed ones.
            (
                "bind /p ro,rbind",
                "overlay overlay lowerdir=/c:/p",
                "/c | /p | ",
            ),
            (
                "overlay overlay lowerdir=/p:/g",
                "overlay overlay lowerdir=/c:/p:/g",
                "/c | /p:/g | ",
            ),
            ("bind /e ro,rbind", "bind /c ro,rbind", "/c |  | /e"),
            (
                "bind /p ro",
                "overlay overlay userxattr,workdir=/w,upperdir=/u,lowerdir=/p",
                "/u | /p |  user",
            ),
            // Not one layer more.
            (
                "bind /q ro",
                "overlay overlay workdir=/w,upperdir=/u,lowerdir=/p",
                no,
            ),
            (
                "overlay overlay lowerdir=/g:/p",
                "overlay overlay workdir=/w,upperdir=/u,lowerdir=/p:/g",
                no,
            ),
            ("bind /g ro", "overlay overlay lowerdir=/c:/p:/g", no),
            (
                "overlay overlay lowerdir=/p:/g",
                "overlay overlay lowerdir=/p:/g",
                no,
            ),
            ("bind /u ro", "bind /u rw", no),
            ("overlay overlay lowerdir=/p:/g", "bind /u rw", no),
            // Not told by the mounts.
            (
                "bind /p ro",
                "btrfs /dev/sda subvol=x",
                "mounts of type \"btrfs\"",
            ),
            ("bind /p ro", "bind /a + bind /b", "2 mounts"),
            ("bind /p ro", "", "0 mounts"),
            (
                "bind /p ro",
                "overlay overlay uidmap=0:1:2,upperdir=/u,lowerdir=/p",
                "mount option \"uidmap=0:1:2\"",
            ),
            (
                "bind /p ro",
                "overlay overlay upperdir=/u,lowerdir=/p::/data",
                "the directory \"\"",
            ),
            (
                "bind /p ro",
                "overlay overlay upperdir=/u,lowerdir=/p\\:q",
                "the directory \"/p\\\\\"",
            ),
            (
                "bind /p ro",
                "overlay overlay upperdir=u,lowerdir=/p",
                "the directory \"u\"",
            ),
            (
                "overlay overlay workdir=/w,upperdir=/v,lowerdir=/p",
                "overlay overlay lowerdir=/u:/v:/p",
                "the left side can change",
            ),
        ] {
            assert_eq!(
                said(plan_diff(&mount(left), &mount(right))),
                plan,
                "{left} -> {right}"
            );
        }
    }

    #[test]
    fn a_layer_goes_where_it_can_be_written() {
        for (mounts, plan) in [
            ("bind /u rw,rbind", Ok(("/u", vec![]))),
            (
                "overlay overlay workdir=/w,upperdir=/u,lowerdir=/p:/g,volatile",
                Ok(("/u", vec!["/p", "/g"])),
            ),
            ("bind /u ro,rbind", Err("the mounts are read-only")),
            (
                "overlay overlay lowerdir=/p:/g",
                Err("the mounts are read-only"),
            ),
            (
                "bind /u uidmap=0:1:2,rw",
                Err("mount option \"uidmap=0:1:2\""),
            ),
        ] {
            let planned = plan_apply(&mount(mounts));
            let planned = planned
                .as_ref()
                .map(|target| {
                    let lowerdirs: Vec<_> = target
                        .lowerdirs
                        .iter()
                        .map(|dir| dir.to_str().unwrap())
                        .collect();
                    (target.dir.to_str().unwrap(), lowerdirs)
                })
                .map_err(|not_ours| not_ours.reason.as_str());
            assert_eq!(planned, plan, "{mounts}");
        }
    }
}
