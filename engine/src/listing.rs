//! The checkpoints of a store and the migrations that are not decided, as a list for people and programs.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use transship_checkpoint::store::{Checkpoint, Store};
use transship_package::signature::SIGNATURE_FILE;
use transship_sandbox::consumed::times_restored;

use crate::error::{Result, one_line};
use crate::migrate::{Pending, Records, pending};

/// A checkpoint in the list; one that cannot be read has its name and the reason. Or a migration of which nobody
/// knows yet which copy runs, by `namespace/container`.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// When it was taken, as RFC 3339 has it.
    pub created: String,
    /// Seconds since then.
    pub age_seconds: u64,
    /// What its files hold, in bytes.
    pub bytes: u64,
    /// The names of its containers.
    pub containers: Vec<String>,
    /// The pod that they belonged to, `namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// containerd's namespace of its containers.
    pub namespace: String,
    /// The host name of the node that it was taken on.
    pub source: String,
    /// How many pods and containers have been restored from it, as far as this node knows.
    pub restored: usize,
    /// The migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undecided: Option<Pending>,
    /// Whether it is signed, by whomever; of one that is sealed nobody knows without a key.
    pub signed: bool,
    /// Whether it is sealed: encrypted as it lies.
    pub sealed: bool,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// All checkpoints, by name. `records` has what was consumed, by whom.
///
/// # Errors
/// The store cannot be read.
pub fn list(store: &Store, records: &Path) -> Result<Vec<Listed>> {
    let listed = store
        .list()?
        .into_iter()
        .map(|(name, opened)| match opened {
            Ok(checkpoint) => listed(name, &checkpoint, records),
            Err(error) => Listed {
                name,
                error: Some(one_line(&error)),
                ..Listed::default()
            },
        });
    Ok(listed.collect())
}

/// Migrations that have not been decided.
///
/// # Errors
/// The records cannot be listed.
pub fn undecided() -> Result<Vec<Listed>> {
    let Records { pending, unread } = pending()?;
    let listed = pending.into_iter().map(|migration| Listed {
        name: format!("{}/{}", migration.namespace, migration.called()),
        created: migration.since.clone(),
        undecided: Some(migration),
        ..Listed::default()
    });
    let unread = unread.into_iter().map(|(name, error)| Listed {
        name: name.replacen(':', "/", 1),
        error: Some(error.one_line()),
        ..Listed::default()
    });
    Ok(listed.chain(unread).collect())
}

fn listed(name: String, checkpoint: &Checkpoint, records: &Path) -> Listed {
    let manifest = &checkpoint.manifest;
    let created = UNIX_EPOCH + Duration::from_secs(manifest.created);
    let names = manifest.containers.iter().map(|container| &container.name);
    let pod = manifest.pod.as_ref();
    let age = SystemTime::now().duration_since(created);
    let namespace = manifest.containers.first().map(|it| it.namespace.clone());
    Listed {
        name,
        created: transship_containerd::rfc3339(created),
        age_seconds: age.map_or(0, |age| age.as_secs()),
        namespace: namespace.unwrap_or_default(),
        signed: checkpoint.dir.join(SIGNATURE_FILE).is_file(),
        sealed: checkpoint.sealed.is_some(),
        bytes: checkpoint.bytes(),
        containers: names.cloned().collect(),
        pod: pod.map(|pod| format!("{}/{}", pod.namespace, pod.name)),
        source: manifest.source.hostname.clone(),
        // Who cannot read the records sees none.
        restored: times_restored(records, manifest).unwrap_or_default(),
        undecided: None,
        error: None,
    }
}
