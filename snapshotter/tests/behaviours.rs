//! What containerd expects of every snapshotter: its conformance list (core/snapshots/testsuite of
//! 2.1.9, 21 behaviours), each as a test over the real socket with real mounts.
//!
//! With SNAPSHOTS_SOCKET (and SNAPSHOTS_NAME) the same tests run against another server, such as
//! containerd's own overlayfs: `SNAPSHOTS_SOCKET=/run/containerd/containerd.sock
//! SNAPSHOTS_NAME=overlayfs`. It must share the mount namespace and be otherwise idle.

#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "behaviours/bench.rs"]
mod bench;
#[path = "behaviours/files.rs"]
mod files;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::snapshots::{Info, Kind};
use containerd_client::tonic::Code;

use bench::{LABELS, behaviour, names, refused, write};

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
            assert!(status.source.to_string().contains("remove"), "{status:?}");
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
        let mut pages = bench.client.list_pages(&[&filter]).await.unwrap();
        while let Some(infos) = pages.next().await.unwrap() {
            seen += infos.len();
            assert_eq!(bench.client.stat(&base).await.unwrap().name, base);
            assert!(bench.client.stat(&infos[0].name).await.is_ok());
            let key = bench.key(&format!("made-after-{seen}"));
            bench.client.prepare(&key, &base, LABELS).await.unwrap();
        }
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
