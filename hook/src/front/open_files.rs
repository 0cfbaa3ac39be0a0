//! What the restored processes have open, before they run: files of the container's own mounts and no others, and none
//! that they could not have opened.
//!
//! CRIU finds files by names, in volumes that others write to meanwhile and in file systems whose links are known when
//! it has made them. So that a name has led elsewhere shows in what it has led to. A file knows its mount, whatever kind of
//! file it is and however it was opened, and a mount is in one namespace alone:
//!
//! ```text
//! /proc/<pid>/mountinfo      <id> <parent> <device> <root> <point> ...      the mounts of the container
//! /proc/<pid>/fdinfo/<n>     mnt_id: <id>                                   the mount of an open file
//! ```
//!
//! A process that has changed its root (chroot) is shown the mounts below it alone, with points as it sees them, so all
//! processes of a namespace are asked.
//!
//! Of some files of `/proc` and `/sys` the kernel asks which capabilities those have who opened them, of the others who may
//! by their modes, and of nobody who reads them later (`sandbox/src/privileged_files.rs`). CRIU has and may all. They are
//! known by their paths in their own file systems (`<root>`, and what is below `<point>`): the container may see
//! `/proc/kcore` as `/x`. Nor does the kernel ask again which devices the container may open
//! (`sandbox/src/device_rules.rs`).
//!
//! The root itself is read-only where the spec says so: CRIU 4.0 and 4.1 forget it.
//!
//! Pipes, sockets and what else has no path are no files of a mount. The standard streams are the runtime's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, statvfs};
use serde_json::Value;
use transship_checkpoint::spec::Spec;
use transship_layer::unescape_octal;
use transship_path_error::During as _;
use transship_sandbox::device_rules::DeviceRules;
use transship_sandbox::privileged_files::{self, Opened, Opener, OwnProcesses};

use super::{FrontError, RestoreError};
use crate::descendants;

/// Of the spec.
const READ_ONLY: &str = "/root/readonly";
/// Links that are files of the kernel, whose mount nobody has.
const OF_KERNEL: [&[u8]; 6] = [
    b"/memfd:",
    b"/dev/zero (deleted)",
    b"/SYSV",
    b"/[aio]",
    b"/anon_hugepage",
    b"/secretmem",
];

/// Refuses a restored container of which a process has a file that is not its own, or whose root can be written and should
/// not; `pid` is its first process.
///
/// # Errors
/// It has one, or `/proc` cannot be read.
pub(super) fn check(id: &str, pid: i32, spec: &Spec) -> Result<(), FrontError> {
    let id = id.to_owned();
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let flags = statvfs(&root).during("look at", &root)?.flags();
    if spec.get(READ_ONLY) == Some(&Value::Bool(true)) && !flags.contains(FsFlags::ST_RDONLY) {
        return Err(RestoreError::WritableRoot { id }.into());
    }
    match unfit(pid, spec).during("look at", format!("/proc/{pid}"))? {
        Some((path, Unfit::Foreign)) => Err(RestoreError::ForeignFile { id, path }.into()),
        Some((path, Unfit::Closed)) => Err(RestoreError::ClosedDevice { id, path }.into()),
        Some((path, Unfit::Takes(needed))) => {
            Err(RestoreError::PrivilegedFile { id, path, needed }.into())
        }
        None => Ok(()),
    }
}

/// What is wrong with a file that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unfit {
    /// It is in none of the process' mounts.
    Foreign,
    /// It is a device that the container may not open.
    Closed,
    /// Opening it takes this capability, which the process cannot have.
    Takes(&'static str),
}

/// The first file of any kind that the process `root`, or one below it, has open, mapped, or for its root, and that
/// is in none of its mounts, or could not be opened by it.
///
/// # Errors
/// `/proc` cannot be read.
fn unfit(root: i32, spec: &Spec) -> io::Result<Option<(PathBuf, Unfit)>> {
    let tree = descendants::tree(root)?;
    let container = Container {
        rules: DeviceRules::of(spec),
        own: OwnProcesses::of(tree.iter().copied())?,
        streams: streams(),
    };
    let mut mounts: BTreeMap<PathBuf, Mounts> = BTreeMap::new();
    let mut processes = Vec::new();
    for pid in tree {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let seen = match mounts_seen_by(&proc) {
            // A zombie is in no mount namespace.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => continue,
            seen => unless_gone(seen)?,
        };
        if let Some((namespace, seen)) = seen {
            let known = mounts.entry(namespace.clone()).or_default();
            for (id, mount) in seen {
                known.entry(id).or_insert(mount);
            }
            processes.push((proc, namespace));
        }
    }
    for (proc, namespace) in processes {
        let mounts = &mounts[&namespace];
        let Some(opener) = unless_gone(Opener::of(&proc))? else {
            continue;
        };
        for link in links(&proc)? {
            let found = unless_gone(container.look_at(&link, &proc, mounts, &opener))?.flatten();
            if let Some(unfit) = found {
                return fs::read_link(&link).map(|path| Some((path, unfit)));
            }
        }
    }
    Ok(None)
}

