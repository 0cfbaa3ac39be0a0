//! A disk that gives each block a new place when it is written, and is full; one that has lost a part of a snapshot.

#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::process::Command;

use containerd_client::tonic::Code;
use nix::mount::{MntFlags, umount2};

use support::daemon::Site;
use support::mounted::{Mounted, enter_private_mounts};

/// What SQLite has mapped would be written to on a full btrfs, too.
#[test]
fn root_a_full_btrfs_ends_no_daemon() {
    on_btrfs_that_takes_no_more(None);
}

/// Over quota is as full as full.
#[test]
fn root_a_spent_quota_is_said_and_survived() {
    on_btrfs_that_takes_no_more(Some("12M"));
}

fn on_btrfs_that_takes_no_more(quota: Option<&str>) {
    if !support::is_root() {
        return;
    }
    enter_private_mounts();
    support::block_on(async {
        let site = Site::new();
        fs::create_dir(site.root()).unwrap();
        let image = site.path().join("image");
        File::create(&image).unwrap().set_len(160 << 20).unwrap();
        let run = |command: &mut Command| assert!(command.status().unwrap().success());
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        let root = site.root();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&root));
        if let Some(quota) = quota {
            run(Command::new("btrfs").args(["quota", "enable"]).arg(&root));
            let limit = ["qgroup", "limit", quota];
            run(Command::new("btrfs").args(limit).arg(&root));
        }
        {
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            for n in 0..20 {
                client.prepare(&format!("p{n}"), "", &[]).await.unwrap();
            }
            let ballast = site.root().join("ballast");
            let mut file = File::create(&ballast).unwrap();
            for piece in [1 << 20, 4096] {
                while file.write_all(&vec![1; piece]).is_ok() {}
                drop(file.sync_all());
            }
            drop(file);
            let mut made = 20;
            let status = loop {
                match client.prepare(&format!("p{made}"), "", &[]).await {
                    Ok(_) => made += 1,
                    Err(status) => break status,
                }
                assert!(made < 10_000, "the disk is never full");
            };
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            for n in 0..10 {
                client.remove(&format!("p{n}")).await.unwrap();
            }
            daemon.kill();
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            client.remove("p10").await.unwrap();
            fs::remove_file(&ballast).unwrap();
            run(Command::new("sync").arg("-f").arg(&root));
            client.prepare("again", "", &[]).await.unwrap();
            assert!(daemon.stop().success());
        }
        umount2(&root, MntFlags::empty()).unwrap();
    });
}

/// As the kernel's documentation has it after a crash of a volatile overlay.
#[test]
fn root_a_workdir_that_was_removed_is_made_again() {
    if !support::is_root() {
        return;
    }
    enter_private_mounts();
    support::block_on(async {
        let site = Site::new();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        {
            let mounted = Mounted::new(&client.prepare("base-active", "", &[]).await.unwrap());
            fs::write(mounted.join("base"), "base").unwrap();
        }
        client.commit("base", "base-active", &[]).await.unwrap();
        client.prepare("active", "base", &[]).await.unwrap();
        client.view("view", "base", &[]).await.unwrap();
        daemon.stop();
        let dir = site.snapshots().join("2");
        fs::write(dir.join("fs/written"), "by the container").unwrap();
        fs::remove_dir_all(dir.join("work")).unwrap();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        let mounted = Mounted::new(&client.mounts("active").await.unwrap());
        let written = fs::read_to_string(mounted.join("written")).unwrap();
        assert_eq!(written, "by the container");
        assert!(!site.snapshots().join("3/work").try_exists().unwrap());
        drop(mounted);
        daemon.stop();
    });
}
