//! Other programs read our layers, and we read theirs.

use std::fs;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::random_operations::{operations, run};
use super::tree_state::{TreeState, differences, read_tree, without_upper_sockets};
use crate::{
    ExportOptions, ImportOptions, LayerFormat, OverlayStack, export_upperdir, import_into_upperdir,
};

/// Whether the program is there; when not, says so, or fails where CI says that it must run.
pub(crate) fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        let required = std::env::var("REQUIRE").unwrap_or_default();
        assert!(
            !required.split(',').any(|need| need == "root"),
            "REQUIRE=root, but {program} is not installed"
        );
        eprintln!("skipped: {program} is not installed");
    }
    found
}

pub(super) fn succeed(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A changed tree with nothing below it, so that no deletions are in its layer.
fn random_tree(operations: &[super::random_operations::Operation]) -> OverlayDirs {
    let dirs = OverlayDirs::on_disk();
    let mounted = dirs.mount();
    run(&dirs.merged, operations);
    drop(mounted);
    dirs
}

pub(super) fn export_to(dirs: &OverlayDirs, file: &Path) {
    // An empty layer below: asked, it says that no mark is needed.
    let out = fs::File::create(file).unwrap();
    export_upperdir(&dirs.stack(), out, &ExportOptions::default()).unwrap();
}

/// The upperdir as a layer can have it: without sockets and overlay's attributes.
pub(super) fn portable(upperdir: &Path) -> TreeState {
    let mut tree = without_upper_sockets(read_tree(upperdir), None);
    for state in tree.values_mut() {
        state.xattrs.retain(|name, _| {
            !crate::overlay_marks::is_overlay_private(crate::OverlayXattrs::Trusted, name)
        });
    }
    tree
}

fn check_tar_reads(
    program: &str,
    arguments: &[&str],
    is_gnu: bool,
    operations: &[super::random_operations::Operation],
) {
    let dirs = random_tree(operations);
    let layer = dirs.base.path().join("layer.tar");
    export_to(&dirs, &layer);
    let out = dirs.base.path().join("out");
    fs::create_dir(&out).unwrap();
    succeed(
        Command::new(program)
            .args(arguments)
            .args(["--numeric-owner", "-xpf"])
            .arg(&layer)
            .arg("-C")
            .arg(&out),
    );
    let (mut expected, mut found) = (portable(&dirs.upperdir), portable(&out));
    if !is_gnu {
        // It leaves the directory that it was told to extract into as it was.
        expected.remove(Path::new(""));
        found.remove(Path::new(""));
        for state in expected.values_mut().chain(found.values_mut()) {
            state.forget_what_libarchive_lacks();
        }
    }
    let found = differences(&expected, &found);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn root_gnu_tar_reads_our_layers() {
    check_tar_reads_random_trees("tar", &["--xattrs", "--xattrs-include=*"], true);
}

#[test]
fn root_libarchive_reads_our_layers() {
    check_tar_reads_random_trees("bsdtar", &["--no-xattrs", "--no-acls"], false);
}

fn check_tar_reads_random_trees(program: &str, arguments: &[&str], is_gnu: bool) {
    if !have_root() || !have(program) {
        return;
    }
    let mut runner = TestRunner::new(Config {
        cases: 30,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&operations(60), |operations| {
            check_tar_reads(program, arguments, is_gnu, &operations);
            Ok(())
        })
        .unwrap();
}

/// Lists name, type, size, link target, owner and mtime, one entry per line.
const PYTHON_LIST: &str = r"
import sys, tarfile
with tarfile.open(sys.argv[1]) as tar:
    for m in tar:
        data = tar.extractfile(m).read() if m.isreg() else b''
        print(repr((m.name.encode('utf-8', 'surrogateescape'), m.type, m.size, len(data))))
";

#[test]
fn root_python_reads_our_layers() {
    if !have_root() || !have("python3") {
        return;
    }
    let mut runner = TestRunner::new(Config {
        cases: 20,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&operations(60), |operations| {
            let dirs = random_tree(&operations);
            let layer = dirs.base.path().join("layer.tar");
            export_to(&dirs, &layer);
            let listed = succeed(
                Command::new("python3")
                    .args(["-c", PYTHON_LIST])
                    .arg(&layer),
            );
            let listed = String::from_utf8(listed).unwrap();
            let expected = portable(&dirs.upperdir);
            prop_assert_eq!(listed.lines().count(), expected.len());
            for (path, state) in expected
                .iter()
                .filter(|(_, state)| state.mode & 0o170_000 == 0o100_000)
            {
                let size = format!(", {}, {})", state.size, state.size);
                let is_listed = listed.lines().any(|line| line.ends_with(&size));
                // A further hard link is listed without its size.
                let is_link = listed.lines().any(|line| line.contains("b'1'"));
                prop_assert!(is_listed || is_link, "{path:?} {size} in\n{listed}");
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn root_we_read_what_gnu_tar_writes() {
    if !have_root() || !have("tar") {
        return;
    }
    let formats: [&[&str]; 7] = [
        &["--format=posix", "--xattrs"],
        &["--format=gnu"],
        &["--format=oldgnu"],
        &["--format=gnu", "--sparse"],
        &[
            "--format=posix",
            "--xattrs",
            "--sparse",
            "--sparse-version=0.0",
        ],
        &[
            "--format=posix",
            "--xattrs",
            "--sparse",
            "--sparse-version=0.1",
        ],
        &[
            "--format=posix",
            "--xattrs",
            "--sparse",
            "--sparse-version=1.0",
        ],
    ];
    let mut runner = TestRunner::new(Config {
        cases: 10,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&operations(60), |operations| {
            let mut dirs = random_tree(&operations);
            let source = dirs.new_upper();
            for format in formats {
                let layer = dirs.base.path().join("layer.tar");
                succeed(
                    Command::new("tar")
                        .args(format)
                        .args([
                            "--xattrs-exclude=*overlay*",
                            "--numeric-owner",
                            "--warning=no-file-ignored",
                            "-cf",
                        ])
                        .arg(&layer)
                        .arg("-C")
                        .arg(&source)
                        .arg("."),
                );
                let file = fs::File::open(&layer).unwrap();
                dirs.new_upper();
                import_into_upperdir(file, &dirs.stack(), &ImportOptions::default()).unwrap();
                let mut expected = portable(&source);
                let mut found = portable(&dirs.upperdir);
                for state in expected.values_mut().chain(found.values_mut()) {
                    state.forget_what_tar_lacks(format.contains(&"--xattrs"));
                }
                let found = differences(&expected, &found);
                prop_assert!(found.is_empty(), "{format:?} {}", found.join("\n"));
            }
            Ok(())
        })
        .unwrap();
}

/// 9 GiB that are no holes to the reader: more than the header's field of 12 octal digits can say.
#[test]
#[ignore = "half a minute; `make test-long` runs it"]
fn root_a_file_beyond_8_gib_is_written_in_full() {
    const SIZE: u64 = (9 << 30) + 5;
    if !have_root() || !have("tar") {
        return;
    }
    let dirs = OverlayDirs::on_disk();
    let file = fs::File::create(dirs.upperdir.join("large")).unwrap();
    file.set_len(SIZE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end", SIZE - 3).unwrap();
    drop(file);
    let mut reader = Command::new("sh")
        .args(["-c", "tar --extract --to-stdout large | tail -c 3"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let options = ExportOptions {
        format: LayerFormat::Image,
        ..ExportOptions::default()
    };
    let pipe = reader.stdin.take().unwrap();
    let stats = export_upperdir(&OverlayStack::new(&dirs.upperdir, []), pipe, &options).unwrap();
    assert!(stats.bytes > SIZE);
    let output = reader.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"end");
}
