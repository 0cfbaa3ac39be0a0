//! `create` of a container that had ended with 0 when the checkpoint of its pod was taken: an init
//! container, or one that was to run once. Those that are restored have what it did; run again, it would do
//! it a second time, to files that it finds changed. In its place runs a program that ends with 0.
//!
//! ```text
//! <bundle>/done/        the root file system; the container's own is not touched
//!   proc/  dev/         mounted as in any container
//!   end                 an ELF file: header, one segment, and
//!                         exit_group(0)
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;

use transship_path_error::During as _;

use super::bundle::{Bundle, Config, HeldRestore, Marker};
use super::{Front, FrontError, Outcome};
use crate::argv::Arguments;

/// Below the bundle.
const ROOT: &str = "done";
const PROGRAM: &str = "end";
/// What the runtimes need to start a program.
const MOUNTS: [&str; 3] = ["/proc", "/dev", "/dev/pts"];

/// Number of the machine in ELF, and `exit_group(0)` in its code.
#[cfg(target_arch = "x86_64")]
const MACHINE: Option<(u16, &[u8])> = Some((
    62,
    // xor edi, edi; mov eax, 231; syscall
    &[0x31, 0xff, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05],
));
#[cfg(target_arch = "aarch64")]
const MACHINE: Option<(u16, &[u8])> = Some((
    183,
    // mov x0, #0; mov x8, #94; svc #0
    &[0, 0, 0x80, 0xd2, 0xc8, 0x0b, 0x80, 0xd2, 1, 0, 0, 0xd4],
));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const MACHINE: Option<(u16, &[u8])> = None;

impl Front<'_> {
    /// Lets the runtime make a container that ends with 0. Where that is not known to be possible it starts
    /// from its image.
    pub(super) fn create_done(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
        restore: HeldRestore,
    ) -> Result<Option<Outcome>, FrontError> {
        let checkpoint = restore.checkpoint.clone();
        let Some(program) = program() else {
            let reason = "there is no program that ends with 0 for this machine";
            self.tell_cold_start(&create.id, Some(&checkpoint), reason);
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
        self.tell_done(&create.id, &checkpoint);
        Ok(None)
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

/// An ELF file that ends with 0.
fn program() -> Option<Vec<u8>> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let (machine, code) = MACHINE?;
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
    fn the_program_ends_with_0() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("done");
        let Some(program) = program() else { return };
        write_root(&root, &program).unwrap();
        // Elsewhere in this program a fork may have the file open for writing.
        let ended = loop {
            match std::process::Command::new(root.join(PROGRAM)).status() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                ended => break ended.unwrap(),
            }
        };
        assert_eq!(ended.code(), Some(0));
    }
}
