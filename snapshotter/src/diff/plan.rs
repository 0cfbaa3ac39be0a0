//! From mounts to directories: what a Diff has to export, where an Apply has to write. Nothing here
//! touches the file system.
//!
//! When the right stack is the left one and one directory more, then that directory is the diff. An
//! empty parent is mounted as an empty directory. All else, this differ leaves to the next.

use std::path::PathBuf;

use containerd_client::types::Mount;
use transship_layer::{MountFields, OverlayStack};

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
    /// The directory that is the diff, and what lies below it.
    pub(super) stack: OverlayStack,
    /// The left side; when there is anything in it, then the directory is not the diff.
    pub(super) must_be_empty: Option<PathBuf>,
}

/// Plans what distinguishes `right` from `left`.
///
/// # Errors
/// When the mounts do not tell.
pub(super) fn plan_diff(left: &[Mount], right: &[Mount]) -> Result<LayerSource, NotOurs> {
    // An empty list stands for an empty directory.
    let left_dirs = if left.is_empty() {
        Vec::new()
    } else {
        let left = read_stack(left)?;
        if left.is_writable && !left.lowerdirs.is_empty() {
            return Err(NotOurs::because("the left side can change"));
        }
        [vec![left.top], left.lowerdirs].concat()
    };
    let stack = read_stack(right)?;
    let must_be_empty = if stack.lowerdirs == left_dirs {
        None
    } else if let ([], [base]) = (&stack.lowerdirs[..], &left_dirs[..])
        && *base != stack.top
    {
        Some(base.clone())
    } else {
        return Err(NotOurs::because(
            "the right side is not the left one and one layer more",
        ));
    };
    Ok(LayerSource {
        stack,
        must_be_empty,
    })
}

/// Plans where a layer for `mounts` goes.
///
/// # Errors
/// When the mounts do not tell, or cannot be written to.
pub(super) fn plan_apply(mounts: &[Mount]) -> Result<OverlayStack, NotOurs> {
    let stack = read_stack(mounts)?;
    if !stack.is_writable {
        return Err(NotOurs::because("the mounts are read-only"));
    }
    Ok(stack)
}

fn read_stack(mounts: &[Mount]) -> Result<OverlayStack, NotOurs> {
    let fields = mounts.iter().map(|mount| MountFields {
        fs_type: &mount.r#type,
        source: &mount.source,
        target: &mount.target,
        options: &mount.options,
    });
    let stack =
        OverlayStack::from_mounts(fields).map_err(|error| NotOurs::because(error.to_string()))?;
    // containerd's own differ looks at such layers through the mount.
    if stack.has_idmapped_lowers {
        return Err(NotOurs::because("lower layers with an id mapping"));
    }
    if !stack.data_dirs.is_empty() {
        return Err(NotOurs::because("lower layers with data only"));
    }
    Ok(stack)
}

#[cfg(test)]
mod tests {
    use super::*;
    use transship_layer::OverlayXattrs;

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
                source.stack.top.display(),
                source
                    .stack
                    .lowerdirs
                    .iter()
                    .map(|dir| dir.display().to_string())
                    .collect::<Vec<_>>()
                    .join(":"),
                source
                    .must_be_empty
                    .map_or(String::new(), |dir| dir.display().to_string()),
                match source.stack.overlay_xattrs {
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
                "lower layers with an id mapping",
            ),
            (
                "bind /p ro",
                "overlay overlay upperdir=/u,lowerdir=/p::/data",
                "lower layers with data only",
            ),
            (
                "bind /p:q ro",
                "overlay overlay upperdir=/u,lowerdir=/p\\:q",
                "/u | /p:q | ",
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
                    (target.top.to_str().unwrap(), lowerdirs)
                })
                .map_err(|not_ours| not_ours.reason.as_str());
            assert_eq!(planned, plan, "{mounts}");
        }
    }
}
