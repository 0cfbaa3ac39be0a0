//! Sockets that are bound to an address which is not in the network that the container comes into.

use std::net::IpAddr;
use std::path::Path;

use transship_checkpoint::criu_images::inet_sockets::leave_lost_addresses;
use transship_checkpoint::namespaces::{Namespace, has_own_network, joined};
use transship_sandbox::addresses_of;

use super::FrontError;
use super::bundle::Config;

/// Frees those that nobody waits at, in the images that are about to be restored; CRIU could not bind them. Not for a
/// container that keeps its addresses.
pub(super) fn leave(images: &Path, config: &Config) -> Result<(), FrontError> {
    let addresses = match joined(&config.spec).get(&Namespace::Network) {
        Some(namespace) => addresses_of(namespace)?,
        // It is made in the restore, and given addresses of its own.
        None if has_own_network(&config.spec) => Vec::new(),
        None => addresses_of(Path::new("/proc/self/ns/net"))?,
    };
    let is_there = |address: IpAddr| address.is_loopback() || addresses.contains(&address);
    Ok(leave_lost_addresses(images, is_there)?)
}
