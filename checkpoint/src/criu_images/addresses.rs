//! `mm-<pid>.img`: where the memory of the processes is, and how much of it stays in memory.
//!
//! ```text
//! mm_entry   14 vmas: vma_entry   1 start   2 end   6 flags of mmap(2)   10 flags of open(2) for its file
//! ```

use std::path::Path;

use super::strict::is_ambiguous;
use super::{Image, ImageError, Kind, list};

const VMAS: u64 = 14;
/// Auxiliary vector, mappings, and requests of asynchronous I/O.
const REPEATED: [u64; 3] = [13, VMAS, 16];
const MAP_LOCKED: u32 = 0x2000;

/// The memory of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Its process, by its id in the container.
    pub pid: u32,
    /// The lowest address that it has memory at.
    pub lowest: Option<u64>,
    /// Bytes that are locked: they stay in memory.
    pub locked: u64,
    /// All flags of open(2) with which CRIU opens the files that it maps.
    pub open_flags: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, optional, tag = "10")]
    fdflags: Option<u32>,
}

/// That of each process.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn addresses(dir: &Path) -> Result<Vec<Addresses>, ImageError> {
    let mut found = Vec::new();
    for (pid, path) in list(dir, Kind::Mm)? {
        let image = Image::read(&path, Kind::Mm)?;
        let Some(message) = image.entries().next_bytes()? else {
            continue;
        };
        if is_ambiguous(message, &REPEATED) {
            return Err(image.ambiguous());
        }
        let entry: MmEntry = image.decode(message)?;
        let locked = entry.vmas.iter().filter(|vma| vma.flags & MAP_LOCKED != 0);
        found.push(Addresses {
            pid,
            lowest: entry.vmas.iter().map(|vma| vma.start).min(),
            locked: locked
                .map(|vma| vma.end.saturating_sub(vma.start))
                .fold(0, u64::saturating_add),
            open_flags: { entry.vmas.iter() }
                .filter_map(|vma| vma.fdflags)
                .fold(0, |all, one| all | one),
        });
    }
    Ok(found)
}
