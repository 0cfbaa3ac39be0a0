//! PID 1 of a node: builds the node's world, says that it is ready, then reaps.
//!
//! Started by `unshare` in new mount, PID, network, UTS, IPC and cgroup namespaces:
//!
//! ```text
//! <executable> testbed-init PLAN.JSON
//!   stdin   a pipe held by the testbed's process; at its end PID 1 exits and the node dies
//!   stdout  one line: {"Ready":{"pid":1234}}  (the pid as the testbed sees it)  or {"Failed":"why"}
//! ```
//!
//! CRIU refuses to dump what lives in a plain chroot, hence overlay + `pivot_root`. The new root is
//! mounted shared, as systemd leaves it on a real node.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use serde::{Deserialize, Serialize};

use crate::TestbedError;
use crate::cgroups::Hierarchy;
use transship_path_error::{During as _, one_line};

/// First argument that asks for this role.
pub(crate) const ROLE: &str = "testbed-init";

/// What PID 1 has to build.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InitPlan {
    pub(crate) hostname: String,
    /// The tree below the overlay.
    pub(crate) tree: PathBuf,
    /// The node's own directory: the overlay's upperdir and workdir, containerd's root.
    pub(crate) data: PathBuf,
    /// Size of a tmpfs over `data` ("64m"); `None` leaves `data` on its disk.
    pub(crate) tmpfs_size: Option<String>,
    /// An empty directory where the root is mounted until pivot_root.
    pub(crate) root: PathBuf,
    /// Files of the machine shown read-only in the node: (source, path in the node).
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    pub(crate) cgroups: Vec<Hierarchy>,
}

/// Directories that must lie on the data directory itself: overlay on overlay does not work, and
/// checkpoints are large.
const DATA_DIRS: [(&str, &str); 2] = [
    ("containerd", "var/lib/containerd"),
    ("transship", "var/lib/transship"),
];

/// PID 1's one line on stdout.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// All is mounted; `pid` is PID 1 as seen from the testbed.
    Ready {
        /// See above.
        pid: i32,
    },
    /// The node cannot be built.
    Failed(String),
}

/// Builds the node and serves it until stdin ends.
pub(crate) fn serve(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let plan = PathBuf::from(arguments.next().unwrap_or_default());
    let (report, code) = match build(&plan) {
        Ok(pid) => (Report::Ready { pid }, ExitCode::SUCCESS),
        Err(error) => (Report::Failed(one_line(&error)), ExitCode::FAILURE),
    };
    let line = serde_json::to_string(&report).expect("the report has no map keys");
    let told = writeln!(std::io::stdout(), "{line}");
    if matches!(report, Report::Failed(_)) || told.is_err() {
        return code;
    }
    match reap_until_stdin_ends() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node init: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(plan: &Path) -> Result<i32, TestbedError> {
    umask(Mode::from_bits_truncate(0o022));
    // The old procfs still shows the testbed's PID namespace.
    let own = fs::read_link("/proc/self").during("read", "/proc/self")?;
    let pid = own
        .to_string_lossy()
        .parse()
        .map_err(|_| TestbedError::Unexpected {
            what: "/proc/self",
            text: own.to_string_lossy().into_owned(),
        })?;
    let plan: InitPlan = serde_json::from_slice(&fs::read(plan).during("read", plan)?)
        .map_err(std::io::Error::from)
        .during("parse", plan)?;

    mount_root(&plan)?;
    mount_kernel_file_systems(&plan.root)?;
    make_devices(&plan.root.join("dev"))?;
    mount_cgroups(&plan)?;
    for (source, path) in &plan.files {
        let target = plan.root.join(path.strip_prefix("/").unwrap_or(path));
        fs::write(&target, "").during("create", &target)?;
        bind(source, &target)?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        attach(None, &target, None, read_only, "")?;
    }
    switch_root(&plan.root)?;
    nix::unistd::sethostname(&plan.hostname).during("set hostname", &plan.hostname)?;
    Ok(pid)
}

fn mount_root(plan: &InitPlan) -> Result<(), TestbedError> {
    let data = &plan.data;
    if let Some(size) = &plan.tmpfs_size {
        attach(
            Some("tmpfs"),
            data,
            Some("tmpfs"),
            MsFlags::empty(),
            &format!("size={size}"),
        )?;
    }
    for dir in ["upper", "work"]
        .into_iter()
        .chain(DATA_DIRS.map(|(dir, _)| dir))
    {
        // After a boot they are there.
        let dir = data.join(dir);
        fs::create_dir_all(&dir).during("make directory", &dir)?;
    }
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        plan.tree.display(),
        data.join("upper").display(),
        data.join("work").display()
    );
    attach(
        Some("overlay"),
        &plan.root,
        Some("overlay"),
        MsFlags::empty(),
        &layers,
    )?;
    for (dir, path) in DATA_DIRS {
        let target = plan.root.join(path);
        fs::create_dir_all(&target).during("create", &target)?;
        bind(&data.join(dir), &target)?;
    }
    Ok(())
}

