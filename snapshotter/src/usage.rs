//! How much disk a directory tree takes, counted as containerd counts it: every inode once (hard
//! links by device and inode number), `st_blocks` times 512, the top directory included.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use walkdir::WalkDir;

use crate::error::{IoContext, Result};
use crate::record::Usage;

/// Counts the tree at `dir`; `None` when it has more than `limit` entries.
///
/// Entries that vanish during the walk are not counted: an active snapshot is in use meanwhile.
///
/// # Errors
/// A directory that cannot be read, or `dir` itself missing.
pub fn count(dir: &Path, limit: usize) -> Result<Option<Usage>> {
    let mut usage = Usage::default();
    // Only a file with more links can come along twice; most trees have none, and no set is built.
    let mut linked = HashSet::new();
    for (n, entry) in WalkDir::new(dir).into_iter().enumerate() {
        if n >= limit {
            return Ok(None);
        }
        let found = entry.and_then(|entry| Ok((entry.metadata()?, entry.depth())));
        let metadata = match found {
            Ok((metadata, _)) => metadata,
            Err(error) if error.depth() > 0 && is_missing(&error) => continue,
            Err(error) => {
                let path = error.path().unwrap_or(dir).to_path_buf();
                return Err(std::io::Error::from(error)).during("count the disk use of", path);
            }
        };
        let seen_before = !metadata.is_dir()
            && metadata.nlink() > 1
            && !linked.insert((metadata.dev(), metadata.ino()));
        if !seen_before {
            usage.inodes += 1;
            usage.size += metadata.blocks() * 512;
        }
    }
    Ok(Some(usage))
}

fn is_missing(error: &walkdir::Error) -> bool {
    error
        .io_error()
        .is_some_and(|io| io.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn hard_links_count_once_and_the_top_counts() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 8192]).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("d/l")).unwrap();
        let usage = count(dir.path(), usize::MAX).unwrap().unwrap();
        let blocks = |name: &str| {
            fs::symlink_metadata(dir.path().join(name))
                .unwrap()
                .blocks()
        };
        assert_eq!(usage.inodes, 4);
        assert_eq!(
            usage.size,
            (blocks("") + blocks("a") + blocks("d") + blocks("d/l")) * 512
        );
    }

    #[test]
    fn larger_than_the_limit_is_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "").unwrap();
        assert_eq!(count(dir.path(), 1).unwrap(), None);
        assert_eq!(count(dir.path(), 2).unwrap().unwrap().inodes, 2);
    }

    #[test]
    fn a_missing_tree_is_an_error_that_names_it() {
        let error = count(Path::new("/does/not/exist"), 10).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot count the disk use of /does/not/exist"
        );
    }
}
