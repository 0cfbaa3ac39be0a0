//! What the operator of a node wants a container to become.

use std::fmt;
use std::path::Path;

use transship_checkpoint::criu_options::CriuOverrides;
use transship_sandbox::admission::foreign_spec::Allowed;
use transship_sandbox::admission::node_config::NodeConfig;

use crate::error::{Error, Result};

/// How a container is made on this node. No part of it comes from a checkpoint or a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// Container id; none: that of the source.
    pub id: Option<String>,
    /// Container whose namespaces are joined.
    pub sandbox: Option<String>,
    /// Whether shared namespaces become the container's own.
    pub new_namespaces: bool,
    /// Snapshotter; none: `transship` where the node has it, else the source's.
    pub snapshotter: Option<String>,
    /// OCI runtime front; none: the one that lies beside the program.
    pub runtime_binary: Option<String>,
    /// Where the output goes, a URI of containerd's; none: nowhere.
    pub log_uri: Option<String>,
    /// CRIU's options that differ from those of the dump.
    pub criu: CriuOverrides,
    /// What it gets of networks that it was in by itself; none: new addresses, in the default network alone.
    pub address: Option<AddressChoice>,
    /// What the checkpoint may ask of this node beyond an ordinary container.
    pub allowed: Allowed,
}

/// What a container gets in place of the networks of CNI that it was in by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressChoice {
    /// An address that the network of this node has.
    New,
    /// The addresses that it had.
    Keep,
    /// No network.
    None,
}

impl fmt::Display for AddressChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "new",
            Self::Keep => "keep",
            Self::None => "none",
        })
    }
}

/// What `/etc/transship/node.toml` allows: to checkpoints of this node's store, and to streams.
///
/// # Errors
/// The file is there and cannot be used.
pub fn allowed_by_node(path: &Path) -> Result<(Allowed, Allowed)> {
    let config = NodeConfig::read(path)
        .map_err(|error| Error::refused("the rules of this node cannot be read").because(error))?;
    Ok((config.restore.allow, config.receive.allow))
}