/// Device and inode of what the runtime gives to the container for its standard streams: terminals and `/dev/null` of
/// the node among them.
fn streams() -> Vec<(u64, u64)> {
    let streams = (0..3).filter_map(|number| fs::metadata(format!("/proc/self/fd/{number}")).ok());
    let streams = streams.filter(|found| !found.is_dir());
    streams.map(|found| (found.dev(), found.ino())).collect()
}

/// Those of a namespace, by their ids.
type Mounts = BTreeMap<u64, Mount>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    /// What of its file system it shows.
    root: PathBuf,
    /// Where, from the first root of the namespace.
    point: PathBuf,
}

impl Mount {
    /// A line of `/proc/<pid>/mountinfo`, of a process that has this root, and the id.
    fn parse(line: &[u8], process_root: &Path) -> Option<(u64, Self)> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let path = |field| PathBuf::from(OsString::from_vec(unescape_octal(field)));
        let root = path(fields.nth(2)?);
        let point = path(fields.next()?);
        let point = process_root.join(point.strip_prefix("/").ok()?);
        Some((id, Self { root, point }))
    }

    /// The path in its file system of what `/proc` calls `target`, which is a path from the first root of the namespace
    /// too; none where that is not below the mount.
    fn inside(&self, target: &Path) -> Option<PathBuf> {
        let below = target.strip_prefix(&self.point).ok()?;
        Some(self.root.components().chain(below.components()).collect())
    }
}

/// A mount namespace, and the mounts that are seen from the root of one of its processes.
fn mounts_seen_by(proc: &Path) -> io::Result<(PathBuf, Mounts)> {
    let namespace = fs::read_link(proc.join("ns/mnt"))?;
    let root = fs::read_link(proc.join("root"))?;
    let text = fs::read(proc.join("mountinfo"))?;
    let lines = text.split(|byte| *byte == b'\n');
    let mounts = lines.filter_map(|line| Mount::parse(line, &root));
    Ok((namespace, mounts.collect()))
}

fn links(proc: &Path) -> io::Result<Vec<PathBuf>> {
    let mut links = ["cwd", "root", "exe"].map(|name| proc.join(name)).to_vec();
    for dir in ["fd", "map_files"] {
        let Some(entries) = unless_gone(fs::read_dir(proc.join(dir)))? else {
            continue;
        };
        for entry in entries {
            links.push(entry?.path());
        }
    }
    Ok(links)
}

/// What a restored container may have open.
struct Container {
    rules: DeviceRules,
    own: OwnProcesses,
    streams: Vec<(u64, u64)>,
}

impl Container {
    /// What is wrong with the file that a link of the process at `proc` leads to.
    fn look_at(
        &self,
        link: &Path,
        proc: &Path,
        mounts: &Mounts,
        opener: &Opener,
    ) -> io::Result<Option<Unfit>> {
        let target = fs::read_link(link)?;
        let found = fs::metadata(link)?;
        let bytes = target.as_os_str().as_bytes();
        let has_path = bytes.starts_with(b"/") && !OF_KERNEL.iter().any(|it| bytes.starts_with(it));
        let is_stream = self.streams.contains(&(found.dev(), found.ino()));
        let mount = match has_path {
            true => mount_of(link, proc)?.and_then(|id| mounts.get(&id)),
            false => None,
        };
        if has_path && !is_stream && mount.is_none() {
            return Ok(Some(Unfit::Foreign));
        }
        if !is_stream && !self.rules.allow(&found, privileged_files::flags(link)?) {
            return Ok(Some(Unfit::Closed));
        }
        let inside = mount.and_then(|mount| mount.inside(&target));
        let file = Opened {
            link,
            target: &target,
            inside: inside.as_deref(),
            found: &found,
        };
        let lacking = privileged_files::lacking_to_open(&file, &self.own, opener)?;
        Ok(lacking.map(|needed| Unfit::Takes(needed.name)))
    }
}

