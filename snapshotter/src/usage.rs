//! How much disk a directory tree takes, counted as containerd counts it: every inode once (hard
//! links by device and inode number), `st_blocks` times 512, the top directory included.
//!
//! Commit counts with [`count_small`], because containerd waits with its own database locked; what is
//! larger is counted by [`count`] afterwards.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use walkdir::WalkDir;

use transship_path_error::During as _;

use crate::error::Result;
use crate::record::Usage;

/// Counts the tree at `dir` however large and deep it is. What vanishes meanwhile is not counted.
///
/// # Errors
/// The first directory that cannot be read, or `dir` itself missing.
pub(crate) fn count(dir: &Path) -> Result<Usage> {
    let usage = transship_layer::upperdir_usage(dir)
        .map_err(|error| (error.path, error.source))
        .or_else(|(path, source)| Err(source).during("count the disk use of", path))?;
    Ok(Usage {
        inodes: usage.inodes,
        size: usage.size,
    })
}

/// Counts the tree at `dir` if that is quickly done: `None` when it has more than `limit` entries or
/// cannot be read without further ado.
#[must_use]
pub(crate) fn count_small(dir: &Path, limit: usize) -> Option<Usage> {
    let mut usage = Usage::default();
    // Only a file with more links can come along twice; most trees have none, and no set is built.
    let mut linked = HashSet::new();
    for (n, entry) in WalkDir::new(dir).into_iter().enumerate() {
        if n >= limit {
            return None;
        }
        let metadata = entry.and_then(|entry| entry.metadata()).ok()?;
        let seen_before = !metadata.is_dir()
            && metadata.nlink() > 1
            && !linked.insert((metadata.dev(), metadata.ino()));
        if !seen_before {
            usage.inodes += 1;
            usage.size += metadata.blocks() * 512;
        }
    }
    Some(usage)
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
        let usage = count_small(dir.path(), usize::MAX).unwrap();
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
        assert_eq!(count(dir.path()).unwrap(), usage);
    }

    #[test]
    fn larger_than_the_limit_is_left_to_the_other_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "").unwrap();
        assert_eq!(count_small(dir.path(), 1), None);
        assert_eq!(count_small(dir.path(), 2).unwrap().inodes, 2);
    }

    #[test]
    fn a_missing_tree_is_an_error_that_names_it() {
        let error = count(Path::new("/does/not/exist")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot count the disk use of /does/not/exist"
        );
        assert_eq!(count_small(Path::new("/does/not/exist"), 10), None);
    }
}
