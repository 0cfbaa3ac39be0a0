//! `ipc.json`: which System V objects restores have put into the sandbox's IPC namespace.
//!
//! ```text
//! { "namespace": [DEV, INODE], "objects": [ { "kind": "shm", "id": 0, "key": 17 }, ... ] }
//! ```
//!
//! The namespace is named, so that a record that outlived its sandbox does not count.

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

const IPC_FILE: &str = "ipc.json";

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    namespace: (u64, u64),
    objects: Vec<IpcObject>,
}

impl PodDir {
    /// Takes the objects out of the images in `dir` that an earlier restore has put into the IPC
    /// namespace at `namespace`, and returns those that this restore will put there, and the
    /// shared memory that its tasks have attached and that has to be attached again.
    ///
    /// # Errors
    /// An image that cannot be edited, or a failed system call.
    pub fn remove_present_ipc(
        &self,
        dir: &Path,
        namespace: &Path,
    ) -> Result<(Vec<IpcObject>, Vec<Attachment>), SandboxError> {
        let present = self.ipc_record(namespace)?.objects;
        let mut new = objects(dir)?;
        new.retain(|object| !present.contains(object));
        let mut attachments = Vec::new();
        if !present.is_empty() {
            remove_objects(dir, &present)?;
            attachments = detach(dir, &present)?;
        }
        Ok((new, attachments))
    }

    /// Remembers objects that a restore has put into the IPC namespace at `namespace`.
    ///
    /// # Errors
    /// A failed system call.
    pub fn record_ipc(&self, namespace: &Path, new: &[IpcObject]) -> Result<(), SandboxError> {
        if new.is_empty() {
            return Ok(());
        }
        let mut record = self.ipc_record(namespace)?;
        record.objects.extend_from_slice(new);
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
                objects: Vec::new(),
            })
        }
    }
}
