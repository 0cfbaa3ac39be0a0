//! One node: a PID 1 in namespaces of its own over a cached tree, and ways to act in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroups::{Hierarchy, NodeCgroups};
use crate::init::{self, InitPlan, Report};
use crate::run::CommandRun as _;
use crate::{Settings, TestbedError, Tree, enter, poll_until};
use transship_path_error::During as _;

/// Our binaries, shown in a node as far as they have been built.
const BINARIES: [&str; 4] = [
    "transship",
    "transship-snapshotter",
    "transship-runc",
    "transship-hook",
];

/// The kernel is the one of the machine, which has not been down.
const OTHER_BOOT: &str = "cat /proc/sys/kernel/random/uuid >/run/boot-id
    mount --bind /run/boot-id /proc/sys/kernel/random/boot_id";

/// Where a node keeps what it writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Storage {
    /// On the disk below the work directory (on a tmpfs if that is an overlay).
    #[default]
    Disk,
    /// On a tmpfs of this size ("64m"): for a disk that fills up, or one that must not slow a test.
    Tmpfs(String),
    /// What another node has written (its `data`) on the file system of the work directory, which becomes this one's: as it
    /// is after a boot, with another boot id.
    Found(PathBuf),
}

/// How a node differs from the plain one.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// Where the root's upperdir, containerd's root and the checkpoints lie.
    pub storage: Storage,
    /// Leaves the v2 "unified" hierarchy out: crun refuses a hybrid of v1 and v2.
    pub without_unified_cgroup: bool,
    /// Programs of the machine that are shown in the node's /usr/local/bin besides ours.
    pub programs: Vec<PathBuf>,
}

/// A running node; clones are handles to the same node, which lives as long as its testbed.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<NodeInner>,
}

#[derive(Debug)]
struct NodeInner {
    name: String,
    index: usize,
    tree: Tree,
    dir: PathBuf,
    pid: Pid,
    cgroups: NodeCgroups,
    executable: PathBuf,
    process: Mutex<Option<NodeProcess>>,
    /// Daemons started in the node, by name: kept so that they are waited for.
    daemons: Mutex<BTreeMap<String, Child>>,
}

#[derive(Debug)]
struct NodeProcess {
    unshare: Child,
    /// Its end is what PID 1 waits for.
    _lifeline: ChildStdin,
}

