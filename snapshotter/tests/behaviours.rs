//! What containerd expects of every snapshotter: its conformance list (core/snapshots/testsuite of
//! 2.1.9, 21 behaviours), each as a test over the real socket with real mounts.
//!
//! With SNAPSHOTS_SOCKET (and SNAPSHOTS_NAME) the same tests run against another server, such as
//! containerd's own overlayfs: `SNAPSHOTS_SOCKET=/run/containerd/containerd.sock
//! SNAPSHOTS_NAME=overlayfs`. It must share the mount namespace and be otherwise idle.

#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::snapshots::{Info, Kind};
use containerd_client::tonic::Code;
use containerd_client::types::Mount;

use support::client::Client;
use support::daemon::{Daemon, Site};
use support::mounted::{Mounted, enter_private_mounts};

/// The snapshotter under test. Keys get a prefix, so that tests can share a foreign server.
struct Bench {
    client: Client,
    prefix: String,
    own: Option<(Daemon, Site)>,
}

impl Bench {
    async fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}-{number}-", std::process::id());
        if let Some(socket) = std::env::var_os("SNAPSHOTS_SOCKET") {
            let name = std::env::var("SNAPSHOTS_NAME").unwrap_or("overlayfs".to_owned());
            let client = Client::connect(Path::new(&socket), &name).await.unwrap();
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

    fn key(&self, key: &str) -> String {
        if key.is_empty() {
            String::new()
        } else {
            format!("{}{key}", self.prefix)
        }
    }

    async fn prepare(&self, key: &str, parent: &str) -> Mounted {
        Mounted::new(&self.prepare_mounts(key, parent).await)
    }

    async fn prepare_mounts(&self, key: &str, parent: &str) -> Vec<Mount> {
        let (key, parent) = (self.key(key), self.key(parent));
        self.client.prepare(&key, &parent, LABELS).await.unwrap()
    }

    async fn view(&self, key: &str, parent: &str) -> Mounted {
        let (key, parent) = (self.key(key), self.key(parent));
        Mounted::new(&self.client.view(&key, &parent, LABELS).await.unwrap())
    }

    async fn commit(&self, name: &str, key: &str) {
        self.client
            .commit(&self.key(name), &self.key(key), LABELS)
            .await
            .unwrap();
    }

    async fn remove(&self, key: &str) {
        self.client.remove(&self.key(key)).await.unwrap();
    }

    async fn stat(&self, key: &str) -> Info {
        self.client.stat(&self.key(key)).await.unwrap()
    }

    /// A committed layer on `parent` in which `change` has been made.
    async fn layer(&self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("{name}-active");
        {
            let mounted = self.prepare(&key, parent).await;
            change(mounted.path());
        }
        self.commit(name, &key).await;
    }

    /// What a view of `parent` shows.
    async fn content(&self, parent: &str) -> BTreeMap<PathBuf, String> {
        let key = format!("{parent}-content");
        let shown = read_tree(self.view(&key, parent).await.path());
        self.remove(&key).await;
        shown
    }
}

/// Keeps containerd's garbage collector away when the server is containerd.
const LABELS: &[(&str, &str)] = &[("containerd.io/gc.root", "test")];

