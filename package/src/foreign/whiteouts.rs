//! Deletions that stand in a list of their own, as whiteouts of the layer that they belong to.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;

use transship_layer::{Archive, LayerChange};
use transship_path_error::During as _;

use crate::error::PackageError;

/// What ends a tar, and what its members are padded to.
const BLOCK: u64 = 512;

/// Adds whiteouts for the paths `deleted` to the plain layer at `path`; those that the layer has already are
/// left out. `root` are the rights of its root, when the layer does not say them; those that it has then are returned.
pub(super) fn append(
    path: &Path,
    deleted: &[String],
    root: Option<u32>,
) -> Result<Option<u32>, PackageError> {
    let refused = |reason: String| PackageError::Member {
        member: "deleted.files".to_owned(),
        reason,
    };
    let in_layer = |error| PackageError::Layer {
        container: "the package".to_owned(),
        source: error,
    };
    let file = File::open(path).during("open", path)?;
    let mut archive = Archive::new(file);
    // The layer may have any number of paths, and a list has an end.
    let asked: BTreeSet<&[u8]> = { deleted.iter() }
        .map(|path| path.trim_start_matches('/').as_bytes())
        .collect();
    let (mut put, mut gone) = (BTreeSet::new(), BTreeSet::new());
    let (mut end, mut root_in_layer) = (0, None);
    while let Some(member) = archive.next_member().map_err(in_layer)? {
        let (changed, change) = member.layer_change();
        match change {
            LayerChange::Put => {
                if changed.is_empty() {
                    root_in_layer = Some(member.mode & 0o7777);
                }
                if asked.contains(&changed[..]) {
                    put.insert(changed);
                }
            }
            LayerChange::Deleted if asked.contains(&changed[..]) => drop(gone.insert(changed)),
            LayerChange::Deleted | LayerChange::Opaque => {}
        }
        archive.skip_data().map_err(in_layer)?;
        end = archive.offset();
    }
    let mut whiteouts = Vec::new();
    for path in deleted {
        let relative = path.trim_start_matches('/');
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if relative.is_empty() || !relative.split('/').all(plain) {
            return Err(refused(format!("{path:?} is no path of a file")));
        }
        let (parent, name) = relative.rsplit_once('/').unwrap_or(("", relative));
        // Who writes for readers that know no whiteouts has the names of whiteouts deleted.
        if name.starts_with(".wh.") || gone.contains(relative.as_bytes()) {
            continue;
        }
        if put.contains(relative.as_bytes()) {
            return Err(refused(format!(
                "{path:?} is a file of rootfs-diff.tar as well"
            )));
        }
        whiteouts.push(match parent {
            "" => format!(".wh.{name}"),
            parent => format!("{parent}/.wh.{name}"),
        });
    }
    let mut file = OpenOptions::new()
        .write(true)
        .open(path)
        .during("open", path)?;
    let end = end.next_multiple_of(BLOCK);
    file.set_len(end)
        .and_then(|()| file.seek(SeekFrom::Start(end)))
        .during("cut", path)?;
    let mut builder = tar::Builder::new(&mut file);
    for name in whiteouts {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(0);
        header.set_mode(0o644);
        let written = builder.append_data(&mut header, &name, std::io::empty());
        written.map_err(|error| refused(format!("{name:?} cannot be written: {error}")))?;
    }
    if let Some(mode) = root.filter(|_| root_in_layer.is_none()) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        header.set_mode(mode);
        let written = builder.append_data(&mut header, "./", std::io::empty());
        written.during("write", path)?;
    }
    builder.finish().during("write", path)?;
    drop(builder);
    file.flush().during("write", path)?;
    Ok(root_in_layer.or(root))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer_changes::{Digests, layer_changes};

    fn layer(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("layer.tar");
        let mut builder = tar::Builder::new(File::create(&path).unwrap());
        for (name, data) in [("etc/motd", &b"hello"[..]), ("etc/.wh.gone", b"")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, data).unwrap();
        }
        builder.finish().unwrap();
        path
    }

    fn changes(path: &Path) -> Vec<(String, &'static str)> {
        let read = layer_changes(File::open(path).unwrap(), Digests::LeftOut).unwrap();
        let each = read.changes.into_iter();
        each.map(|it| (it.path, it.change)).collect()
    }

    #[test]
    fn deletions_are_added_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = layer(dir.path());
        let deleted = ["/var/lib/x", "/etc/gone", "/etc/.wh.gone", "/top"];
        append(&path, &deleted.map(str::to_owned), None).unwrap();
        let expected = [
            ("/etc/motd", "put"),
            ("/etc/gone", "deleted"),
            ("/var/lib/x", "deleted"),
            ("/top", "deleted"),
        ];
        assert_eq!(
            changes(&path),
            expected.map(|(it, how)| (it.to_owned(), how))
        );
    }

    #[test]
    fn the_layer_says_the_rights_of_its_root_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = layer(dir.path());
        assert_eq!(append(&path, &[], None).unwrap(), None);
        assert_eq!(append(&path, &[], Some(0o555)).unwrap(), Some(0o555));
        assert_eq!(append(&path, &[], Some(0o700)).unwrap(), Some(0o555));
    }

    #[test]
    fn a_list_that_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = layer(dir.path());
        for deleted in ["/", "", "/../x", "/a//b", "/etc/./x", "/etc/motd"] {
            let deleted = [deleted.to_owned()];
            assert!(append(&path, &deleted, None).is_err(), "{deleted:?}");
        }
        append(&path, &[], None).unwrap();
        assert_eq!(changes(&path).len(), 2);
    }
}
