//! The interfaces of a container with a network namespace of its own, and the networks of CNI that they are in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;
use transship_checkpoint::spec::Spec;
use transship_cni::{Attachment, Cni, Place, container_name};
use transship_sandbox::read_proc;

use crate::error::{Context, Error, Result};

/// What the kernel puts into a new network namespace by itself: loopback, and the fallback devices of
/// tunnel modules (`net.core.fb_tunnels_only_for_init_net`).
const OF_EVERY_NAMESPACE: [&str; 11] = [
    "lo",
    "tunl0",
    "gre0",
    "gretap0",
    "erspan0",
    "ip_vti0",
    "ip6_vti0",
    "sit0",
    "ip6tnl0",
    "ip6gre0",
    "ip6gretap0",
];

/// How long a container that stands still waits for its networks.
const PATIENCE: Duration = Duration::from_secs(10);

/// The networks that a container with this first process is in by itself.
///
/// # Errors
/// What CNI has written down cannot be read.
pub(crate) fn of_container(
    namespace: &str,
    id: &str,
    pid: u32,
    spec: &Spec,
) -> Result<Vec<Attachment>> {
    if !has_own_network(spec) {
        return Ok(Vec::new());
    }
    let mut networks = Cni::default()
        .of_container(&container_name(namespace, id))
        .with_context(|| format!("the networks of {id:?} are not known"))?;
    // A result may be older than the container.
    let there = interfaces(pid);
    networks.retain(|network| there.contains(&network.interface));
    Ok(networks)
}

/// Puts a container with this first process into the networks again that it is not in any more.
///
/// # Errors
/// A plugin's, or they have taken too long: it has not all of its networks.
pub(crate) async fn give_back(
    (namespace, id): (&str, &str),
    pid: u32,
    networks: &[Attachment],
) -> Result<()> {
    let there = interfaces(pid);
    let gone = { networks.iter() }.filter(|it| !there.contains(&it.interface));
    let gone: Vec<Attachment> = gone.cloned().collect();
    if gone.is_empty() {
        return Ok(());
    }
    let container = container_name(namespace, id);
    let file = namespace_of(pid);
    let added = tokio::task::spawn_blocking(move || {
        let place = Place {
            container: &container,
            namespace: Some(&file),
        };
        { gone.iter() }.try_for_each(|network| Cni::default().add(place, network))
    });
    let failed = || format!("{id:?} runs on here without its network");
    match timeout(PATIENCE, added).await {
        Ok(added) => added?.with_context(failed),
        // They go on, and may still do it.
        Err(_) => Err(Error::failed(format!(
            "its plugins have taken more than {} s",
            PATIENCE.as_secs()
        )))
        .with_context(failed),
    }
}

/// The network namespace of a process.
pub(crate) fn namespace_of(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("ns/net")
}

/// Whether it has a network namespace, and shares it with nobody.
pub(crate) fn has_own_network(spec: &Spec) -> bool {
    let namespaces = spec.get("/linux/namespaces").and_then(|it| it.as_array());
    let mut namespaces = namespaces.into_iter().flatten();
    namespaces.any(|it| it["type"] == "network" && it["path"].as_str().is_none_or(str::is_empty))
}

/// The interfaces in the network namespace of a process, without those of every namespace; none of a process
/// that is gone.
pub(crate) fn interfaces(pid: u32) -> Vec<String> {
    let table = read_proc(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    own_interfaces(&table)
}

fn own_interfaces(table: &str) -> Vec<String> {
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'));
    names
        .map(|(name, _)| name.trim().to_owned())
        .filter(|name| !OF_EVERY_NAMESPACE.contains(&name.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_somebody_made_are_found() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes |bytes\n    lo: 0 0\n  tunl0: 0\n  \
                     eth0: 5 5\n";
        assert_eq!(own_interfaces(table), ["eth0"]);
        assert!(own_interfaces("").is_empty());
    }

    #[test]
    fn a_network_is_its_own_when_it_has_one_without_a_path() {
        for (namespaces, own) in [
            (r#"[{"type":"pid"}]"#, false),
            (r#"[{"type":"network"}]"#, true),
            (r#"[{"type":"network","path":"/proc/7/ns/net"}]"#, false),
        ] {
            let json = format!(r#"{{"linux":{{"namespaces":{namespaces}}}}}"#);
            let spec = Spec::parse(json.as_bytes()).unwrap();
            assert_eq!(has_own_network(&spec), own, "{namespaces}");
        }
    }
}