/// The id of the mount that what a link leads to was opened in.
fn mount_of(link: &Path, proc: &Path) -> io::Result<Option<u64>> {
    let info = match link.parent().is_some_and(|dir| dir.ends_with("fd")) {
        true => {
            let number = link.file_name().unwrap_or_default();
            fs::read_to_string(proc.join("fdinfo").join(number))?
        }
        // Of these the mount is told by a descriptor of our own, which opens nothing.
        false => {
            let file = open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?
        }
    };
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    Ok(mount.and_then(|id| id.trim().parse().ok()))
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_path_in_a_file_system_is_told_by_its_mount() {
        for (line, process_root, target, inside) in [
            (
                "7 1 0:21 / /proc rw - proc proc rw",
                "/",
                "/proc/kcore",
                Some("/kcore"),
            ),
            (
                "7 1 0:21 /kcore /x rw - proc proc rw",
                "/",
                "/x",
                Some("/kcore"),
            ),
            (
                "7 1 0:21 /bus/pci /a\\040b rw - proc proc rw",
                "/",
                "/a b/00/1f.0",
                Some("/bus/pci/00/1f.0"),
            ),
            // As a process in another root sees it.
            (
                "7 1 0:21 / /proc rw - proc proc rw",
                "/jail",
                "/jail/proc/7/mem",
                Some("/7/mem"),
            ),
            (
                "7 1 8:1 /a\\134b / rw - ext4 /dev/vda rw",
                "/",
                "/etc/x",
                Some("/a\\b/etc/x"),
            ),
            (
                "7 1 0:21 / /proc rw - proc proc rw",
                "/",
                "/procs/kcore",
                None,
            ),
        ] {
            let (id, mount) = Mount::parse(line.as_bytes(), Path::new(process_root)).unwrap();
            let found = mount.inside(Path::new(target));
            assert_eq!((id, found.as_deref()), (7, inside.map(Path::new)), "{line}");
        }
        for line in ["", "x 1 0:21 / /proc", "7 1 0:21 /", "7 1 0:21 / proc"] {
            assert_eq!(
                Mount::parse(line.as_bytes(), Path::new("/")),
                None,
                "{line}"
            );
        }
    }

    /// Files of `/proc` behind a bind mount, of root without capabilities and of a user.
    #[test]
    fn root_what_is_mounted_elsewhere_is_known() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("x");
        fs::write(&name, "").unwrap();
        let allowed = br#"{"linux":{"resources":{"devices":[{"allow":true,"access":"rwm"}]}}}"#;
        let spec = Spec::parse(allowed).unwrap();
        let found = |file: &str, descriptor: &str, who: &str| {
            let name = name.display();
            let opened = format!(
                "mount --bind {file} {name}; exec 3{descriptor}{name}; \
                 exec setpriv --bounding-set=-all --inh-caps=-all {who} sleep 100"
            );
            let mut held = Command::new("unshare")
                .args(["--mount", "sh", "-ec", &opened])
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            let pid = held.id().cast_signed();
            let deadline = Instant::now() + Duration::from_secs(20);
            let comm = format!("/proc/{pid}/comm");
            while fs::read_to_string(&comm).unwrap() != "sleep\n" {
                assert!(Instant::now() < deadline, "{opened}");
                std::thread::sleep(Duration::from_millis(5));
            }
            let found = unfit(pid, &spec);
            held.kill().unwrap();
            held.wait().unwrap();
            found.unwrap().map(|(_, unfit)| unfit)
        };
        let user = "--reuid=1000 --regid=1000 --clear-groups";
        let takes = |needed| Some(Unfit::Takes(needed));
        assert_eq!(found("/proc/kallsyms", "<", ""), takes("CAP_SYSLOG"));
        assert_eq!(found("/proc/iomem", "<", user), takes("CAP_SYS_ADMIN"));
        assert_eq!(
            found("/proc/timer_list", "<", user),
            takes("CAP_DAC_OVERRIDE")
        );
        assert_eq!(found("/proc/timer_list", "<", ""), None);
        assert_eq!(found("/proc/uptime", "<", user), None);
        let switch = "/proc/sys/net/core/somaxconn";
        assert_eq!(found(switch, "<", user), None);
        assert_eq!(found(switch, "<>", user), takes("CAP_DAC_OVERRIDE"));
        // What is on a disk has the modes that its owner gives it.
        let disk = dir.path().join("disk");
        fs::write(&disk, "").unwrap();
        assert_eq!(found(disk.to_str().unwrap(), "<>", user), None);
    }

    #[test]
    fn a_file_of_no_mount_of_its_own_is_told() {
        let proc = Path::new("/proc/self");
        let file = tempfile::tempfile().unwrap();
        let link = |file: &dyn AsRawFd| proc.join(format!("fd/{}", file.as_raw_fd()));
        let (_, own) = mounts_seen_by(proc).unwrap();
        let none = Mounts::new();
        let closed = br#"{"linux":{"resources":{"devices":[{"allow":false,"access":"rwm"}]}}}"#;
        let mut container = Container {
            rules: DeviceRules::of(&Spec::parse(closed).unwrap()),
            own: OwnProcesses::of([std::process::id().cast_signed()]).unwrap(),
            streams: Vec::new(),
        };
        let opener = Opener::of(proc).unwrap();
        let look_at = |container: &Container, link: &Path, mounts| {
            container.look_at(link, proc, mounts, &opener).unwrap()
        };
        assert_eq!(look_at(&container, &link(&file), &own), None);
        let foreign = Some(Unfit::Foreign);
        assert_eq!(look_at(&container, &link(&file), &none), foreign);
        let exe = proc.join("exe");
        assert_eq!(look_at(&container, &exe, &none), foreign);
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(look_at(&container, &link(&pipe), &none), None);
        // What is no regular file, and what is only named.
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let named = open(&socket, OFlag::O_PATH, Mode::empty()).unwrap();
        assert_eq!(look_at(&container, &link(&named), &own), None);
        assert_eq!(look_at(&container, &link(&named), &none), foreign);
        let null = fs::File::open("/dev/null").unwrap();
        assert_eq!(look_at(&container, &link(&null), &none), foreign);
        assert_eq!(look_at(&container, &link(&null), &own), None);
        let found = null.metadata().unwrap();
        container.streams = vec![(found.dev(), found.ino())];
        assert_eq!(look_at(&container, &link(&null), &none), None);
    }
}
