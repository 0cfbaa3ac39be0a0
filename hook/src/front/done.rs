//! `create` of a container that had ended when the checkpoint of its pod was taken: an init container, one
//! that was to run once, or one that has failed. Those that are restored have what it did; run again, it would do
//! it a second time, to files that it finds changed. In its place runs a program that ends with the same code: what is
//! done about a failure is kubelet's to decide, as it was. Where kubelet makes it again in the same sandbox, it is one
//! that always runs (a sidecar that was between two runs), and starts from its image.
//!
//! ```text
//! <bundle>/done/        the root file system; the container's own is not touched
//!   proc/  dev/         mounted as in any container
//!   end                 an ELF file: header, one segment, and
//!                         exit_group(code)
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;

use transship_checkpoint::annotations::is_of_migration;
use transship_path_error::During as _;

use super::bundle::{Bundle, Config, HeldRestore, Marker, Phase};
use super::{Front, FrontError, Outcome};
use crate::argv::Arguments;
use crate::runtime::exit_code;

/// Below the bundle.
const ROOT: &str = "done";
const PROGRAM: &str = "end";
/// What the runtimes need to start a program.
const MOUNTS: [&str; 3] = ["/proc", "/dev", "/dev/pts"];

/// Number of the machine in ELF, and `exit_group(code)` in its code.
#[cfg(target_arch = "x86_64")]
fn machine(code: u8) -> Option<(u16, Vec<u8>)> {
    // mov edi, code; mov eax, 231; syscall
    let program = [0xbf, code, 0, 0, 0, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05];
    Some((62, program.to_vec()))
}
#[cfg(target_arch = "aarch64")]
fn machine(code: u8) -> Option<(u16, Vec<u8>)> {
    // mov x0, #code; mov x8, #94; svc #0
    let first = 0xd280_0000_u32 | u32::from(code) << 5;
    let rest = [0xc8, 0x0b, 0x80, 0xd2, 1, 0, 0, 0xd4];
    Some((183, [&first.to_le_bytes()[..], &rest].concat()))
}
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn machine(_code: u8) -> Option<(u16, Vec<u8>)> {
    None
}

impl Front<'_> {
    /// Lets the runtime make a container that ends with `code`. Where that is not known to be possible it starts
    /// from its image.
    pub(super) fn create_done(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
        (restore, code): (HeldRestore, u8),
    ) -> Result<Option<Outcome>, FrontError> {
        let checkpoint = restore.checkpoint.clone();
        let Some(program) = program(code) else {
            let reason = format!("there is no program that ends with {code} for this machine");
            self.tell_cold_start(&create.id, Some(&checkpoint), &reason);
            return self.create_cold(create, bundle, config);
        };
        write_root(&bundle.path(ROOT), &program)?;
        let spec = &mut config.spec;
        spec.keep_mounts(&MOUNTS);
        // They expect the files of the container.
        spec.remove_hooks();
        spec.set("/root", json!({ "path": ROOT, "readonly": true }));
        spec.set("/process/args", json!([format!("/{PROGRAM}")]));
        spec.set("/process/cwd", json!("/"));
        bundle.replace_config(&config.spec)?;
        bundle.write_marker(&Marker::done(restore))?;
        self.tell_done(&create.id, &checkpoint, code);
        Ok(None)
    }

    /// `start` of that program.
    pub(super) fn start_done(
        &self,
        id: &str,
        bundle: &Bundle,
        mut marker: Marker,
    ) -> Result<Outcome, FrontError> {
        // What a migration brings has run when it is let go: before that nothing says that it has ended.
        if let Some(restore) = &marker.restore
            && !is_of_migration(&restore.checkpoint)
        {
            self.consume(restore)?;
        }
        let args = self.with_globals("start", vec![id.into()]);
        let status = self.env.runtime.run(&self.env.own, &args)?;
        if status.success() {
            if let (Some(restore), Some(config)) = (&marker.restore, bundle.any_config(id)?) {
                // Without it the container ends so once more.
                drop(self.pod_of(id, &config)?.set_ended(&restore.container));
            }
            marker.phase = Phase::Running;
            bundle.write_marker(&marker)?;
        }
        Ok(Outcome::Exit(exit_code(status)))
    }
}

fn write_root(root: &Path, program: &[u8]) -> Result<(), FrontError> {
    for dir in [root, &root.join("proc"), &root.join("dev")] {
        fs::create_dir_all(dir).during("create", dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).during("open", dir)?;
    }
    let path = root.join(PROGRAM);
    fs::write(&path, program).during("write", &path)?;
    Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).during("open", &path)?)
}

/// An ELF file that ends with this code.
fn program(exit_code: u8) -> Option<Vec<u8>> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let (machine, code) = machine(exit_code)?;
    let len = HEADERS + u64::try_from(code.len()).ok()?;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // e_type (executable), e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags.
    file.extend(2_u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for field in [BASE + HEADERS, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    // e_ehsize, e_phentsize, e_phnum, and no sections.
    for field in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    // p_type (loaded), p_flags (read, execute), p_offset, addresses, lengths, alignment.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for field in [0, BASE, BASE, len, len, 0x1_0000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_ends_with_its_code() {
        let dir = tempfile::tempdir().unwrap();
        for code in [0, 1, 137, 255] {
            let root = dir.path().join(code.to_string());
            let Some(program) = program(code) else { return };
            write_root(&root, &program).unwrap();
            // Elsewhere in this program a fork may have the file open for writing.
            let ended = loop {
                match std::process::Command::new(root.join(PROGRAM)).status() {
                    Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                    ended => break ended.unwrap(),
                }
            };
            assert_eq!(ended.code(), Some(code.into()));
        }
    }
}
