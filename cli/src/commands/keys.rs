//! The keys that flags name.

use std::path::Path;

use transship_engine::{Context as _, Result};
use transship_package::encryption::Identities;
use transship_package::signature::TrustedKeys;
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};

use crate::args::IdentityArgs;

/// The keys of the files that were named.
pub(crate) fn identities(args: &IdentityArgs) -> Result<Identities> {
    let mut identities = Identities::default();
    for path in &args.identity {
        identities.add_file(path)?;
    }
    Ok(identities)
}

/// The keys that a flag names, else those of node.toml.
pub(super) fn trusted_keys(flags: &[String]) -> Result<TrustedKeys> {
    let config = NodeConfig::read(Path::new(NODE_CONFIG));
    let config = config.context("cannot tell whose checkpoints are taken")?;
    let keys = match flags {
        [] => &config.checkpoints.signed_by,
        flags => flags,
    };
    Ok(TrustedKeys::parse(keys.iter().map(String::as_str))?)
}
