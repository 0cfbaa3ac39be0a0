//! For whom a layer is written, and from whom it is read.
//!
//! | | image | checkpoint |
//! |---|---|---|
//! | holes of files | written as zeros: some tools read no sparse entries, others change the digest | sparse entries (sparse.rs) |
//! | names that begin with `.wh.` | cannot be said | PAX record, below |
//! | attributes `trusted.*` | left out | kept |
//! | owner, mode, times of `/` | left out | kept |
//!
//! A name with a component that begins with `.wh.` and is no deletion has this record in its PAX header,
//! which other tools do not know; they take it for a deletion, as they do in layers of containerd's own:
//!
//! ```text
//! TRANSSHIP.names=literal     no component is a marker             a/.wh.b      a file of that name
//! TRANSSHIP.names=parents     only the last component is one       .wh.a/.wh.b  deletes b in ".wh.a"
//! ```
//!
//! In the layer of a migration a file can have its content elsewhere: TRANSSHIP.content, see contents.rs.

/// For whom a layer is written, and from whom it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LayerFormat {
    /// What registries and other tools get and give: nothing in it that one of them reads differently.
    Image,
    /// What goes from one node of Transship to another: all that the directory has.
    #[default]
    Checkpoint,
}

/// Key of the record.
pub(crate) const NAMES_KEY: &[u8] = b"TRANSSHIP.names";

/// Which components of an entry's name are names, though they look like markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LiteralNames {
    /// All of them.
    All,
    /// All but the last one, which is a marker.
    Parents,
}

impl LiteralNames {
    pub(crate) fn value(self) -> &'static [u8] {
        match self {
            LiteralNames::All => b"literal",
            LiteralNames::Parents => b"parents",
        }
    }

    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        [LiteralNames::All, LiteralNames::Parents]
            .into_iter()
            .find(|literal| literal.value() == value)
    }
}
