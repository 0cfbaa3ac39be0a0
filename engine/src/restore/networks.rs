//! The networks of CNI that a restored container is put into.

use transship_checkpoint::manifest::Container;
use transship_cni::{Address, Cni, Networks, container_name};

use super::target::{AddressChoice, Target};

/// The networks of a container with this id; none when it had none by itself. What is in the way is added to
/// `reasons`.
pub(super) fn choose(
    container: &Container,
    (namespace, id): (&str, &str),
    target: &Target,
    reasons: &mut Vec<String>,
) -> Option<Networks> {
    let address = match target.address {
        Some(AddressChoice::None) => return None,
        Some(AddressChoice::Keep) => Address::Keep,
        Some(AddressChoice::New) | None => Address::New,
    };
    // Whoever joins a sandbox has the sandbox's.
    if container.networks.is_empty() || !container.joined.is_empty() {
        return None;
    }
    let cni = Cni::default();
    let usual = cni.default_network().ok().flatten();
    let mut attachments = container.networks.clone();
    for attachment in &mut attachments {
        attachment.address = address.clone();
        let network = &attachment.network;
        let without = "--network none lets it have none";
        if !attachment.is_plain() {
            reasons.push(format!(
                "it names the network {network:?} and what it had there in words that are none"
            ));
        } else if let Err(error) = cni.check(network) {
            reasons.push(format!("{error}; {without}"));
        } else if target.address.is_none() && usual.as_ref() != Some(network) {
            reasons.push(format!(
                "it was in the network {network:?}, which is not the first of this node: --network new puts it \
                 there, {without}"
            ));
        }
    }
    Some(Networks {
        container: container_name(namespace, id),
        attachments,
    })
}
