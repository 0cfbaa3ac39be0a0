//! Layers for registries, as other programs unpack them: what they make of a stock layer, they make of ours.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::cross_read::{have, portable, succeed};
use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::tree_state::{TreeState, differences};
use crate::{ExportOptions, LayerFormat, export_upperdir};

/// All kinds of inode, with what was written differently for one of the programs once: holes, long names,
/// names that are no UTF-8, attributes on files with several names, owners beyond seven digits, fractions of
/// seconds. `$1` is the length of some names.
const TREE: &str = r#"
    long=$(head -c $1 /dev/zero | tr '\0' n)
    mkdir -p dir/$long/$long empty; chmod 2750 dir; chmod 1777 empty
    echo data >dir/file; ln dir/file dir/link; chmod 4711 dir/file
    echo far >dir/$long/$long/file; ln -s $long/$long/file dir/far
    echo bytes >"$(printf 'latin-\351')"; echo utf8 >'ü ñ'
    truncate -s 3M sparse; printf x | dd of=sparse bs=1 seek=1500000 conv=notrunc status=none
    head -c 700000 /dev/urandom >random; : >nothing; chmod 0 nothing
    chown 3000000:4000000 random; chown -h 7:8 dir/far
    mkfifo fifo; mknod null c 1 3; mknod disk b 259 7
    if command -v setfattr; then setfattr -n user.origin -v somewhere dir/file; fi
    if command -v setcap; then setcap cap_net_raw+ep dir/file; fi
    find . -exec touch -h -d '2001-02-03 04:05:06.789' {} +"#;

/// What the programs have in common: no extended attributes, whole seconds, nothing of `/`.
fn common(root: &Path) -> TreeState {
    let mut tree = portable(root);
    for state in tree.values_mut() {
        state.forget_what_tar_lacks(false);
    }
    tree.remove(Path::new(""));
    tree
}

/// A layer of an image, and the tree that it is of; beside it what GNU tar writes of the same.
fn image_layer(name_len: &str) -> (OverlayDirs, TreeState) {
    let dirs = OverlayDirs::on_disk();
    let mounted = dirs.mount();
    let mut make = Command::new("sh");
    make.args(["-euc", TREE, "sh", name_len]);
    succeed(make.current_dir(&dirs.merged));
    let mut reference = Command::new("tar");
    reference.args(["--format=posix", "--sort=name"]);
    reference.args(["--transform=s,^\\./,,", "-cf", "../reference.tar", "."]);
    succeed(reference.current_dir(&dirs.merged));
    let tree = common(&dirs.merged);
    drop(mounted);
    let out = fs::File::create(dirs.base.path().join("layer.tar")).unwrap();
    let options = ExportOptions {
        format: LayerFormat::Image,
        ..ExportOptions::default()
    };
    export_upperdir(&dirs.stack(), out, &options).unwrap();
    (dirs, tree)
}

const PYTHON: &str = "
import sys, tarfile
tarfile.open(sys.argv[1]).extractall(numeric_owner=True)";

const PERL: &str = "
use Archive::Tar; $Archive::Tar::CHOWN = 1; $Archive::Tar::CHMOD = 1; $Archive::Tar::SAME_PERMISSIONS = 1;
my $tar = Archive::Tar->new($ARGV[0]) or die Archive::Tar->error;
$tar->extract() or die $tar->error;";

#[test]
fn root_tools_unpack_the_layers_of_images() {
    if !have_root() {
        return;
    }
    let usual = image_layer("150");
    // Archive::Tar knows no long names, whoever writes them.
    let short = image_layer("20");
    let plain = &["--numeric-owner", "-xpf"][..];
    for (program, arguments, (dirs, expected), is_exact) in [
        ("tar", plain, &usual, true),
        ("bsdtar", plain, &usual, true),
        (
            "busybox",
            &["tar", "--numeric-owner", "-xpf"],
            &usual,
            false,
        ),
        ("python3", &["-c", PYTHON], &usual, false),
        ("perl", &["-e", PERL], &short, false),
    ] {
        if !have(program) {
            continue;
        }
        let unpack = |tar: &str| {
            let out = dirs.base.path().join(format!("{program}-of-{tar}"));
            fs::create_dir(&out).unwrap();
            let tar = dirs.base.path().join(tar);
            let mut unpack = Command::new(program);
            succeed(unpack.args(arguments).arg(tar).current_dir(&out));
            common(&out)
        };
        let mut ours = unpack("layer.tar");
        if is_exact {
            let found = differences(expected, &ours);
            assert!(found.is_empty(), "{program}: {}", found.join("\n"));
        } else {
            let mut reference = unpack("reference.tar");
            // They leave directories and symlinks with the time of their making.
            let is_regular = |mode: u32| mode & 0o170_000 == 0o100_000;
            for state in ours.values_mut().chain(reference.values_mut()) {
                if !is_regular(state.mode) {
                    state.forget_time();
                }
            }
            let found = differences(&reference, &ours);
            assert!(found.is_empty(), "{program}: {}", found.join("\n"));
        }
    }
}