impl Node {
    /// Starts a node; `dir` is its own empty directory, `index` its number in the testbed.
    pub(crate) fn start(
        settings: &Settings,
        tree: Tree,
        tree_dir: &Path,
        dir: &Path,
        run: &str,
        (name, index): (&str, usize),
        options: &NodeOptions,
    ) -> Result<Node, TestbedError> {
        let hostname = format!("node-{name}");
        let (data, root) = (dir.join("data"), dir.join("root"));
        for path in [dir, &root] {
            fs::create_dir(path).during("create", path)?;
        }
        match &options.storage {
            Storage::Found(found) => fs::rename(found, &data).during("move", found)?,
            Storage::Disk | Storage::Tmpfs(_) => fs::create_dir(&data).during("create", &data)?,
        }
        let cgroups = NodeCgroups::plan(
            &fs::read_to_string("/proc/self/mountinfo").during("read", "/proc/self/mountinfo")?,
            &fs::read_to_string("/proc/self/cgroup").during("read", "/proc/self/cgroup")?,
            &format!("transship-{run}-{name}"),
        );
        // One that is not shown has a cgroup of its own all the same: CRIU mounts the hierarchy for itself, and a restore
        // would make all cgroups of the machine again below the container's.
        let shown = |hierarchy: &&Hierarchy| {
            !options.without_unified_cgroup || hierarchy.v1_options.is_some()
        };
        let shown = cgroups.hierarchies.iter().filter(shown).cloned().collect();
        let ours = BINARIES.map(|binary| settings.binaries_dir.join(binary));
        let files = ours
            .iter()
            .chain(&options.programs)
            .filter_map(|source| {
                let target = Path::new(BIN_DIR).join(source.file_name()?);
                source.is_file().then(|| (source.clone(), target))
            })
            .collect();
        let plan = InitPlan {
            hostname: hostname.clone(),
            tree: tree_dir.to_owned(),
            data,
            tmpfs_size: match &options.storage {
                // No overlay on an overlay: inside of a container the work directory may be one.
                Storage::Disk | Storage::Found(_) if lies_on_overlay(dir)? => {
                    Some(TMPFS_FOR_OVERLAY.to_owned())
                }
                Storage::Disk | Storage::Found(_) => None,
                Storage::Tmpfs(size) => Some(size.clone()),
            },
            root,
            files,
            cgroups: shown,
        };
        let plan_file = write_json(&dir.join("init.json"), &plan)?;
        // Written before the first cgroup exists, for the sweep after a SIGKILL.
        write_json(&dir.join(CGROUPS_FILE), &cgroups)?;
        if let Err(error) = cgroups.create() {
            return cgroups.remove().and(Err(error));
        }

        let mut command = Command::new(&settings.executable);
        command
            .arg(enter::ROLE)
            .args(cgroups.first_procs())
            .arg("--");
        command.args([
            "unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup",
        ]);
        command.args(["--fork", "--kill-child", "--propagation", "private", "--"]);
        command
            .arg(&settings.executable)
            .arg(init::ROLE)
            .arg(&plan_file);
        let log = dir.join("init.log");
        let started = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).during("create", &log)?)
            .spawn();
        let mut unshare = started.map_err(|source| TestbedError::Start {
            line: "unshare (node init)".to_owned(),
            source,
        })?;
        let lifeline = unshare.stdin.take().expect("stdin was asked for as a pipe");
        let stdout = unshare
            .stdout
            .take()
            .expect("stdout was asked for as a pipe");
        let pid = match read_report(stdout, &log) {
            Ok(pid) => pid,
            Err(reason) => {
                drop(lifeline);
                unshare.wait().during("wait for", "unshare")?;
                cgroups.remove()?;
                return Err(TestbedError::NodeStart {
                    node: name.to_owned(),
                    reason,
                });
            }
        };
        let node = Node {
            inner: Arc::new(NodeInner {
                name: name.to_owned(),
                index,
                tree,
                dir: dir.to_owned(),
                pid,
                cgroups,
                executable: settings.executable.clone(),
                process: Mutex::new(Some(NodeProcess {
                    unshare,
                    _lifeline: lifeline,
                })),
                daemons: Mutex::default(),
            }),
        };
        match node
            .inner
            .cgroups
            .delegate()
            .and_then(|()| node.set_up(&hostname))
            .and_then(|()| match options.storage {
                Storage::Found(_) => node.shell(OTHER_BOOT).run(),
                Storage::Disk | Storage::Tmpfs(_) => Ok(()),
            }) {
            Ok(()) => Ok(node),
            Err(error) => node.stop().and(Err(error)),
        }
    }

    /// The machine itself: nothing is made for it, and nothing is taken away in the end.
    pub(crate) fn of_machine(
        settings: &Settings,
        tree: Tree,
        index: usize,
    ) -> Result<Node, TestbedError> {
        if let Some(reason) = crate::Need::Vm.missing(settings) {
            return Err(TestbedError::NodeStart {
                node: "machine".to_owned(),
                reason,
            });
        }
        Ok(Node {
            inner: Arc::new(NodeInner {
                name: "machine".to_owned(),
                index,
                tree,
                dir: PathBuf::from("/"),
                pid: Pid::from_raw(1),
                cgroups: NodeCgroups {
                    hierarchies: Vec::new(),
                },
                executable: settings.executable.clone(),
                process: Mutex::new(None),
                daemons: Mutex::default(),
            }),
        })
    }

    fn set_up(&self, hostname: &str) -> Result<(), TestbedError> {
        self.shell(&format!(
            "ip link set lo up
             echo {hostname} >/etc/hostname
             printf '127.0.0.1 localhost\\n127.0.1.1 {hostname}\\n' >/etc/hosts
             echo 1 >/proc/sys/net/ipv4/ip_forward
             mkdir -p /opt/cni && ln -sfn /usr/lib/cni /opt/cni/bin"
        ))
        .run()
    }

    /// The name given to [`crate::Testbed::node`]; the hostname is `node-<name>`.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Number of the node in its testbed, from 0.
    pub fn index(&self) -> usize {
        self.inner.index
    }

    /// The tree that the node runs on.
    pub fn tree(&self) -> Tree {
        self.inner.tree
    }

    /// PID 1 of the node, as the caller sees it.
    pub fn pid(&self) -> i32 {
        self.inner.pid.as_raw()
    }

    /// A command that runs in the node: all its namespaces, its root, its cgroups.
    ///
    /// The child is `nsenter`, which passes the exit status on; killing the child does not reach
    /// the command.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(&self.inner.executable);
        command.arg(enter::ROLE).args(self.inner.cgroups.procs());
        command.args([
            "--",
            "nsenter",
            "--target",
            &self.pid().to_string(),
            "--all",
            "--",
        ]);
        command.arg(program);
        command
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8");
        command
    }

    /// A shell script that runs in the node and ends at its first failure.
    pub fn shell(&self, script: &str) -> Command {
        let mut command = self.command("sh");
        command.args(["-eu", "-c", script]);
        command
    }

    /// A path of the node as this program can open it, mounts of the node included.
    #[must_use]
    pub fn path_from_outside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid()))
    }

    /// Reads a file of the node.
    ///
    /// # Errors
    /// When there is none that can be read.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>, TestbedError> {
        self.command("cat").args(["--", path]).feed(b"")
    }

    /// Writes a file of the node; makes its directory when it is not there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, path: &str, content: impl AsRef<[u8]>) -> Result<(), TestbedError> {
        let script = "mkdir -p -- \"${0%/*}\"; cat >\"$0\"";
        self.command("sh")
            .args(["-eu", "-c", script, path])
            .feed(content.as_ref())
            .map(drop)
    }

    /// True if one of our binaries is in the node.
    pub fn has_binary(&self, name: &str) -> bool {
        self.command("test")
            .args(["-x", &format!("{BIN_DIR}/{name}")])
            .run()
            .is_ok()
    }

    /// Starts a daemon in the node with its output in `/var/log/<name>.log`.
    ///
    /// # Errors
    /// When the program cannot be started; that it ends later is seen by [`Node::wait_for_daemon`].
    pub fn start_daemon(&self, name: &str, program: &[&str]) -> Result<(), TestbedError> {
        // The PID file holds the daemon's PID inside the node: what the caller sees is nsenter's.
        // The line on stdout says that it is written; after it stdout is the log.
        let script = "echo $$ >\"/run/$0.pid\"; echo up; exec \"$@\" >>\"/var/log/$0.log\" 2>&1";
        let mut child = self
            .command("sh")
            .args(["-eu", "-c", script, name])
            .args(program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| TestbedError::Start {
                line: program.join(" "),
                source,
            })?;
        let mut up = String::new();
        let stdout = child.stdout.take().expect("stdout was asked for as a pipe");
        BufReader::new(stdout)
            .read_line(&mut up)
            .during("read from daemon", name)?;
        if up.is_empty() {
            let status = child.wait().during("wait for", name)?;
            return Err(TestbedError::NodeStart {
                node: self.name().to_owned(),
                reason: format!("daemon {name} ended with {status} before it began"),
            });
        }
        let before = lock(&self.inner.daemons).insert(name.to_owned(), child);
        if let Some(mut before) = before {
            before.wait().during("wait for", name)?;
        }
        Ok(())
    }

    /// Sends a signal ("TERM", "KILL") to a daemon of [`Node::start_daemon`] and waits for its end.
    ///
    /// # Errors
    /// When no such daemon was started, or it has ended before.
    pub fn stop_daemon(&self, name: &str, signal: &str) -> Result<(), TestbedError> {
        let mut child = self.take_daemon(name)?;
        self.shell(&format!("kill -{signal} \"$(cat /run/{name}.pid)\""))
            .run()?;
        Ok(child.wait().during("wait for", name).map(drop)?)
    }

    /// Waits until a program of [`Node::start_daemon`] has ended by itself, with whatever status.
    ///
    /// # Errors
    /// When no such program was started.
    pub fn wait_for_daemon_end(&self, name: &str) -> Result<(), TestbedError> {
        let mut child = self.take_daemon(name)?;
        Ok(child.wait().during("wait for", name).map(drop)?)
    }

    fn take_daemon(&self, name: &str) -> Result<Child, TestbedError> {
        let found = lock(&self.inner.daemons).remove(name);
        found.ok_or_else(|| TestbedError::Missing {
            what: format!("daemon {name} on node {}", self.name()),
            remedy: "start it first".to_owned(),
        })
    }

    /// True if a daemon of that name was started and not stopped.
    pub(crate) fn has_daemon(&self, name: &str) -> bool {
        lock(&self.inner.daemons).contains_key(name)
    }

    /// `Some(status)` if a daemon of [`Node::start_daemon`] has ended by itself.
    pub(crate) fn daemon_end(&self, name: &str) -> Option<std::process::ExitStatus> {
        lock(&self.inner.daemons)
            .get_mut(name)?
            .try_wait()
            .ok()
            .flatten()
    }

    /// Kills everything in the node and removes its cgroups and its directory; idempotent.
    ///
    /// # Errors
    /// When the node cannot be killed, or its cgroups and its directory cannot be removed.
    pub fn stop(&self) -> Result<(), TestbedError> {
        let Some(mut process) = lock(&self.inner.process).take() else {
            return Ok(());
        };
        // PID 1 cannot have been reaped: its parent `unshare` has not been waited for, and waits
        // itself until the kernel has killed the whole PID namespace.
        kill(self.inner.pid, Signal::SIGKILL).during("kill node", self.name())?;
        poll_until("the end of a node", END_DEADLINE, || {
            self.inner.cgroups.thaw();
            match process.unshare.try_wait() {
                Ok(Some(_)) => Ok(()),
                Ok(None) => Err(format!("processes of node {} live", self.name())),
                Err(error) => Err(error.to_string()),
            }
        })?;
        for daemon in std::mem::take(&mut *lock(&self.inner.daemons)).values_mut() {
            daemon.wait().during("wait for", self.name())?;
        }
        self.inner.cgroups.remove()?;
        Ok(fs::remove_dir_all(&self.inner.dir).during("remove", &self.inner.dir)?)
    }

    pub(crate) fn cgroups(&self) -> &NodeCgroups {
        &self.inner.cgroups
    }
}

