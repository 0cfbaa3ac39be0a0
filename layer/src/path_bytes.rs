//! Paths as the bytes they are: relative to the root of a layer, components joined by `/`, no `.`,
//! no `..`, no empty component; the root itself is the empty path.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// For messages; the root is shown as `/`.
pub(crate) fn to_path_buf(path: &[u8]) -> PathBuf {
    if path.is_empty() {
        PathBuf::from("/")
    } else {
        PathBuf::from(OsStr::from_bytes(path))
    }
}

/// The components of a path.
pub(crate) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|component| !component.is_empty())
}

/// The path that `target`, the text of a symlink in the directory `dir`, means when the root of the layer
/// is the root of all: `..` never leads out of it.
pub(crate) fn join_cleaned(dir: &[u8], target: &[u8]) -> Vec<u8> {
    let mut path = if target.starts_with(b"/") {
        Vec::new()
    } else {
        dir.to_vec()
    };
    for component in components(target) {
        match component {
            b"." => {}
            b".." => path.truncate(split_last(&path).0.len()),
            component => push_component(&mut path, component),
        }
    }
    path
}

/// A name in a tar as such a path.
pub(crate) fn clean_path(name: &[u8]) -> Vec<u8> {
    join_cleaned(b"", name)
}

/// Parent and last component.
pub(crate) fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// Appends a component.
pub(crate) fn push_component(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}

/// Brings a name into that form. The root of the layer is the root of all: absolute names
/// count from there, and `..` does not lead out of it, as Go's `filepath.Clean` and containerd have it.
pub(crate) fn clean_path_into(raw: &[u8], path: &mut Vec<u8>) {
    path.clear();
    for component in components(raw) {
        match component {
            b"." => {}
            b".." => path.truncate(split_last(path).0.len()),
            component => push_component(path, component),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_inside() {
        for (dir, target, path) in [
            ("", "usr/lib", "usr/lib"),
            ("a/b", "c", "a/b/c"),
            ("a/b", "../c", "a/c"),
            ("a/b", "/c/./d//", "c/d"),
            ("a", "../../../etc", "etc"),
            ("a", "..", ""),
            ("", "/", ""),
            ("a", "b/../..", ""),
        ] {
            let joined = join_cleaned(dir.as_bytes(), target.as_bytes());
            assert_eq!(joined, path.as_bytes(), "{dir} {target}");
        }
    }
}
