//! A cgroup per node in each hierarchy of the machine, so that two nodes can use the same paths.
//!
//! A node's processes live in `transship-<run>-<node>` below the caller's own cgroup (v1), or at
//! the top of the hierarchy (v2: a cgroup that holds processes cannot hand controllers down). The
//! node has a cgroup namespace whose root that is, and mounts the hierarchies again:
//! what containerd calls `/default/web` is another directory in each node.
//!
//! On a v2-only machine the node's processes move on to `<node>/init` once the namespace exists:
//! the rule against inner processes holds for the root of a cgroup namespace too.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::TestbedError;
use crate::poll::poll_until;
use transship_path_error::During as _;

/// One hierarchy, as a node mounts it again.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Path below /sys/fs/cgroup; empty for a v2-only machine.
    pub(crate) mount_name: String,
    /// Mount data of v1 ("memory", "none,name=systemd"); `None` for v2.
    pub(crate) v1_options: Option<String>,
    /// The node's cgroup, as seen from the machine.
    pub(crate) node_dir: PathBuf,
}

/// The cgroups of one node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeCgroups {
    pub(crate) hierarchies: Vec<Hierarchy>,
}

impl NodeCgroups {
    /// Plans the cgroups of a node called `name` from /proc/self/mountinfo and /proc/self/cgroup.
    pub(crate) fn plan(mountinfo: &str, own_cgroups: &str, name: &str) -> NodeCgroups {
        let mounts: Vec<_> = mountinfo.lines().filter_map(parse_mount).collect();
        let only_v2 = mounts.iter().all(|mount| mount.v1_options.is_none());
        let mut hierarchies = Vec::new();
        for mount in mounts {
            let own = match &mount.v1_options {
                Some(options) => own_cgroup(own_cgroups, options),
                None if only_v2 => "/",
                None => own_cgroup(own_cgroups, ""),
            };
            let below_root = own
                .strip_prefix(mount.root.trim_end_matches('/'))
                .unwrap_or("/");
            let base = mount.mount_point.join(below_root.trim_start_matches('/'));
            let mount_name = match mount.mount_point.strip_prefix("/sys/fs/cgroup") {
                Ok(name) => name.to_string_lossy().into_owned(),
                Err(_) => continue,
            };
            let hierarchy = Hierarchy {
                mount_name,
                v1_options: mount.v1_options,
                node_dir: base.join(name),
            };
            if !hierarchies.contains(&hierarchy) {
                hierarchies.push(hierarchy);
            }
        }
        NodeCgroups { hierarchies }
    }

    /// Makes the directories and gives them the controllers.
    pub(crate) fn create(&self) -> Result<(), TestbedError> {
        for hierarchy in &self.hierarchies {
            let dir = &hierarchy.node_dir;
            let parent = dir.parent().unwrap_or(Path::new("/"));
            if self.only_v2() {
                enable_controllers(parent);
            }
            fs::create_dir(dir).during("create cgroup", dir)?;
            // A v1 cpuset is born without processors and memory nodes, and refuses processes until
            // it has both.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if hierarchy
                    .v1_options
                    .as_deref()
                    .is_some_and(|o| has_option(o, "cpuset"))
                {
                    let inherited =
                        fs::read(parent.join(file)).during("read", parent.join(file))?;
                    fs::write(dir.join(file), inherited).during("write", dir.join(file))?;
                }
            }
        }
        Ok(())
    }

    /// On a v2-only machine, moves the node's first processes aside and hands the controllers down.
    pub(crate) fn delegate(&self) -> Result<(), TestbedError> {
        if !self.only_v2() {
            return Ok(());
        }
        for hierarchy in &self.hierarchies {
            let dir = &hierarchy.node_dir;
            let leaf = dir.join("init");
            fs::create_dir(&leaf).during("create cgroup", &leaf)?;
            let procs = dir.join("cgroup.procs");
            for pid in fs::read_to_string(&procs).during("read", &procs)?.lines() {
                fs::write(leaf.join("cgroup.procs"), pid).during("join cgroup", &leaf)?;
            }
            enable_controllers(dir);
        }
        Ok(())
    }

    /// The `cgroup.procs` files that a process joins before the node's namespaces exist.
    pub(crate) fn first_procs(&self) -> Vec<PathBuf> {
        self.hierarchies
            .iter()
            .map(|h| h.node_dir.join("cgroup.procs"))
            .collect()
    }

    /// The `cgroup.procs` files that later commands join.
    pub(crate) fn procs(&self) -> Vec<PathBuf> {
        let below = if self.only_v2() {
            "init/cgroup.procs"
        } else {
            "cgroup.procs"
        };
        self.hierarchies
            .iter()
            .map(|h| h.node_dir.join(below))
            .collect()
    }

    /// Lets what is frozen in the node run, so that a SIGKILL reaches it: a v1 freezer keeps the processes
    /// of a paused container alive, and with them PID 1 of their namespace, for ever.
    pub(crate) fn thaw(&self) {
        for hierarchy in &self.hierarchies {
            let options = hierarchy.v1_options.as_deref();
            if options.is_some_and(|options| has_option(options, "freezer")) {
                thaw_tree(&hierarchy.node_dir);
            }
        }
    }

    /// Removes the cgroups and all below them, once the node's processes are dead.
    pub(crate) fn remove(&self) -> Result<(), TestbedError> {
        self.thaw();
        for hierarchy in &self.hierarchies {
            // A killed process leaves its cgroup a moment after its parent has been told.
            poll_until(
                "removal of a node's cgroup",
                Duration::from_secs(10),
                || {
                    remove_tree(&hierarchy.node_dir)
                        .map_err(|error| format!("{}: {error}", hierarchy.node_dir.display()))
                },
            )?;
        }
        Ok(())
    }

    fn only_v2(&self) -> bool {
        self.hierarchies
            .iter()
            .all(|hierarchy| hierarchy.v1_options.is_none())
    }
}

