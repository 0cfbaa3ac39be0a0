//! A checkpoint as a thing: looked into, compared, packed into a file, read from one.
//!
//! ```text
//!  checkpoint directory ──> contents (layer_changes, requirements) ──> for people and programs
//!                      ──> difference: two of them
//!                      ──> export (tar_members ──> compression ──> encryption) ──> a package
//!                      ──> oci: blobs that checkpoints share                         <──> a layout
//!  checkpoint directory <── import (open_package: decrypts, decompresses, reads members) <── a package
//!                      <── foreign: archives of containerd, CRI-O and podman
//!  contents            <── look: the same without unpacking it                    <── a package
//!                           signature: whose checkpoint it is
//!  new_file: where what was read comes to lie;  import_options;  registry_error: what a registry has refused
//!  socket: one, as it is shown;  counted: how far a reader is;  times: as Go and OCI write them
//! ```
//!
//! A plain synchronous library: no runtime, no gRPC, no terminal; of the environment it reads `TMPDIR` alone. Every byte of a package
//! is hostile input.

mod compression;
pub mod contents;
pub mod counted;
pub mod difference;
pub mod encryption;
pub mod error;
pub mod export;
pub mod foreign;
pub mod import;
mod import_options;
pub mod layer_changes;
pub mod look;
mod new_file;
pub mod oci;
mod open_package;
mod registry_error;
mod requirements;
pub mod signature;
mod socket;
mod tar_members;
mod times;

pub use compression::DEFAULT_LEVEL;
pub use error::PackageError;

#[cfg(test)]
mod package_tests;
