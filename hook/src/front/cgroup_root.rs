//! The cgroup of a restored container on cgroup v2.
//!
//! runc starts CRIU in the new container's cgroup. On cgroup v1 it also tells CRIU to put the tasks
//! there. On cgroup v2 runc before 1.2.0 does not (`criuApplyCgroups` returns before it fills
//! `CgRoot`; opencontainers/runc commit 3438ef30b), and CRIU makes the path of the dump again and
//! moves all tasks into it: out of the new limits, or into the cgroup of a container that lives. So
//! CRIU is told by its configuration, which it reads after what the runtime says. Later versions of
//! runc say the same.
//!
//! The path is the one that runc makes of the spec (libcontainer, specconv `createCgroupConfig` and
//! the v2 managers; the same in 1.1.5 and 1.3.6):
//!
//! | manager | `cgroupsPath` | cgroup |
//! |---|---|---|
//! | cgroupfs | `/a/b` | `/a/b` |
//! | cgroupfs | `a/b`, or the id when there is none | beside the cgroup of the caller |
//! | systemd | `a-b.slice:prefix:name` | `/a.slice/a-b.slice/prefix-name.scope` |
//! | systemd | `:prefix:name` | `/system.slice/prefix-name.scope` |
//! | systemd | none | `/system.slice/runc-<id>.scope` |

use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use transship_checkpoint::spec::Spec;

use super::Front;

const MOUNT: &str = "/sys/fs/cgroup";
const DEFAULT_SLICE: &str = "system.slice";

impl Front<'_> {
    /// The cgroup that the runtime makes for the container, as CRIU must be told; `None` where it
    /// need not be, or where the runtime will say what is wrong with the path.
    pub(super) fn cgroup_root(&self, id: &str, spec: &Spec) -> Option<String> {
        let unified =
            statfs(MOUNT).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
        if self.around.runtime.name() != "runc" || !unified {
            return None;
        }
        let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
        let path = spec.cgroups_path().unwrap_or_default();
        if self.globals.systemd_cgroup {
            scope(path, id)
        } else {
            directory(path, id, own)
        }
    }
}

fn directory(path: &str, id: &str, own: &str) -> Option<String> {
    let path = Path::new(if path.is_empty() { id } else { path });
    let base = if path.is_absolute() {
        Path::new("/")
    } else {
        Path::new(own).parent()?
    };
    // Not out of where it belongs by "..": runc cleans the path as if it began at the root.
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(base.join(clean).to_str()?.to_owned())
}

fn scope(path: &str, id: &str) -> Option<String> {
    let (slice, prefix, name) = match *path.split(':').collect::<Vec<_>>() {
        [""] => ("", "runc", id),
        [slice, prefix, name] => (slice, prefix, name),
        _ => return None,
    };
    let slice = if slice.is_empty() {
        DEFAULT_SLICE
    } else {
        slice
    };
    let unit = match prefix {
        _ if name.ends_with(".slice") => name.to_owned(),
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    };
    Some(format!("{}/{unit}", expanded(slice)?))
}

/// `a-b.slice` is `/a.slice/a-b.slice` (systemd.slice(5)).
fn expanded(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = String::new();
    if name == "-" {
        return Some(path);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        path += &format!("/{prefix}{part}.slice");
        prefix += part;
        prefix.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_runc() {
        let own = "/system.slice/containerd.service";
        for (path, wanted) in [
            ("/k8s.io/abc", "/k8s.io/abc"),
            ("/kubepods//pod1/../pod2/abc/", "/kubepods/pod2/abc"),
            ("/../../abc", "/abc"),
            ("mine/abc", "/system.slice/mine/abc"),
            ("../abc", "/system.slice/abc"),
            ("", "/system.slice/web"),
        ] {
            let found = directory(path, "web", own);
            assert_eq!(found.as_deref(), Some(wanted), "{path:?}");
        }
    }

    #[test]
    fn scopes_are_those_of_systemd() {
        for (path, wanted) in [
            (
                "kubepods-burstable-podx_1.slice:cri-containerd:abc",
                Some(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx_1.slice/\
                     cri-containerd-abc.scope",
                ),
            ),
            (":docker:abc", Some("/system.slice/docker-abc.scope")),
            ("-.slice:x:abc", Some("/x-abc.scope")),
            ("a.slice::abc", Some("/a.slice/abc.scope")),
            ("a.slice:x:b.slice", Some("/a.slice/b.slice")),
            ("", Some("/system.slice/runc-web.scope")),
            ("/k8s.io/abc", None),
            ("a--b.slice:x:abc", None),
            ("a:x:abc", None),
        ] {
            assert_eq!(scope(path, "web").as_deref(), wanted, "{path:?}");
        }
    }
}