/// Paths below `dir` with what is there: mode, owner, and content.
fn read_tree(dir: &Path) -> BTreeMap<PathBuf, String> {
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

fn write(dir: &Path, name: &str, content: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn names(tree: &BTreeMap<PathBuf, String>) -> Vec<&str> {
    tree.keys().map(|path| path.to_str().unwrap()).collect()
}

/// Runs one behaviour on a thread with a mount namespace of its own.
fn behaviour(test: impl AsyncFnOnce(Bench)) {
    if support::is_root() {
        enter_private_mounts();
        support::block_on(async { test(Bench::new().await).await });
    }
}

macro_rules! refused {
    ($call:expr, $code:ident) => {{
        let status = $call.await.expect_err(stringify!($call));
        assert_eq!(status.code(), Code::$code, "{status:?}");
        status
    }};
}

#[test]
fn root_basic_life_of_a_layer() {
    behaviour(async |bench| {
        let first = bench.prepare("first", "").await;
        write(first.path(), "foo", "foo\n");
        write(first.path(), "a/b/c/file", "deep\n");
        drop(first);
        bench.commit("base", "first").await;
        let committed = bench.stat("base").await;
        assert_eq!(
            (committed.kind(), committed.parent.as_str()),
            (Kind::Committed, "")
        );
        refused!(bench.client.stat(&bench.key("first")), NotFound);

        let second = bench.prepare("second", "base").await;
        assert_eq!(fs::read_to_string(second.join("foo")).unwrap(), "foo\n");
        write(second.path(), "bar", "bar\n");
        fs::remove_dir_all(second.join("a/b")).unwrap();
        drop(second);
        let active = bench.stat("second").await;
        assert_eq!(
            (active.kind(), active.parent),
            (Kind::Active, bench.key("base"))
        );
        bench.commit("top", "second").await;
        assert_eq!(names(&bench.content("top").await), ["a", "bar", "foo"]);
        assert_eq!(
            names(&bench.content("base").await),
            ["a", "a/b", "a/b/c", "a/b/c/file", "foo"]
        );

        let used = bench.client.usage(&bench.key("top")).await.unwrap();
        assert!(used.inodes >= 3 && used.size > 0, "{used:?}");
        bench.remove("top").await;
        refused!(bench.client.stat(&bench.key("top")), NotFound);
        bench.remove("base").await;
    });
}

#[test]
fn root_stat_of_an_active_snapshot() {
    behaviour(async |bench| {
        let before = now();
        bench.prepare_mounts("active", "").await;
        let info = bench.stat("active").await;
        assert_eq!(info.name, bench.key("active"));
        assert_eq!((info.kind(), info.parent.as_str()), (Kind::Active, ""));
        assert_eq!(info.created_at, info.updated_at);
        let created = nanoseconds(info.created_at);
        assert!((before..=now()).contains(&created), "{created}");
    });
}

#[test]
fn root_stat_of_a_committed_snapshot() {
    behaviour(async |bench| {
        bench
            .layer("base", "", |dir| write(dir, "foo", "foo"))
            .await;
        bench.prepare_mounts("active", "base").await;
        let before = now();
        bench
            .client
            .commit(&bench.key("top"), &bench.key("active"), LABELS)
            .await
            .unwrap();
        let info = bench.stat("top").await;
        assert_eq!(
            (info.kind(), info.parent.as_str()),
            (Kind::Committed, &*bench.key("base"))
        );
        assert_eq!(info.created_at, info.updated_at);
        assert!(
            nanoseconds(info.created_at) >= before,
            "commit sets a new time"
        );
        assert_eq!(
            info.labels.get("containerd.io/gc.root").map(String::as_str),
            Some("test")
        );
    });
}

#[test]
fn root_chain_of_parents() {
    behaviour(async |bench| {
        bench.layer("one", "", |dir| write(dir, "1", "")).await;
        bench.layer("two", "one", |dir| write(dir, "2", "")).await;
        bench.prepare_mounts("three", "two").await;
        let mut chain = vec![bench.key("three")];
        while let Some(key) = chain.last().filter(|key| !key.is_empty()) {
            let parent = bench.client.stat(key).await.unwrap().parent;
            chain.push(parent);
        }
        assert_eq!(
            chain,
            [
                bench.key("three"),
                bench.key("two"),
                bench.key("one"),
                String::new()
            ]
        );
    });
}

#[test]
fn root_what_prepare_and_view_refuse() {
    behaviour(async |bench| {
        let client = &bench.client;
        let key = |key: &str| bench.key(key);
        bench.layer("base", "", |dir| write(dir, "foo", "")).await;
        bench.prepare_mounts("active", "base").await;
        bench.view("view", "base").await;
        refused!(client.prepare(&key("x"), &key("missing"), LABELS), NotFound);
        refused!(client.view(&key("x"), &key("missing"), LABELS), NotFound);
        refused!(
            client.prepare(&key("x"), &key("active"), LABELS),
            InvalidArgument
        );
        refused!(
            client.view(&key("x"), &key("active"), LABELS),
            InvalidArgument
        );
        refused!(
            client.prepare(&key("x"), &key("view"), LABELS),
            InvalidArgument
        );
        refused!(
            client.prepare(&key("active"), &key("base"), LABELS),
            AlreadyExists
        );
        refused!(
            client.view(&key("active"), &key("base"), LABELS),
            AlreadyExists
        );
        refused!(client.prepare(&key("base"), "", LABELS), AlreadyExists);
        refused!(client.commit(&key("x"), &key("missing"), LABELS), NotFound);
        refused!(
            client.commit(&key("x"), &key("view"), LABELS),
            FailedPrecondition
        );
        refused!(
            client.commit(&key("x"), &key("base"), LABELS),
            FailedPrecondition
        );
        refused!(
            client.commit(&key("base"), &key("active"), LABELS),
            AlreadyExists
        );
        refused!(client.mounts(&key("missing")), NotFound);
        refused!(client.mounts(&key("base")), FailedPrecondition);
        refused!(client.usage(&key("missing")), NotFound);
        refused!(client.stat(&key("missing")), NotFound);
        refused!(client.remove(&key("missing")), NotFound);
        refused!(
            client.update(
                Info {
                    name: key("missing"),
                    ..Info::default()
                },
                &[]
            ),
            NotFound
        );
        // Nothing of it left a trace.
        refused!(client.stat(&key("x")), NotFound);
        assert_eq!(bench.stat("active").await.kind(), Kind::Active);
    });
}

#[test]
fn root_update_of_labels() {
    behaviour(async |bench| {
        bench.layer("base", "", |dir| write(dir, "foo", "")).await;
        let info = bench.stat("base").await;
        let with = |labels: &[(&str, &str)]| Info {
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..info.clone()
        };
        let root = ("containerd.io/gc.root", "test");
        let update = async |sent: Info, fields: &[&str]| -> BTreeSet<(String, String)> {
            let answered = bench.client.update(sent, fields).await.unwrap();
            let stored = bench.stat("base").await;
            assert_eq!(answered, stored);
            assert_eq!(stored.created_at, info.created_at);
            assert!(nanoseconds(stored.updated_at) > nanoseconds(stored.created_at));
            stored
                .labels
                .into_iter()
                .filter(|(key, _)| *key != root.0)
                .collect()
        };
        let set = |labels: &[(&str, &str)]| -> BTreeSet<(String, String)> {
            labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let (l1, l2) = (
            ("containerd.io/snapshot/l1", "v1"),
            ("containerd.io/snapshot/l2", "v2"),
        );
        // No mask: all labels are replaced.
        assert_eq!(update(with(&[root, l1]), &[]).await, set(&[l1]));
        // One label; others that are sent along do not count.
        let path = "labels.containerd.io/snapshot/l2";
        assert_eq!(
            update(with(&[l2, ("x", "y")]), &[path]).await,
            set(&[l1, l2])
        );
        // A label that is named and not sent goes.
        assert_eq!(
            update(with(&[]), &["labels.containerd.io/snapshot/l1"]).await,
            set(&[l2])
        );
        // All labels by name; an empty value is no label.
        let empty = ("containerd.io/snapshot/l3", "");
        assert_eq!(
            update(with(&[root, l1, empty]), &["labels"]).await,
            set(&[l1])
        );
        for field in ["name", "parent", "kind", "created_at"] {
            refused!(bench.client.update(with(&[l2]), &[field]), InvalidArgument);
        }
        refused!(
            bench.client.update(with(&[l2]), &["labels", "parent"]),
            InvalidArgument
        );
        assert_eq!(
            bench
                .stat("base")
                .await
                .labels
                .get(l1.0)
                .map(String::as_str),
            Some("v1")
        );
    });
}

#[test]
fn root_remove_goes_from_the_top() {
    behaviour(async |bench| {
        bench.layer("base", "", |dir| write(dir, "foo", "")).await;
        bench
            .layer("middle", "base", |dir| write(dir, "bar", ""))
            .await;
        bench.view("view", "middle").await;
        bench.prepare_mounts("active", "middle").await;
        for key in ["view", "active"] {
            let status = refused!(
                bench.client.remove(&bench.key("middle")),
                FailedPrecondition
            );
            assert!(status.message().contains("remove"), "{status:?}");
            bench.remove(key).await;
        }
        refused!(bench.client.remove(&bench.key("base")), FailedPrecondition);
        bench.remove("middle").await;
        bench.remove("base").await;
        // The keys are free again.
        bench.layer("base", "", |dir| write(dir, "other", "")).await;
        assert_eq!(names(&bench.content("base").await), ["other"]);
        if bench.own.is_some() {
            // Proxied only to snapshotters; containerd's own service has no Cleanup.
            bench.client.cleanup().await.unwrap();
            assert_eq!(names(&bench.content("base").await), ["other"]);
        }
    });
}

#[test]
fn root_walk_with_filters() {
    behaviour(async |bench| {
        bench.layer("base", "", |dir| write(dir, "foo", "")).await;
        bench
            .layer("top", "base", |dir| write(dir, "bar", ""))
            .await;
        bench.prepare_mounts("active", "top").await;
        bench.view("view", "top").await;
        let labels = [LABELS[0], ("containerd.io/snapshot/color", "green")];
        bench
            .client
            .prepare(&bench.key("green"), "", &labels)
            .await
            .unwrap();
        let base = bench.key("base");
        let mine = format!("name~=\"^{}\"", bench.prefix);
        let cases: &[(Vec<String>, &[&str])] = &[
            (
                vec![mine.clone()],
                &["active", "base", "green", "top", "view"],
            ),
            (vec![format!("{mine},kind==active")], &["active", "green"]),
            (
                vec![format!("{mine},kind!=committed")],
                &["active", "green", "view"],
            ),
            (vec![format!("{mine},parent=={base}")], &["top"]),
            (
                vec![format!("{mine},parent==\"\",kind==committed")],
                &["base"],
            ),
            (
                vec![format!("name=={base}"), format!("{mine},kind==view")],
                &["base", "view"],
            ),
            (
                vec![format!(
                    "{mine},labels.\"containerd.io/snapshot/color\"==green"
                )],
                &["green"],
            ),
            (
                vec![format!("{mine},labels.\"containerd.io/snapshot/color\"")],
                &["green"],
            ),
            (vec![format!("{mine},labels.nothing")], &[]),
        ];
        for (filters, expected) in cases {
            let filters: Vec<_> = filters.iter().map(String::as_str).collect();
            let infos = bench.client.list(&filters).await.unwrap();
            let found: BTreeSet<_> = infos
                .iter()
                .map(|info| info.name.strip_prefix(&bench.prefix).unwrap())
                .collect();
            assert_eq!(found, expected.iter().copied().collect(), "{filters:?}");
            for info in &infos {
                assert_eq!(*info, bench.client.stat(&info.name).await.unwrap());
            }
        }
        let status = bench
            .client
            .list(&["kind=active"])
            .await
            .expect_err("no such operator");
        // containerd's service forgets the code of this one error.
        let code = if bench.own.is_some() {
            Code::InvalidArgument
        } else {
            Code::Unknown
        };
        assert_eq!(status.code(), code, "{status:?}");
    });
}

#[test]
fn root_files_change_from_layer_to_layer() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "foo", "first");
                write(dir, "bar", "first");
            })
            .await;
        bench
            .layer("two", "one", |dir| write(dir, "foo", "second"))
            .await;
        bench
            .layer("three", "two", |dir| {
                write(dir, "bar", "third");
                write(dir, "new/file", "third");
            })
            .await;
        let shown = bench.content("three").await;
        assert!(shown[Path::new("foo")].ends_with(" second"), "{shown:?}");
        assert!(shown[Path::new("bar")].ends_with(" third"), "{shown:?}");
        assert!(bench.content("one").await[Path::new("foo")].ends_with(" first"));
    });
}

