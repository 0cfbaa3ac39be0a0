//! A testbed: some nodes that know each other, and their common end.
//!
//! ```text
//! <work_dir>/run-<pid>-<n>/         one testbed; flock'd by its process as long as it lives
//!     <node>/init.json cgroups.json init.log
//!     <node>/data/{upper,work}      the root's overlay
//!     <node>/data/containerd        /var/lib/containerd        (or all of data on a tmpfs)
//!     <node>/root                   mount point, in the node's own mount namespace
//! ```
//!
//! A run directory whose lock is free belongs to a process that was killed: the next testbed
//! removes it and its cgroups. Processes, mounts and networks are gone by then (see init.rs).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::fcntl::{Flock, FlockArg};

use crate::cgroups::NodeCgroups;
use crate::interrupt::{self, TearDown};
use crate::node::{CGROUPS_FILE, Node, NodeOptions, lock};
use crate::{Settings, TestbedError, Tree};
use transship_path_error::During as _;

/// Some nodes on the same tree; all of it ends when this is dropped.
#[derive(Debug)]
pub struct Testbed {
    inner: Arc<BedInner>,
}

#[derive(Debug)]
struct BedInner {
    settings: Settings,
    tree: Tree,
    tree_dir: PathBuf,
    name: String,
    dir: PathBuf,
    nodes: Mutex<Vec<Node>>,
    /// Held for the whole of a teardown: who comes second must not end the process before it is done.
    teardown: Mutex<()>,
    links: AtomicUsize,
    _lock: Flock<File>,
}

impl Testbed {
    /// Builds the tree if it is not cached, and an empty testbed on it.
    ///
    /// # Errors
    /// When the tree cannot be built, or the work directory cannot be written.
    pub fn new(tree: Tree, settings: &Settings) -> Result<Testbed, TestbedError> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let tree_dir = tree.ensure(&settings.cache_dir)?;
        fs::create_dir_all(&settings.work_dir).during("create", &settings.work_dir)?;
        // Held until the new directory is locked, so that nobody takes it for a stale one.
        let _all = lock_dir(&settings.work_dir, FlockArg::LockExclusive)?;
        sweep(&settings.work_dir);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("run-{}-{count}", std::process::id());
        let dir = settings.work_dir.join(&name);
        fs::create_dir(&dir).during("create", &dir)?;
        let lock = lock_dir(&dir, FlockArg::LockExclusiveNonblock)?;
        let inner = Arc::new(BedInner {
            settings: settings.clone(),
            tree,
            tree_dir,
            name,
            dir,
            nodes: Mutex::default(),
            teardown: Mutex::default(),
            links: AtomicUsize::new(0),
            _lock: lock,
        });
        interrupt::register(&inner);
        Ok(Testbed { inner })
    }

    /// Starts a node without a containerd; `name` becomes the hostname `node-<name>`.
    ///
    /// # Errors
    /// When the node does not come up; see [`TestbedError::NodeStart`].
    pub fn node(&self, name: &str) -> Result<Node, TestbedError> {
        self.node_with(name, &NodeOptions::default())
    }

    /// Starts a node that differs from the plain one.
    ///
    /// # Errors
    /// When the node does not come up; see [`TestbedError::NodeStart`].
    pub fn node_with(&self, name: &str, options: &NodeOptions) -> Result<Node, TestbedError> {
        let inner = &self.inner;
        let mut nodes = lock(&inner.nodes);
        let node = Node::start(
            &inner.settings,
            inner.tree,
            &inner.tree_dir,
            &inner.dir.join(name),
            &inner.name,
            (name, nodes.len()),
            options,
        )?;
        nodes.push(node.clone());
        Ok(node)
    }

    /// The machine itself as a node, with its systemd and its own root: for the machine of
    /// `make test-vm` alone.
    ///
    /// # Errors
    /// On any other machine.
    pub fn machine(&self) -> Result<Node, TestbedError> {
        let inner = &self.inner;
        let mut nodes = lock(&inner.nodes);
        let node = Node::of_machine(&inner.settings, inner.tree, nodes.len())?;
        nodes.push(node.clone());
        Ok(node)
    }

    /// The nodes started so far.
    pub fn nodes(&self) -> Vec<Node> {
        lock(&self.inner.nodes).clone()
    }

    /// The tree of the nodes.
    pub fn tree(&self) -> Tree {
        self.inner.tree
    }

    /// The built tree itself; do not write to it.
    pub fn tree_dir(&self) -> &Path {
        &self.inner.tree_dir
    }

    /// The paths that the testbed works with.
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    /// A directory of the machine that goes away with the testbed.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Number for the next link between nodes.
    pub(crate) fn next_link(&self) -> usize {
        self.inner.links.fetch_add(1, Ordering::Relaxed)
    }

    /// Ends all nodes and removes what they had; what `Drop` does, with errors.
    ///
    /// # Errors
    /// Names the first thing that could not be removed; the rest is removed all the same.
    pub fn stop(self) -> Result<(), TestbedError> {
        let result = self.inner.tear_down();
        interrupt::stay_if_ending();
        result
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.nodes() {
                eprintln!("{}", node.logs());
            }
        }
        if let Err(error) = self.inner.tear_down() {
            eprintln!("testbed {}: {error}", self.inner.name);
        }
        interrupt::stay_if_ending();
    }
}

impl TearDown for BedInner {
    fn tear_down(&self) -> Result<(), TestbedError> {
        let _alone = lock(&self.teardown);
        let nodes = std::mem::take(&mut *lock(&self.nodes));
        let mut result = Ok(());
        for node in nodes {
            result = result.and(node.stop());
        }
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => result,
            removed => result.and(Ok(removed.during("remove", &self.dir)?)),
        }
    }
}

fn lock_dir(dir: &Path, how: FlockArg) -> Result<Flock<File>, TestbedError> {
    let file = File::open(dir).during("open", dir)?;
    Ok(Flock::lock(file, how)
        .map_err(|(_, errno)| errno)
        .during("lock", dir)?)
}

/// Removes what killed testbeds left; what cannot be removed is told and left for the next time.
fn sweep(work_dir: &Path) {
    let Ok(entries) = fs::read_dir(work_dir) else {
        return;
    };
    for dir in entries.flatten().map(|entry| entry.path()) {
        // A live testbed holds its lock.
        let Ok(_lock) = lock_dir(&dir, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        if let Err(error) = remove_stale(&dir) {
            eprintln!("testbed left over at {}: {error}", dir.display());
        }
    }
}

fn remove_stale(dir: &Path) -> Result<(), TestbedError> {
    for node in fs::read_dir(dir).during("read", dir)?.flatten() {
        let file = node.path().join(CGROUPS_FILE);
        let Ok(text) = fs::read(&file) else { continue };
        let cgroups: NodeCgroups = serde_json::from_slice(&text)
            .map_err(std::io::Error::from)
            .during("parse", &file)?;
        cgroups.remove()?;
    }
    Ok(fs::remove_dir_all(dir).during("remove", dir)?)
}
