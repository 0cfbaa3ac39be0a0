//! What the layer of a container's files changes: its entries, told without unpacking them.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};

use serde::Serialize;
use transship_digest::Sha256;
use transship_layer::{Archive, ImportError, LayerChange, MemberKind, decompress};

/// As many changes are listed, with paths of as many bytes; those behind are counted.
const LISTED: usize = 100_000;
const PATHS: usize = 16 << 20;
/// Bytes read at once.
const PIECE: usize = 64 << 10;

/// What a layer changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LayerChanges {
    /// How many entries it has.
    pub count: u64,
    /// Bytes of all its files.
    pub bytes: u64,
    /// The changes, in the order of the layer; of 100 000 and more, or 16 MiB of paths, the first ones.
    pub changes: Vec<Change>,
}

/// One file that a layer changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Its path; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// `put`, `deleted` or `opaque`.
    pub change: &'static str,
    /// What it is; nothing of a file that is deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// Bytes of a regular file.
    pub bytes: u64,
    /// SHA-256 of a regular file's content, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Whether files are read through for their digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digests {
    /// They are.
    Taken,
    /// They are not.
    LeftOut,
}

/// Reads a layer, plain or compressed.
///
/// # Errors
/// It is damaged.
pub fn layer_changes(layer: impl Read, digests: Digests) -> Result<LayerChanges, ImportError> {
    let plain = decompress(BufReader::new(layer)).map_err(|source| ImportError::Read { source })?;
    let mut archive = Archive::new(plain);
    let mut found = LayerChanges::default();
    let mut piece = vec![0; PIECE];
    let mut paths = 0_usize;
    while let Some(member) = archive.next_member()? {
        let (path, change) = member.layer_change();
        if path.is_empty() {
            continue;
        }
        let is_file = matches!(member.kind, MemberKind::File | MemberKind::SparseFile);
        let is_put = change == LayerChange::Put;
        let bytes = if is_put && is_file { member.size } else { 0 };
        found.count += 1;
        found.bytes = found.bytes.saturating_add(bytes);
        let mut sha256 = None;
        if digests == Digests::Taken && is_put && is_file {
            let mut hasher = Sha256::new();
            loop {
                match archive.read_piece(&mut piece)? {
                    0 => break,
                    len => hasher.update(&piece[..len]),
                }
            }
            sha256 = Some(hasher.finish_hex());
        }
        paths += path.len();
        if found.changes.len() < LISTED && paths < PATHS {
            found.changes.push(Change {
                path: format!("/{}", String::from_utf8_lossy(&path)),
                change: match change {
                    LayerChange::Put => "put",
                    LayerChange::Deleted => "deleted",
                    LayerChange::Opaque => "opaque",
                },
                kind: is_put.then(|| kind_name(member.kind)),
                bytes,
                sha256,
            });
        }
    }
    archive.finish()?;
    Ok(found)
}

fn kind_name(kind: MemberKind) -> &'static str {
    match kind {
        MemberKind::File | MemberKind::SparseFile => "file",
        MemberKind::Directory => "directory",
        MemberKind::Symlink => "symlink",
        MemberKind::HardLink => "hard link",
        MemberKind::Special => "device",
    }
}

impl LayerChanges {
    /// What `newer` changes otherwise than this one: paths, each with what is different.
    #[must_use]
    pub fn compared_with(&self, newer: &Self) -> Vec<(String, &'static str)> {
        let by_path = |changes: &[Change]| -> BTreeMap<String, Change> {
            let each = changes.iter().filter(|it| it.kind != Some("directory"));
            each.map(|it| (it.path.clone(), it.clone())).collect()
        };
        let (old, mut new) = (by_path(&self.changes), by_path(&newer.changes));
        let mut found = Vec::new();
        for (path, before) in old {
            match new.remove(&path) {
                Some(after) if after == before => {}
                Some(after) if after.change == "deleted" => found.push((path, "deleted")),
                Some(_) => found.push((path, "changed")),
                // A change that is not there any more: the file of the image, or none.
                None => found.push((path, "undone")),
            }
        }
        let added = new.into_values().map(|it| {
            let how = if it.change == "put" {
                "added"
            } else {
                it.change
            };
            (it.path, how)
        });
        found.extend(added);
        found.sort();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, data) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn two_layers_are_compared_by_content() {
        let old = layer(&[("a", b"1"), ("b", b"2"), ("c", b"3"), ("etc/.wh.d", b"")]);
        let new = layer(&[("a", b"1"), ("b", b"X"), ("etc/.wh.c", b""), ("e", b"5")]);
        let read = |layer: &[u8]| layer_changes(layer, Digests::Taken).unwrap();
        let (old, new) = (read(&old), read(&new));
        assert_eq!((old.count, old.bytes), (4, 3));
        assert_eq!(old.changes[3].path, "/etc/d");
        assert_eq!(old.changes[3].change, "deleted");
        let found = old.compared_with(&new);
        let expected = [
            ("/b", "changed"),
            ("/c", "undone"),
            ("/e", "added"),
            ("/etc/c", "deleted"),
            ("/etc/d", "undone"),
        ];
        assert_eq!(found, expected.map(|(path, how)| (path.to_owned(), how)));
        assert!(old.compared_with(&old).is_empty());
    }

    #[test]
    fn long_paths_are_counted_and_not_kept() {
        let long = "x/".repeat(50_000);
        let names: Vec<_> = (0..300).map(|nth| format!("{nth}/{long}x")).collect();
        let mut builder = tar::Builder::new(Vec::new());
        for name in &names {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &b""[..]).unwrap();
        }
        let layer = builder.into_inner().unwrap();
        let found = layer_changes(&layer[..], Digests::LeftOut).unwrap();
        assert_eq!(found.count, 300);
        let kept: usize = found.changes.iter().map(|it| it.path.len()).sum();
        assert!((8 << 20..=PATHS).contains(&kept), "{kept}");
    }

    #[test]
    fn a_layer_that_is_cut_off_is_an_error() {
        let whole = layer(&[("a", &[7; 5000])]);
        assert!(layer_changes(&whole[..2000], Digests::LeftOut).is_err());
    }
}
