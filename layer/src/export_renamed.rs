//! Export of what `redirect_dir=on` and `metacopy=on` leave in the lower layers.
//!
//! Some distributions turn both on by default (Arch's kernel does), and containerd does not turn them
//! off. A directory renamed that way exists in the upperdir only as `redirect` to where its content
//! is; a file whose mode or owner was changed only as its attributes. An OCI layer cannot point to
//! another place, so the content is written in full, below an opaque directory:
//!
//! ```text
//! lower   a/x a/y                       tar   b/            attributes of upper b
//! upper   b  redirect="a"               ->    b/.wh..wh..opq   if a lower layer has a b
//!         b/y  whiteout                       b/x           read from lower a/x
//!         b/z                                 b/z           read from upper
//!         a  whiteout                         .wh.a
//! ```

use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use nix::fcntl::readlinkat;
use tar::EntryType;

use crate::export::{Data, Export, stat_open};
use crate::export_error::ExportError;
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::overlay_marks::{OverlayMarks, read_marks_and_xattrs};
use crate::path_bytes::{push_component, split_last};
use crate::upper_walk::UpperWalk;

impl<W: Write> Export<'_, W> {
    /// Where the directory named last by the walk has its lower half, when that is not at its own
    /// path.
    pub(crate) fn lower_path_of(
        &mut self,
        walk: &UpperWalk,
        marks: &OverlayMarks,
    ) -> Result<Option<Vec<u8>>, ExportError> {
        let path = walk.path();
        let lower_path = match &marks.redirect {
            Some(redirect) => resolve_redirect(walk, path, redirect)?,
            None if marks.opaque => return Ok(None),
            None => match walk.lower_path() {
                Some(parent) => join(parent, split_last(path).1),
                None => return Ok(None),
            },
        };
        let below = self.lower.look_up(&lower_path)?;
        if below.is_some_and(|inode| inode.attributes.is_directory()) {
            return Ok(Some(lower_path));
        }
        if marks.redirect.is_some() {
            return Err(ExportError::inexact(
                path,
                "redirect_dir=on: its content is in a lower layer that was not given or lacks it",
            ));
        }
        // New in a renamed directory: nothing below, but its names still need no whiteouts.
        Ok(None)
    }

    /// Writes what only the lower half of the renamed directory just entered has.
    pub(crate) fn write_lower_half(&mut self, walk: &UpperWalk) -> Result<(), ExportError> {
        let Some(lower_path) = walk.lower_path() else {
            return Ok(());
        };
        let names = self.lower.list(lower_path)?;
        for name in names.iter().filter(|name| !walk.innermost_has(name)) {
            self.write_lower_tree(join(walk.path(), name), join(lower_path, name))?;
        }
        Ok(())
    }

    /// Writes a tree of the lower layers under another path, directories before what is in them.
    fn write_lower_tree(&mut self, path: Vec<u8>, lower_path: Vec<u8>) -> Result<(), ExportError> {
        let mut waiting = vec![(path, lower_path)];
        while let Some((path, lower_path)) = waiting.pop() {
            if self.write_lower_inode(&path, &lower_path)? {
                let names = self.lower.list(&lower_path)?;
                waiting.extend(
                    names
                        .iter()
                        .rev()
                        .map(|name| (join(&path, name), join(&lower_path, name))),
                );
            }
        }
        Ok(())
    }

    /// Writes one inode of the lower layers. Returns whether it is a directory.
    fn write_lower_inode(&mut self, path: &[u8], lower_path: &[u8]) -> Result<bool, ExportError> {
        let Some(inode) = self.lower.look_up(lower_path)? else {
            return Err(ExportError::changed(path));
        };
        if self.stack.has_idmapped_lowers {
            return Err(ExportError::inexact(
                path,
                "redirect_dir=on: its owner in the lower layer is shown through an id mapping",
            ));
        }
        let attributes = inode.attributes;
        let mut link = Vec::new();
        if attributes.inode_type == InodeType::Symlink {
            let target = readlinkat(inode.directory(), split_last(lower_path).1)
                .map_err(|errno| ExportError::io("read the symlink", path, errno))?;
            link = target.as_bytes().to_vec();
        }
        let namespace = self.stack.overlay_xattrs;
        let holder = inode.holder();
        read_marks_and_xattrs(&mut self.xattr_reader, holder, namespace, &mut self.xattrs)
            .map_err(|error| ExportError::io("read the attributes of", path, error))?;
        let entry_type = match attributes.inode_type {
            InodeType::Directory => {
                self.write_directory_entry(path, &attributes)?;
                return Ok(true);
            }
            InodeType::Socket => {
                self.stats.sockets += 1;
                return Ok(false);
            }
            InodeType::Regular => EntryType::Regular,
            InodeType::Symlink => EntryType::Symlink,
            InodeType::CharDevice => EntryType::Char,
            InodeType::BlockDevice => EntryType::Block,
            InodeType::Fifo => EntryType::Fifo,
        };
        if self.write_hard_link(path, &attributes, &OverlayMarks::default())? {
            return Ok(false);
        }
        if entry_type == EntryType::Regular {
            self.write_data_from_below(path, lower_path, &attributes)?;
        } else {
            self.write_entry(path, entry_type, &attributes, &link, Data::Follows)?;
        }
        Ok(false)
    }

    /// Writes a file whose attributes are in the upperdir and whose data is in a lower layer
    /// (`metacopy=on`): for a layer it is an ordinary changed file.
    pub(crate) fn write_metacopy(
        &mut self,
        walk: &UpperWalk,
        path: &[u8],
        attributes: &InodeAttributes,
        marks: &OverlayMarks,
    ) -> Result<(), ExportError> {
        let lower_path = match &marks.redirect {
            Some(redirect) => resolve_redirect(walk, path, redirect)?,
            None => resolve_redirect(walk, path, split_last(path).1)?,
        };
        self.stats.metacopy_files += 1;
        self.write_data_from_below(path, &lower_path, attributes)
    }

    fn write_data_from_below(
        &mut self,
        path: &[u8],
        lower_path: &[u8],
        attributes: &InodeAttributes,
    ) -> Result<(), ExportError> {
        let Some(file) = self.lower.open_data(lower_path)? else {
            return Err(ExportError::inexact(
                path,
                "metacopy=on: its data is in a lower layer that was not given or lacks it",
            ));
        };
        let data = stat_open(&file, path)?;
        if data.size != attributes.size {
            return Err(ExportError::inexact(
                path,
                "metacopy=on: its data has another size",
            ));
        }
        self.write_data(path, attributes, &file)?;
        if data.unchanged_in(&stat_open(&file, path)?) {
            Ok(())
        } else {
            Err(ExportError::changed(path))
        }
    }
}

/// Path in the lower layers that a redirect means: from the root of the overlay when it begins with
/// a slash, else a name beside the lower half of the directory that holds it. The kernel follows nothing else.
fn resolve_redirect(
    walk: &UpperWalk,
    path: &[u8],
    redirect: &[u8],
) -> Result<Vec<u8>, ExportError> {
    let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..");
    let names = redirect.strip_prefix(b"/").unwrap_or(redirect);
    let is_beside = names.len() == redirect.len();
    if is_beside && names.contains(&b'/') || !names.split(|byte| *byte == b'/').all(is_name) {
        return Err(ExportError::inexact(
            path,
            "redirect_dir=on: what it says is no place in the lower layers",
        ));
    }
    if !is_beside {
        return Ok(names.to_vec());
    }
    let parent = walk.lower_path().unwrap_or(split_last(walk.path()).0);
    Ok(join(parent, names))
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = parent.to_vec();
    push_component(&mut path, name);
    path
}
