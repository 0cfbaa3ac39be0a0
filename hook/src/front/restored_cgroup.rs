//! Where a restored container is in the cgroups, as CRIU must be told by its configuration, which it
//! reads after what the runtime says.
//!
//! **cgroup v2, `cgroup-root`.** runc starts CRIU in the new container's cgroup. On cgroup v1 it also
//! tells CRIU to put the tasks there. On cgroup v2 runc before 1.2.0 does not (`criuApplyCgroups`
//! returns before it fills `CgRoot`; opencontainers/runc commit 3438ef30b), and CRIU makes the path of
//! the dump again and moves all tasks into it: out of the new limits, or into the cgroup of a container
//! that lives. Later versions of runc say the same as we.
//!
//! **cgroup v1, `external`.** A container sees its own cgroup of each hierarchy below its mount of type
//! `cgroup`. For a container that starts, runc works these bind mounts out in the container's first
//! process, from its `/proc/self/cgroup`. For one that is restored it does so in its own process
//! (libcontainer, `getCgroupMounts` called by `restore`, 1.1.5 to 1.3.6), which is in the cgroup of the
//! shim: the container would see the limits of containerd's service, or all cgroups of the node.
//!
//! **Left behind.** crun starts CRIU where it is itself, so that tasks of which CRIU changes nothing
//! (`manage-cgroups-mode: ignore`) are in the cgroup of the shim: out of all limits, with all devices. They are moved
//! before they run.
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

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use transship_checkpoint::criu_options::ConfigLine;
use transship_checkpoint::spec::Spec;
use transship_sandbox::read_proc;

use super::{Front, FrontError};
use crate::descendants::tree;

const MOUNT: &str = "/sys/fs/cgroup";
const DEFAULT_SLICE: &str = "system.slice";
/// The v1 controllers in which both managers of runc make a cgroup (libcontainer/cgroups, 1.1.5 to
/// 1.3.6). Where there is none CRIU would have nothing to mount.
const CONTROLLERS: [&str; 13] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "name=systemd",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
];

impl Front<'_> {
    /// Lines for CRIU's configuration of the restore; none where the runtime says all, or will say
    /// what is wrong with the path.
    ///
    /// # Errors
    /// A path that cannot be in that file.
    pub(super) fn cgroup_lines(
        &self,
        id: &str,
        spec: &Spec,
    ) -> Result<Vec<ConfigLine>, FrontError> {
        if self.env.runtime.name() != "runc" {
            return Ok(Vec::new());
        }
        let path = spec.cgroups_path().unwrap_or_default();
        let place = |own: &str| match self.globals.systemd_cgroup {
            true => scope(path, id),
            false => directory(path, id, own),
        };
        let own = read_proc("/proc/self/cgroup").unwrap_or_default();
        if statfs(MOUNT).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            let place = own_cgroup(&own, "").and_then(place);
            let line = place.map(|place| ConfigLine::with("cgroup-root", &place));
            return Ok(line.transpose()?.into_iter().collect());
        }
        let Some(mount) = spec.cgroup_mount() else {
            return Ok(Vec::new());
        };
        // Below the caller's own cgroup on v1, not beside it. containerd gives whole paths.
        if !self.globals.systemd_cgroup && !path.starts_with('/') {
            return Ok(Vec::new());
        }
        let mounts = read_proc("/proc/self/mountinfo").unwrap_or_default();
        hierarchies(&mounts)
            .filter_map(|(name, controllers)| {
                let place = place(own_cgroup(&own, controllers)?)?;
                let value = format!("mnt[{mount}/{name}]:{MOUNT}/{name}{place}");
                Some(ConfigLine::with("external", &value).map_err(FrontError::from))
            })
            .collect()
    }

    /// Moves the restored tasks, from `root` downwards, out of the cgroups that are the front's own.
    ///
    /// # Errors
    /// One cannot be moved, because the runtime has made no cgroup where the spec says it.
    pub(super) fn take_into_cgroup(&self, id: &str, spec: &Spec, root: i32) -> io::Result<()> {
        let path = spec.cgroups_path().unwrap_or_default();
        let own = read_proc("/proc/self/cgroup")?;
        let mounts = read_proc("/proc/self/mountinfo")?;
        let unified = statfs(MOUNT).is_ok_and(|it| it.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let all: Vec<_> = match unified {
            true => vec![("", "")],
            false => hierarchies(&mounts).collect(),
        };
        for pid in tree(root)? {
            let of_task = read_proc(format!("/proc/{pid}/cgroup"))?;
            for (name, controllers) in &all {
                let here = own_cgroup(&own, controllers);
                let Some(here) = here.filter(|it| own_cgroup(&of_task, controllers) == Some(it))
                else {
                    continue;
                };
                let place = match self.globals.systemd_cgroup {
                    true => scope(path, id),
                    false => directory(path, id, here),
                };
                let place = place.ok_or_else(|| io::Error::other("its cgroup has no path"))?;
                if place != here {
                    let dir = Path::new(MOUNT)
                        .join(name)
                        .join(place.trim_start_matches('/'));
                    fs::write(dir.join("cgroup.procs"), pid.to_string())?;
                }
            }
        }
        Ok(())
    }
}

