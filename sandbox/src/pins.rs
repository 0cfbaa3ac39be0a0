//! Namespaces that are kept by a bind mount, and a look into living ones.
//!
//! A pin keeps a namespace when the process that made it is gone, and is never another one, as
//! `/proc/<pid>/ns/net` is as soon as the pid is given to another process.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use nix::sys::utsname::uname;

use transship_checkpoint::criu_images::ipc_sysctls::{self, IpcSysctls};
use transship_checkpoint::criu_images::utsns::UtsNames;
use transship_checkpoint::namespaces::Namespace;

use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{make_dir, remove_file};
use crate::pod_dir::PodDir;

/// What a sandbox can share with its containers. Mounts are never shared.
const PINNED: [Namespace; 6] = [
    Namespace::Network,
    Namespace::Ipc,
    Namespace::Uts,
    Namespace::Pid,
    Namespace::User,
    Namespace::Cgroup,
];

impl PodDir {
    /// Pins the namespaces of the process `pid`.
    ///
    /// # Errors
    /// A system call failed; nothing stays pinned.
    pub fn pin(&self, pid: i32) -> Result<(), SandboxError> {
        let pin_all = || {
            for (namespace, source) in paths_of_process(pid) {
                // A sandbox without a user namespace of its own has the host's: nobody joins that.
                let optional = matches!(namespace, Namespace::User | Namespace::Cgroup);
                let host = Path::new("/proc/self/ns").join(namespace.proc_name());
                if optional && same_file(&source, &host).during("look at", &source)? {
                    continue;
                }
                self.pin_one(namespace, &source)?;
            }
            Ok(())
        };
        pin_all().inspect_err(|_| drop(self.unpin()))
    }

    /// Where a pin of this kind is or would be.
    #[must_use]
    pub fn pin_path(&self, namespace: Namespace) -> PathBuf {
        self.path().join("ns").join(namespace.proc_name())
    }

    /// Pins one namespace.
    ///
    /// # Errors
    /// A system call failed.
    pub fn pin_one(&self, namespace: Namespace, source: &Path) -> Result<(), SandboxError> {
        make_dir(&self.path().join("ns"))?;
        let pin = self.pin_path(namespace);
        unmount_all(&pin)?;
        File::create(&pin).during("create", &pin)?;
        Ok(mount(
            Some(source),
            &pin,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .inspect_err(|_| drop(fs::remove_file(&pin)))
        .during("bind mount onto", &pin)?)
    }

    /// The pins that are there.
    #[must_use]
    pub fn pins(&self) -> BTreeMap<Namespace, PathBuf> {
        PINNED
            .into_iter()
            .map(|namespace| (namespace, self.pin_path(namespace)))
            .filter(|(_, pin)| is_namespace(pin))
            .collect()
    }

    /// Removes the pins. It is no error when there are none.
    ///
    /// # Errors
    /// A system call failed.
    pub fn unpin(&self) -> Result<(), SandboxError> {
        for namespace in PINNED {
            let pin = self.pin_path(namespace);
            unmount_all(&pin)?;
            remove_file(&pin)?;
        }
        match fs::remove_dir(self.path().join("ns")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Ok(Err(error).during("remove", self.path().join("ns"))?)
            }
            _ => Ok(()),
        }
    }
}

/// The namespaces of a process, as far as they can be shared.
#[must_use]
pub fn paths_of_process(pid: i32) -> BTreeMap<Namespace, PathBuf> {
    let dir = PathBuf::from(format!("/proc/{pid}/ns"));
    PINNED
        .into_iter()
        .map(|namespace| (namespace, dir.join(namespace.proc_name())))
        .filter(|(_, path)| is_namespace(path))
        .collect()
}

/// What the UTS namespace at `path` is called now.
///
/// # Errors
/// It cannot be entered.
pub fn live_uts_names(path: &Path) -> Result<UtsNames, SandboxError> {
    in_thread("enter", path, || {
        setns(File::open(path)?, CloneFlags::CLONE_NEWUTS)?;
        let uts = uname()?;
        Ok(UtsNames {
            node: uts.nodename().to_string_lossy().into_owned(),
            domain: uts.domainname().to_string_lossy().into_owned(),
        })
    })
}

/// The limits of the IPC namespace at `path`, as far as this kernel has them.
///
/// # Errors
/// It cannot be entered.
pub fn live_ipc_sysctls(path: &Path) -> Result<IpcSysctls, SandboxError> {
    in_thread("enter", path, || {
        setns(File::open(path)?, CloneFlags::CLONE_NEWIPC)?;
        // Those files are the reader's namespace's.
        let read = |name: &'static str| {
            let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
            let numbers = text.split_whitespace().map(|word| word.parse().ok());
            Some((name, numbers.collect::<Option<Vec<u64>>>()?))
        };
        Ok(ipc_sysctls::NAMES.into_iter().filter_map(read).collect())
    })
}

/// Makes a network namespace, with its loopback interface up, and pins it in `pod`.
///
/// # Errors
/// A system call failed.
pub fn live_network_namespace(pod: &PodDir) -> Result<PathBuf, SandboxError> {
    let pin = pod.pin_path(Namespace::Network);
    thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).during("make a network namespace for", &pin)?;
                crate::loopback::raise().during("raise the loopback interface of", &pin)?;
                pod.pin_one(Namespace::Network, Path::new("/proc/thread-self/ns/net"))
            })
            .join()
            .expect("the thread returns its errors")
    })?;
    Ok(pin)
}

/// Raises the loopback interface of the network namespace of a process: CRIU makes a new namespace
/// without what was in it, and the runtimes raise it for containers that start from their image only.
///
/// # Errors
/// A system call failed.
pub fn raise_loopback_of(pid: i32) -> Result<(), SandboxError> {
    let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
    in_network(
        "raise the loopback interface of",
        &path,
        crate::loopback::raise,
    )
}

/// Runs it in a network namespace; so does every process that it starts.
pub(crate) fn in_network<T: Send>(
    act: &'static str,
    namespace: &Path,
    run: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T, SandboxError> {
    in_thread(act, namespace, || {
        setns(File::open(namespace)?, CloneFlags::CLONE_NEWNET)?;
        run()
    })
}

// A thread of its own, because a thread that has changed its namespace cannot be used again.
pub(crate) fn in_thread<T: Send>(
    act: &'static str,
    path: &Path,
    run: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T, SandboxError> {
    Ok(thread::scope(|scope| {
        scope
            .spawn(run)
            .join()
            .expect("the thread returns its errors")
    })
    .during(act, path)?)
}

fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

fn same_file(a: &Path, b: &Path) -> io::Result<bool> {
    let (a, b) = (fs::metadata(a)?, fs::metadata(b)?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}

fn unmount_all(path: &Path) -> Result<(), SandboxError> {
    // A second pin over the first must go as well. MNT_DETACH: somebody may be looking at it.
    while is_namespace(path) {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::ENOENT | Errno::EINVAL) => break,
            Err(errno) => return Ok(Err(errno).during("unmount", path)?),
        }
    }
    Ok(())
}
