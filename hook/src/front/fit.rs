//! Whether a checkpoint fits the container that asks for it: asked before anything is changed.
//!
//! ```text
//!  lengths          manifest                       the files
//!  asker            manifest, spec.dump            annotations, config.json: admission/asker.rs
//!  base             manifest (chain ids)           the parent of the snapshot, asked of containerd; not of what a
//!                                                  migration has made here (Once)
//!  privileges       the images                     config.json: sandbox/src/admission.rs
//!  once             staged restore (owner)         the container's name in the pod
//! ```
//!
//! The front has no connection to containerd: the program `transship` beside it has, and is run for this
//! one question, in restores only.

use std::path::PathBuf;
use std::process::Stdio;

use transship_checkpoint::manifest::Container;
use transship_checkpoint::spec::Spec;
use transship_sandbox::admission::AdmissionError;
use transship_sandbox::admission::asker::Asker;
use transship_sandbox::admission::container_base::ContainerBase;
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::{Request, Staged};

use transship_path_error::During as _;

use super::admission::{admit, read_spec};
use super::bundle::{Bundle, Config};
use super::{FitError, Front, FrontError};
use crate::origin::require_origin;

pub(super) fn not_admitted(request: &Request, source: AdmissionError) -> FrontError {
    let (container, checkpoint) = (&request.container, &request.checkpoint);
    FrontError::from(FitError::NotAdmitted {
        what: format!("{container:?} from the checkpoint {checkpoint:?}"),
        source,
    })
}

impl Front<'_> {
    /// Checks it; nothing is changed but who the restore is for. Gives the log of a container of the CRI.
    pub(super) fn check_fit(
        &self,
        id: &str,
        config: &Config,
        bundle: &Bundle,
        staged: &Staged,
    ) -> Result<Option<PathBuf>, FrontError> {
        let request = staged.request()?;
        let checkpoint = self.env.store.open(&request.checkpoint)?;
        let manifest = &checkpoint.manifest;
        let container = manifest.container(Some(&request.container))?;
        checkpoint.check_lengths(container)?;
        let old = read_spec(&checkpoint.container_dir(container))?;
        let rules = &NodeConfig::read(&self.env.node_config)?;
        let annotations = &config.annotations;
        let asker = Asker { rules, annotations };
        asker.admit_container(manifest, container, &old, &config.spec)?;
        require_origin(&checkpoint, rules, &self.env.origins, self.tool())?;
        // Of what our own tool has made it has looked at the layers itself.
        let made = staged.once().filter(|made| made.id == id);
        let log = match (made, config.cri) {
            (Some(made), true) => made.log,
            (None, true) => self.check_base(id, container, &manifest.name)?,
            (_, false) => None,
        };
        check_privileges(&request, &old, config, bundle)?;
        if let Some(name) = config
            .annotations
            .pod_container
            .as_ref()
            .filter(|_| config.cri)
        {
            staged.reserve_for(name)?;
        }
        Ok(log)
    }

    /// The upperdir is a diff against the layers of the image that the container had.
    fn check_base(
        &self,
        id: &str,
        container: &Container,
        checkpoint: &str,
    ) -> Result<Option<PathBuf>, FrontError> {
        let image = &container.image;
        let base = self.ask_for_base(id, &image.chain_id)?;
        let rebuilt = image.rebuilt.iter().map(|it| &it.chain_id);
        if [&image.chain_id]
            .into_iter()
            .chain(rebuilt)
            .any(|it| *it == base.chain_id)
        {
            return Ok(base.log);
        }
        let named = |name: &str, digest: &str| format!("{name:?} ({digest})");
        Err(FrontError::from(FitError::Base {
            container: container.name.clone(),
            checkpoint: checkpoint.to_owned(),
            had: named(&container.image.name, &container.image.digest),
            has: named(&base.image, &base.digest),
        }))
    }

    fn ask_for_base(&self, id: &str, expected: &str) -> Result<ContainerBase, FrontError> {
        let output = { self.tool() }
            .args(["container-base", id, "--expected", expected])
            .stdin(Stdio::null())
            .output()
            .during("run", &self.env.tool)?;
        let said = String::from_utf8_lossy(&output.stderr);
        let parsed = match output.status.success() {
            true => serde_json::from_slice(&output.stdout).map_err(std::io::Error::from),
            false => Err(std::io::Error::other(said.trim().to_owned())),
        };
        Ok(parsed.during("ask containerd for the image of", id)?)
    }
}

fn check_privileges(
    request: &Request,
    old: &Spec,
    config: &Config,
    bundle: &Bundle,
) -> Result<(), FrontError> {
    let criu = config.annotations.criu.over(request.criu.clone());
    admit(&request.images, Some(old), &config.spec, bundle, &criu)
        .map(drop)
        .map_err(|source| not_admitted(request, source))
}