/// For the kernel to end all processes of a node.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Where our binaries lie in a node.
pub(crate) const BIN_DIR: &str = "/usr/local/bin";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// In a node's directory: which cgroups it has.
pub(crate) const CGROUPS_FILE: &str = "cgroups.json";

/// Size of the tmpfs that stands in for a disk that cannot be used: a limit, not a reservation.
const TMPFS_FOR_OVERLAY: &str = "8g";

fn lies_on_overlay(dir: &Path) -> Result<bool, TestbedError> {
    let kind = nix::sys::statfs::statfs(dir).during("ask for the file system of", dir)?;
    Ok(kind.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<PathBuf, TestbedError> {
    let text = serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .during("write", path)?;
    fs::write(path, text).during("write", path)?;
    Ok(path.to_owned())
}

fn read_report(stdout: impl std::io::Read, log: &Path) -> Result<Pid, String> {
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .map_err(|error| error.to_string())?;
    match serde_json::from_str(&line) {
        Ok(Report::Ready { pid }) => Ok(Pid::from_raw(pid)),
        Ok(Report::Failed(reason)) => Err(reason),
        Err(_) => {
            let said = fs::read_to_string(log).unwrap_or_default();
            Err(format!(
                "its PID 1 said {line:?} ({}); does main() begin with node_role?",
                said.trim()
            ))
        }
    }
}

/// Nodes are torn down after a panic too, whose thread may have held the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
