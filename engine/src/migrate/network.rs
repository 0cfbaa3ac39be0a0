//! The networks of a container that has a network namespace of its own.
//!
//! ```text
//!              new                                 keep
//!  frozen                                          CNI DEL here
//!  restored    CNI ADD on the target (runtime front, before the sockets are made again)
//!  aborted     the target's is removed             the same, and CNI ADD here with what it had
//!  runs        CNI DEL here                        (done)
//! ```
//!
//! Interfaces that CNI has not made belong to the node, and are refused before anything happens.

use std::path::PathBuf;

use tokio::task::JoinHandle;
use transship_checkpoint::criu_options::{NETWORK, Tcp};
use transship_checkpoint::spec::Spec;
use transship_cni::{Address, Attachment, Cni, Place, container_name, keep_addresses};

use super::Request;
use super::record::Pending;
use crate::error::{Context, Error, Result};
use crate::own_networks::{give_back, has_own_network, interfaces, namespace_of};
use crate::restore::AddressChoice;
use crate::source::SourceContainer;

/// Refuses a container whose interfaces would be lost, unless they may be; then it has no networks.
pub(super) fn check(container: &mut SourceContainer, request: &Request) -> Result<()> {
    let may_be_lost = container.container.criu.allow_lost.contain(NETWORK);
    let networks = &mut container.container.networks;
    if may_be_lost || request.target.address == Some(AddressChoice::None) {
        networks.clear();
        return Ok(());
    }
    let id = container.container.id.clone();
    let spec = Spec::parse(&container.spec);
    let spec = spec.with_context(|| format!("the spec of {id:?} is no OCI runtime spec"))?;
    if !has_own_network(&spec) {
        return Ok(());
    }
    if request.target.address == Some(AddressChoice::Keep) {
        for network in networks.iter_mut() {
            network.address = Address::Keep;
        }
    }
    let made = |name: &String| networks.iter().any(|network| network.interface == *name);
    // A program that has ended is found by the freeze.
    let lost: Vec<String> = { interfaces(container.pid).into_iter() }
        .filter(|name| !made(name))
        .collect();
    if lost.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!(
        "{id:?} has network interfaces of its own that CNI has not made, which stay behind: {}; run it in the \
         network of a sandbox (--sandbox on the other node), or let it lose them (--allow-lost network)",
        lost.join(", ")
    )))
}

/// Whether the addresses come along, so that they must be gone here before the copy has them.
fn are_kept(pending: &Pending) -> bool {
    keep_addresses(&pending.networks)
}

/// Whether packets must not be answered for while the container moves: its connections go on with its addresses.
pub(super) fn is_locked(pending: &Pending, tcp: Tcp) -> bool {
    are_kept(pending) && tcp == Tcp::Established
}

/// The networks that it is not in while it is frozen.
pub(super) fn given_away(pending: &Pending) -> Vec<Attachment> {
    match are_kept(pending) {
        true => pending.networks.clone(),
        false => Vec::new(),
    }
}

/// Before the copy is made: takes the addresses away here that it is to have. The plugins are at work until what is given
/// has ended, also when it is dropped.
pub(super) fn give_away(pending: &Pending, pid: u32) -> Option<JoinHandle<Result<()>>> {
    are_kept(pending).then(|| remove(pending, given_away(pending), Some(namespace_of(pid))))
}

/// The source goes on: it has its addresses again.
pub(super) async fn take_back(pending: &Pending, pid: u32) -> Result<()> {
    let named = (&*pending.namespace, &*pending.container);
    give_back(named, pid, &given_away(pending)).await
}

/// The copy runs: nothing here is the source's any more.
pub(super) async fn forget(pending: &Pending) -> Result<()> {
    remove(pending, left_at_end(pending), None).await?
}

/// The networks that it is in when the copy runs: not those that it was taken out of before. Plugins that give out addresses
/// for several nodes know both by one name, and would give away the copy's.
fn left_at_end(pending: &Pending) -> Vec<Attachment> {
    match are_kept(pending) {
        true => Vec::new(),
        false => pending.networks.clone(),
    }
}

fn remove(
    pending: &Pending,
    networks: Vec<Attachment>,
    namespace: Option<PathBuf>,
) -> JoinHandle<Result<()>> {
    let container = container_name(&pending.namespace, &pending.container);
    let id = pending.container.clone();
    let failed = move || format!("the network of {id:?} could not be removed here");
    tokio::task::spawn_blocking(move || {
        let place = Place {
            container: &container,
            namespace: namespace.as_deref(),
        };
        let mut networks = networks.iter().rev();
        let removed =
            networks.try_for_each(|network: &Attachment| Cni::default().del(place, network));
        removed.with_context(failed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_away_is_not_removed_again() {
        let network = |address| Attachment {
            network: "lan".into(),
            interface: "eth0".into(),
            addresses: Vec::new(),
            mac: String::new(),
            address,
            ports: Vec::new(),
        };
        let pending = |networks: Vec<Attachment>| -> Pending {
            let json = r#"{"migration":"","namespace":"","container":"","to":"","remote_program":"","was_paused":false,
                "keep_source":false,"since":""}"#;
            let pending = serde_json::from_str(json).unwrap();
            Pending {
                networks,
                ..pending
            }
        };
        let keep = pending(vec![network(Address::Keep)]);
        assert_eq!(given_away(&keep), keep.networks);
        // Who gives out addresses may be one for both nodes, and take this for the copy's.
        assert!(left_at_end(&keep).is_empty());
        let new = pending(vec![network(Address::New)]);
        assert!(given_away(&new).is_empty());
        assert_eq!(left_at_end(&new), new.networks);
    }
}
