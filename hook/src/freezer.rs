//! The freezer of cgroups: tasks in it execute nothing, and do not notice.
//!
//! ```text
//!  v1  /proc/PID/cgroup  5:freezer:/default/web  -> <mount>/default/web/freezer.state         FROZEN | THAWED
//!                                                                       freezer.self_freezing 1 | 0
//!  v2                    0::/default/web         -> <mount>/default/web/cgroup.freeze         1 | 0
//!                                                                       cgroup.events         frozen 1
//! ```
//!
//! On v1 a frozen task takes no signal, not even SIGKILL, until it is thawed; then it ends before it is back
//! in its program.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use transship_sandbox::read_proc;

use crate::start_time::start_time;

/// How long tasks may take to freeze: one that writes to a slow disk is not interrupted.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cgroup that can be frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Freezer {
    dir: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Freezer {
    /// The smallest cgroup that has all of these processes, but for those that have ended.
    ///
    /// # Errors
    /// There is none that can be frozen.
    pub(crate) fn around(pids: &[i32]) -> io::Result<Self> {
        let mounts = read_proc("/proc/self/mountinfo")?;
        let mut common: Option<Self> = None;
        // Of one that has ended v1 gives the root of the hierarchy.
        let alive = pids.iter().filter(|pid| start_time(**pid).is_ok());
        for pid in alive {
            let cgroups = read_proc(format!("/proc/{pid}/cgroup"))?;
            let own = Self::find(&cgroups, &mounts).ok_or_else(unknown)?;
            common = Some(match common {
                Some(common) => Self {
                    dir: shared(&common.dir, &own.dir),
                    ..own
                },
                None => own,
            });
        }
        common.filter(Self::can_freeze).ok_or_else(unknown)
    }

    /// The one in this directory.
    pub(crate) fn at(dir: &Path) -> Self {
        let version = match dir.join("freezer.state").symlink_metadata().is_ok() {
            true => Version::One,
            false => Version::Two,
        };
        Self {
            dir: dir.to_path_buf(),
            version,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Freezes it, and waits until all of its tasks are.
    ///
    /// # Errors
    /// They are not, and it is thawed again.
    pub(crate) fn freeze(&self) -> io::Result<()> {
        match self.version {
            Version::One => fs::write(self.dir.join("freezer.state"), "FROZEN"),
            Version::Two => fs::write(self.dir.join("cgroup.freeze"), "1"),
        }?;
        let deadline = Instant::now() + PATIENCE;
        while !self.is_frozen()? {
            if Instant::now() > deadline {
                self.thaw()?;
                let message = format!("{} does not freeze", self.dir.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets its tasks go on.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        match self.version {
            Version::One => fs::write(self.dir.join("freezer.state"), "THAWED"),
            Version::Two => fs::write(self.dir.join("cgroup.freeze"), "0"),
        }
    }

    /// Whether all of its tasks are frozen, because it or one above is.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn is_frozen(&self) -> io::Result<bool> {
        Ok(match self.version {
            Version::One => fs::read_to_string(self.dir.join("freezer.state"))?.trim() == "FROZEN",
            Version::Two => {
                let events = fs::read_to_string(self.dir.join("cgroup.events"))?;
                events.lines().any(|line| line == "frozen 1")
            }
        })
    }

    /// Whether a task that is killed ends while it is frozen.
    pub(crate) fn ends_frozen(&self) -> bool {
        self.version == Version::Two
    }

    /// The processes in it and in those below.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn members(&self) -> io::Result<BTreeSet<i32>> {
        let mut members = BTreeSet::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            let pids = fs::read_to_string(dir.join("cgroup.procs"))?;
            members.extend(pids.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    dirs.push(entry.path());
                }
            }
        }
        Ok(members)
    }

    /// Moves a process here.
    ///
    /// # Errors
    /// The kernel's; none for a process that has ended.
    pub(crate) fn take(&self, pid: i32) -> io::Result<()> {
        match fs::write(self.dir.join("cgroup.procs"), pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
            taken => taken,
        }
    }

    /// The cgroup of a process by its `/proc/PID/cgroup`.
    fn find(cgroups: &str, mounts: &str) -> Option<Self> {
        let of = |named: fn(&str) -> bool| {
            cgroups.lines().find_map(|line| {
                let (_, line) = line.split_once(':')?;
                let (controllers, path) = line.split_once(':')?;
                named(controllers).then_some(path)
            })
        };
        let one = of(|controllers| controllers.split(',').any(|it| it == "freezer"));
        let (path, version) = match one {
            Some(path) => (path, Version::One),
            None => (of(str::is_empty)?, Version::Two),
        };
        let dir = mounts.lines().find_map(|line| place(line, version, path))?;
        Some(Self { dir, version })
    }

    /// The root of a hierarchy has no freezer.
    fn can_freeze(&self) -> bool {
        let file = match self.version {
            Version::One => "freezer.state",
            Version::Two => "cgroup.freeze",
        };
        self.dir.join(file).symlink_metadata().is_ok()
    }

    /// Whether it is itself what freezes its tasks.
    fn is_cause(&self) -> bool {
        let file = match self.version {
            Version::One => "freezer.self_freezing",
            Version::Two => "cgroup.freeze",
        };
        fs::read_to_string(self.dir.join(file)).is_ok_and(|text| text.trim() == "1")
    }
}

/// Thaws the cgroups that hold back the end of these processes, which have been killed. One that freezes
/// others as well stays as it is.
pub(crate) fn thaw_killed(pids: &BTreeSet<i32>) {
    let mut done = BTreeSet::new();
    for pid in pids {
        // One that has ended needs nothing.
        let Ok(own) = Freezer::around(&[*pid]) else {
            continue;
        };
        for dir in own.dir.ancestors() {
            let freezer = Freezer {
                dir: dir.to_path_buf(),
                version: own.version,
            };
            if !freezer.can_freeze() || !done.insert(dir.to_path_buf()) {
                break;
            }
            let killed = || freezer.members().is_ok_and(|it| it.is_subset(pids));
            if freezer.is_cause() && killed() {
                // Whatever cannot be thawed is found by whoever waits for the end.
                drop(freezer.thaw());
            }
        }
    }
}

/// Where a cgroup is below a mount, if that is one of its hierarchy.
fn place(line: &str, version: Version, path: &str) -> Option<PathBuf> {
    // 36 35 0:32 / /sys/fs/cgroup/freezer rw shared:9 - cgroup cgroup rw,freezer
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, at) = (mount.next()?, mount.next()?);
    let mut filesystem = filesystem.split(' ');
    let kind = filesystem.next()?;
    let options = filesystem.nth(1)?;
    let fits = match version {
        Version::One => kind == "cgroup" && options.split(',').any(|it| it == "freezer"),
        Version::Two => kind == "cgroup2",
    };
    let below = Path::new(path).strip_prefix(root).ok()?;
    // Out of the caller's cgroup namespace.
    let plain = below
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    (fits && plain).then(|| Path::new(at).join(below))
}

