//! `stats-dump`: what CRIU measured at the dump.
//!
//! ```text
//!   u32 LE   0x55105940                 head of the files that are no part of the dump
//!   u32 LE   0x57093306                 magic of figures
//!   u32 LE   n, then the message:       1 dump: 1 freezing_time  2 frozen_time  3 memdump_time
//!                                       4 memwrite_time (microseconds)  5 pages_scanned
//!                                       6 pages_skipped_parent  7 pages_written
//! ```

use std::path::Path;

use super::{Image, ImageError, Kind};

/// CRIU's figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Microseconds until all tasks stood still.
    pub freezing: u32,
    /// Microseconds for which they did.
    pub frozen: u32,
    /// Microseconds for finding and taking the memory.
    pub memory_dump: u32,
    /// Microseconds for writing it.
    pub memory_write: u32,
    /// Pages that were looked at.
    pub pages_scanned: u64,
    /// Pages that are in the dump.
    pub pages_written: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatsEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct DumpStatsEntry {
    #[prost(uint32, required, tag = "1")]
    freezing_time: u32,
    #[prost(uint32, required, tag = "2")]
    frozen_time: u32,
    #[prost(uint32, required, tag = "3")]
    memdump_time: u32,
    #[prost(uint32, required, tag = "4")]
    memwrite_time: u32,
    #[prost(uint64, required, tag = "5")]
    pages_scanned: u64,
    #[prost(uint64, required, tag = "7")]
    pages_written: u64,
}

/// Reads the file at `path`; none where it has no figures of a dump.
///
/// # Errors
/// It cannot be read, or is damaged.
pub fn read(path: &Path) -> Result<Option<DumpStats>, ImageError> {
    let image = Image::read(path, Kind::Stats)?;
    let entry: Option<StatsEntry> = image.entries().next()?;
    let dump = entry.and_then(|entry| entry.dump);
    Ok(dump.map(|dump| DumpStats {
        freezing: dump.freezing_time,
        frozen: dump.frozen_time,
        memory_dump: dump.memdump_time,
        memory_write: dump.memwrite_time,
        pages_scanned: dump.pages_scanned,
        pages_written: dump.pages_written,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    #[test]
    fn figures_are_read_as_criu_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats-dump");
        let dump = DumpStatsEntry {
            freezing_time: 11,
            frozen_time: 22,
            memdump_time: 33,
            memwrite_time: 44,
            pages_scanned: 55,
            pages_written: 66,
        };
        let mut bytes = [0x5510_5940_u32, 0x5709_3306]
            .map(u32::to_le_bytes)
            .concat();
        push_entry(&mut bytes, &StatsEntry { dump: Some(dump) });
        std::fs::write(&path, &bytes).unwrap();
        let stats = read(&path).unwrap().unwrap();
        assert_eq!((stats.frozen, stats.pages_written), (22, 66));
        std::fs::write(&path, &bytes[..20]).unwrap();
        assert!(read(&path).is_err());
    }
}