#[test]
fn root_a_directory_of_a_lower_layer_is_removed_and_made_again() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "dir/old", "");
                write(dir, "dir/sub/old", "");
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                fs::remove_dir_all(dir.join("dir")).unwrap();
            })
            .await;
        bench
            .layer("three", "two", |dir| write(dir, "dir/new", ""))
            .await;
        assert_eq!(names(&bench.content("two").await), [] as [&str; 0]);
        assert_eq!(names(&bench.content("three").await), ["dir", "dir/new"]);
        assert_eq!(
            names(&bench.content("one").await),
            ["dir", "dir/old", "dir/sub", "dir/sub/old"]
        );
    });
}

#[test]
fn root_ownership_survives_layers() {
    behaviour(async |bench| {
        let chown = |path: PathBuf, id| std::os::unix::fs::chown(path, Some(id), Some(id)).unwrap();
        bench
            .layer("one", "", |dir| {
                write(dir, "dir/file", "");
                write(dir, "other", "");
                chown(dir.join("dir"), 1);
                chown(dir.join("dir/file"), 1);
                chown(dir.to_path_buf(), 7);
            })
            .await;
        bench
            .layer("two", "one", |dir| chown(dir.join("dir/file"), 2))
            .await;
        let shown = bench.content("two").await;
        assert!(shown[Path::new("dir")].contains(" 1:1 "), "{shown:?}");
        assert!(shown[Path::new("dir/file")].contains(" 2:2 "), "{shown:?}");
        assert!(shown[Path::new("other")].contains(" 0:0 "), "{shown:?}");
        // The top directory of a new snapshot belongs to whom its parent's belongs.
        let mounted = bench.prepare("three", "two").await;
        let top = fs::metadata(mounted.path()).unwrap();
        assert_eq!((top.uid(), top.gid()), (7, 7));
    });
}

