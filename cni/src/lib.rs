//! Networks of containers, made and removed by the plugins of CNI as containerd's clients do it.
//!
//! ```text
//!  /etc/cni/net.d/*.conflist ── config ──> plugins of a network
//!                                            └─ plugin: ADD one after the other, DEL in reverse
//!  /var/lib/cni/results/     ── results <── what was made: written and read as libcni does it
//!                               (listing: the files of either directory)
//! ```
//!
//! `ctr --cni` and `nerdctl` know a container as `<namespace>-<id>`. Which networks one has is in the results
//! that libcni keeps, whoever has made them. A network goes by its name: each node has a configuration of its
//! own for it.
//!
//! Specification: <https://www.cni.dev/docs/spec/>, 1.0.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use transship_path_error::PathError;

mod config;
mod listing;
mod plugin;
mod results;

/// What a container is given in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    /// What the network of the new node gives.
    New,
    /// The addresses and the hardware address that it had.
    Keep,
}

/// One network that a container is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// The interface in the container.
    pub interface: String,
    /// Its addresses, each with the length of its prefix.
    pub addresses: Vec<String>,
    /// Its hardware address; empty: not known.
    pub mac: String,
    /// What it is given when it is made again.
    pub address: Address,
    /// Ports of the node that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortMapping>,
}

/// A port of the node that leads to one of the container, as plugins with the capability `portMappings` take it:
/// <https://www.cni.dev/docs/conventions/>.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The node's port.
    #[serde(alias = "HostPort")]
    pub host_port: u16,
    /// The container's port.
    #[serde(alias = "ContainerPort")]
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    #[serde(alias = "Protocol")]
    pub protocol: String,
    /// The node's address; empty: all of them.
    #[serde(rename = "hostIP", alias = "HostIP", default)]
    pub host_ip: String,
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip.as_str() {
            "" | "0.0.0.0" => write!(f, "{}/{}", self.host_port, self.protocol),
            address => write!(f, "{address}:{}/{}", self.host_port, self.protocol),
        }
    }
}

/// Whether addresses come along in one of these networks.
#[must_use]
pub fn keep_addresses(attachments: &[Attachment]) -> bool {
    attachments.iter().any(|it| it.address == Address::Keep)
}

/// The networks that a container is to be in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networks {
    /// See [`container_name`].
    pub container: String,
    /// Each of them.
    pub attachments: Vec<Attachment>,
}

/// Where a node has its networks and plugins.
#[derive(Debug, Clone)]
pub struct Cni {
    /// Configurations of networks.
    pub config_dir: PathBuf,
    /// Plugins.
    pub plugin_dirs: Vec<PathBuf>,
    /// libcni's results.
    pub results_dir: PathBuf,
    /// How long a plugin may take for one call; then it is killed.
    pub patience: Duration,
}

/// A container and its network namespace.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The container's name among those of CNI; see [`container_name`].
    pub container: &'a str,
    /// A file of its network namespace; none: it is gone.
    pub namespace: Option<&'a Path>,
}

/// A network cannot be made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CniError {
    /// No configuration has this name.
    #[error("this node has no network {network:?} of CNI in {config_dir}")]
    NoNetwork {
        /// The network.
        network: String,
        /// Where it was looked for.
        config_dir: PathBuf,
    },
    /// A plugin that is named is nowhere.
    #[error("the plugin {plugin:?} of the network {network:?} is on this node in none of {dirs:?}")]
    NoPlugin {
        /// The plugin.
        plugin: String,
        /// The network.
        network: String,
        /// Where it was looked for.
        dirs: Vec<PathBuf>,
    },
    /// A plugin has failed.
    #[error("the plugin {plugin:?} of the network {network:?} says: {reason}")]
    Plugin {
        /// The plugin.
        plugin: String,
        /// The network.
        network: String,
        /// Its words.
        reason: String,
    },
    /// A plugin does not come to its end.
    #[error(
        "the plugin {plugin:?} of the network {network:?} has taken more than {seconds} s, and was killed"
    )]
    Slow {
        /// The plugin.
        plugin: String,
        /// The network.
        network: String,
        /// What it may take.
        seconds: u64,
    },
    /// Ports of the node cannot lead into the network.
    #[error("the network {network:?} of this node has no plugin with the capability portMappings")]
    NoPortMappings {
        /// The network.
        network: String,
    },
    /// A port of the node leads somewhere else.
    #[error("the port {port} of this node leads to the container {container:?} already")]
    PortIsTaken {
        /// The port.
        port: String,
        /// Its name among those of CNI.
        container: String,
    },
    /// The network gives other addresses than those that are to be kept.
    #[error(
        "the network {network:?} cannot give the address that is to be kept: {asked} was asked for, {given} given"
    )]
    OtherAddress {
        /// The network.
        network: String,
        /// What was to be kept.
        asked: String,
        /// What the plugin has made.
        given: String,
    },
    /// A configuration or an answer that is not what the specification says.
    #[error("{what} cannot be read")]
    Json {
        /// Whose it is.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A file or a program.
    #[error(transparent)]
    Path(#[from] PathError),
}

impl Attachment {
    /// Whether its words can be handed to a plugin: those of a checkpoint may come from anybody.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let name = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !text.is_empty() && !text.starts_with('.') && text.chars().all(plain)
        };
        // IFNAMSIZ of the kernel, without the zero at the end.
        let interface = name(&self.interface) && self.interface.len() < 16;
        let mac = self.mac.chars().all(|c| c.is_ascii_hexdigit() || c == ':');
        let address = |address: &String| {
            address.split_once('/').is_some_and(|(ip, prefix)| {
                ip.parse::<IpAddr>().is_ok() && prefix.parse::<u8>().is_ok()
            })
        };
        let port = |port: &PortMapping| {
            ["tcp", "udp", "sctp"].contains(&port.protocol.as_str())
                && (port.host_ip.is_empty() || port.host_ip.parse::<IpAddr>().is_ok())
        };
        let addresses = self.addresses.iter().all(address);
        name(&self.network) && interface && mac && addresses && self.ports.iter().all(port)
    }
}

