//! A socket of a checkpoint, as it is shown.

use serde::Serialize;

/// A socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Socket {
    /// `tcp`, `udp`, `unix`, ...
    pub protocol: &'static str,
    /// `listening`, `connected`, ...
    pub state: &'static str,
    /// Its own address, or its name.
    pub local: String,
    /// The other end of it.
    pub peer: Option<String>,
    /// Who has it: process and descriptor.
    pub by: Vec<(u32, u32)>,
}
