//! The snapshotter under test, and what its snapshots show.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use containerd_client::services::v1::snapshots::Info;
use containerd_client::types::Mount;

use crate::support;
use crate::support::client::{self, Client};
use crate::support::daemon::{Daemon, Site};
use crate::support::mounted::{Mounted, enter_private_mounts};

/// The snapshotter under test. Keys get a prefix, so that tests can share a foreign server.
pub(crate) struct Bench {
    pub(crate) client: Client,
    pub(crate) prefix: String,
    pub(crate) own: Option<(Daemon, Site)>,
}

impl Bench {
    pub(crate) async fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}-{number}-", std::process::id());
        if let Some(socket) = std::env::var_os("SNAPSHOTS_SOCKET") {
            let name = std::env::var("SNAPSHOTS_NAME").unwrap_or("overlayfs".to_owned());
            let client = client::connect(Path::new(&socket), &name).await.unwrap();
            return Self {
                client,
                prefix,
                own: None,
            };
        }
        let site = Site::new();
        let daemon = site.start(&[]);
        Self {
            client: daemon.client().await,
            prefix,
            own: Some((daemon, site)),
        }
    }

    pub(crate) fn key(&self, key: &str) -> String {
        if key.is_empty() {
            String::new()
        } else {
            format!("{}{key}", self.prefix)
        }
    }

    pub(crate) async fn prepare(&self, key: &str, parent: &str) -> Mounted {
        Mounted::new(&self.prepare_mounts(key, parent).await)
    }

    pub(crate) async fn prepare_mounts(&self, key: &str, parent: &str) -> Vec<Mount> {
        let (key, parent) = (self.key(key), self.key(parent));
        self.client.prepare(&key, &parent, LABELS).await.unwrap()
    }

    pub(crate) async fn view(&self, key: &str, parent: &str) -> Mounted {
        let (key, parent) = (self.key(key), self.key(parent));
        Mounted::new(&self.client.view(&key, &parent, LABELS).await.unwrap())
    }

    pub(crate) async fn commit(&self, name: &str, key: &str) {
        self.client
            .commit(&self.key(name), &self.key(key), LABELS)
            .await
            .unwrap();
    }

    pub(crate) async fn remove(&self, key: &str) {
        self.client.remove(&self.key(key)).await.unwrap();
    }

    pub(crate) async fn stat(&self, key: &str) -> Info {
        self.client.stat(&self.key(key)).await.unwrap()
    }

    /// A committed layer on `parent` in which `change` has been made.
    pub(crate) async fn layer(&self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("{name}-active");
        {
            let mounted = self.prepare(&key, parent).await;
            change(mounted.path());
        }
        self.commit(name, &key).await;
    }

    /// What a view of `parent` shows.
    pub(crate) async fn content(&self, parent: &str) -> BTreeMap<PathBuf, String> {
        let key = format!("{parent}-content");
        let shown = read_tree(self.view(&key, parent).await.path());
        self.remove(&key).await;
        shown
    }
}

/// Keeps containerd's garbage collector away when the server is containerd.
pub(crate) const LABELS: &[(&str, &str)] = &[("containerd.io/gc.root", "test")];

/// Paths below `dir` with what is there: mode, owner, and content.
pub(crate) fn read_tree(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut tree = BTreeMap::new();
    for entry in walkdir::WalkDir::new(dir).min_depth(1) {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        let content = if metadata.is_file() {
            fs::read_to_string(entry.path()).unwrap()
        } else if metadata.is_symlink() {
            fs::read_link(entry.path()).unwrap().display().to_string()
        } else {
            String::new()
        };
        tree.insert(
            entry.path().strip_prefix(dir).unwrap().to_path_buf(),
            format!(
                "{:o} {}:{} {content}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid()
            ),
        );
    }
    tree
}

pub(crate) fn write(dir: &Path, name: &str, content: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

pub(crate) fn names(tree: &BTreeMap<PathBuf, String>) -> Vec<&str> {
    tree.keys().map(|path| path.to_str().unwrap()).collect()
}

/// Runs one behaviour on a thread with a mount namespace of its own.
pub(crate) fn behaviour(test: impl AsyncFnOnce(Bench)) {
    if support::is_root() {
        enter_private_mounts();
        support::block_on(async { test(Bench::new().await).await });
    }
}

macro_rules! refused {
    ($call:expr, $code:ident) => {{
        let status = $call.await.expect_err(stringify!($call));
        assert_eq!(
            status.code(),
            containerd_client::tonic::Code::$code,
            "{status:?}"
        );
        status
    }};
}

pub(crate) use refused;
