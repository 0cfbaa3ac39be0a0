//! A Debian machine with systemd and cgroup v2 alone, booted by QEMU, in which the tests run.
//!
//! ```text
//!  root.rs     mmdebstrap ──> tree ──> machine-<hash>.ext4 ─────────────┐ vda, writable, thrown away
//!  root.rs     node trees ──────────> <tree>-<hash>.ext4 (mke2fs -d) ───┤ vdb.., read-only
//!  payload.rs  binaries, tests, container programs ──> payload.tar ─────┤ read as it is
//!                                                                       v
//!  boot.rs     QEMU: KVM if it works, else software emulation ── systemd ── transship-vm.service
//!                                                                       │ unpacks the payload, runs `run`
//!              stdout <── virtio port "transship.tests" <── the tests' output, "transship-vm: exit N"
//!              journal.log <── virtio port "transship.journal" <── the journal, when something failed
//!              console.log <── serial console
//! ```
//!
//! No network and no loop device is needed. The tests are those of the same test program, run in
//! the machine: nodes on all trees as elsewhere, and the machine itself as one more node
//! ([`crate::Testbed::machine`]), with systemd.

mod boot;
mod payload;
mod root;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::IoContext as _;
use crate::{Settings, TestbedError};

/// In the machine, and nowhere else: tests with the prefix `vm_` may do to it what they want.
pub(crate) const MARKER: &str = "/etc/transship-vm";

/// One run of tests in a machine.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Where the images are kept, and with what the container programs are built.
    pub settings: &'a Settings,
    /// The test program.
    pub tests: &'a Path,
    /// Files for the machine's root, as `make install` puts them.
    pub installed: &'a Path,
    /// Which tests: arguments of the test program.
    pub arguments: &'a [String],
    /// An existing directory for the payload and for what the machine said.
    pub dir: &'a Path,
    /// After this time the machine is killed.
    pub deadline: Duration,
}

impl Machine<'_> {
    /// Boots the machine, runs the tests in it, and gives their exit code; `None` when the machine
    /// ended, or was killed at the deadline, before they did. Each line of the tests is given to
    /// `show`.
    ///
    /// # Errors
    /// What is missing: QEMU, mmdebstrap, a Debian mirror, a binary.
    pub fn run(&self, show: impl FnMut(&str)) -> Result<Option<u8>, TestbedError> {
        let cache = &self.settings.cache_dir;
        let root = root::machine_root(cache)?;
        let trees = root::tree_images(cache)?;
        let with_kvm = boot::kvm_works(&root.kernel);
        let payload = self.dir.join("payload.tar");
        payload::pack(self, &trees, with_kvm, &payload)?;
        boot::Boot {
            root: &root,
            trees: &trees,
            payload: &payload,
            with_kvm,
            console: &self.console_log(),
            journal: &self.journal_log(),
            deadline: self.deadline,
        }
        .run(show)
    }

    /// What kernel and systemd wrote on the serial console.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// The machine's journal, if the tests failed.
    #[must_use]
    pub fn journal_log(&self) -> PathBuf {
        self.dir.join("journal.log")
    }
}

fn fresh_dir(path: &Path) -> Result<(), TestbedError> {
    if path.try_exists().during("look for", path)? {
        fs::remove_dir_all(path).during("remove", path)?;
    }
    fs::create_dir_all(path).during("create", path)
}