#[test]
fn root_modes_survive_commit() {
    behaviour(async |bench| {
        let chmod = |path: PathBuf, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        bench
            .layer("one", "", |dir| {
                for (name, mode) in [
                    ("d1", 0o700),
                    ("d2", 0o1777),
                    ("d3", 0o2755),
                    ("d3/sub", 0o711),
                ] {
                    fs::create_dir(dir.join(name)).unwrap();
                    chmod(dir.join(name), mode);
                }
            })
            .await;
        bench
            .layer("two", "one", |dir| chmod(dir.join("d1"), 0o755))
            .await;
        let shown = bench.content("two").await;
        let modes: Vec<_> = shown
            .values()
            .map(|what| what.split(' ').next().unwrap())
            .collect();
        assert_eq!(modes, ["40755", "41777", "42755", "40711"]);
        assert!(bench.content("one").await[Path::new("d1")].starts_with("40700"));
    });
}

#[test]
fn root_a_layer_in_the_middle_cannot_go() {
    behaviour(async |bench| {
        bench.layer("base", "", |dir| write(dir, "base", "")).await;
        bench
            .layer("middle", "base", |dir| write(dir, "middle", ""))
            .await;
        bench
            .layer("top", "middle", |dir| write(dir, "top", ""))
            .await;
        refused!(
            bench.client.remove(&bench.key("middle")),
            FailedPrecondition
        );
        refused!(bench.client.remove(&bench.key("base")), FailedPrecondition);
        assert_eq!(
            names(&bench.content("top").await),
            ["base", "middle", "top"]
        );
        for key in ["top", "middle", "base"] {
            bench.remove(key).await;
        }
    });
}

