//! A disk that has lost a part of a snapshot.

#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs;

use support::daemon::Site;
use support::mounted::{Mounted, enter_private_mounts};

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
