//! What changes from run to run: our binaries, the tests, and the script that runs them.
//!
//! ```text
//! payload.tar
//!     run            started by transship-vm.service: runs the cases listed on the disk "cases"
//!     root/          copied over the machine's root: binaries, units, samples
//!     tests          the test program
//!     workloads/     the programs of the containers' images
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use super::cases::{ALL_DONE, BEGINS, ENDS};
use super::root::TreeImage;
use super::{Machine, fresh_dir};
use crate::run::CommandRun as _;
use crate::{TestbedError, Workload};
use transship_path_error::During as _;

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
    let workloads = dir.join("workloads");
    fs::create_dir(&workloads).during("create", &workloads)?;
    for workload in Workload::ALL {
        let built = workload.build(machine.settings)?;
        let target = workloads.join(workload.name());
        fs::copy(&built, &target).during("copy to", &target)?;
    }
    let script = dir.join("run");
    let text = script_text(trees, if with_kvm { 1 } else { SLOWDOWN });
    fs::write(&script, text).during("write", &script)?;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&script, executable).during("chmod", &script)?;
    Command::new("tar")
        .arg("-cf")
        .arg(tar)
        .arg("-C")
        .args([&dir, Path::new(".")])
        .run()?;
    Ok(fs::remove_dir_all(&dir).during("remove", &dir)?)
}

/// A case that takes longer than this hangs: the others shall get their turn.
const CASE_SECONDS: u32 = 1500;

fn script_text(trees: &[TreeImage], patience: u32) -> String {
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
    format!(
        "#!/bin/sh\n\
         exec >/dev/virtio-ports/transship.tests 2>&1\n\
         set -e\n\
         cd /opt/transship-vm\n\
         {mounts}\
         cp -a root/. /\n\
         systemctl daemon-reload\n\
         udevadm wait --timeout=120 /dev/disk/by-id/virtio-cases\n\
         export TRANSSHIP_BIN_DIR=/usr/local/bin TRANSSHIP_WORKLOADS=/opt/transship-vm/workloads\n\
         export TRANSSHIP_PATIENCE={patience} REQUIRE=vm,node\n\
         failed=\n\
         while read -r case; do\n\
         \x20 [ \"$case\" ] || continue\n\
         \x20 echo \"{BEGINS}$case\"\n\
         \x20 code=0\n\
         \x20 timeout --signal=KILL {CASE_SECONDS} ./tests --test-threads 1 --nocapture --exact \"$case\" </dev/null || code=$?\n\
         \x20 [ $code != 137 ] || echo \"$case: killed, as it ran for more than {CASE_SECONDS} s\"\n\
         \x20 [ $code = 0 ] || failed=1\n\
         \x20 echo \"{ENDS}$case $code\"\n\
         done </dev/disk/by-id/virtio-cases\n\
         [ ! \"$failed\" ] || journalctl -b --no-pager >/dev/virtio-ports/transship.journal\n\
         echo '{ALL_DONE}'\n"
    )
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
        let text = script_text(&[tree], 10);
        let mount =
            "mount -o ro /dev/disk/by-id/virtio-forky /var/cache/transship-testbed/forky-0123\n";
        assert!(text.contains(mount), "{text}");
        let parsed = Command::new("sh").args(["-n", "-c", &text]).run();
        assert!(parsed.is_ok(), "{parsed:?}");
    }
}
