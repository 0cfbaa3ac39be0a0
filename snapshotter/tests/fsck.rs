//! Checking and mending of a root whose daemon is stopped, and metadata of earlier releases.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs;

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::tonic::Code;

use support::daemon::{Site, refusal, run};
use support::mounted::{Mounted, as_root, make_layer};

/// A site with a few snapshots of every kind, the daemon stopped.
async fn filled_site() -> Site {
    let site = Site::new();
    let daemon = site.start(&[]);
    let client = daemon.client().await;
    make_layer(&client, "base", "").await;
    make_layer(&client, "top", "base").await;
    client.prepare("active", "top", &[]).await.unwrap();
    client.view("view", "base", &[]).await.unwrap();
    client.prepare("gone", "top", &[]).await.unwrap();
    client.remove("gone").await.unwrap();
    client.cleanup().await.unwrap();
    assert!(daemon.stop().success());
    site
}

/// Checks that the site of [`filled_site`] is whole.
async fn check_filled_site(site: &Site) {
    assert_eq!(
        run(site, &["fsck"]).status.code(),
        Some(0),
        "fsck finds nothing more"
    );
    let daemon = site.start(&[]);
    let client = daemon.client().await;
    let mut infos = client.list(&[]).await.unwrap();
    infos.sort_by(|a, b| a.name.cmp(&b.name));
    let found: Vec<_> = infos
        .iter()
        .map(|info| (info.name.as_str(), info.kind(), info.parent.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            ("active", Kind::Active, "top"),
            ("base", Kind::Committed, ""),
            ("top", Kind::Committed, "base"),
            ("view", Kind::View, "base"),
        ]
    );
    assert_eq!(
        infos[2]
            .labels
            .get("containerd.io/snapshot/l")
            .map(String::as_str),
        Some("v")
    );
    let mounted = Mounted::new(&client.mounts("active").await.unwrap());
    assert_eq!(fs::read_to_string(mounted.join("top")).unwrap(), "top");
    assert_eq!(fs::read_to_string(mounted.join("base")).unwrap(), "base");
    let status = client.remove("top").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    let mounts = client.prepare("fresh", "top", &[]).await.unwrap();
    for id in 1..=5 {
        let used = format!("upperdir={}/{id}/fs", site.snapshots().display());
        assert!(!mounts[0].options.contains(&used), "id {id} came back");
    }
}

#[test]
fn root_fsck_finds_nothing_on_a_sound_root() {
    as_root(async || {
        let site = filled_site().await;
        check_filled_site(&site).await;
        let daemon = site.start(&[]);
        let error = refusal(&site, &["fsck"]);
        assert_eq!(run(&site, &["fsck"]).status.code(), Some(8));
        assert!(
            error.contains("another transship-snapshotter uses"),
            "{error}"
        );
        daemon.stop();
    });
}

#[test]
fn root_fsck_rebuilds_a_lost_or_damaged_database() {
    as_root(async || {
        for damage in ["missing", "empty", "garbage", "zeroed"] {
            let site = filled_site().await;
            let database = site.root().join("metadata.sqlite");
            let mut content = fs::read(&database).unwrap();
            match damage {
                "missing" => fs::remove_file(&database).unwrap(),
                "empty" => fs::write(&database, "").unwrap(),
                "garbage" => fs::write(&database, "x".repeat(100_000)).unwrap(),
                _ => {
                    content[8192..].fill(0);
                    fs::write(&database, &content).unwrap();
                }
            }
            if damage == "missing" || damage == "empty" {
                // The daemon does not take a new database for the truth and delete everything.
                let error = refusal(&site, &["--address", site.socket().to_str().unwrap()]);
                assert!(error.contains("fsck --repair"), "{error}");
                assert_eq!(site.directories().len(), 4);
            }
            let output = run(&site, &["fsck"]);
            assert_eq!(output.status.code(), Some(4), "{damage}: {output:?}");
            assert_eq!(
                site.directories().len(),
                4,
                "nothing is touched without --repair"
            );
            let output = run(&site, &["fsck", "--repair"]);
            assert_eq!(output.status.code(), Some(1), "{damage}: {output:?}");
            check_filled_site(&site).await;
        }
    });
}