/// What containerd's clients call a container among those of CNI.
#[must_use]
pub fn container_name(namespace: &str, id: &str) -> String {
    format!("{namespace}-{id}")
}

impl Default for Cni {
    /// The places of libcni, and Debian's of the plugins.
    fn default() -> Self {
        Self {
            config_dir: "/etc/cni/net.d".into(),
            plugin_dirs: ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .map(PathBuf::from)
                .into(),
            results_dir: "/var/lib/cni/results".into(),
            patience: Duration::from_secs(60),
        }
    }
}

impl Cni {
    /// The networks that a container is in.
    ///
    /// # Errors
    /// A result cannot be read.
    pub fn of_container(&self, container: &str) -> Result<Vec<Attachment>, CniError> {
        results::read(&self.results_dir, container)
    }

    /// The network that clients of containerd use unless they name one: that of the first configuration.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn default_network(&self) -> Result<Option<String>, CniError> {
        config::first(&self.config_dir)
    }

    /// Checks that a network can be made here at all.
    ///
    /// # Errors
    /// It has no configuration here, or a plugin is missing.
    pub fn check(&self, network: &str) -> Result<(), CniError> {
        let found = config::find(&self.config_dir, network)?;
        for plugin in &found.plugins {
            plugin::find(&self.plugin_dirs, &found, plugin)?;
        }
        Ok(())
    }

    /// Checks that these ports can lead into a network here.
    ///
    /// # Errors
    /// No plugin of it can do so, or a port leads to another container.
    pub fn check_ports(&self, network: &str, ports: &[PortMapping]) -> Result<(), CniError> {
        let found = config::find(&self.config_dir, network)?;
        let maps = |plugin: &serde_json::Value| plugin["capabilities"]["portMappings"] == true;
        if !ports.is_empty() && !found.plugins.iter().any(maps) {
            return Err(CniError::NoPortMappings {
                network: network.to_owned(),
            });
        }
        let taken = results::ports(&self.results_dir)?;
        let same = |a: &PortMapping, b: &PortMapping| {
            (a.host_port, &a.protocol) == (b.host_port, &b.protocol)
        };
        for port in ports {
            if let Some((container, _)) = taken.iter().find(|(_, other)| same(port, other)) {
                return Err(CniError::PortIsTaken {
                    port: port.to_string(),
                    container: container.clone(),
                });
            }
        }
        Ok(())
    }

    /// Puts a container into a network.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub fn add(&self, place: Place<'_>, attachment: &Attachment) -> Result<(), CniError> {
        let network = config::find(&self.config_dir, &attachment.network)?;
        let added = self.add_all(place, attachment, &network);
        added.inspect_err(|_| {
            // The first failure is the one that is told.
            drop(self.run_del(place, attachment, &network));
        })
    }

    fn add_all(
        &self,
        place: Place<'_>,
        attachment: &Attachment,
        network: &config::Network,
    ) -> Result<(), CniError> {
        let mut result = None;
        for plugin in &network.plugins {
            let call = plugin::Call {
                command: "ADD",
                place,
                attachment,
                previous: result.as_ref(),
            };
            result = Some(plugin::run(self, network, plugin, &call)?);
        }
        let result = result.unwrap_or_default();
        if attachment.address == Address::Keep {
            check_kept(attachment, &result)?;
        }
        results::write(
            &self.results_dir,
            place.container,
            attachment,
            network,
            &result,
        )
    }

    /// Takes a container out of a network. It is no error when it is not in it.
    ///
    /// # Errors
    /// A plugin's.
    pub fn del(&self, place: Place<'_>, attachment: &Attachment) -> Result<(), CniError> {
        let network = config::find(&self.config_dir, &attachment.network)?;
        self.run_del(place, attachment, &network)
    }

    fn run_del(
        &self,
        place: Place<'_>,
        attachment: &Attachment,
        network: &config::Network,
    ) -> Result<(), CniError> {
        let previous = results::read_result(&self.results_dir, place.container, attachment);
        for plugin in network.plugins.iter().rev() {
            let call = plugin::Call {
                command: "DEL",
                place,
                attachment,
                previous: previous.as_ref(),
            };
            plugin::run(self, network, plugin, &call)?;
        }
        results::remove(&self.results_dir, place.container, attachment);
        Ok(())
    }
}

/// Whether the network has given what was asked for.
fn check_kept(attachment: &Attachment, result: &serde_json::Value) -> Result<(), CniError> {
    let (addresses, mac) = results::given(result, &attachment.interface);
    let missing = { attachment.addresses.iter() }.any(|address| !addresses.contains(address));
    if missing || (!attachment.mac.is_empty() && !attachment.mac.eq_ignore_ascii_case(&mac)) {
        let shown = |addresses: &[String], mac: &str| format!("{} {mac}", addresses.join(" "));
        return Err(CniError::OtherAddress {
            network: attachment.network.clone(),
            asked: shown(&attachment.addresses, &attachment.mac),
            given: shown(&addresses, &mac),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