fn mount_kernel_file_systems(root: &Path) -> Result<(), TestbedError> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for (kind, path, flags, data) in [
        ("proc", "proc", quiet, ""),
        ("sysfs", "sys", quiet, ""),
        ("tmpfs", "dev", MsFlags::MS_NOSUID, "mode=755"),
        (
            "tmpfs",
            "run",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=755",
        ),
        (
            "tmpfs",
            "tmp",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=1777",
        ),
    ] {
        attach(Some(kind), &root.join(path), Some(kind), flags, data)?;
    }
    Ok(())
}

/// A private /dev: a devtmpfs is one for the whole machine, and a node must not change the machine.
fn make_devices(dev: &Path) -> Result<(), TestbedError> {
    for dir in ["pts", "shm", "net"] {
        make_dir(&dev.join(dir))?;
    }
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
        ("fuse", 10, 229),
        ("net/tun", 10, 200),
    ] {
        let path = dev.join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(major, minor))
            .during("make device", &path)?;
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        fs::set_permissions(&path, all).during("chmod", &path)?;
    }
    for (name, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, dev.join(name)).during("link", dev.join(name))?;
    }
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let pts = "newinstance,ptmxmode=0666,mode=0620,gid=5";
    attach(Some("devpts"), &dev.join("pts"), Some("devpts"), quiet, pts)?;
    attach(
        Some("tmpfs"),
        &dev.join("shm"),
        Some("tmpfs"),
        quiet,
        "mode=1777",
    )
}

fn mount_cgroups(plan: &InitPlan) -> Result<(), TestbedError> {
    let top = plan.root.join("sys/fs/cgroup");
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if plan
        .cgroups
        .iter()
        .any(|hierarchy| !hierarchy.mount_name.is_empty())
    {
        attach(Some("tmpfs"), &top, Some("tmpfs"), quiet, "mode=755")?;
    }
    for hierarchy in &plan.cgroups {
        let target = top.join(&hierarchy.mount_name);
        if !hierarchy.mount_name.is_empty() {
            make_dir(&target)?;
        }
        let (kind, options) = match &hierarchy.v1_options {
            Some(options) => ("cgroup", options.as_str()),
            None => ("cgroup2", ""),
        };
        attach(Some(kind), &target, Some(kind), quiet, options)?;
        // "cpu,cpuacct" is also looked for under each of its names.
        if hierarchy.mount_name.contains(',') {
            for name in hierarchy.mount_name.split(',') {
                symlink(&hierarchy.mount_name, top.join(name)).during("link", top.join(name))?;
            }
        }
    }
    Ok(())
}

fn switch_root(root: &Path) -> Result<(), TestbedError> {
    std::env::set_current_dir(root).during("enter", root)?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up below the new one and is taken off.
    nix::unistd::pivot_root(".", ".").during("pivot_root to", root)?;
    umount2(".", MntFlags::MNT_DETACH).during("unmount old root below", root)?;
    std::env::set_current_dir("/").during("enter", "/")?;
    attach(
        None,
        Path::new("/"),
        None,
        MsFlags::MS_SHARED | MsFlags::MS_REC,
        "",
    )
}

fn make_dir(path: &Path) -> Result<(), TestbedError> {
    Ok(fs::create_dir(path).during("create", path)?)
}

fn bind(source: &Path, target: &Path) -> Result<(), TestbedError> {
    Ok(mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .during("bind-mount", source)?)
}

fn attach(
    source: Option<&str>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: &str,
) -> Result<(), TestbedError> {
    Ok(mount(source, target, kind, flags, Some(data)).during("mount", target)?)
}

fn reap_until_stdin_ends() -> nix::Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let stdin = std::io::stdin();
    loop {
        let mut events = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut events, PollTimeout::NONE)?;
        // Nothing is ever written to the pipe: any event is its end.
        if events[0].any().unwrap_or(true) {
            return Ok(());
        }
        while children.read_signal()?.is_some() {}
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => break,
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
