//! The daemon killed at any moment: nothing acknowledged is lost, nothing is half there, no directory
//! is left over, no id comes back.

#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_client::services::v1::snapshots::{Info, Kind};
use containerd_client::tonic::Code;
use containerd_client::types::Mount;
use transship_snapshotter::fault::STEPS;

use support::client::Client;
use support::daemon::{Daemon, Site};

/// What a client knows to be true.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    Active {
        parent: String,
    },
    Committed {
        parent: String,
    },
    Removed,
    /// The daemon died before it answered: any of these may be true.
    Either(Box<[Known; 2]>),
}

/// Keys with what is known about them, and all ids ever seen.
#[derive(Debug, Default)]
struct Ledger {
    known: BTreeMap<String, Known>,
    ids: BTreeSet<u64>,
}

impl Ledger {
    /// An id of a new snapshot, which must never have been seen.
    fn note_new_id(&mut self, mounts: &[Mount]) {
        let id = id_of(&upperdir_of(mounts));
        assert!(self.ids.insert(id), "id {id} came back");
    }
}

fn upperdir_of(mounts: &[Mount]) -> PathBuf {
    let upperdir = mounts[0]
        .options
        .iter()
        .find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upperdir.unwrap_or(&mounts[0].source))
}

fn id_of(fs: &Path) -> u64 {
    fs.parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap()
}

/// Starts with the upperdir label on, so that directories can be found.
fn start(site: &Site, flags: &[&str]) -> Daemon {
    let config = site.path().join("config.toml");
    fs::write(&config, "upperdir_label = true\n").unwrap();
    let mut all = vec!["--config", config.to_str().unwrap()];
    all.extend(flags);
    site.start(&all)
}

/// Checks everything that must hold after a restart.
async fn check(site: &Site, client: &Client, ledger: &mut Ledger) {
    client.cleanup().await.unwrap();
    let infos: BTreeMap<String, Info> = client
        .list(&[])
        .await
        .unwrap()
        .into_iter()
        .map(|info| (info.name.clone(), info))
        .collect();
    for (key, known) in &mut ledger.known {
        let found = infos
            .get(key)
            .map_or(Known::Removed, |info| match info.kind() {
                Kind::Committed => Known::Committed {
                    parent: info.parent.clone(),
                },
                _ => Known::Active {
                    parent: info.parent.clone(),
                },
            });
        match &*known {
            Known::Either(possible) => assert!(possible.contains(&found), "{key}: {found:?}"),
            certain => assert_eq!(certain, &found, "{key}"),
        }
        *known = found;
    }
    let mut expected = Vec::new();
    for (key, info) in &infos {
        assert!(ledger.known.contains_key(key), "{key} was never made");
        let fs = Path::new(&info.labels["containerd.io/snapshot/overlay.upperdir"]);
        assert!(fs.is_dir(), "{key} has no directory");
        // Everybody marks what he made, once he knows that it is there.
        if let Ok(mark) = fs::read_to_string(fs.join("mark")) {
            assert!(key.starts_with(&mark), "{key} holds the files of {mark}");
        } else if info.kind() == Kind::Committed {
            panic!("{key} lost its files");
        }
        if info.kind() == Kind::Active {
            assert!(
                fs.parent().unwrap().join("work").is_dir(),
                "{key} has no workdir"
            );
            client.mounts(key).await.unwrap();
        }
        expected.push(id_of(fs).to_string());
    }
    expected.sort_unstable();
    assert_eq!(
        site.directories(),
        expected,
        "directories without a snapshot"
    );
}

async fn check_shared(site: &Site, client: &Client, ledger: &Mutex<Ledger>) {
    let mut taken = std::mem::take(&mut *ledger.lock().unwrap());
    check(site, client, &mut taken).await;
    *ledger.lock().unwrap() = taken;
}

#[test]
fn root_killed_at_every_step() {
    if !support::is_root() {
        return;
    }
    for step in STEPS {
        support::block_on(killed_at(step));
    }
}

