//! TCP connections between two containers of a pod.
//!
//! ```text
//!  restore of the first end ... start ... restore of the second end
//!  |-- table inet transship-<sandbox>: packets of the connections are dropped --|
//! ```
//!
//! Its ends are restored one after the other, and the kernel answers for an end that is not there
//! yet: with a reset, which ends the connection (CRIU itself makes the first end send a packet, the
//! window probe after TCP repair). So the packets of such connections are dropped until no restore
//! of an end is waiting; what was lost is sent again, as TCP does. nft is what CRIU's own network lock needs.
//! A pod in the node's own network gets no rules: they are made of what a checkpoint says.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use transship_checkpoint::criu_images::inet_sockets::{Connection, connections};
use transship_checkpoint::criu_options::Tcp;
use transship_checkpoint::manifest::IMAGES_DIR;
use transship_checkpoint::namespaces::{self, Namespace};
use transship_sandbox::admission::is_own_namespace;
use transship_sandbox::{PodDir, Request, nft};

use super::bundle::Config;
use super::{Front, FrontError};

/// Lets the connections go when it is dropped and no restore of the pod waits.
#[derive(Debug)]
pub(super) struct HeldConnections<'a> {
    pod: &'a PodDir,
    own: String,
    namespace: PathBuf,
    table: String,
    ends: Vec<(String, Connection)>,
}

impl Front<'_> {
    /// Drops the packets of the connections between the container and another one of the pod, if
    /// there are any.
    pub(super) fn hold_pod_connections<'a>(
        &self,
        config: &Config,
        pod: &'a PodDir,
        request: &Request,
    ) -> Result<Option<HeldConnections<'a>>, FrontError> {
        if request.criu.tcp != Tcp::Established || !config.cri {
            return Ok(None);
        }
        let network = namespaces::joined(&config.spec).remove(&Namespace::Network);
        let is_nodes = |path: &PathBuf| is_own_namespace(Namespace::Network.oci_name(), path);
        // In the node's own a rule would meet others' connections, and outlive the pod.
        let Some(namespace) = network.filter(|path| !is_nodes(path)) else {
            return Ok(None);
        };
        let checkpoint = self.env.store.open(&request.checkpoint)?;
        let mut ends = Vec::new();
        for container in &checkpoint.manifest.containers {
            let images = checkpoint.container_dir(container).join(IMAGES_DIR);
            let own = connections(&images)?;
            ends.extend(own.into_iter().map(|end| (container.name.clone(), end)));
        }
        let rules = rules(&ends, |_| true);
        if rules.is_empty() {
            return Ok(None);
        }
        let id = pod.path().file_name().unwrap_or_default().to_string_lossy();
        let held = HeldConnections {
            pod,
            own: config.annotations.container.clone().unwrap_or_default(),
            namespace,
            table: format!("inet transship-{id}"),
            ends,
        };
        held.replace(&rules)?;
        Ok(Some(held))
    }
}

/// A rule for each direction of each connection that has its ends in two containers, one of which `waits`.
fn rules(ends: &[(String, Connection)], waits: impl Fn(&str) -> bool) -> String {
    let mut owners: HashMap<Connection, HashSet<&str>> = HashMap::new();
    for (container, end) in ends {
        owners.entry(*end).or_default().insert(container);
    }
    let between = ends.iter().filter(|(container, end)| {
        let others = owners.get(&end.other_end()).into_iter().flatten();
        let mut others = others.filter(|it| *it != container);
        others.any(|it| waits(it) || waits(container))
    });
    let rule = |end: &Connection| {
        let family = if end.local.is_ipv4() { "ip" } else { "ip6" };
        let (from, to) = (end.peer, end.local);
        format!(
            "{family} saddr {} {family} daddr {} tcp sport {} tcp dport {} drop\n",
            from.ip(),
            to.ip(),
            from.port(),
            to.port(),
        )
    };
    between.map(|(_, end)| rule(end)).collect()
}

impl HeldConnections<'_> {
    /// Puts these rules in the place of those before; none at all without one.
    fn replace(&self, rules: &str) -> Result<(), FrontError> {
        // Declared first, a table can be deleted whether it was there or not.
        let mut script = format!("table {0}\ndelete table {0}\n", self.table);
        if !rules.is_empty() {
            script += &format!(
                "table {} {{ chain input {{\n\
                 type filter hook input priority -150; policy accept;\n{rules}}}\n}}\n",
                self.table
            );
        }
        let act = "hold the TCP connections inside of the pod by rules in";
        Ok(nft(act, &self.namespace, &script)?)
    }
}

impl Drop for HeldConnections<'_> {
    fn drop(&mut self) {
        // One that the new pod does not have waits for ever, and holds its own connections alone.
        let waiting = self.pod.waiting().unwrap_or_default();
        let waits = |name: &str| name != self.own && waiting.iter().any(|it| it == name);
        // What stays drops packets of connections that nobody restores; it goes with the network namespace.
        drop(self.replace(&rules(&self.ends, waits)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connections_between_two_containers_have_rules() {
        let end = |local: &str, peer: &str| Connection {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        };
        let there = end("127.0.0.1:7000", "127.0.0.1:40000");
        let inside = end("[::1]:80", "[::1]:5000");
        let ends = [
            ("server", there),
            ("client", there.other_end()),
            ("client", inside),
            ("client", inside.other_end()),
            ("server", end("10.0.0.2:7000", "10.0.0.9:1234")),
        ];
        let ends = ends.map(|(name, end)| (name.to_owned(), end));
        // A third one that waits has no part in them.
        assert_eq!(rules(&ends, |name| name == "debugger"), "");
        for waits in ["server", "client"] {
            assert_eq!(rules(&ends, |name| name == waits), rules(&ends, |_| true));
        }
        assert_eq!(
            rules(&ends, |_| true),
            "ip saddr 127.0.0.1 ip daddr 127.0.0.1 tcp sport 40000 tcp dport 7000 drop\n\
             ip saddr 127.0.0.1 ip daddr 127.0.0.1 tcp sport 7000 tcp dport 40000 drop\n"
        );
    }
}