struct CgroupMount {
    root: String,
    mount_point: PathBuf,
    v1_options: Option<String>,
}

/// Reads one line of mountinfo (proc_pid_mountinfo(5)) if it is a cgroup mount.
fn parse_mount(line: &str) -> Option<CgroupMount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, mount_point) = (left.next()?.to_owned(), PathBuf::from(left.next()?));
    let mut right = right.split(' ');
    let v1_options = match right.next()? {
        "cgroup2" => None,
        "cgroup" => {
            let options = right.nth(1)?;
            let kept: Vec<_> = options
                .split(',')
                .filter(|option| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children"))
                .filter(|option| !option.starts_with("release_agent="))
                .map(|option| match option.strip_prefix("name=") {
                    Some(_) => format!("none,{option}"),
                    None => option.to_owned(),
                })
                .collect();
            Some(kept.join(","))
        }
        _ => return None,
    };
    Some(CgroupMount {
        root,
        mount_point,
        v1_options,
    })
}

fn has_option(options: &str, wanted: &str) -> bool {
    options.split(',').any(|option| option == wanted)
}

/// The caller's path in the hierarchy with these v1 options ("" for v2), from /proc/self/cgroup.
fn own_cgroup<'a>(own_cgroups: &'a str, options: &str) -> &'a str {
    own_cgroups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find(|(controllers, _)| {
            if options.is_empty() {
                return controllers.is_empty();
            }
            !controllers.is_empty() && controllers.split(',').all(|c| has_option(options, c))
        })
        .map_or("/", |(_, path)| path)
}

/// Hands every available v2 controller down; one that cannot be is left out, as systemd does.
fn enable_controllers(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"))
        {
            eprintln!(
                "cgroup {}: no controller {controller}: {error}",
                dir.display()
            );
        }
    }
}

/// Removes a directory of a cgroup file system: its files cannot be deleted, its directories can.
fn remove_tree(dir: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

/// Thaws a cgroup and those below it; one that is removed meanwhile has nothing frozen.
fn thaw_tree(dir: &Path) {
    drop(fs::write(dir.join("freezer.state"), "THAWED"));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            thaw_tree(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
20 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 25 0:20 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
31 25 0:21 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 25 0:22 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
33 25 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn v1_nodes_lie_below_the_callers_own_cgroups() {
        let own = "3:name=systemd:/user\n2:memory:/job/7\n1:cpu,cpuacct:/\n0::/user\n";
        let plan = NodeCgroups::plan(HYBRID, own, "n");
        let seen: Vec<_> = plan
            .hierarchies
            .iter()
            .map(|h| {
                let options = h.v1_options.as_deref().unwrap_or("v2");
                format!("{} {options} {}", h.mount_name, h.node_dir.display())
            })
            .collect();
        assert_eq!(
            seen,
            [
                "cpu,cpuacct cpu,cpuacct /sys/fs/cgroup/cpu,cpuacct/n",
                "memory memory /sys/fs/cgroup/memory/job/7/n",
                "systemd none,name=systemd /sys/fs/cgroup/systemd/user/n",
                "unified v2 /sys/fs/cgroup/unified/user/n",
            ]
        );
        assert_eq!(plan.procs(), plan.first_procs());
    }

    #[test]
    fn a_v2_only_machine_gets_one_cgroup_at_the_top() {
        let mounts = "30 25 0:20 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let plan = NodeCgroups::plan(mounts, "0::/user.slice/x\n", "n");
        assert_eq!(plan.hierarchies.len(), 1);
        assert_eq!(plan.hierarchies[0].mount_name, "");
        assert_eq!(
            plan.procs(),
            [Path::new("/sys/fs/cgroup/n/init/cgroup.procs")]
        );
        assert_eq!(
            plan.first_procs(),
            [Path::new("/sys/fs/cgroup/n/cgroup.procs")]
        );
    }
}
