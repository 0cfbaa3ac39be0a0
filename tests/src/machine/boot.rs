//! QEMU: whether KVM works here, and the one boot.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::cases::Cases;
use super::root::{MachineRoot, TreeImage};
use crate::TestbedError;
use transship_path_error::During as _;

const QEMU: &str = "qemu-system-x86_64";
const MEMORY: &str = "3072";
/// The first line of a kernel is there within a second where KVM works.
const KVM_PATIENCE: Duration = Duration::from_secs(10);
/// For the power to go off once the tests have ended.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(60);

/// One machine.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    pub(super) root: &'a MachineRoot,
    pub(super) trees: &'a [TreeImage],
    pub(super) payload: &'a Path,
    pub(super) with_kvm: bool,
    /// For the list of cases and what the machine says.
    pub(super) dir: &'a Path,
    /// Of all boots of this run.
    pub(super) number: usize,
    pub(super) deadline: Instant,
}

impl Boot<'_> {
    /// Runs the cases that wait; gives the reason if the machine ended before all were done.
    pub(super) fn run(
        &self,
        cases: &mut Cases,
        show: impl Fn(&str),
    ) -> Result<Option<String>, TestbedError> {
        let mut list: String = cases.waiting().flat_map(|name| [name, "\n"]).collect();
        // A disk consists of whole sectors.
        list.extend(std::iter::repeat_n('\n', 512 - list.len() % 512));
        let path = self.cases_disk();
        fs::write(&path, list).during("write", &path)?;
        let mut qemu = self.command();
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut machine = Killed(qemu.spawn().map_err(|source| TestbedError::Start {
            line: format!("{QEMU} (run `make setup-vm`)"),
            source,
        })?);
        let stdout = machine.0.stdout.take().expect("it was asked for as a pipe");
        let lines = lines_of(stdout);
        loop {
            let left = match cases.are_done {
                false => self.deadline.saturating_duration_since(Instant::now()),
                true => POWER_OFF_PATIENCE,
            };
            match lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(text) = cases.take(&line) {
                        show(&text);
                    }
                }
                Err(_) if cases.are_done => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    return Ok(Some("there was no more time".to_owned()));
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(Some(self.reason_of_end())),
            }
        }
    }

    /// A panic of the kernel by its name, or the end of the console.
    fn reason_of_end(&self) -> String {
        let console = self.console_log();
        let text = fs::read(&console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let see = format!("see {}", console.display());
        match text.lines().find(|line| line.contains("Kernel panic")) {
            Some(line) => format!("the machine's kernel panicked: {} ({see})", line.trim()),
            None => format!("the machine ended before the tests ({see})"),
        }
    }

    fn cases_disk(&self) -> PathBuf {
        self.dir.join(format!("cases-{}", self.number))
    }

    fn console_log(&self) -> PathBuf {
        self.dir.join(format!("console-{}.log", self.number))
    }

    fn journal_log(&self) -> PathBuf {
        self.dir.join(format!("journal-{}.log", self.number))
    }

    fn command(&self) -> Command {
        let mut qemu = bare_machine(&self.root.kernel, MEMORY, self.with_kvm);
        qemu.args(["-smp", &processors(self.with_kvm).to_string()])
            .arg("-initrd")
            .arg(&self.root.initramfs)
            .args([
                "-append",
                "root=/dev/vda rw console=ttyS0 panic=-1 quiet systemd.show_status=1",
            ])
            .arg("-serial")
            .arg(format!("file:{}", self.console_log().display()));
        let disk = |qemu: &mut Command, id: &str, path: &Path, how: &str| {
            // Nothing that is written outlives the machine: no write has to reach the disk.
            let drive = format!(
                "if=none,id={id},file={},format=raw,cache=unsafe,{how}",
                path.display()
            );
            qemu.args(["-drive", &drive, "-device"])
                .arg(format!("virtio-blk-pci,drive={id},serial={id}"));
        };
        disk(&mut qemu, "root", &self.root.disk, "snapshot=on");
        for tree in self.trees {
            disk(&mut qemu, &tree.serial, &tree.disk, "readonly=on");
        }
        disk(&mut qemu, "payload", self.payload, "readonly=on");
        disk(&mut qemu, "cases", &self.cases_disk(), "readonly=on");
        qemu.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            // A chardev of kind "stdio" is closed when its stdin is, and the machine's writes wait.
            .args(["-chardev", "file,id=tests,path=/dev/stdout"])
            .args([
                "-device",
                "virtserialport,chardev=tests,name=transship.tests",
            ])
            .arg("-chardev")
            .arg(format!(
                "file,id=journal,path={}",
                self.journal_log().display()
            ))
            .args([
                "-device",
                "virtserialport,chardev=journal,name=transship.journal",
            ]);
        qemu
    }
}

/// A machine of `memory` MiB that ends with its kernel; it has no disk and no console yet.
fn bare_machine(kernel: &Path, memory: &str, with_kvm: bool) -> Command {
    let mut qemu = Command::new(QEMU);
    qemu.args(["-machine", "q35", "-m", memory, "-cpu", "max"])
        .args(accelerator(with_kvm))
        .args(["-display", "none", "-monitor", "none", "-nic", "none"])
        .args(["-no-reboot", "-kernel"])
        .arg(kernel);
    qemu
}

fn accelerator(with_kvm: bool) -> [&'static str; 2] {
    ["-accel", if with_kvm { "kvm" } else { "tcg,thread=single" }]
}

fn processors(with_kvm: bool) -> usize {
    match with_kvm {
        true => thread::available_parallelism().map_or(1, |count| count.get().min(4)),
        false => 1,
    }
}

/// Whether a kernel starts under KVM. /dev/kvm alone tells little: in a virtual machine without
/// nested virtualisation it may be there, take a machine, and never run it.
pub(super) fn kvm_works(kernel: &Path) -> bool {
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return false;
    }
    let probe = bare_machine(kernel, "512", true)
        .args(["-append", "console=ttyS0 panic=-1", "-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(probe) = probe else { return false };
    let mut probe = Killed(probe);
    let lines = lines_of(probe.0.stdout.take().expect("it was asked for as a pipe"));
    let end = Instant::now() + KVM_PATIENCE;
    while let Ok(line) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
        if line.contains("Linux version") {
            return true;
        }
    }
    false
}

/// The lines of a stream, until its end.
fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A process that ends with its holder.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
