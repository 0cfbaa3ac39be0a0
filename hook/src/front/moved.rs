//! `create` of a container whose pod has been moved away: refused; see [`transship_sandbox::moved`].

use std::collections::HashMap;
use std::fs;

use serde::Deserialize;
use transship_checkpoint::cri_names::annotations::SANDBOX_UID;
use transship_sandbox::moved;

use super::bundle::Bundle;
use super::{FitError, Front, FrontError};

#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl Front<'_> {
    /// Also for containers without an annotation of ours: a pod that is moved needs none.
    pub(super) fn refuse_moved(&self, bundle: &Bundle) -> Result<(), FrontError> {
        let dir = &self.env.moved;
        if !moved::is_any(dir) {
            return Ok(());
        }
        // The runtime says what is wrong with a spec.
        let spec = { bundle.config_file() }.and_then(|file| fs::read(file).ok());
        let spec = spec.unwrap_or_default();
        let spec: Option<Annotated> = serde_json::from_slice(&spec).ok();
        let uid = spec.and_then(|mut spec| spec.annotations.remove(SANDBOX_UID));
        let Some(uid) = uid else { return Ok(()) };
        match moved::find(dir, &uid)? {
            None => Ok(()),
            Some(moved) => Err(FrontError::from(FitError::Moved {
                pod: format!("{}/{}", moved.namespace, moved.name),
                checkpoint: moved.checkpoint,
            })),
        }
    }
}
