//! The links that CRIU makes in `/dev/shm` of a pod for the time of a dump (`link-remap`).
//!
//! A named semaphore is open by a name that it has lost (glibc makes it under another one). CRIU gives such a file
//! a name for the dump, and takes it away again; the images know the file by it. So the names are written down
//! while they are there, by a program that CRIU runs, and made again before the restore.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use transship_checkpoint::shared_dirs::{DumpLink, LINK_PREFIX};

use crate::error::{Context, Result};

/// Writes down the links in a directory, if there are any.
///
/// # Errors
/// The directory cannot be read, or the file is there already.
pub fn write(dir: &Path, to: &Path) -> Result<()> {
    let links = find(dir).with_context(|| format!("cannot look into {}", dir.display()))?;
    if links.is_empty() {
        return Ok(());
    }
    let json = serde_json::to_vec(&links).context("names are JSON")?;
    let file = fs::File::create_new(to).and_then(|mut file| io::Write::write_all(&mut file, &json));
    file.with_context(|| format!("cannot write {}", to.display()))
}

fn find(dir: &Path) -> io::Result<Vec<DumpLink>> {
    let (mut links, mut names) = (Vec::new(), BTreeMap::new());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // One that cannot be a name in JSON is in no image either.
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let metadata = entry.metadata()?;
        if !metadata.is_file() {
            continue;
        }
        match name.starts_with(LINK_PREFIX) {
            true => links.push((metadata.ino(), name)),
            false => drop(names.insert(metadata.ino(), name)),
        }
    }
    let found = links.into_iter().filter_map(|(inode, link)| {
        let name = names.get(&inode)?.clone();
        Some(DumpLink { link, name })
    });
    Ok(found.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_known_by_another_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["sem.jobs", "other", "link_remap.9"] {
            fs::write(at(name), name).unwrap();
        }
        fs::create_dir(at("link_remap.dir")).unwrap();
        fs::hard_link(at("sem.jobs"), at("link_remap.3")).unwrap();
        let to = at("links");
        write(dir.path(), &to).unwrap();
        let links: Vec<DumpLink> = serde_json::from_slice(&fs::read(&to).unwrap()).unwrap();
        let [link] = links.as_slice() else {
            panic!("{links:?}");
        };
        assert_eq!(
            (link.link.as_str(), link.name.as_str()),
            ("link_remap.3", "sem.jobs")
        );
        assert!(link.is_plain());
        let bad = DumpLink {
            name: "../x".into(),
            ..link.clone()
        };
        assert!(!bad.is_plain());
    }
}