/// The cgroup that `/proc/self/cgroup` names for a hierarchy; `""` is that of v2.
fn own_cgroup<'a>(text: &'a str, controllers: &str) -> Option<&'a str> {
    // "4:memory:/system.slice/containerd.service", "0::/init.scope"
    text.lines().find_map(|line| {
        let (_, line) = line.split_once(':')?;
        let (found, path) = line.split_once(':')?;
        (found == controllers).then_some(path)
    })
}

/// The v1 hierarchies in which runc makes a cgroup: the directory's name below [`MOUNT`], and the
/// controllers as `/proc/self/cgroup` names them.
fn hierarchies(mountinfo: &str) -> impl Iterator<Item = (&str, &str)> {
    mountinfo.lines().filter_map(|line| {
        // 36 35 0:32 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
        let (mount, filesystem) = line.split_once(" - ")?;
        let name = mount.split(' ').nth(4)?.strip_prefix(MOUNT)?;
        let name = name.strip_prefix('/').filter(|name| !name.contains('/'))?;
        let mut fields = filesystem.split(' ');
        let is_v1 = fields.next()? == "cgroup";
        // Others come first: "rw,xattr,name=systemd", "rw,nosuid,cpu,cpuacct".
        let options = fields.nth(1)?;
        let first = options
            .split(',')
            .position(|option| CONTROLLERS.contains(&option))?;
        let controllers = options.splitn(first + 1, ',').nth(first)?;
        is_v1.then_some((name, controllers))
    })
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
    fn hierarchies_are_those_with_a_cgroup_of_the_container() {
        let mountinfo = "\
25 30 0:22 / /sys rw shared:7 - sysfs sysfs rw\n\
31 25 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755\n\
32 31 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
33 31 0:28 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd\n\
34 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:12 - cgroup cgroup rw,cpu,cpuacct\n\
35 31 0:30 / /sys/fs/cgroup/misc rw shared:13 - cgroup cgroup rw,misc\n\
36 31 0:31 / /run/elsewhere/memory rw shared:14 - cgroup cgroup rw,memory\n";
        assert_eq!(
            hierarchies(mountinfo).collect::<Vec<_>>(),
            [("systemd", "name=systemd"), ("cpu,cpuacct", "cpu,cpuacct")]
        );
        let own = "2:cpu,cpuacct:/a\n1:name=systemd:/init.scope\n0::/b\n";
        assert_eq!(own_cgroup(own, "cpu,cpuacct"), Some("/a"));
        assert_eq!(own_cgroup(own, ""), Some("/b"));
        assert_eq!(own_cgroup(own, "memory"), None);
    }

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
