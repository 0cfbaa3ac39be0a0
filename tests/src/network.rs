//! Links between nodes, and the network of the containers in a node.
//!
//! Link n joins two nodes by a veth pair called `link<n>` on both sides: 10.99.n.1/24 and
//! 10.99.n.2/24. Containers of node i get addresses from 10.88.i.0/24 on a bridge; each side of a
//! link has a route to the other's containers.

use std::process::Command;

use crate::node::Node;
use crate::run::CommandRun as _;
use crate::{Testbed, TestbedError};

/// A veth pair between two nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Name of the interface, on both sides.
    pub interface: String,
    /// Address of the first node on this link.
    pub first: String,
    /// Address of the second node on this link.
    pub second: String,
}

impl Testbed {
    /// Joins two nodes; each then knows the other's hostname and the way to its containers.
    ///
    /// # Errors
    /// When `ip` fails in one of the nodes.
    pub fn link(&self, first: &Node, second: &Node) -> Result<Link, TestbedError> {
        let number = self.next_link();
        let link = Link {
            interface: format!("link{number}"),
            first: format!("10.99.{number}.1"),
            second: format!("10.99.{number}.2"),
        };
        // Born in the two namespaces: the machine's own never sees an interface.
        let (one, other) = (first.pid().to_string(), second.pid().to_string());
        Command::new("ip")
            .args([
                "link",
                "add",
                &link.interface,
                "netns",
                &one,
                "type",
                "veth",
            ])
            .args(["peer", "name", &link.interface, "netns", &other])
            .run()?;
        for (node, own, peer, peer_address) in [
            (first, &link.first, second, &link.second),
            (second, &link.second, first, &link.first),
        ] {
            node.shell(&format!(
                "ip address add {own}/24 dev {interface}
                 ip link set {interface} up
                 ip route add {pods} via {peer_address}
                 echo {peer_address} node-{peer} >>/etc/hosts",
                interface = link.interface,
                pods = pod_subnet(peer),
                peer = peer.name(),
            ))
            .run()?;
        }
        Ok(link)
    }
}

impl Node {
    /// Writes the CNI configuration that `ctr run --cni` and the CRI use.
    pub(crate) fn write_cni_config(&self) -> Result<(), TestbedError> {
        let config = serde_json::json!({
            "cniVersion": "0.4.0",
            "name": "transship-test",
            "plugins": [{
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": pod_subnet(self) }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        self.write_file("/etc/cni/net.d/10-transship.conflist", config.to_string())
    }
}

fn pod_subnet(node: &Node) -> String {
    format!("10.88.{}.0/24", node.index())
}
