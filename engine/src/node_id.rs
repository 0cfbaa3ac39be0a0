//! What tells this node from all others, and its boot from those before it.
//!
//! ```text
//! /var/lib/transship/node-id        32 hexadecimal digits, made once: whoever has lost it has lost its records as well
//! /proc/sys/kernel/random/boot_id   the kernel's, another one after each boot
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::error::{Context as _, Result};
use crate::locks::make_private;

const NODE_ID: &str = "/var/lib/transship/node-id";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const BYTES: usize = 16;

/// What tells this node from all others; made, and on the disk, when it is first asked for.
///
/// # Errors
/// A system call failed.
pub(crate) fn node_id() -> Result<String> {
    of_file(Path::new(NODE_ID))
}

/// Whether another node may have said it of itself.
pub(crate) fn is_node_id(id: &str) -> bool {
    id.len() == 2 * BYTES && id.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// What tells this boot from all others.
///
/// # Errors
/// The kernel does not say it.
pub(crate) fn boot_id() -> Result<String> {
    let id = fs::read_to_string(BOOT_ID).with_context(|| format!("cannot read {BOOT_ID}"))?;
    Ok(id.trim().to_owned())
}

/// Random bytes in hexadecimal digits, that nobody guesses.
///
/// # Errors
/// The kernel gives none.
pub(crate) fn random_digits<const BYTES: usize>() -> Result<String> {
    let mut bytes = [0; BYTES];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(transship_digest::hex(&bytes))
}

fn of_file(path: &Path) -> Result<String> {
    let failed = || format!("cannot make {}", path.display());
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        id => {
            let id = id.with_context(|| format!("cannot read {}", path.display()))?;
            return Ok(id.trim().to_owned());
        }
    }
    let id = random_digits::<BYTES>()?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    make_private(dir)?;
    let new = path.with_extension(format!("new{}", std::process::id()));
    let made = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        writeln!(file, "{id}")?;
        file.sync_all()?;
        // Of two that make one at once the first has made it.
        match fs::hard_link(&new, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        File::open(dir)?.sync_all()
    };
    let made = made();
    drop(fs::remove_file(&new));
    made.with_context(failed)?;
    let id = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("transship/node-id");
        let id = of_file(&path).unwrap();
        assert_eq!(id.len(), 2 * BYTES);
        assert_eq!(of_file(&path).unwrap(), id);
        let other = of_file(&dir.path().join("other")).unwrap();
        assert_ne!(other, id);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(!boot_id().unwrap().is_empty());
    }
}