async fn killed_at(step: &str) {
    let site = Site::in_memory();
    let mut ledger = Ledger::default();
    let daemon = start(&site, &[]);
    let client = daemon.client().await;
    for key in ["base", "victim"] {
        let mounts = client
            .prepare(&format!("{key}-active"), "", &[])
            .await
            .unwrap();
        ledger.note_new_id(&mounts);
        fs::write(upperdir_of(&mounts).join("mark"), key).unwrap();
        client
            .commit(key, &format!("{key}-active"), &[])
            .await
            .unwrap();
        ledger.known.insert(
            key.to_owned(),
            Known::Committed {
                parent: String::new(),
            },
        );
    }
    let mounts = client.prepare("active", "base", &[]).await.unwrap();
    ledger.note_new_id(&mounts);
    fs::write(upperdir_of(&mounts).join("mark"), "active").unwrap();
    let active = Known::Active {
        parent: "base".to_owned(),
    };
    ledger.known.insert("active".to_owned(), active.clone());
    daemon.stop();

    let daemon = start(&site, &["--kill-at", step]);
    let client = daemon.client().await;
    let either = |a: &Known, b: &Known| Known::Either(Box::new([a.clone(), b.clone()]));
    let outcome = match step.split(':').next().unwrap() {
        "prepare" => {
            ledger
                .known
                .insert("fresh".to_owned(), either(&active, &Known::Removed));
            client.prepare("fresh", "base", &[]).await.map(drop)
        }
        "commit" => {
            let committed = Known::Committed {
                parent: "base".to_owned(),
            };
            ledger
                .known
                .insert("active".to_owned(), either(&active, &Known::Removed));
            ledger.known.insert(
                "active-done".to_owned(),
                either(&committed, &Known::Removed),
            );
            client.commit("active-done", "active", &[]).await
        }
        "remove" => {
            let victim = ledger.known["victim"].clone();
            ledger
                .known
                .insert("victim".to_owned(), either(&victim, &Known::Removed));
            client.remove("victim").await
        }
        "update" => {
            let info = Info {
                name: "base".to_owned(),
                labels: [("l".to_owned(), "v".to_owned())].into(),
                ..Info::default()
            };
            client.update(info, &[]).await.map(drop)
        }
        "cleanup" => client.cleanup().await,
        other => panic!("no call reaches {other}"),
    };
    outcome.expect_err("the daemon died before it answered");
    let status = daemon.wait();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9),
        "{step}"
    );

    let daemon = start(&site, &[]);
    let client = daemon.client().await;
    check(&site, &client, &mut ledger).await;
    if step.starts_with("commit") {
        let one = (&ledger.known["active"], &ledger.known["active-done"]);
        assert!(
            (one.0 == &Known::Removed) != (one.1 == &Known::Removed),
            "{step}: {one:?}"
        );
    }
    // Whatever was half done can be done again.
    for key in ["again", "fresh"] {
        match client.prepare(key, "base", &[]).await {
            Ok(mounts) => ledger.note_new_id(&mounts),
            Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{step}: {status:?}"),
        }
        ledger.known.insert(key.to_owned(), active.clone());
    }
    check(&site, &client, &mut ledger).await;
}

/// Kills of [`root_killed_under_load`], and how many hit the same root before it is too full to be
/// checked quickly.
const KILLS: u64 = 300;
const KILLS_PER_ROOT: u64 = 25;
const CLIENTS: usize = 6;

#[test]
fn root_killed_under_load() {
    if !support::is_root() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut site = Site::in_memory();
        let mut ledger = Arc::new(Mutex::new(Ledger::default()));
        for kill in 0..KILLS {
            if kill % KILLS_PER_ROOT == 0 {
                site = Site::in_memory();
                ledger = Arc::default();
            }
            let daemon = start(&site, &[]);
            let client = daemon.client().await;
            check_shared(&site, &client, &ledger).await;
            let clients: Vec<_> = (0..CLIENTS)
                .map(|n| {
                    let (client, ledger) = (client.clone(), Arc::clone(&ledger));
                    tokio::spawn(work_until_killed(client, ledger, format!("{kill}-{n}")))
                })
                .collect();
            // Any moment will do; this spreads them over the first calls and the busy time.
            tokio::time::sleep(Duration::from_micros(kill * 7919 % 60_000)).await;
            daemon.kill();
            for client in clients {
                client.await.unwrap();
            }
            if kill % KILLS_PER_ROOT == KILLS_PER_ROOT - 1 {
                let daemon = start(&site, &[]);
                check_shared(&site, &daemon.client().await, &ledger).await;
            }
        }
    });
}

/// Makes, commits and removes snapshots until a call fails, and keeps the ledger.
async fn work_until_killed(client: Client, ledger: Arc<Mutex<Ledger>>, name: String) {
    let known = |key: &str, known: Known| {
        ledger.lock().unwrap().known.insert(key.to_owned(), known);
    };
    let mut parent = String::new();
    for n in 0.. {
        let (key, layer) = (format!("{name}-{n}"), format!("{name}-{n}-done"));
        let active = Known::Active {
            parent: parent.clone(),
        };
        let committed = Known::Committed {
            parent: parent.clone(),
        };
        let either = |a: &Known| Known::Either(Box::new([a.clone(), Known::Removed]));

        known(&key, either(&active));
        let Ok(mounts) = client.prepare(&key, &parent, &[]).await else {
            return;
        };
        ledger.lock().unwrap().note_new_id(&mounts);
        known(&key, active.clone());
        fs::write(upperdir_of(&mounts).join("mark"), &key).unwrap();

        known(&key, either(&active));
        known(&layer, either(&committed));
        if client.commit(&layer, &key, &[]).await.is_err() {
            return;
        }
        known(&key, Known::Removed);
        known(&layer, committed.clone());
        // Every third layer goes again; the others grow a chain.
        if n % 3 == 2 {
            known(&layer, either(&committed));
            if client.remove(&layer).await.is_err() {
                return;
            }
            known(&layer, Known::Removed);
        } else if n % 12 == 0 {
            parent = String::new();
        } else {
            parent = layer;
        }
    }
}

#[test]
fn root_a_lost_connection_is_unavailable_to_the_client() {
    if !support::is_root() {
        return;
    }
    support::block_on(async {
        let site = Site::in_memory();
        let daemon = start(&site, &[]);
        let client = daemon.client().await;
        client.prepare("a", "", &[]).await.unwrap();
        daemon.kill();
        let status = client.stat("a").await.expect_err("nobody is there");
        assert!(
            matches!(status.code(), Code::Unavailable | Code::Unknown),
            "{status:?}"
        );
        // A stale socket is there; the next daemon replaces it and the same client goes on.
        let _daemon = start(&site, &[]);
        client.stat("a").await.unwrap();
    });
}
