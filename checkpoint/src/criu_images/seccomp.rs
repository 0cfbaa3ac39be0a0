//! `seccomp.img`: the filters of all threads, each with the next one of its chain.
//!
//! ```text
//! seccomp_entry   1 seccomp_filters
//!   seccomp_filter  1 filter   struct sock_filter[]: u16 code, u8 jt, u8 jf, u32 k
//!                   2 prev     index of the filter that is installed after this one
//!                   3 flags    of seccomp(2)
//! ```
//!
//! `seccomp_filter` of a thread's image is the index of the one that is installed first.

use std::path::Path;

use super::strict::{fields, is_ambiguous};
use super::{Image, ImageError, Kind, push_entry};

/// `SECCOMP_FILTER_FLAG_TSYNC`: the other threads of the process get the filter too.
pub const ALL_THREADS: u32 = 1;

/// A filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Its program, `struct sock_filter[]`.
    pub program: Vec<u8>,
    /// The index of the filter that is installed after it.
    pub next: Option<u32>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SeccompEntry {
    #[prost(message, repeated, tag = "1")]
    filters: Vec<SeccompFilter>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SeccompFilter {
    #[prost(bytes = "vec", required, tag = "1")]
    filter: Vec<u8>,
    #[prost(uint32, optional, tag = "2")]
    prev: Option<u32>,
    #[prost(uint32, optional, tag = "3")]
    flags: Option<u32>,
}

/// All filters; none when the dump has no such image.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn filters(dir: &Path) -> Result<Vec<Filter>, ImageError> {
    let path = dir.join("seccomp.img");
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(Vec::new());
    }
    let image = Image::read(&path, Kind::Seccomp)?;
    let mut entries = image.entries();
    let Some(message) = entries.next_bytes()? else {
        return Ok(Vec::new());
    };
    let parts = fields(message).ok_or_else(|| image.ambiguous())?;
    let ambiguous = parts
        .into_iter()
        .any(|part| is_ambiguous(&message[part.value], &[]));
    if ambiguous || is_ambiguous(message, &[1]) {
        return Err(image.ambiguous());
    }
    let entry: SeccompEntry = image.decode(message)?;
    Ok({ entry.filters }
        .into_iter()
        .map(|filter| Filter {
            program: filter.filter,
            next: filter.prev,
            flags: filter.flags.unwrap_or_default(),
        })
        .collect())
}

/// Writes the image with these filters into `dir`, in the place of the one that is there.
///
/// # Errors
/// It cannot be written.
pub fn write_filters(dir: &Path, filters: &[Filter]) -> Result<(), ImageError> {
    let path = dir.join("seccomp.img");
    let mut body = Vec::new();
    push_entry(
        &mut body,
        &SeccompEntry {
            filters: filters
                .iter()
                .map(|filter| SeccompFilter {
                    filter: filter.program.clone(),
                    prev: filter.next,
                    flags: Some(filter.flags),
                })
                .collect(),
        },
    );
    Image::new(&path, Kind::Seccomp, body).replace(&path)
}
