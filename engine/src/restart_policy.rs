//! containerd's restart monitor, kept away from a container that a migration has frozen.
//!
//! The monitor starts every container again whose label `containerd.io/restart.status` says `running`
//! and whose task does not run; containerd before 2.0 takes a paused one for that. So the label has
//! another name while the container is frozen, and stays so on a source that is kept, or left paused.
//!
//! ```text
//!  source    restart.status -> dev.transship/suspended-restart.status, until the migration has failed
//!            dev.transship/suspended-in: the boot in which that was; not on a source that is kept
//!  target    dev.transship/suspended-restart.status, restart.policy, as the copy is made
//!            -> restart.status, when it runs and is the only one
//! ```
//!
//! A guard puts it back where the command cannot; after a power cut neither is left, and before the record is on the disk
//! nothing says that anything was under way. So what was hidden in an earlier boot, and has no record, is shown again.
//!
//! Of what the source says only values that mean nothing else than "start it again" come along: `restart.loguri` is a program
//! that the monitor would run.

use std::collections::{BTreeMap, HashMap};

use transship_containerd::Containerd;

use crate::error::Result;
use crate::node_id::boot_id;

const STATUS: &str = "containerd.io/restart.status";
const SUSPENDED: &str = "dev.transship/suspended-restart.status";

/// The boot in which a container was hidden that moves.
const SUSPENDED_IN: &str = "dev.transship/suspended-in";

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
pub(crate) async fn suspend(node: &Containerd, id: &str) -> Result<()> {
    let boot = boot_id()?;
    change(node, id, |labels| hidden(labels, &boot)).await
}

/// Whether it is hidden from the monitor.
///
/// # Errors
/// containerd does not answer.
pub(crate) async fn is_suspended(node: &Containerd, id: &str) -> Result<bool> {
    Ok({ node.container(id).await }?.labels.contains_key(SUSPENDED))
}

/// It stays hidden from the monitor: it has moved.
///
/// # Errors
/// containerd does not answer.
pub(crate) async fn keep_suspended(node: &Containerd, id: &str) -> Result<()> {
    change(node, id, |mut labels| {
        labels.remove(SUSPENDED_IN).map(|_| labels)
    })
    .await
}

/// Shows what a power cut has left hidden, in all namespaces; `has_record` tells of a namespace and an id whether a
/// migration of it is still to be decided.
///
/// # Errors
/// containerd does not answer.
pub(crate) async fn put_back_left(
    node: &Containerd,
    has_record: impl Fn(&str, &str) -> bool,
) -> Result<()> {
    let boot = boot_id()?;
    let mut outcome = Ok(());
    for namespace in node.namespaces().await? {
        let node = node.in_namespace(&namespace)?;
        for record in node.all_containers().await? {
            if !is_left(&record.labels, &boot) || has_record(&namespace, &record.id) {
                continue;
            }
            // As it is by then: a migration that has begun hides it anew.
            let shown = |labels| match is_left(&labels, &boot) {
                true => renamed(labels, SUSPENDED, STATUS),
                false => None,
            };
            // What cannot be shown keeps no other one hidden.
            outcome = outcome.and(change(&node, &record.id, shown).await);
        }
    }
    outcome
}

/// Whether it was hidden, in an earlier boot, by who cannot be there any more.
fn is_left(labels: &HashMap<String, String>, boot: &str) -> bool {
    labels
        .get(SUSPENDED_IN)
        .is_some_and(|hidden_in| hidden_in != boot)
}

/// Shows it to the monitor again, if it was hidden.
///
/// # Errors
/// containerd does not answer. A container that has gone needs no policy.
pub(crate) async fn put_back(node: &Containerd, id: &str) -> Result<()> {
    change(node, id, |labels| renamed(labels, SUSPENDED, STATUS)).await
}

/// Changes its labels, if there is something to change.
async fn change(
    node: &Containerd,
    id: &str,
    changed: impl FnOnce(HashMap<String, String>) -> Option<HashMap<String, String>>,
) -> Result<()> {
    let record = match node.container(id).await {
        Err(error) if error.is_not_found() => return Ok(()),
        record => record?,
    };
    match changed(record.labels) {
        Some(labels) => Ok(node.label_container(id, labels).await?),
        None => Ok(()),
    }
}

/// Also of one that an earlier boot has left hidden and somebody has started since.
fn hidden(labels: HashMap<String, String>, boot: &str) -> Option<HashMap<String, String>> {
    let is_left = labels.contains_key(SUSPENDED_IN);
    let mut labels = match labels.contains_key(STATUS) {
        true => renamed(labels, STATUS, SUSPENDED)?,
        false => Some(labels).filter(|_| is_left)?,
    };
    labels.insert(SUSPENDED_IN.to_owned(), boot.to_owned());
    Some(labels)
}

fn renamed(
    mut labels: HashMap<String, String>,
    from: &str,
    to: &str,
) -> Option<HashMap<String, String>> {
    labels.remove(SUSPENDED_IN);
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
        let hidden = hidden(labels.clone(), "now").unwrap();
        assert!(!hidden.contains_key(STATUS));
        assert_eq!(renamed(hidden, SUSPENDED, STATUS).unwrap(), labels);
        assert_eq!(renamed(labels, SUSPENDED, STATUS), None);
    }

    #[test]
    fn what_an_earlier_boot_has_hidden_is_left() {
        let labels: HashMap<_, _> = [(STATUS.to_owned(), "running".to_owned())].into();
        assert!(!is_left(&labels, "now"));
        let before = hidden(labels, "before").unwrap();
        assert!(is_left(&before, "now") && !is_left(&before, "before"));
        let again = hidden(before.clone(), "now").unwrap();
        assert!(!is_left(&again, "now") && again.contains_key(SUSPENDED));
        // One that is kept.
        let mut kept = before;
        kept.remove(SUSPENDED_IN);
        assert!(!is_left(&kept, "now"));
        assert_eq!(hidden(kept, "now"), None);
    }
}
