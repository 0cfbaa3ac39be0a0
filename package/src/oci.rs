//! A checkpoint as an artifact of OCI: blobs that a registry or a directory keeps once, however many
//! checkpoints have them.
//!
//! ```text
//! manifest   artifactType application/vnd.transship.checkpoint.v1
//!   config   application/vnd.transship.checkpoint.config.v1+json    transship.json, byte for byte
//!   layers   application/vnd.transship.checkpoint.signature.v1      optional: transship.json.minisig
//!            application/vnd.transship.checkpoint.files.v1.tar+zstd all files below 256 KiB, whole
//!            application/vnd.transship.checkpoint.chunk.v1+zstd     a piece of a larger file (chunks.rs), with
//!              annotations dev.transship.path, dev.transship.offset, dev.transship.length
//! ```
//!
//! What no chunk has of a file is zeros. The same chunk at two places is one blob and two layers.

mod artifact;
mod blobs;
mod chunks;
mod credentials;
mod document;
mod layout;
mod partial;
mod reference;
mod registry;
mod restore;

pub use artifact::{StoreOptions, Stored, store};
pub use blobs::Blobs;
pub use credentials::Credentials;
pub use document::Descriptor;
pub use layout::Layout;
pub use partial::remove_abandoned;
pub use reference::Reference;
pub use registry::{Patience, Registry, RegistryError, Transport};
pub use restore::Offered;
