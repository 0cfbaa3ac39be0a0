//! Images of other builders: umoci and buildah read our layers, and we read theirs.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::cross_read::{export_to, have, portable, succeed};
use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::tree_state::{TreeState, differences};
use crate::{ImportOptions, decompress, import_into_upperdir};

const BASE: &str = "
    mkdir -p data/keep data/gone/deep etc bin root tmp
    echo a >data/keep/a; echo b >data/keep/b; echo deep >data/gone/deep/file
    echo delete >data/delete-me; echo x:0 >etc/passwd; echo prog >bin/prog; ln -s prog bin/link
    chmod 1777 tmp; touch -d '2001-02-03 04:05:06' etc/passwd";

/// Gives what a step wrote a time of its own, and leaves the rest: umoci rounds times to seconds, where
/// others cut them off, and to containers/storage another time alone is no change of a directory.
fn whole_seconds(year: u16) -> String {
    format!("find . -depth -newermt 2010-01-01 -exec touch -h -d {year}-01-01 {{}} +")
}

/// Every kind of change that the builders can carry, too: they know no sockets.
const CHANGE: &str = "
    mkdir -p new/deep/dir; echo new >new/deep/dir/file; : >new/empty
    echo changed >>data/keep/a; rm data/delete-me; rm -r data/gone
    rm -r data/keep; mkdir data/keep; echo other >data/keep/other
    mv bin/prog bin/moved; rm bin/link; ln -s moved bin/link
    ln new/deep/dir/file new/hardlink; ln -s ../../etc/passwd 'new/sym link'
    chmod 4755 bin/moved; chown 12345:54321 new/empty; chmod 0 new/empty
    rmdir root; echo a-file >root
    mkfifo new/fifo; mknod new/null c 1 3
    truncate -s 1M new/sparse; printf x | dd of=new/sparse bs=1 seek=500000 conv=notrunc status=none
    head -c 3000000 /dev/urandom >new/random
    touch -d '2001-02-03 04:05:06' new/old";

fn in_dir(dir: &Path, year: u16, script: &str) {
    let script = format!("{script}\n{}", whole_seconds(year));
    succeed(Command::new("sh").args(["-euc", &script]).current_dir(dir));
}

/// What both sides of a comparison have: builders write times in seconds, and no attributes here.
fn plain(root: &Path) -> TreeState {
    let mut tree = portable(root);
    for state in tree.values_mut() {
        state.forget_what_tar_lacks(false);
    }
    // Each builder has its own idea of the root's time.
    tree.remove(Path::new(""));
    tree
}

/// Blobs of the layers of a tagged image in an OCI layout, the lowest first.
fn layers(layout: &Path, tag: &str) -> Vec<PathBuf> {
    let json = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        layout.join("blobs").join(digest.replace(':', "/"))
    };
    let index = json(&layout.join("index.json"));
    let manifests = index["manifests"].as_array().unwrap();
    let tagged = manifests
        .iter()
        .find(|it| it["annotations"]["org.opencontainers.image.ref.name"] == tag)
        .unwrap();
    let manifest = json(&blob(tagged));
    manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(blob)
        .collect()
}

/// Stacks layers as snapshots and compares what the kernel shows of them.
fn check_we_read(layers: &[PathBuf], expected: &TreeState) {
    let mut dirs = OverlayDirs::on_disk();
    for layer in layers {
        let blob = BufReader::new(fs::File::open(layer).unwrap());
        import_into_upperdir(
            decompress(blob).unwrap(),
            &dirs.stack(),
            &ImportOptions::default(),
        )
        .unwrap();
        dirs.commit();
    }
    let mounted = dirs.mount();
    let found = differences(expected, &plain(&dirs.merged));
    drop(mounted);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Our two layers, a base and its changes, and the tree that they make.
fn our_layers() -> (OverlayDirs, [PathBuf; 2], TreeState) {
    let mut dirs = OverlayDirs::on_disk();
    let mut written = Vec::new();
    for (name, year, script) in [("base.tar", 2003, BASE), ("change.tar", 2004, CHANGE)] {
        let mounted = dirs.mount();
        in_dir(&dirs.merged, year, script);
        drop(mounted);
        let layer = dirs.base.path().join(name);
        export_to(&dirs, &layer);
        written.push(layer);
        dirs.commit();
    }
    let mounted = dirs.mount();
    let tree = plain(&dirs.merged);
    drop(mounted);
    let written = written.try_into().unwrap();
    (dirs, written, tree)
}

#[test]
fn root_umoci_reads_our_layers_and_we_read_its() {
    if !have_root() || !have("umoci") {
        return;
    }
    let (dirs, written, expected) = our_layers();
    let umoci = |arguments: &[&str]| {
        succeed(
            Command::new("umoci")
                .args(arguments)
                .current_dir(dirs.base.path()),
        );
    };
    umoci(&["init", "--layout", "image"]);
    umoci(&["new", "--image", "image:ours"]);
    for layer in &written {
        umoci(&[
            "raw",
            "add-layer",
            "--image",
            "image:ours",
            layer.to_str().unwrap(),
        ]);
    }
    umoci(&["unpack", "--image", "image:ours", "bundle"]);
    let rootfs = dirs.base.path().join("bundle/rootfs");
    let found = differences(&expected, &plain(&rootfs));
    assert!(found.is_empty(), "{}", found.join("\n"));

    in_dir(
        &rootfs,
        2005,
        "rm -r new data/keep; mkdir data/keep; echo 3 >data/keep/3; echo more >>etc/passwd",
    );
    let expected = plain(&rootfs);
    umoci(&["repack", "--image", "image:theirs", "bundle"]);
    let layers = layers(&dirs.base.path().join("image"), "theirs");
    assert_eq!(layers.len(), 3);
    check_we_read(&layers, &expected);
}

/// podman's commit is the same code: containers/storage makes the layer, containers/image packs it.
#[test]
fn root_we_read_the_layers_of_buildah() {
    if !have_root() || !have("buildah") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let buildah = |arguments: &[&str]| {
        let mut command = Command::new("buildah");
        let root = dir.path().join("storage");
        command.arg("--root").arg(root);
        command.arg("--runroot").arg(dir.path().join("run"));
        command.args(["--storage-driver", "vfs"]).args(arguments);
        let said = succeed(command.current_dir(dir.path()));
        String::from_utf8(said).unwrap().trim().to_owned()
    };
    let mut image = "scratch".to_owned();
    let mut expected = TreeState::new();
    for (name, year, script) in [("base", 2003, BASE), ("changed", 2004, CHANGE)] {
        let container = buildah(&["from", &image]);
        let rootfs = PathBuf::from(buildah(&["mount", &container]));
        in_dir(&rootfs, year, script);
        expected = plain(&rootfs);
        buildah(&["umount", &container]);
        for to in [name.to_owned(), format!("oci:image:{name}")] {
            buildah(&["commit", "--quiet", "--format", "oci", &container, &to]);
        }
        image = format!("localhost/{name}");
    }
    let layers = layers(&dir.path().join("image"), "changed");
    assert_eq!(layers.len(), 2);
    check_we_read(&layers, &expected);
}
