//! What is mounted on this node below a directory.
//!
//! ```text
//! 46 66 0:61 / /var/lib/pods/a\\040b/sub rw,relatime shared:51 - tmpfs one rw     /proc/self/mountinfo, proc(5)
//! id parent device root  mount point; blanks, tabs, newlines and backslashes in octal
//! ```

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::mounted_overlay::unescape_octal;

/// The places below `dir` where something is mounted, in the mount namespace of this process; what is mounted on `dir`
/// itself is none of them.
///
/// # Errors
/// `dir` is not there, or the table cannot be read.
pub fn mounted_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let dir = fs::canonicalize(dir)?;
    // Names are bytes.
    Ok(below(&fs::read("/proc/self/mountinfo")?, &dir))
}

fn below(table: &[u8], dir: &Path) -> Vec<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|at| PathBuf::from(OsString::from_vec(unescape_octal(at))))
        .filter(|at| at.starts_with(dir) && at != dir)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_is_told_from_what_is_beside() {
        let table = b"46 66 0:61 / /v/data rw shared:51 - tmpfs one rw\n\
            47 46 0:62 / /v/data/a\\040b\\134c rw - tmpfs two rw\n\
            48 46 0:62 / /v/data/\xff rw - tmpfs two rw\n49 46 0:62 / /v/data2 rw - tmpfs two rw\n50 46\n";
        let found = below(table, Path::new("/v/data"));
        let bytes = OsString::from_vec(b"/v/data/\xff".to_vec());
        assert_eq!(found, [PathBuf::from("/v/data/a b\\c"), bytes.into()]);
        assert_eq!(below(b"", Path::new("/")), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_directory_that_is_not_there_has_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(mounted_below(dir.path()).unwrap(), Vec::<PathBuf>::new());
        mounted_below(&dir.path().join("missing")).unwrap_err();
    }
}
