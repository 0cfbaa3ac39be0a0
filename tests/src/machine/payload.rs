//! What changes from run to run: our binaries, the tests, and the script that runs them.
//!
//! ```text
//! payload.tar
//!     run            started by transship-vm.service
//!     root/          copied over the machine's root: binaries, units, samples
//!     tests          the test program
//!     workloads/     the programs of the containers' images
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use super::root::TreeImage;
use super::{Machine, fresh_dir};
use crate::error::IoContext as _;
use crate::run::CommandRun as _;
use crate::{TestbedError, Workload};

/// Software emulation is about ten times slower than the processor.
const SLOWDOWN: u32 = 10;

/// Packs the payload into `tar`.
pub(super) fn pack(
    machine: &Machine<'_>,
    trees: &[TreeImage],
    with_kvm: bool,
    tar: &Path,
) -> Result<(), TestbedError> {
    let dir = tar.with_extension("dir");
    fresh_dir(&dir)?;
    let root = dir.join("root");
    Command::new("cp")
        .arg("-a")
        .args([machine.installed, &root])
        .run()?;
    // Lines of the source are most of a binary, and all of it is read through the emulation.
    let tests = dir.join("tests");
    Command::new("strip")
        .arg("--strip-debug")
        .arg("-o")
        .args([&tests, &machine.tests.to_owned()])
        .run()?;
    let binaries = root.join("usr/local/bin");
    for binary in fs::read_dir(&binaries).during("read", &binaries)? {
        let binary = binary.during("read", &binaries)?.path();
        Command::new("strip")
            .arg("--strip-debug")
            .arg(binary)
            .run()?;
    }
    let workloads = dir.join("workloads");
    fs::create_dir(&workloads).during("create", &workloads)?;
    for workload in Workload::ALL {
        let built = workload.build(machine.settings)?;
        let target = workloads.join(workload.name());
        fs::copy(&built, &target).during("copy to", &target)?;
    }
    let script = dir.join("run");
    let text = script_text(
        machine.arguments,
        trees,
        if with_kvm { 1 } else { SLOWDOWN },
    );
    fs::write(&script, text).during("write", &script)?;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&script, executable).during("chmod", &script)?;
    Command::new("tar")
        .arg("-cf")
        .arg(tar)
        .arg("-C")
        .args([&dir, Path::new(".")])
        .run()?;
    fs::remove_dir_all(&dir).during("remove", &dir)
}

/// Line with which the script says that the tests have ended, and how.
pub(super) const EXIT_LINE: &str = "transship-vm: exit ";

fn script_text(arguments: &[String], trees: &[TreeImage], patience: u32) -> String {
    let cache = "/var/cache/transship-testbed";
    let mounts: String = trees
        .iter()
        .map(|tree| {
            let (serial, dir) = (&tree.serial, &tree.dir_name);
            format!(
                "mkdir -p {cache}/{dir}\nmount -o ro /dev/disk/by-id/virtio-{serial} {cache}/{dir}\n"
            )
        })
        .collect();
    let arguments: Vec<_> = arguments.iter().map(|word| quoted(word)).collect();
    format!(
        "#!/bin/sh\n\
         exec >/dev/virtio-ports/transship.tests 2>&1\n\
         status=99\n\
         finish() {{\n\
         \x20 [ $status = 0 ] || journalctl -b --no-pager >/dev/virtio-ports/transship.journal\n\
         \x20 echo '{EXIT_LINE}'$status\n\
         }}\n\
         trap finish EXIT\n\
         set -e\n\
         cd /opt/transship-vm\n\
         {mounts}\
         cp -a root/. /\n\
         systemctl daemon-reload\n\
         export TRANSSHIP_BIN_DIR=/usr/local/bin TRANSSHIP_WORKLOADS=/opt/transship-vm/workloads\n\
         export TRANSSHIP_PATIENCE={patience} REQUIRE=vm,node\n\
         set +e\n\
         ./tests --test-threads 1 {arguments}\n\
         status=$?\n",
        arguments = arguments.join(" "),
    )
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_mounts_every_tree_where_the_tests_look_for_it() {
        let tree = TreeImage {
            serial: "forky".to_owned(),
            dir_name: "forky-0123".to_owned(),
            disk: "/c/forky-0123.ext4".into(),
        };
        let text = script_text(&["vm_it's".to_owned()], &[tree], 10);
        let mount =
            "mount -o ro /dev/disk/by-id/virtio-forky /var/cache/transship-testbed/forky-0123\n";
        assert!(text.contains(mount), "{text}");
        assert!(
            text.contains("./tests --test-threads 1 'vm_it'\\''s'\n"),
            "{text}"
        );
        let parsed = Command::new("sh").args(["-n", "-c", &text]).run();
        assert!(parsed.is_ok(), "{parsed:?}");
    }
}
