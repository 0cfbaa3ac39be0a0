//! `ipc.json`: which System V objects restores have put into the sandbox's IPC namespace.
//!
//! ```text
//! { "namespace": [DEV, INODE],
//!   "restores": [ { "checkpoint": "web", "created": 1700000000, "holders": [ [PID, START TIME], ... ],
//!                   "objects": [ { "kind": "shm", "id": 0, "key": 17 }, ... ] } ] }
//! ```
//!
//! The namespace is named, so that a record that outlived its sandbox does not count. Containers of one checkpoint have the
//! objects together, as long as one of them lives: to another restore they are what somebody has left, with contents
//! of another time, and give way; unless somebody is there who may use them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use transship_checkpoint::criu_images::ipcns::{IpcObject, objects, remove_objects};
use transship_checkpoint::criu_images::shm_mappings::{Attachment, detach};

use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::replace;
use crate::pod_dir::PodDir;
use crate::proc_text::TaskStat;
use crate::sysv_objects::LiveIpc;

const IPC_FILE: &str = "ipc.json";

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    namespace: (u64, u64),
    #[serde(default)]
    restores: Vec<RestoredIpc>,
}

/// What the containers of one checkpoint have together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RestoredIpc {
    checkpoint: String,
    /// Seconds since 1970; another one may get its name.
    created: Option<u64>,
    /// Their first processes, and when these started.
    holders: Vec<(i32, u64)>,
    objects: Vec<IpcObject>,
}

/// Whose objects they are: a checkpoint, and when it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OfCheckpoint<'a> {
    /// Its name.
    pub name: &'a str,
    /// Seconds since 1970.
    pub created: Option<u64>,
}

impl RestoredIpc {
    fn is_of(&self, of: OfCheckpoint<'_>) -> bool {
        self.checkpoint == of.name && self.created == of.created
    }

    fn lives(&self) -> bool {
        self.holders.iter().any(|(pid, started)| {
            let stat = TaskStat::of(Path::new("/proc").join(pid.to_string()));
            stat.is_ok_and(|stat| !stat.has_ended() && stat.start_time() == Some(*started))
        })
    }
}

impl PodDir {
    /// Takes the objects out of the images in `dir` that a container of the same checkpoint, which lives, has in the IPC
    /// namespace at `namespace`, and returns those that this restore will put there, and the
    /// shared memory that its tasks have attached and that has to be attached again. What is left there of others gives way.
    ///
    /// # Errors
    /// [`SandboxError::IpcInUse`]; an image that cannot be edited, or a failed system call.
    pub fn remove_present_ipc(
        &self,
        dir: &Path,
        namespace: &Path,
        of: OfCheckpoint<'_>,
        has_others: &dyn Fn() -> bool,
    ) -> Result<(Vec<IpcObject>, Vec<Attachment>), SandboxError> {
        let mut record = self.ipc_record(namespace)?;
        record.restores.retain(RestoredIpc::lives);
        let own = record.restores.iter().find(|it| it.is_of(of));
        let present = own.map_or(Vec::new(), |it| it.objects.clone());
        let mut new = objects(dir)?;
        new.retain(|object| !present.contains(object));
        LiveIpc::of(namespace)?.make_way(&new, &present, has_others)?;
        let mut attachments = Vec::new();
        if !present.is_empty() {
            remove_objects(dir, &present)?;
            attachments = detach(dir, &present)?;
        }
        Ok((new, attachments))
    }

    /// Remembers objects that a restore has put into the IPC namespace at `namespace`, and the first process of its
    /// container, with the moment when it started.
    ///
    /// # Errors
    /// A failed system call.
    pub fn record_ipc(
        &self,
        namespace: &Path,
        of: OfCheckpoint<'_>,
        new: &[IpcObject],
        holder: (i32, u64),
    ) -> Result<(), SandboxError> {
        let mut record = self.ipc_record(namespace)?;
        record.restores.retain(RestoredIpc::lives);
        let own = record.restores.iter_mut().find(|it| it.is_of(of));
        match own {
            Some(own) => {
                own.objects.extend_from_slice(new);
                own.holders.push(holder);
            }
            None if new.is_empty() => return Ok(()),
            None => record.restores.push(RestoredIpc {
                checkpoint: of.name.to_owned(),
                created: of.created,
                holders: vec![holder],
                objects: new.to_vec(),
            }),
        }
        let json = serde_json::to_vec_pretty(&record).expect("strings and numbers are JSON");
        replace(&self.path().join(IPC_FILE), &json)
    }

    pub(crate) fn has_ipc_record(&self) -> Result<bool, SandboxError> {
        let path = self.path().join(IPC_FILE);
        Ok(path.try_exists().during("look for", &path)?)
    }

    fn ipc_record(&self, namespace: &Path) -> Result<Record, SandboxError> {
        let meta = fs::metadata(namespace).during("look at", namespace)?;
        let identity = (meta.dev(), meta.ino());
        let path = self.path().join(IPC_FILE);
        let record: Record = match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map_err(|error| SandboxError::Damaged {
                path: path.clone(),
                what: error.to_string(),
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(error) => return Ok(Err(error).during("read", &path)?),
        };
        if record.namespace == identity {
            Ok(record)
        } else {
            Ok(Record {
                namespace: identity,
                restores: Vec::new(),
            })
        }
    }
}
