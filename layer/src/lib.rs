//! Overlay upperdir <-> OCI layer tar, exact both ways, in time proportional to the changes.
//!
//! ```text
//!  upperdir ──> upper_walk ──> export ──────────────> tar_write ──> any Write
//!               sorted, by     types, hard links,     ustar + PAX (pax), holes (sparse)
//!               descriptors    marks -> `.wh.` names
//!               read_ahead: small files and directories to come, loaded by other threads
//!                   │              │
//!                xattrs <── overlay_marks          lower_view: the lowerdirs as one tree,
//!                   │              │               asked by name only
//!  upperdir <── upper_tree <── import <───────────── tar_read <── decompress <── any BufRead
//!               stack of       `.wh.` names ->       hostile input: bounded before memory
//!               descriptors    marks, entries        is taken
//! ```
//!
//! The layer is what <https://github.com/opencontainers/image-spec/blob/main/layer.md> describes:
//!
//! ```text
//! ./                     the root's own attributes (containerd skips it, others take it)
//! a/                     directory; changed ones only, with all their attributes
//! a/.wh..wh..opq         nothing of the lower layers shows in a
//! a/.wh.b                b of a lower layer is deleted in a
//! a/c                    file, symlink, device, FIFO, or hard link to an earlier entry
//! ```
//!
//! Entries come depth first, in each directory ordered by the bytes of the names, so equal trees give
//! equal tars. What a layer cannot say is refused with the reason ([`ExportError`]) or, where leaving
//! it out is what every reader expects (sockets), counted in [`ExportStats`]. Both directions hold one
//! buffer, the names of the directories on the way down, and the first names of hard links
//! whose other names are still to come; nothing grows with sizes or with the number of files.
//!
//! `overlay_stack` and `mounted_overlay` tell the directories of an overlay, by its options or as it is mounted; `node_mounts`
//! what is mounted below a directory;
//! `directory_stack` walks a tree of any depth with few descriptors (`remove_tree`, `usage`, with `directory_names` of a
//! few at a time; the export with a whole `directory_listing`).
//! `open_for_export`, `load`, `inode_attributes` and `set_attributes` take and give what a layer keeps of an inode, `export_renamed` what
//! `redirect_dir` and `metacopy` have left in lower layers; `tar_header` and `pax_overrides` are Go's reading of a header,
//! `user_namespace` tells whether devices can be made; `layer_format` says for whom a layer is, `path_bytes` what a path may be. `export_error` and `import_error` say why not.
//!
//! `contents` sends large files of a directory that is in use, so that a layer need not have them.
//! `large_windows` bounds what zstd takes for several layers at once.
//! `archive` reads a tar member by member, for those who only look. `rewrite_for_image` makes of a checkpoint's
//! layer one for registries.
//!
//! ```
//! use std::fs;
//!
//! use transship_layer::{
//!     ExportOptions, ImportOptions, OverlayStack, export_upperdir, import_into_upperdir,
//! };
//!
//! # let dir = tempfile::tempdir()?;
//! # let (here, there) = (dir.path().join("here"), dir.path().join("there"));
//! # for top in [&here, &there] { fs::create_dir(top)?; }
//! // Upperdirs over no image at all, on two nodes; over one the lowerdirs stand in place of `[]`.
//! fs::write(here.join("state"), "changed")?;
//! let stack = OverlayStack::new(here, []);
//! let mut layer = Vec::new();
//! let stats = export_upperdir(&stack, &mut layer, &ExportOptions::default())?;
//! assert_eq!(stats.entries, 2, "the root and the file");
//!
//! let stack = OverlayStack::new(there.clone(), []);
//! import_into_upperdir(layer.as_slice(), &stack, &ImportOptions::default())?;
//! assert_eq!(fs::read_to_string(there.join("state"))?, "changed");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The library is synchronous, prints nothing and reads no environment.

mod archive;
mod contents;
mod decompress;
mod directory_listing;
mod directory_names;
mod directory_stack;
mod export;
mod export_error;
mod export_renamed;
mod import;
mod import_error;
mod inode_attributes;
mod large_windows;
mod layer_format;
mod load;
mod lower_view;
mod mounted_overlay;
mod node_mounts;
mod open_for_export;
mod overlay_marks;
mod overlay_stack;
#[cfg(test)]
mod overlay_tests;
mod path_bytes;
mod pax;
mod pax_overrides;
mod read_ahead;
mod remove_tree;
mod rewrite_for_image;
mod sparse;
mod tar_header;
mod tar_read;
mod tar_write;
mod upper_tree;
mod upper_walk;
mod usage;
mod user_namespace;
mod xattrs;

pub use archive::{Archive, LayerChange, Member, MemberKind};
pub use contents::{ContentsError, KnownContents, send_contents};
pub use decompress::{Compression, Decompressed, decompress, decompress_in_turn};
pub use export::{
    ExportError, ExportOptions, ExportStats, export_upperdir, export_upperdir_to_file,
};
pub use import::{ImportError, ImportOptions, ImportStats, import_into_upperdir};
pub use large_windows::{LargeWindowTurn, LargeWindows};
pub use layer_format::LayerFormat;
pub use lower_view::LowerError;
pub use mounted_overlay::{MountedOverlay, unescape_octal};
pub use node_mounts::mounted_below;
pub use overlay_marks::OverlayXattrs;
pub use overlay_stack::{MountFields, OverlayStack, StackError};
pub use remove_tree::{remove_contents, remove_contents_but, remove_tree};
pub use rewrite_for_image::{LeftOut, NotInImages, RewriteError, Rewritten, rewrite_for_image};
pub use usage::{Usage, UsageError, upperdir_usage};
pub use user_namespace::in_user_namespace;
