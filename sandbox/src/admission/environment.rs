//! What of the node decides a comparison.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use super::allowance::{Allowance, clean};
use super::network::Network;
use crate::proc_text::TaskStat;

/// In the order of their numbers, as the kernel has them on x86 and ARM.
const RESOURCES: [Resource; 16] = [
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_STACK,
    Resource::RLIMIT_CORE,
    Resource::RLIMIT_RSS,
    Resource::RLIMIT_NPROC,
    Resource::RLIMIT_NOFILE,
    Resource::RLIMIT_MEMLOCK,
    Resource::RLIMIT_AS,
    Resource::RLIMIT_LOCKS,
    Resource::RLIMIT_SIGPENDING,
    Resource::RLIMIT_MSGQUEUE,
    Resource::RLIMIT_NICE,
    Resource::RLIMIT_RTPRIO,
    Resource::RLIMIT_RTTIME,
];

/// Most symbolic links in one path, as in Linux.
const MOST_LINKS: u32 = 40;

/// The node, as far as it decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// Machine, as in `uname -m`.
    pub machine: String,
    /// Hard limits of the caller, which a container has that names none.
    pub hard_limits: Vec<u64>,
    /// The caller's nice value.
    pub nice: i32,
    /// The caller's, which a container has that names none.
    pub oom_score_adj: i32,
    /// The lowest address that a process may map without a capability.
    pub lowest_address: u64,
    /// Masked and read-only paths of the spec that there are: runtimes pass over the others.
    pub present: BTreeSet<PathBuf>,
    /// The LSM that gives profiles, `apparmor` or `selinux`.
    pub lsm: Option<&'static str>,
    /// Joined namespaces that are the node's own, by their OCI names: those of a pod in the network
    /// of its node.
    pub node_namespaces: BTreeSet<String>,
    /// Bytes of the largest pipe that everybody may have.
    pub largest_pipe: u32,
    /// The network of the container.
    pub network: Network,
}

impl Environment {
    /// Looks at the node; `rootfs` is the root of the container, as it is mounted now.
    #[must_use]
    pub fn of_node(allowed: &Allowance, rootfs: &Path) -> Self {
        let hard_limits = RESOURCES
            .into_iter()
            .map(|resource| getrlimit(resource).map_or(0, |(_, hard)| hard))
            .collect();
        let paths = allowed.masked.iter().chain(&allowed.read_only);
        let is_present = |path: &&PathBuf| {
            let of_kernel = path.starts_with("/proc") || path.starts_with("/sys");
            let place = match of_kernel {
                true => path.to_path_buf(),
                false => rootfs.join(path.strip_prefix("/").unwrap_or(path)),
            };
            fs::symlink_metadata(place).is_ok()
        };
        Self {
            machine: machine(),
            hard_limits,
            nice: own_nice(),
            oom_score_adj: own_oom_score_adj(),
            lowest_address: lowest_address(),
            present: paths.filter(is_present).cloned().collect(),
            lsm: lsm(),
            node_namespaces: { allowed.joined.iter() }
                .filter(|(kind, path)| is_own_namespace(kind, path))
                .map(|(kind, _)| kind.clone())
                .collect(),
            largest_pipe: largest_pipe(),
            network: Network::of(allowed),
        }
    }

    pub(super) fn has_lsm(&self, profile: &str) -> bool {
        profile
            .split_once(':')
            .is_some_and(|(lsm, _)| self.lsm == Some(lsm))
    }
}

/// The path of a container without symbolic links: each is followed as in the container, so that none
/// leads out of `root`. What does not exist is as it is named.
#[must_use]
pub fn resolve_within(root: &Path, path: &Path) -> PathBuf {
    let mut left: Vec<_> = clean(path).components().rev().map(owned).collect();
    let mut found = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = left.pop() {
        let next = clean(&found.join(&part));
        let below = next.strip_prefix("/").unwrap_or(&next);
        match fs::read_link(root.join(below)) {
            Ok(target) if links < MOST_LINKS => {
                links += 1;
                if target.is_absolute() {
                    found = PathBuf::from("/");
                }
                left.extend(target.components().rev().map(owned));
            }
            _ => found = next,
        }
    }
    found
}

fn owned(part: Component<'_>) -> PathBuf {
    match part {
        Component::RootDir => PathBuf::new(),
        part => PathBuf::from(part.as_os_str()),
    }
}

/// Whether the namespace at `path`, of the kind that an OCI spec calls so, is that of this process, which is
/// in all of the node's.
#[must_use]
pub fn is_own_namespace(kind: &str, path: &Path) -> bool {
    let file = match kind {
        "network" => "net",
        "mount" => "mnt",
        kind => kind,
    };
    let identity = |path: &Path| {
        let found = fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    let own = identity(&Path::new("/proc/self/ns").join(file));
    own.is_some() && own == identity(path)
}

/// Whether it is absolute, and no part of it leads back.
pub(super) fn is_plain(path: &Path) -> bool {
    let mut parts = path.components();
    path.is_absolute() && parts.all(|it| matches!(it, Component::RootDir | Component::Normal(_)))
}

fn own_oom_score_adj() -> i32 {
    let text = fs::read_to_string("/proc/self/oom_score_adj");
    { text.ok() }
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or_default()
}

fn own_nice() -> i32 {
    let stat = TaskStat::of("/proc/self").ok();
    stat.and_then(|stat| stat.nice()).unwrap_or_default()
}

/// Nothing that is there cannot be read by root.
fn lowest_address() -> u64 {
    let text = fs::read_to_string("/proc/sys/vm/mmap_min_addr").unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}

fn largest_pipe() -> u32 {
    let text = fs::read_to_string("/proc/sys/fs/pipe-max-size").unwrap_or_default();
    // The kernel's own default.
    text.trim().parse().unwrap_or(1 << 20)
}

fn lsm() -> Option<&'static str> {
    let apparmor = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if apparmor.is_ok_and(|text| text.starts_with('Y')) {
        return Some("apparmor");
    }
    Path::new("/sys/fs/selinux/enforce")
        .try_exists()
        .is_ok_and(|there| there)
        .then_some("selinux")
}

/// This machine, as in `uname -m`.
pub(super) fn machine() -> String {
    // uname(2) fails on a bad pointer only.
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |uname| uname.machine().to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_as_in_the_container() {
        let root = tempfile::tempdir().unwrap();
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, root.path().join(name)).unwrap();
        };
        fs::create_dir_all(root.path().join("run/lock")).unwrap();
        fs::create_dir_all(root.path().join("var")).unwrap();
        link("../run", "var/run");
        link("/run/lock", "var/lock");
        link("../../../../etc", "out");
        link("circle", "circle");
        for (path, wanted) in [
            ("/var/run/secrets/x", "/run/secrets/x"),
            ("/var/lock/", "/run/lock"),
            ("/var/../var//run", "/run"),
            ("/out/passwd", "/etc/passwd"),
            ("/circle/x", "/circle/x"),
            ("/", "/"),
        ] {
            let found = resolve_within(root.path(), Path::new(path));
            assert_eq!(found, Path::new(wanted), "{path}");
        }
    }
}
