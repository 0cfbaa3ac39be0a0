//! containerd's restart monitor, kept away from a container that a migration has frozen.
//!
//! The monitor starts every container again whose label `containerd.io/restart.status` says `running`
//! and whose task does not run; containerd before 2.0 takes a paused one for that. So the label has
//! another name while the container moves, and stays so on a source that is kept.
//!
//! ```text
//!  source    restart.status -> dev.transship/suspended-restart.status, until the migration has failed
//!  target    dev.transship/suspended-restart.status, restart.policy, as the copy is made
//!            -> restart.status, when it runs and is the only one
//! ```
//!
//! Of what the source says only values that mean nothing else than "start it again" come along: `restart.loguri` is a program
//! that the monitor would run.

use std::collections::{BTreeMap, HashMap};

use transship_containerd::Containerd;

use crate::error::Result;

const STATUS: &str = "containerd.io/restart.status";
const SUSPENDED: &str = "dev.transship/suspended-restart.status";

/// When the monitor starts a container again: `always`, `on-failure:3`.
const POLICY: &str = "containerd.io/restart.policy";

/// The labels of a copy that containerd shall start again, once it is the only one, as it did with the source.
pub(crate) fn of_copy(source: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    if source.get(STATUS).is_none_or(|status| status != "running") {
        return BTreeMap::new();
    }
    let mut labels = BTreeMap::from([(SUSPENDED.to_owned(), "running".to_owned())]);
    match source.get(POLICY) {
        None => {}
        Some(policy) if is_policy(policy) => {
            labels.insert(POLICY.to_owned(), policy.clone());
        }
        // Without one the monitor takes `always`, which nobody has asked for.
        Some(_) => labels.clear(),
    }
    labels
}

fn is_policy(policy: &str) -> bool {
    let retries = policy.strip_prefix("on-failure:");
    ["always", "unless-stopped", "on-failure"].contains(&policy)
        || retries.is_some_and(|count| count.parse::<u16>().is_ok())
}

/// Shows a copy to the monitor that was hidden from it; its labels as they are to be.
pub(crate) fn shown(labels: HashMap<String, String>) -> HashMap<String, String> {
    renamed(labels.clone(), SUSPENDED, STATUS).unwrap_or(labels)
}

/// Hides the container from the monitor.
///
/// # Errors
/// containerd does not answer.
pub async fn suspend(node: &Containerd, id: &str) -> Result<()> {
    rename(node, id, STATUS, SUSPENDED).await
}

/// Shows it to the monitor again, if it was hidden.
///
/// # Errors
/// containerd does not answer. A container that has gone needs no policy.
pub async fn put_back(node: &Containerd, id: &str) -> Result<()> {
    rename(node, id, SUSPENDED, STATUS).await
}

async fn rename(node: &Containerd, id: &str, from: &str, to: &str) -> Result<()> {
    let record = match node.container(id).await {
        Err(error) if error.is_not_found() => return Ok(()),
        record => record?,
    };
    match renamed(record.labels, from, to) {
        Some(labels) => Ok(node.label_container(id, labels).await?),
        None => Ok(()),
    }
}

fn renamed(
    mut labels: HashMap<String, String>,
    from: &str,
    to: &str,
) -> Option<HashMap<String, String>> {
    let value = labels.remove(from)?;
    labels.insert(to.to_owned(), value);
    Some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_comes_along_and_nothing_else() {
        let of = |labels: &[(&str, &str)]| {
            let labels = labels.iter();
            let labels = labels.map(|(name, value)| (format!("{RESTART}{name}"), (*value).into()));
            let copy: HashMap<_, _> = of_copy(&labels.collect()).into_iter().collect();
            assert!(!copy.contains_key(STATUS), "{copy:?}");
            let mut shown: Vec<_> = shown(copy).into_iter().collect();
            shown.sort();
            let short = |name: String| name.replace(RESTART, "");
            let shown = shown.into_iter();
            shown
                .map(|(name, value)| format!("{}={value}", short(name)))
                .collect::<Vec<_>>()
        };
        const RESTART: &str = "containerd.io/restart.";
        let running = ("status", "running");
        assert_eq!(of(&[running]), ["status=running"]);
        let log = ("loguri", "binary:///bin/sh");
        let policy = ("policy", "on-failure:3");
        assert_eq!(
            of(&[running, policy, log, ("count", "2")]),
            ["policy=on-failure:3", "status=running"]
        );
        for policy in ["no", "on-failure:x", "always\n", ""] {
            assert!(of(&[running, ("policy", policy)]).is_empty(), "{policy:?}");
        }
        assert!(of(&[("status", "stopped"), ("policy", "always")]).is_empty());
        assert!(of(&[("policy", "always")]).is_empty());
    }

    #[test]
    fn the_label_comes_back_as_it_was() {
        let labels: HashMap<_, _> = [(STATUS.to_owned(), "running".to_owned())].into();
        let hidden = renamed(labels.clone(), STATUS, SUSPENDED).unwrap();
        assert!(!hidden.contains_key(STATUS));
        assert_eq!(renamed(hidden, SUSPENDED, STATUS).unwrap(), labels);
        assert_eq!(renamed(labels, SUSPENDED, STATUS), None);
    }
}