fn shared(one: &Path, two: &Path) -> PathBuf {
    let parts = one.components().zip(two.components());
    let same = parts.take_while(|(one, two)| one == two);
    same.map(|(part, _)| part).collect()
}

fn unknown() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "there is no freezer for it")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const MOUNTS: &str = "\
36 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
37 31 0:32 /machine /sys/fs/cgroup/freezer rw shared:9 - cgroup cgroup rw,freezer\n";

    #[test]
    fn a_cgroup_is_found_below_its_mount() {
        let found = |cgroups: &str| Freezer::find(cgroups, MOUNTS);
        let one = found("5:freezer:/machine/default/web\n0::/other\n").unwrap();
        assert_eq!(one.dir, Path::new("/sys/fs/cgroup/freezer/default/web"));
        assert_eq!(one.version, Version::One);
        let two = found("0::/a/b\n").unwrap();
        assert_eq!(two.dir, Path::new("/sys/fs/cgroup/unified/a/b"));
        assert_eq!(found("5:freezer:/machine/../x\n"), None);
        assert_eq!(found("5:freezer:/elsewhere\n"), None);
        assert_eq!(
            shared(&one.dir, Path::new("/sys/fs/cgroup/freezer/default/x"))
                .file_name()
                .unwrap(),
            "default"
        );
    }

    /// On the freezer that this machine has.
    #[test]
    fn root_who_is_killed_while_frozen_ends() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = Freezer::find(&cgroups, &mounts).unwrap();
        let dir = own.dir.join(format!("transship-test-{pid}"));
        fs::create_dir(&dir).unwrap();
        let freezer = Freezer::at(&dir);
        freezer.take(pid).unwrap();
        assert_eq!(Freezer::around(&[pid]).unwrap(), freezer);
        assert_eq!(freezer.members().unwrap(), BTreeSet::from([pid]));
        freezer.freeze().unwrap();
        assert!(freezer.is_frozen().unwrap() && freezer.is_cause());
        child.kill().unwrap();
        // What is frozen beside it would be let go.
        thaw_killed(&BTreeSet::from([i32::MAX]));
        assert!(freezer.is_cause());
        thaw_killed(&BTreeSet::from([pid]));
        child.wait().unwrap();
        fs::remove_dir(&dir).unwrap();
    }
}
