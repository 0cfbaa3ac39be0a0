//! Debian machines with systemd and cgroup v2 alone, booted by QEMU, in which the tests run.
//!
//! ```text
//!  root.rs     mmdebstrap ──> tree ──> machine-<hash>.ext4 ─────────────┐ vda, writable, thrown away
//!  root.rs     trees of nodes, images > <tree>-<hash>.ext4 (mke2fs -d) ───┤ vdb.., read-only
//!  payload.rs  binaries, tests, container programs ──> payload.tar ─────┤ read as it is
//!  cases.rs    the cases of this boot ──> cases-<boot> ─────────────────┤ read as it is
//!                                                                       v
//!  boot.rs     QEMU: KVM if it works, else software emulation ── systemd ── transship-vm.service
//!                                                                       │ unpacks the payload, runs `run`
//!  cases.rs    <── virtio port "transship.tests" <── output and exit code of each case
//!              journal-<boot>.log <── virtio port "transship.journal" <── the journal, when a case failed
//!              console-<boot>.log <── serial console
//! ```
//!
//! Under software emulation a machine has one processor: with several, QEMU may execute an
//! instruction of the kernel while another processor is patching it (seen as a panic in
//! `__schedule`). Two machines share the cases instead. A machine that ends all the same is booted
//! again for the cases that have no verdict yet.
//!
//! No network and no loop device is needed. The tests are those of the same test program, run in
//! the machine: nodes on all trees as elsewhere, and the machine itself as one more node
//! ([`crate::Testbed::machine`]), with systemd.

mod boot;
mod cases;
mod payload;
mod root;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cases::Cases;
pub use cases::Verdict;

use crate::{Settings, TestbedError};
use transship_path_error::During as _;

/// One run of tests in machines.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Where the images are kept, and with what the container programs are built.
    pub settings: &'a Settings,
    /// The test program.
    pub tests: &'a Path,
    /// Files for the machine's root, as `make install` puts them.
    pub installed: &'a Path,
    /// Names of the cases.
    pub cases: &'a [String],
    /// An existing directory for the payload and for what the machines say.
    pub dir: &'a Path,
    /// At this time the machines are killed.
    pub deadline: Instant,
}

/// Machines that share the cases where each has one processor.
const EMULATED_MACHINES: usize = 2;

impl Machine<'_> {
    /// Boots machines, runs the cases in them, and gives the verdict on each. What a person should see
    /// is given to `show`: the output of a case at its end.
    ///
    /// # Errors
    /// What is missing: QEMU, mmdebstrap, a Debian mirror, a binary.
    pub fn run(&self, show: impl Fn(&str) + Sync) -> Result<Vec<(String, Verdict)>, TestbedError> {
        let cache = &self.settings.cache_dir;
        let root = root::machine_root(cache)?;
        let trees = root::tree_images(self.settings)?;
        let with_kvm = boot::kvm_works(&root.kernel);
        let payload = self.dir.join("payload.tar");
        payload::pack(self, &trees, with_kvm, &payload)?;
        let machines = if with_kvm { 1 } else { EMULATED_MACHINES };
        let boots = AtomicUsize::new(0);
        let run = |first: usize| {
            // The cases of a file take about as long as each other: each machine gets every second one.
            let names = self.cases.iter().skip(first).step_by(machines);
            let mut cases = Cases::new(names.cloned());
            // No case is to blame for a machine that ends between two: after two such ends it is given up.
            let mut unexplained = 0;
            while cases.waiting().next().is_some()
                && unexplained < 2
                && Instant::now() < self.deadline
            {
                let number = boots.fetch_add(1, Ordering::Relaxed) + 1;
                let boot = boot::Boot {
                    root: &root,
                    trees: &trees,
                    payload: &payload,
                    with_kvm,
                    dir: self.dir,
                    number,
                    deadline: self.deadline,
                };
                let Some(reason) = boot.run(&mut cases, &show)? else {
                    break;
                };
                match cases.machine_ended(&reason) {
                    Some((name, said)) => show(&format!("{said}\n{name}: {reason}")),
                    None => {
                        unexplained += 1;
                        show(&reason);
                    }
                }
            }
            Ok(cases.give_up("no machine was left for it"))
        };
        let run = &run;
        std::thread::scope(|scope| {
            let machines: Vec<_> = (0..machines)
                .map(|first| scope.spawn(move || run(first)))
                .collect();
            let mut verdicts = Vec::new();
            for machine in machines {
                let of_machine: Result<Vec<_>, TestbedError> =
                    machine.join().expect("a machine's thread does not panic");
                verdicts.extend(of_machine?);
            }
            Ok(verdicts)
        })
    }
}

fn fresh_dir(path: &Path) -> Result<(), TestbedError> {
    if path.try_exists().during("look for", path)? {
        fs::remove_dir_all(path).during("remove", path)?;
    }
    Ok(fs::create_dir_all(path).during("create", path)?)
}