/// Digests of the uncompressed layers of an image in an OCI layout.
fn diff_ids(dir: &Path, layout: &str) -> serde_json::Value {
    let image = format!("oci:{layout}");
    let mut inspect = Command::new("skopeo");
    inspect
        .args(["inspect", "--config", &image])
        .current_dir(dir);
    let config: serde_json::Value = serde_json::from_slice(&succeed(&mut inspect)).unwrap();
    config["rootfs"]["diff_ids"].clone()
}

/// buildah and podman take a layer apart when they pull it, and put it together again when they push it: what
/// they do not write as it was has another digest then, and the push fails.
#[test]
fn root_an_image_of_our_layers_passes_through_other_stores() {
    if !have_root() || !["umoci", "skopeo", "buildah"].into_iter().all(have) {
        return;
    }
    let (dirs, expected) = image_layer("150");
    let dir = dirs.base.path();
    let run = |program: &str, arguments: &[&str]| {
        succeed(Command::new(program).args(arguments).current_dir(dir));
    };
    run("umoci", &["init", "--layout", "image"]);
    run("umoci", &["new", "--image", "image:ours"]);
    run(
        "umoci",
        &["raw", "add-layer", "--image", "image:ours", "layer.tar"],
    );
    run("umoci", &["unpack", "--image", "image:ours", "bundle"]);
    let found = differences(&expected, &common(&dir.join("bundle/rootfs")));
    assert!(found.is_empty(), "umoci: {}", found.join("\n"));
    let ours = diff_ids(dir, "image:ours");
    assert_eq!(ours.as_array().map(Vec::len), Some(1), "{ours}");

    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "oci:image:ours",
            "oci-archive:archive.tar:ours",
        ],
    );
    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "oci-archive:archive.tar",
            "oci:copied:ours",
        ],
    );
    assert_eq!(diff_ids(dir, "copied:ours"), ours);
    for program in ["buildah", "podman"] {
        if program == "podman" && Command::new(program).arg("--version").output().is_err() {
            // It is no need of the tests: the same code as buildah's.
            continue;
        }
        let (root, pushed) = (format!("{program}-root"), format!("oci:{program}:ours"));
        let store = [
            "--root",
            &root,
            "--runroot",
            "run",
            "--storage-driver",
            "vfs",
        ];
        run(
            program,
            &[&store[..], &["pull", "--quiet", "oci:image:ours"]].concat(),
        );
        let mut list = Command::new(program);
        list.args(store)
            .args(["images", "--quiet"])
            .current_dir(dir);
        let id = String::from_utf8(succeed(&mut list)).unwrap();
        run(
            program,
            &[&store[..], &["push", "--quiet", id.trim(), &pushed]].concat(),
        );
        assert_eq!(diff_ids(dir, &format!("{program}:ours")), ours, "{program}");
    }
}

/// Debian's registry on the loopback of a network namespace of its own: pushed by skopeo, pulled, pushed again
/// and built upon by buildah.
const THROUGH_REGISTRY: &str = "
    ip link set lo up
    printf 'version: 0.1\\nstorage: {filesystem: {rootdirectory: %s/blobs}}\\nhttp: {addr: 127.0.0.1:5000}\\n' $PWD >registry.yml
    docker-registry serve registry.yml >registry.log 2>&1 & registry=$!
    trap 'kill $registry' EXIT
    at=docker://127.0.0.1:5000
    until skopeo copy --quiet --dest-tls-verify=false oci:image:ours $at/ours:1 2>push.log; do
        kill -0 $registry || { cat registry.log push.log >&2; exit 1; }
        sleep 0.1
    done
    b='buildah --root store --runroot run --storage-driver vfs'
    $b pull --quiet --tls-verify=false $at/ours:1
    $b push --quiet --tls-verify=false 127.0.0.1:5000/ours:1 $at/again:1
    container=$($b from 127.0.0.1:5000/ours:1)
    $b copy --quiet $container registry.yml /added
    $b commit --quiet --tls-verify=false $container $at/built:1
    for name in again built; do
        skopeo copy --quiet --src-tls-verify=false $at/$name:1 oci:$name:ours
    done";

#[test]
fn root_our_layers_go_through_a_registry() {
    let programs = ["umoci", "skopeo", "buildah", "docker-registry"];
    if !have_root() || !programs.into_iter().all(have) {
        return;
    }
    let (dirs, expected) = image_layer("150");
    let dir = dirs.base.path();
    let run = |program: &str, arguments: &[&str]| {
        succeed(Command::new(program).args(arguments).current_dir(dir));
    };
    run("umoci", &["init", "--layout", "image"]);
    run("umoci", &["new", "--image", "image:ours"]);
    run(
        "umoci",
        &["raw", "add-layer", "--image", "image:ours", "layer.tar"],
    );
    let ours = diff_ids(dir, "image:ours");
    run(
        "timeout",
        &["120", "unshare", "--net", "sh", "-euc", THROUGH_REGISTRY],
    );
    assert_eq!(diff_ids(dir, "again:ours"), ours);
    let built = diff_ids(dir, "built:ours");
    assert_eq!(built.as_array().map(Vec::len), Some(2), "{built}");
    assert_eq!(built[0], ours[0]);
    run("umoci", &["unpack", "--image", "again:ours", "bundle"]);
    let found = differences(&expected, &common(&dir.join("bundle/rootfs")));
    assert!(found.is_empty(), "{}", found.join("\n"));
}
