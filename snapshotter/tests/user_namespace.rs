//! The daemon in a user namespace, as rootless containerd runs it.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::Path;
use std::process::{Child, Command};

use containerd_client::types::Mount;

use support::client;
use support::daemon::Site;

/// A daemon in namespaces of its own; killed when dropped.
struct Rootless(Child);

impl Rootless {
    fn start(site: &Site) -> Self {
        let daemon = site.command();
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "--mount"])
            .arg(daemon.get_program())
            .args(daemon.get_args())
            .arg("--address")
            .arg(site.socket())
            .stderr(site.open_log());
        Self(command.spawn().unwrap())
    }

    /// Runs a script in a place where `mount` is mounted, inside the namespaces.
    fn in_mount(&self, mount: &Mount, place: &Path, script: &str) -> String {
        let (place, options) = (place.display(), mount.options.join(","));
        let source = &mount.source;
        let mounting = match mount.r#type.as_str() {
            "bind" => format!("mount -o {options} {source} {place}"),
            _ => format!("mount -t overlay -o {options} overlay {place}"),
        };
        let output = Command::new("nsenter")
            .args(["--user", "--mount", "--preserve-credentials", "--target"])
            .arg(self.0.id().to_string())
            .args(["env", "LIBMOUNT_FORCE_MOUNT2=always", "sh", "-euc"])
            .arg(format!(
                "mkdir -p {place}; {mounting}; cd {place}; {script}; cd /; umount {place}"
            ))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Rootless {
    fn drop(&mut self) {
        // Fails only for a daemon that is gone already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn root_layers_work_in_a_user_namespace() {
    if !support::is_root() {
        return;
    }
    support::block_on(async {
        let site = Site::new();
        let daemon = Rootless::start(&site);
        support::wait_until("the daemon listens", || site.socket().try_exists().unwrap());
        let client = client::connect(&site.socket(), "transship").await.unwrap();
        let place = site.path().join("place");

        let mounts = client.prepare("1", "", &[]).await.unwrap();
        daemon.in_mount(
            &mounts[0],
            &place,
            "mkdir d; echo old > d/old; echo f > file",
        );
        client.commit("layer-1", "1", &[]).await.unwrap();
        let mounts = client.prepare("2", "layer-1", &[]).await.unwrap();
        assert!(mounts[0].options.contains(&"userxattr".to_owned()));
        // A whiteout, and an opaque directory: overlayfs marks it in user.overlay.opaque here.
        daemon.in_mount(
            &mounts[0],
            &place,
            "rm file; rm -r d; mkdir d; echo new > d/new",
        );
        client.commit("layer-2", "2", &[]).await.unwrap();
        let mounts = client.prepare("3", "layer-2", &[]).await.unwrap();
        let seen = daemon.in_mount(&mounts[0], &place, "find . | sort");
        assert_eq!(seen, ".\n./d\n./d/new\n");
        client.remove("3").await.unwrap();
    });
}
