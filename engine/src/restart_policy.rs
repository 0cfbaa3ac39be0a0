//! containerd's restart monitor, kept away from a container that a migration has frozen.
//!
//! The monitor starts every container again whose label `containerd.io/restart.status` says `running`
//! and whose task does not run; containerd before 2.0 takes a paused one for that. So the label has
//! another name while the container moves, and stays so on a source that is kept.

use std::collections::HashMap;

use transship_containerd::Containerd;

use crate::error::Result;

const STATUS: &str = "containerd.io/restart.status";
const SUSPENDED: &str = "dev.transship/suspended-restart.status";

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
    fn the_label_comes_back_as_it_was() {
        let labels: HashMap<_, _> = [(STATUS.to_owned(), "running".to_owned())].into();
        let hidden = renamed(labels.clone(), STATUS, SUSPENDED).unwrap();
        assert!(!hidden.contains_key(STATUS));
        assert_eq!(renamed(hidden, SUSPENDED, STATUS).unwrap(), labels);
        assert_eq!(renamed(labels, SUSPENDED, STATUS), None);
    }
}