/// A database of the last release with redb, whose daemon was killed: part of it is in the journal only. Made by
/// `ctr snapshots` (prepare, commit, label, view, rm) on the socket of that release.
#[test]
fn root_metadata_of_earlier_releases_is_taken_over_once() {
    as_root(async || {
        for by_fsck in [false, true] {
            let site = Site::new();
            fs::create_dir_all(site.snapshots()).unwrap();
            let fixture = include_bytes!("fixtures/redb-layout-2.tar.zst");
            let tar = zstd::decode_all(&fixture[..]).unwrap();
            fs::write(site.path().join("fixture.tar"), tar).unwrap();
            let unpack = || {
                let status = std::process::Command::new("tar")
                    .arg("-xf")
                    .arg(site.path().join("fixture.tar"))
                    .arg("-C")
                    .arg(site.root())
                    .status();
                assert!(status.unwrap().success());
            };
            unpack();
            // Layers; the directories of the others are made anew.
            for id in ["1", "2"] {
                fs::create_dir_all(site.snapshots().join(id).join("fs")).unwrap();
                fs::create_dir(site.snapshots().join(id).join("work")).unwrap();
            }
            if by_fsck {
                let output = run(&site, &["fsck", "--repair"]);
                assert_eq!(output.status.code(), Some(1), "{output:?}");
            }
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            let mut infos = client.list(&[]).await.unwrap();
            infos.sort_by(|a, b| a.name.cmp(&b.name));
            let found: Vec<_> = (infos.iter())
                .map(|info| (info.name.as_str(), info.kind(), info.parent.as_str()))
                .collect();
            let expected = [
                ("active", Kind::Active, "top"),
                ("base", Kind::Committed, ""),
                ("top", Kind::Committed, "base"),
                ("view", Kind::View, "base"),
            ];
            assert_eq!(found, expected);
            let label = infos[2].labels.get("containerd.io/snapshot/l");
            assert_eq!(label.map(String::as_str), Some("v"), "from the journal");
            for name in ["metadata.redb", "metadata.journal"] {
                assert!(!site.root().join(name).try_exists().unwrap(), "{name}");
            }
            // Ids up to 6 were given out.
            client.prepare("new", "top", &[]).await.unwrap();
            let ids = site.directories().into_iter();
            let newest = ids.filter_map(|name| name.parse::<u64>().ok()).max();
            assert!(newest > Some(6), "{newest:?}");
            assert!(daemon.stop().success());
            let output = run(&site, &["fsck"]);
            assert!(matches!(output.status.code(), Some(0 | 4)), "{output:?}");
            // The earlier release has run again: nobody here knows which of them is right.
            let before = site.directories();
            unpack();
            let error = refusal(&site, &[]);
            assert!(
                error.contains("an earlier release has run since"),
                "{error}"
            );
            let output = run(&site, &["fsck", "--repair"]);
            assert_eq!(output.status.code(), Some(8), "{output:?}");
            assert_eq!(run(&site, &["fsck"]).status.code(), Some(4));
            assert_eq!(site.directories(), before);
            assert!(site.root().join("metadata.redb").try_exists().unwrap());
        }
    });
}

#[test]
fn root_fsck_mends_directories() {
    as_root(async || {
        let site = filled_site().await;
        let dir = |name: &str| site.snapshots().join(name);
        fs::create_dir(dir("77")).unwrap();
        fs::create_dir(dir("new-78")).unwrap();
        fs::create_dir(dir("gone-79")).unwrap();
        fs::remove_dir_all(dir("3")).unwrap();
        rustix::fs::removexattr(dir("1"), "trusted.transship.snapshot").unwrap();
        let output = run(&site, &["fsck"]);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        assert!(dir("77").try_exists().unwrap());
        let output = run(&site, &["fsck", "--repair"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(site.directories(), ["1", "2", "3", "4"]);
        check_filled_site(&site).await;

        let site = filled_site().await;
        fs::remove_dir_all(site.snapshots().join("1")).unwrap();
        let output = run(&site, &["fsck", "--repair"]);
        assert_eq!(
            output.status.code(),
            Some(4),
            "a lost layer cannot be mended: {output:?}"
        );
    });
}

/// As the kernel's documentation says for a volatile overlay after a crash.
#[test]
fn root_fsck_keeps_what_was_written_when_the_workdir_is_gone() {
    as_root(async || {
        let site = filled_site().await;
        let dir = site.snapshots().join("3");
        fs::write(dir.join("fs/written"), "by the container").unwrap();
        fs::remove_dir_all(dir.join("work")).unwrap();
        assert_eq!(run(&site, &["fsck"]).status.code(), Some(4));
        let output = run(&site, &["fsck", "--repair"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(dir.join("work").is_dir());
        let written = fs::read_to_string(dir.join("fs/written")).unwrap();
        assert_eq!(written, "by the container");
    });
}
