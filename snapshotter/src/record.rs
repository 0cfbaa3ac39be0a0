//! One snapshot as it is stored.
//!
//! A record is a protobuf message (the encoding is compact, and a field that an older or newer
//! daemon does not know does no harm):
//!
//! ```text
//!  1 id         uint64            names the directory snapshots/<id>; never reused
//!  2 kind       uint32            1 view, 2 active, 3 committed (the numbers of containerd's API)
//!  3 parent     string            name of the parent, empty without one
//!  4 ancestors  repeated uint64   ids from the parent upwards, nearest first: the lowerdirs
//!  5 created    sfixed64          nanoseconds since the epoch
//!  6 updated    sfixed64
//!  7 labels     map<string,string>
//!  8 usage      {1 inodes uint64, 2 size uint64 (bytes)}   absent: not counted (yet)
//! 15 key        string            only in the copy that sits on the directory
//! ```
//!
//! It is kept twice: in the database, under its key (`metadata.rs`), which alone decides; and in the
//! extended attribute `trusted.transship.snapshot` of `snapshots/<id>` (`user.` in a user namespace),
//! from which `fsck --repair` rebuilds a lost database. Labels that do not fit into an attribute are
//! left out there (they are hints of the client; the chain of layers is what must not be lost).

use std::collections::BTreeMap;

/// What kind of snapshot it is; the numbers are those of containerd's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Read-only look at a committed snapshot.
    View = 1,
    /// Being written to.
    Active = 2,
    /// Finished and immutable; can be a parent.
    Committed = 3,
}

impl Kind {
    /// The name that filters and people use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }

    /// The kind with this stored number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::View),
            2 => Some(Self::Active),
            3 => Some(Self::Committed),
            _ => None,
        }
    }
}

/// Disk use of a snapshot without its parents.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Usage {
    /// Inodes, hard links counted once.
    #[prost(uint64, tag = "1")]
    pub inodes: u64,
    /// Bytes allocated on disk.
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

/// A snapshot as stored; the module's header draws the encoding.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Record {
    /// Names the directory; never reused.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The number of a [`Kind`]; read it with [`Record::kind`].
    #[prost(uint32, tag = "2")]
    pub kind_number: u32,
    /// Name of the parent, empty without one.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// Ids of all ancestors, nearest first.
    #[prost(uint64, repeated, tag = "4")]
    pub ancestors: Vec<u64>,
    /// Nanoseconds since the epoch.
    #[prost(sfixed64, tag = "5")]
    pub created: i64,
    /// Nanoseconds since the epoch.
    #[prost(sfixed64, tag = "6")]
    pub updated: i64,
    /// Labels; none has an empty value.
    #[prost(btree_map = "string, string", tag = "7")]
    pub labels: BTreeMap<String, String>,
    /// Counted disk use; `None` until it is counted.
    #[prost(message, optional, tag = "8")]
    pub usage: Option<Usage>,
    /// The key, only in the copy on the directory.
    #[prost(string, tag = "15")]
    pub key: String,
}

impl Record {
    /// The kind, or `None` for a number that no daemon writes.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_number(self.kind_number)
    }
}

/// A snapshot as shown to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Key of an active snapshot or view, name of a committed one.
    pub name: String,
    /// What kind of snapshot it is.
    pub kind: Kind,
    /// Name of the parent, empty without one.
    pub parent: String,
    /// Labels; none has an empty value.
    pub labels: BTreeMap<String, String>,
    /// Nanoseconds since the epoch.
    pub created: i64,
    /// Nanoseconds since the epoch.
    pub updated: i64,
}
