//! Real mounts of what the daemon returns, in a mount namespace of the test's thread.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use tempfile::TempDir;

use super::client::Client;

/// Gives this thread a mount namespace of its own, so that no mount survives a failing test.
pub fn enter_private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
}

/// A mounted snapshot; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    dir: TempDir,
}

impl Mounted {
    pub fn new(mounts: &[Mount]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("transship-mnt-")
            .tempdir()
            .unwrap();
        let [one] = mounts else {
            panic!("one mount expected: {mounts:?}")
        };
        perform(one, dir.path());
        Self { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(self.dir.path(), MntFlags::empty()).unwrap();
    }
}

fn perform(one: &Mount, target: &Path) {
    let options: Vec<_> = one.options.iter().map(String::as_str).collect();
    match one.r#type.as_str() {
        "bind" => {
            assert!(options.contains(&"rbind"), "{one:?}");
            let none = None::<&str>;
            let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(one.source.as_str()), target, none, bind, none).unwrap();
            if options.contains(&"ro") {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(none, target, none, flags, none).unwrap();
            }
        }
        // The options one by one: 128 lowerdirs do not fit into the page of mount(2).
        "overlay" => {
            let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
            for option in options {
                match option.split_once('=') {
                    Some(("lowerdir", dirs)) => {
                        for dir in dirs.split(':') {
                            fsconfig_set_string(&context, "lowerdir+", dir).unwrap();
                        }
                    }
                    Some((key, value)) => fsconfig_set_string(&context, key, value).unwrap(),
                    None => fsconfig_set_flag(&context, option).unwrap(),
                }
            }
            fsconfig_create(&context).unwrap();
            let flags = FsMountFlags::FSMOUNT_CLOEXEC;
            let tree = fsmount(&context, flags, MountAttrFlags::empty()).unwrap();
            let from_tree = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&tree, "", rustix::fs::CWD, target, from_tree).unwrap();
        }
        other => panic!("unknown mount type {other}"),
    }
}

/// Runs an operator's test if it can be run.
pub fn as_root(test: impl AsyncFnOnce()) {
    if super::is_root() {
        enter_private_mounts();
        super::block_on(test());
    }
}

/// A layer with one file, on `parent`.
pub async fn make_layer(client: &Client, name: &str, parent: &str) {
    let key = format!("{name}-active");
    {
        let mounted = Mounted::new(&client.prepare(&key, parent, &[]).await.unwrap());
        fs::write(mounted.join(name), name).unwrap();
    }
    client
        .commit(name, &key, &[("containerd.io/snapshot/l", "v")])
        .await
        .unwrap();
}
