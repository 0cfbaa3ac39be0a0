//! How much of everything is measured.

use std::time::Duration;

/// Sizes of one run.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    /// Existing snapshots, ascending from 0.
    pub(crate) levels: Vec<usize>,
    /// Existing snapshots at which resident memory is read; at most the last level.
    pub(crate) memory_level: usize,
    /// Concurrent clients.
    pub(crate) clients: Vec<usize>,
    /// Turns of load that each side takes, one after the other.
    pub(crate) rounds: usize,
    /// How long a turn of load lasts: short, so that the sides find the same machine.
    pub(crate) round: Duration,
    /// How long a turn through containerd lasts: it does some hundred cycles a second at best.
    pub(crate) containerd_round: Duration,
    /// Files of the large image and of the small one.
    pub(crate) image_files: [u32; 2],
    /// Files of the large image that are changed in the case of many changes.
    pub(crate) many_changes: u32,
    /// The one large file.
    pub(crate) large_file_bytes: u64,
    /// Turns of what takes tens of seconds.
    pub(crate) slow_rounds: usize,
    /// Memory of the migrated containers.
    pub(crate) migration_memory_mb: Vec<u32>,
    /// That of a large one.
    pub(crate) large_memory_mb: u32,
    /// Migrations of each kind.
    pub(crate) migrations: usize,
    /// Memory of the checkpoint that is packed.
    pub(crate) package_mb: u32,
    /// Restores through the CRI, and bare.
    pub(crate) restores: usize,
    /// Pairs of create and delete.
    pub(crate) pairs: usize,
}

impl Sizes {
    /// What the goals speak of; about a quarter of an hour.
    pub(crate) fn full() -> Sizes {
        Sizes {
            levels: vec![0, 5_000, 50_000],
            memory_level: 10_000,
            clients: vec![1, 4, 16, 64],
            rounds: 9,
            round: Duration::from_millis(500),
            containerd_round: Duration::from_millis(800),
            image_files: [100_000, 10_000],
            many_changes: 50_000,
            large_file_bytes: 2 << 30,
            slow_rounds: 3,
            migration_memory_mb: vec![16, 500],
            large_memory_mb: 2000,
            migrations: 10,
            package_mb: 500,
            restores: 25,
            pairs: 100,
        }
    }

    /// Enough to see that everything is measured; the figures mean little.
    pub(crate) fn quick() -> Sizes {
        Sizes {
            levels: vec![0, 500],
            memory_level: 500,
            clients: vec![1, 16],
            rounds: 1,
            round: Duration::from_millis(500),
            containerd_round: Duration::from_millis(500),
            image_files: [2_000, 500],
            many_changes: 1_000,
            large_file_bytes: 64 << 20,
            slow_rounds: 1,
            migration_memory_mb: vec![16],
            large_memory_mb: 64,
            migrations: 1,
            package_mb: 40,
            restores: 2,
            pairs: 5,
        }
    }
}
