//! Overlayfs snapshots for containerd, served as a proxy plugin.
//!
//! ```text
//!  containerd --- snapshots API over a Unix socket ---> service.rs   the only module that knows gRPC
//!                                                           |        one log line per call
//!                                                           v
//!                      filter.rs (List) ------------> snapshots.rs   the order of all steps
//!                      labels.rs, mounts.rs (pure) ---/  |      \
//!                                                        v       v
//!            changes.rs: what may change     metadata.rs         disk.rs      snapshots/<id>/{fs,work}
//!            record.rs:  how it is stored    SQLite              usage.rs     background.rs
//!            from_redb.rs: earlier releases  group_commit.rs, batch.rs
//!                                            reserve.rs
//! ```
//!
//! Beside it, on a socket of its own, containerd's diff service: see `diff`.
//!
//! Around it: `cli.rs` and `config.rs` (flags, file), `durable_commit.rs` (what waits for the disk), `dispatch.rs` and `workers.rs` (the threads that calls run on),
//! `logging.rs`, `metrics.rs`, `probe.rs` (what this kernel needs), `daemon.rs` (lock, systemd, stop),
//! `socket.rs` (made here or handed over), `fsck.rs` (check and repair), `fault.rs` (where crash tests
//! kill the process).

pub mod background;
mod batch;
mod changes;
pub mod cli;
mod config;
pub mod daemon;
pub mod diff;
pub mod disk;
mod dispatch;
mod durable_commit;
pub mod error;
pub mod fault;
pub mod filter;
mod from_redb;
pub mod fsck;
mod group_commit;
mod labels;
pub mod logging;
pub mod metadata;
pub mod metrics;
pub mod mounts;
mod probe;
pub mod record;
mod reserve;
pub mod service;
pub mod snapshots;
pub mod socket;
mod usage;
mod workers;