#[test]
fn root_deleted_files_stay_deleted_above() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "kept", "");
                write(dir, "deleted", "");
                write(dir, "dir/deleted", "");
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                fs::remove_file(dir.join("deleted")).unwrap();
                fs::remove_file(dir.join("dir/deleted")).unwrap();
            })
            .await;
        bench
            .layer("three", "two", |dir| write(dir, "added", ""))
            .await;
        assert_eq!(
            names(&bench.content("three").await),
            ["added", "dir", "kept"]
        );
    });
}

#[test]
fn root_a_file_of_a_lower_layer_moves() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "dir/file", "content");
                fs::set_permissions(dir.join("dir/file"), fs::Permissions::from_mode(0o4711))
                    .unwrap();
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                fs::rename(dir.join("dir/file"), dir.join("moved")).unwrap();
            })
            .await;
        let shown = bench.content("two").await;
        assert_eq!(names(&shown), ["dir", "moved"]);
        assert_eq!(shown[Path::new("moved")], "104711 0:0 content");
    });
}

#[test]
fn root_a_view_cannot_be_written() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| write(dir, "foo", "content"))
            .await;
        bench.layer("two", "one", |dir| write(dir, "bar", "")).await;
        for (key, parent) in [("nothing", ""), ("bind", "one"), ("overlay", "two")] {
            let view = bench.view(key, parent).await;
            let error = fs::write(view.join("foo"), "changed").unwrap_err();
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ReadOnlyFilesystem,
                "{key}"
            );
            assert_eq!(bench.stat(key).await.kind(), Kind::View);
        }
        refused!(
            bench
                .client
                .commit(&bench.key("x"), &bench.key("overlay"), LABELS),
            FailedPrecondition
        );
        assert!(bench.content("one").await[Path::new("foo")].ends_with(" content"));
    });
}

