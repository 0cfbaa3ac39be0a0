//! The directories that the containers of a pod share get the content that the checkpoint has of
//! them: once for the pod, when the first container that needs it is restored, before it is.
//!
//! What lies in them by then (init containers run again, and may have filled a volume) gives way:
//! the memory knows the files of the checkpoint.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use transship_checkpoint::annotations::Role;
use transship_checkpoint::manifest::check_name;
use transship_checkpoint::shared_dirs::{SHARED_DIR, SharedDir};
use transship_layer::{ImportOptions, import_into_upperdir, remove_contents};
use transship_sandbox::shared_dirs::{Consumed, shared_mounts};
use transship_sandbox::stage::{PodDir, Request};

use super::bundle::Config;
use super::rootfs::RootfsError;
use super::{Front, FrontContext, FrontError};

impl Front<'_> {
    /// Fills those directories that the container mounts and that have not been filled yet.
    ///
    /// # Errors
    /// The pod lacks one; or it cannot be filled: then another attempt begins it anew.
    pub(super) fn fill_shared_dirs(
        &self,
        config: &Config,
        pod: &PodDir,
        request: &Request,
    ) -> Result<(), FrontError> {
        let Role::Member { sandbox } = &config.annotations.role else {
            return Ok(());
        };
        let checkpoint = self.around.store.open(&request.checkpoint)?;
        let needed = checkpoint.manifest.shared.of_container(&request.container);
        let mounts = shared_mounts(&config.spec, sandbox);
        let mut consumed = Consumed::by_pod_of(&config.spec, &checkpoint.dir)?;
        for dir in needed.collect::<Vec<_>>() {
            let mount = mounts.iter().find(|it| it.dir == dir && !it.part);
            let mount = mount.ok_or_else(|| FrontError::NoSharedDir {
                checkpoint: request.checkpoint.clone(),
                container: request.container.clone(),
                what: match &dir {
                    SharedDir::Shm => "the pod's own /dev/shm".to_owned(),
                    SharedDir::EmptyDir(volume) => format!("the emptyDir volume {volume:?}"),
                },
            })?;
            let file = dir.file_name();
            let taken = match (&dir, &consumed) {
                (SharedDir::EmptyDir(volume), Some(consumed)) => consumed.has_volume(volume),
                // A new sandbox has a new one.
                _ => false,
            };
            if taken || pod.is_filled(&file)? {
                continue;
            }
            fill(&mount.source, &checkpoint.dir.join(SHARED_DIR).join(&file))?;
            pod.set_filled(&file)?;
            if let (SharedDir::EmptyDir(volume), Some(consumed)) = (&dir, &mut consumed) {
                consumed.add_volume(volume)?;
            }
        }
        Ok(())
    }

    /// Whether the pod has taken the container `name` out of the checkpoint before, in whichever
    /// sandbox.
    pub(super) fn has_consumed(
        &self,
        config: &Config,
        checkpoint: &str,
        name: &str,
    ) -> Result<bool, FrontError> {
        check_name("the checkpoint's name", checkpoint)?;
        let dir = self.around.store.root().join(checkpoint);
        let consumed = Consumed::by_pod_of(&config.spec, &dir)?;
        Ok(consumed.is_some_and(|consumed| consumed.has_container(name)))
    }

    /// Remembers that it has.
    pub(super) fn set_consumed(
        &self,
        config: &Config,
        request: &Request,
    ) -> Result<(), FrontError> {
        let dir = self.around.store.root().join(&request.checkpoint);
        // The pod's name of the container, which the next attempt has again.
        let name = config.annotations.container.as_ref();
        if let (Some(mut consumed), Some(name)) = (Consumed::by_pod_of(&config.spec, &dir)?, name) {
            consumed.add_container(name)?;
        }
        Ok(())
    }
}

/// Makes the content of a directory that of a layer without lower layers.
fn fill(dir: &Path, layer: &Path) -> Result<(), FrontError> {
    let file = File::open(layer).during("open", layer)?;
    remove_contents(dir).during("empty", dir)?;
    let tar = BufReader::with_capacity(1 << 20, file);
    import_into_upperdir(tar, dir, &[], &ImportOptions::default())
        .map(drop)
        .map_err(|source| {
            let error = RootfsError::Import {
                upperdir: dir.to_path_buf(),
                layer: layer.to_path_buf(),
                source,
            };
            error.into()
        })
}
