//! The lock and the record of a migration that is under way.
//!
//! ```text
//! <container>: its id, or that of a pod's sandbox
//! /run/transship/migrations/<namespace>:<container>        locked (flock): a migration is under way
//! /var/lib/transship/migrations/<namespace>:<container>    JSON: Pending. `Commit` is about to be sent,
//!                                                          or has been, and the source is not gone yet
//! /run/transship/migrations/<namespace>:<container>~runs   the name of the migration whose copy runs, where the disk is
//!                                                          too full for the record to say so. What it is about ends
//!                                                          with the node at the latest
//! ```
//!
//! A record whose lock nobody has was left behind: nobody knows which copy runs, until
//! `transship recover` has asked the target.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use transship_cni::Attachment;

use crate::durable_record;
use crate::error::{Error, Result};
use crate::locks::Lock;

/// No id of containerd ends so.
const RUNS: &str = "~runs";

/// A migration whose end is not known here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// What both sides call it.
    pub migration: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container here, or of the pod's sandbox.
    pub container: String,
    /// The pod that it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PendingPod>,
    /// The command that leads to the other node.
    pub to: String,
    /// The program's path there.
    pub remote_program: String,
    /// What tells the other node from all others; empty: it does not say it.
    #[serde(default)]
    pub node: String,
    /// When containerd has made the records of the containers, by their ids.
    #[serde(default)]
    pub created: BTreeMap<String, String>,
    /// Whether somebody had paused it before.
    pub was_paused: bool,
    /// Whether record and snapshot stay here.
    pub keep_source: bool,
    /// The networks of CNI that it is in by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Attachment>,
    /// When `Commit` was sent, as in RFC 3339.
    pub since: String,
    /// Whether the target has said that the copy runs, and has all of its memory: what is here is being ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub copy_runs: bool,
}

/// A pod whose migration has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingPod {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Ids of its containers.
    pub containers: Vec<String>,
}

impl Pending {
    /// Ids of all containers that move.
    pub fn ids(&self) -> Vec<&str> {
        match &self.pod {
            Some(pod) => pod.containers.iter().map(String::as_str).collect(),
            None => vec![&self.container],
        }
    }

    /// What people call it, and what `transship recover` takes for its name: the container's id, or the pod as
    /// `namespace/name`.
    pub fn called(&self) -> String {
        match &self.pod {
            Some(pod) => format!("{}/{}", pod.namespace, pod.name),
            None => self.container.clone(),
        }
    }

    /// Whether a container that has one of its ids was made at another time than the one that moves.
    pub(super) fn names_others(&self, created: &BTreeMap<String, String>) -> bool {
        let mut then = self.created.iter();
        then.any(|(id, then)| created.get(id).is_some_and(|now| now != then))
    }

    /// Whether a person means this one, who works in containerd's namespace `namespace`. Pods are in one alone.
    pub fn is_called(&self, namespace: &str, name: &str) -> bool {
        match &self.pod {
            Some(_) => name == self.called() || name == self.container,
            None => name == self.container && namespace == self.namespace,
        }
    }
}

/// The record of one migration, whose lock is held as long as this is there.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    /// Whose copy runs.
    runs: PathBuf,
    _lock: Lock,
}

impl Record {
    /// Locks the migration of the container. Records are in `records`, locks in `locks`.
    ///
    /// # Errors
    /// Another migration has it.
    pub(super) fn take(records: &Path, locks: &Path, namespace: &str, id: &str) -> Result<Self> {
        let name = name_of(namespace, id);
        match durable_record::lock(records, locks, &name)? {
            Some(lock) => Ok(Self {
                path: records.join(&name),
                runs: locks.join(format!("{name}{RUNS}")),
                _lock: lock,
            }),
            None => Err(Error::refused(format!(
                "another migration of {id:?} is under way"
            ))),
        }
    }

    /// # Errors
    /// An earlier migration of the container, which is paused, has not been decided.
    pub(super) fn check_clear(&self, id: &str, namespace: &str) -> Result<()> {
        let Some(pending) = self.read()? else {
            return Ok(());
        };
        let (called, to) = (pending.called(), pending.to);
        Err(Error::refused(format!(
            "an earlier migration of {id:?} by {to:?} has not been decided: it may run there"
        ))
        .hint(format!("transship -n {namespace} recover {called}")))
    }

    /// What it says; none when it is known which copy runs.
    pub(super) fn read(&self) -> Result<Option<Pending>> {
        let mut pending: Option<Pending> = durable_record::read(&self.path)?;
        if let Some(pending) = &mut pending
            && fs::read(&self.runs).is_ok_and(|runs| runs == pending.migration.as_bytes())
        {
            pending.copy_runs = true;
        }
        Ok(pending)
    }

    /// Writes down that the target is told to let the copy run, or has said that it does.
    pub(super) fn write(&self, pending: &Pending) -> Result<()> {
        durable_record::write(&self.path, pending)
    }