#[test]
fn root_stat_works_during_a_walk() {
    behaviour(async |bench| {
        bench.layer("base", "", |dir| write(dir, "foo", "")).await;
        // More than fit into what the server and the transport read ahead.
        for n in 0..1500 {
            bench
                .client
                .prepare(&bench.key(&format!("p{n}")), "", LABELS)
                .await
                .unwrap();
        }
        let base = bench.key("base");
        let filter = format!("name~=\"^{}p\"", bench.prefix);
        let mut seen = 0;
        bench
            .client
            .for_each_message(&[&filter], async |infos| {
                seen += infos.len();
                assert_eq!(bench.client.stat(&base).await.unwrap().name, base);
                assert!(bench.client.stat(&infos[0].name).await.is_ok());
                let key = bench.key(&format!("made-after-{seen}"));
                bench.client.prepare(&key, &base, LABELS).await.unwrap();
            })
            .await
            .unwrap();
        assert_eq!(seen, 1500);
    });
}

#[test]
fn root_clients_come_and_go() {
    behaviour(async |bench| {
        bench.prepare_mounts("active", "").await;
        // A proxy plugin's Close only ends the connection; twice is as good as once.
        let other = bench.client.clone();
        drop(other.clone());
        drop(other);
        assert_eq!(bench.stat("active").await.kind(), Kind::Active);
    });
}

#[test]
fn root_the_top_directory_has_mode_0755() {
    behaviour(async |bench| {
        let mode = |mounted: &Mounted| fs::metadata(mounted.path()).unwrap().mode() & 0o7777;
        assert_eq!(mode(&bench.prepare("one", "").await), 0o755);
        bench.commit("base", "one").await;
        assert_eq!(mode(&bench.prepare("two", "base").await), 0o755);
        assert_eq!(mode(&bench.view("view", "base").await), 0o755);
        bench.commit("top", "two").await;
        assert_eq!(mode(&bench.view("views", "top").await), 0o755);
        assert_eq!(mode(&bench.view("empty", "").await), 0o755);
    });
}

#[test]
fn root_renames_within_a_layer() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "file", "one");
                std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                // A directory of this layer; one of a lower layer cannot be renamed without redirect_dir.
                write(dir, "made/here", "two");
                fs::rename(dir.join("made"), dir.join("named")).unwrap();
                fs::rename(dir.join("file"), dir.join("file2")).unwrap();
                fs::rename(dir.join("link"), dir.join("link2")).unwrap();
                write(dir, "file", "again");
            })
            .await;
        let shown = bench.content("two").await;
        assert_eq!(
            names(&shown),
            ["file", "file2", "link2", "named", "named/here"]
        );
        assert!(shown[Path::new("file")].ends_with(" again"));
        assert!(shown[Path::new("file2")].ends_with(" one"));
    });
}

#[test]
fn root_128_layers_mount() {
    behaviour(async |bench| {
        let mut parent = String::new();
        for n in 1..=128 {
            let name = format!("layer{n}");
            bench
                .layer(&name, &parent, |dir| {
                    write(dir, &format!("file{n}"), "");
                    write(dir, "last", &n.to_string());
                })
                .await;
            parent = name;
        }
        let shown = bench.content("layer128").await;
        assert_eq!(shown.len(), 129);
        assert!(shown[Path::new("last")].ends_with(" 128"));
    });
}

fn now() -> i128 {
    i128::try_from(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos(),
    )
    .unwrap()
}

fn nanoseconds(time: Option<prost_types::Timestamp>) -> i128 {
    let time = time.expect("every snapshot has its times");
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
}
