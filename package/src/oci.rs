//! A checkpoint as an artifact of OCI: blobs that a registry or a directory keeps once, however many
//! checkpoints have them. In a registry it has an image beside it, which starts cold:
//!
//! ```text
//!  checkpoint ── artifact (chunks) ─────────────────────────> blobs ──> Offered (restore) ──> checkpoint
//!             ── rewrite, gzip (image_layer) ─┐
//!  base image (of containerd) ────────────────┴─ image ──> push ──> registry: index { image, artifact }
//! ```
//!
//! The artifact:
//!
//! ```text
//! manifest   artifactType application/vnd.transship.checkpoint.v1
//!   config   application/vnd.transship.checkpoint.config.v1+json    transship.json, byte for byte
//!   layers   application/vnd.transship.checkpoint.signature.v1      optional: transship.json.minisig
//!            application/vnd.transship.checkpoint.files.v1.tar+zstd files below 256 KiB, whole
//!            application/vnd.transship.checkpoint.chunk.v1+zstd     a piece of a larger file (chunks.rs), with
//!              annotations dev.transship.path, dev.transship.offset, dev.transship.length
//! ```
//!
//! What no chunk has of a file is zeros. The same chunk at two places is one blob and two layers. `annotations` has the
//! names by which other engines know a checkpoint. One that is encrypted is a package in pieces (`sealed`).

mod annotations;
mod artifact;
mod blobs;
mod chunks;
mod credentials;
mod digests;
mod document;
mod image;
mod image_layer;
mod layout;
mod partial;
mod push;
mod reference;
mod registry;
mod restore;
mod sealed;
mod transfers;

pub use artifact::{StoreOptions, Stored, store};
pub use blobs::Blobs;
pub use credentials::Credentials;
pub use document::Descriptor;
pub use image::{Base, BaseLayer, config_of_spec};
pub use layout::Layout;
pub use partial::remove_abandoned;
pub use push::{Bases, OnlyInArtifact, OpenBlob, Pushed, PushedImage, push};
pub use reference::Reference;
pub use registry::{Patience, Registry, Transport};
pub use restore::Offered;
pub use sealed::{FetchedPackage, store_encrypted};

pub use crate::registry_error::RegistryError;
