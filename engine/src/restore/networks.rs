//! The networks of CNI that a restored container is put into.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use transship_checkpoint::manifest::Container;
use transship_cni::{Address, Attachment, Cni, Networks, PortMapping, container_name};
use transship_sandbox::admission::foreign_spec::{Allow, Allowed};

use super::target::{AddressChoice, Target};

/// Why the ports that led to it cannot lead to it here.
fn ports(cni: &Cni, attachment: &Attachment, allowed: &Allowed) -> Option<String> {
    let ports: Vec<String> = attachment
        .ports
        .iter()
        .map(PortMapping::to_string)
        .collect();
    let named = ports.join(", ");
    if ports.is_empty() {
        return None;
    }
    if !allowed.contains(&Allow::HostPorts) {
        return Some(format!(
            "it is to be reached by ports of the node: {named} (--allow {})",
            Allow::HostPorts
        ));
    }
    let mut failed = { cni.check_ports(&attachment.network, &attachment.ports) }
        .err()
        .map(|error| error.to_string());
    for port in attachment.ports.iter().filter(|port| is_taken(port)) {
        failed.get_or_insert_with(|| format!("the port {port} of this node is in use"));
    }
    failed
}

/// Whether a program of the node listens there.
fn is_taken(port: &PortMapping) -> bool {
    let ip = port.host_ip.parse();
    let address = SocketAddr::new(ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port.host_port);
    let error = match port.protocol.as_str() {
        "tcp" => TcpListener::bind(address).err(),
        "udp" => UdpSocket::bind(address).err(),
        _ => None,
    };
    error.is_some_and(|error| error.kind() == ErrorKind::AddrInUse)
}

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
        } else if let Some(reason) = ports(&cni, attachment, &target.allowed) {
            reasons.push(reason);
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