    /// Writes down that the target has said that the copy runs: from then on nothing lets the source run, however its end
    /// goes.
    ///
    /// # Errors
    /// Neither the disk nor `/run` takes it.
    pub(super) fn write_copy_runs(&self, pending: &Pending) -> Result<()> {
        self.write(pending).or_else(|error| {
            let mut new = OpenOptions::new();
            let new = { new.write(true).create(true).truncate(true) }.mode(0o600);
            let mark = |mut file: fs::File| file.write_all(pending.migration.as_bytes());
            match new.open(&self.runs).and_then(mark) {
                Ok(()) => {
                    tracing::warn!("{}", error.one_line());
                    Ok(())
                }
                Err(_) => Err(error),
            }
        })
    }

    /// It is known which copy runs.
    pub(super) fn clear(&self) -> Result<()> {
        durable_record::remove(&self.path)
            // Of a migration that is open no more it says nothing.
            .inspect(|()| drop(fs::remove_file(&self.runs)))
    }
}

/// The records of a node.
#[derive(Debug, Default)]
pub struct Records {
    /// What they say.
    pub pending: Vec<Pending>,
    /// The names of those that cannot be read, and why.
    pub unread: Vec<(String, Error)>,
}

/// Whether a migration that has been listed is still not decided, whoever works on it.
pub(super) fn is_open(records: &Path, listed: &Pending) -> bool {
    let path = records.join(name_of(&listed.namespace, &listed.container));
    match durable_record::read::<Pending>(&path) {
        Ok(pending) => pending.is_some_and(|it| it.migration == listed.migration),
        // Nobody has decided it.
        Err(_) => true,
    }
}

fn name_of(namespace: &str, id: &str) -> String {
    format!("{namespace}:{id}")
}

/// All records in a directory.
pub(super) fn list(records: &Path) -> Result<Records> {
    let mut found = Records::default();
    for path in durable_record::list(records)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // One that was being written when the node went down: nothing was sent.
        if name.ends_with(durable_record::UNFINISHED) {
            continue;
        }
        match durable_record::read::<Pending>(&path) {
            Ok(pending) => found.pending.extend(pending),
            Err(error) => found.unread.push((name.into_owned(), error)),
        }
    }
    found.pending.sort_by(|a, b| a.since.cmp(&b.since));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn take(dir: &Path, namespace: &str) -> Result<Record> {
        Record::take(&dir.join("records"), &dir.join("locks"), namespace, "web")
    }

    #[test]
    fn one_migration_of_a_container_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let record = take(dir.path(), "default").unwrap();
        let error = take(dir.path(), "default").unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        take(dir.path(), "moved").unwrap();
        drop(record);
        take(dir.path(), "default").unwrap();
    }

    #[test]
    fn what_is_not_decided_stays_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let record = take(dir.path(), "default").unwrap();
        record.check_clear("web", "default").unwrap();
        let pending = Pending {
            migration: "0123".into(),
            namespace: "default".into(),
            container: "web".into(),
            pod: None,
            to: "ssh node-b".into(),
            remote_program: "transship".into(),
            node: String::new(),
            created: BTreeMap::new(),
            was_paused: false,
            keep_source: false,
            networks: Vec::new(),
            since: "2026-01-02T03:04:05Z".into(),
            copy_runs: false,
        };
        let at = |at: &str| BTreeMap::from([("web".to_owned(), at.to_owned())]);
        assert!(!pending.names_others(&at("1.0")), "an older record");
        let known = Pending {
            created: at("1.0"),
            ..pending.clone()
        };
        assert!(!known.names_others(&at("1.0")) && known.names_others(&at("1.1")));
        assert!(!known.names_others(&BTreeMap::new()), "it is gone");
        record.write(&pending).unwrap();
        drop(record);
        let records = dir.path().join("records");
        fs::write(records.join("default:other"), "{").unwrap();
        assert!(is_open(&records, &pending));
        let another = Pending {
            migration: "4567".into(),
            ..pending.clone()
        };
        assert!(!is_open(&records, &another));
        let listed = list(&records).unwrap();
        assert_eq!(listed.pending, std::slice::from_ref(&pending));
        assert_eq!(listed.unread[0].0, "default:other");
        let record = take(dir.path(), "default").unwrap();
        assert_eq!(record.read().unwrap(), Some(pending.clone()));
        let error = record.check_clear("web", "default").unwrap_err();
        assert!(error.to_string().contains("ssh node-b"), "{error}");
        // There is no room for another record.
        let unfinished = records.join("default:web~");
        fs::create_dir(&unfinished).unwrap();
        let runs = Pending {
            copy_runs: true,
            ..pending.clone()
        };
        assert!(record.write(&runs).is_err());
        record.write_copy_runs(&runs).unwrap();
        assert_eq!(record.read().unwrap(), Some(runs));
        fs::remove_dir(unfinished).unwrap();
        record.write(&another).unwrap();
        assert_eq!(
            record.read().unwrap(),
            Some(another),
            "of another migration"
        );
        record.clear().unwrap();
        record.write(&pending).unwrap();
        assert_eq!(
            record.read().unwrap(),
            Some(pending.clone()),
            "all is forgotten"
        );
        record.clear().unwrap();
        assert!(!is_open(&records, &pending));
        record.check_clear("web", "default").unwrap();
        assert_eq!(record.read().unwrap(), None);
        assert!(list(&records).unwrap().pending.is_empty());
        let none = list(&dir.path().join("none")).unwrap();
        assert!(none.pending.is_empty() && none.unread.is_empty());
    }
}
