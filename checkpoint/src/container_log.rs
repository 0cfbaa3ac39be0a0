//! What a container has written so far, in a checkpoint: put in front of what it writes when it is restored.
//!
//! ```text
//! <container>/container.log    the newest 16 MiB, from the beginning of a line; as they were in its log
//! ```
//!
//! A file that kubelet has rotated away is not looked for.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::fcntl::OFlag;

use crate::beneath::{Links, open_regular};

/// The file in a container's directory.
pub const LOG_FILE: &str = "container.log";
/// So many bytes of a log come along.
pub const LOG_LIMIT: u64 = 16 << 20;

/// Copies the newest lines into a container's directory of a draft. Without a log there is nothing to copy.
///
/// # Errors
/// It cannot be read, or is no regular file.
pub fn keep(log: &Path, dir: &Path) -> io::Result<()> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let mut from = match OpenOptions::new().read(true).custom_flags(flags).open(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        from => from?,
    };
    let metadata = from.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let skipped = metadata.len().saturating_sub(LOG_LIMIT);
    from.seek(SeekFrom::Start(skipped))?;
    let mut lines = Vec::new();
    from.take(LOG_LIMIT).read_to_end(&mut lines)?;
    if skipped > 0 {
        let begun = lines.iter().position(|byte| *byte == b'\n');
        lines.drain(..begun.map_or(lines.len(), |end| end + 1));
    }
    if lines.is_empty() {
        return Ok(());
    }
    File::create_new(dir.join(LOG_FILE))?.write_all(&lines)
}

/// Writes what is in a container's directory of the checkpoint to the log of the container that is about to run.
///
/// # Errors
/// One of them cannot be read or written.
pub fn put_in_front(dir: &Path, log: &Path) -> io::Result<()> {
    let from = match open_regular(dir, Path::new(LOG_FILE), Links::Refused) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        from => from?,
    };
    let mut to = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    io::copy(&mut from.take(LOG_LIMIT), &mut to).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_newest_lines_come_along() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        keep(&log, dir.path()).unwrap();
        let line = format!("{}\n", "x".repeat(1023));
        let lines = usize::try_from(LOG_LIMIT).unwrap() / line.len();
        fs::write(&log, format!("oldest{}newest\n", line.repeat(lines))).unwrap();
        keep(&log, dir.path()).unwrap();
        let kept = fs::read_to_string(dir.path().join(LOG_FILE)).unwrap();
        assert!(kept.starts_with("xxx") && kept.ends_with("x\nnewest\n"));
        assert!(kept.len() as u64 <= LOG_LIMIT && kept.len() % line.len() == 7);
        let new = dir.path().join("new");
        put_in_front(dir.path(), &new).unwrap();
        assert_eq!(fs::read_to_string(&new).unwrap(), kept);
        // A checkpoint without one.
        put_in_front(&dir.path().join("none"), &new).unwrap();
    }
}
