//! The directories that the containers of a pod share get the content that the checkpoint has of
//! them: once for the pod, when the first container that needs it is restored, before it is.
//!
//! What lies in them by then (init containers run again, and may have filled a volume) gives way:
//! the memory knows the files of the checkpoint.
//!
//! What comes with a migration waits for its files before anything of the pod runs; contents of large files may be there by
//! then, in a directory of the emptyDir that only the receiver can have made.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::Path;

use transship_checkpoint::annotations::Role;
use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::contents_in_filled;
use transship_checkpoint::shared_dirs::{DumpLink, LINKS_FILE, LINKS_LIMIT, SHARED_DIR, SharedDir};
use transship_layer::{
    Compression, ImportOptions, OverlayStack, import_into_upperdir, mounted_below,
    remove_contents_but,
};
use transship_sandbox::consumed::{Consumed, Owner};
use transship_sandbox::shared_dirs::{SharedMount, shared_mounts};
use transship_sandbox::{PodDir, Request};

use transship_path_error::During as _;

use super::RootfsError;
use super::bundle::Config;
use super::{FitError, Front, FrontError};

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
        let checkpoint = self.env.store.open(&request.checkpoint)?;
        let needed = checkpoint.manifest.shared.of_container(&request.container);
        let mounts = shared_mounts(&config.spec, sandbox);
        let owner = config.annotations.pod_uid.clone().map(Owner::Pod);
        let consumed = owner.map(|owner| Consumed::by(&self.env.consumed, &owner));
        let mut consumed = consumed.transpose()?;
        let had_ended = |name: &str| checkpoint.manifest.ended_with(name).is_some();
        let has_run =
            { consumed.as_ref() }.is_some_and(|it| it.has_run(&request.checkpoint, had_ended));
        for dir in needed.collect::<Vec<_>>() {
            let uid = config.annotations.pod_uid.as_deref();
            let is_it = |it: &&SharedMount| it.dir == dir && !it.part && it.may_be_filled(uid);
            let mount = mounts.iter().find(is_it);
            let mount = mount.ok_or_else(|| {
                FrontError::from(FitError::NoSharedDir {
                    checkpoint: request.checkpoint.clone(),
                    container: request.container.clone(),
                    what: match &dir {
                        SharedDir::Shm => "the pod's own /dev/shm".to_owned(),
                        SharedDir::EmptyDir(volume) => format!("the emptyDir volume {volume:?}"),
                    },
                })
            })?;
            let file = dir.file_name();
            let taken = match (&dir, &consumed) {
                // Of a sandbox in which nothing of it came to run: what has been written there since is of nobody.
                (SharedDir::EmptyDir(volume), Some(consumed)) => {
                    has_run && consumed.has_volume(&request.checkpoint, volume)
                }
                // A new sandbox has a new one.
                _ => false,
            };
            if !taken && !pod.is_filled(&file)? {
                let layer = checkpoint.open_file(SHARED_DIR, &file)?;
                let path = checkpoint.dir.join(SHARED_DIR).join(&file);
                let contents = { config.annotations.receives }
                    .then(|| contents_in_filled(&request.checkpoint));
                let mounted = mounted_below(&mount.source).during("look at", &mount.source)?;
                if let Some(mounted) = mounted.into_iter().next() {
                    let (checkpoint, dir) = (request.checkpoint.clone(), mount.source.clone());
                    return Err(FitError::Mounted {
                        checkpoint,
                        dir,
                        mounted,
                    }
                    .into());
                }
                fill(&mount.source, &path, layer, contents)?;
                pod.set_filled(&file)?;
                if let (SharedDir::EmptyDir(volume), Some(consumed)) = (&dir, &mut consumed) {
                    consumed.add_volume(&request.checkpoint, volume)?;
                }
            }
            if dir == SharedDir::Shm {
                let of_container = checkpoint.dir.join(&request.container);
                make_links(&mount.source, &of_container)?;
            }
        }
        Ok(())
    }
}

/// Makes the names again that CRIU had given files of `/dev/shm` for the dump of this container. CRIU takes them
/// away.
fn make_links(shm: &Path, of_container: &Path) -> Result<(), FrontError> {
    let json = read_regular(
        of_container,
        Path::new(LINKS_FILE),
        Links::Refused,
        LINKS_LIMIT,
    );
    let json = match json {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        json => json.during("read", of_container.join(LINKS_FILE))?,
    };
    let links: Vec<DumpLink> = serde_json::from_slice(&json)
        .map_err(io::Error::from)
        .during("read", of_container.join(LINKS_FILE))?;
    for it in links {
        if !it.is_plain() {
            return Err(io::Error::from(io::ErrorKind::InvalidData))
                .during("take for a name", &it.link)?;
        }
        let link = shm.join(&it.link);
        // Of a restore that was given up.
        drop(fs::remove_file(&link));
        // link(2) follows no link at the end.
        fs::hard_link(shm.join(&it.name), &link).during("link", &link)?;
    }
    Ok(())
}

/// Makes the content of a directory that of a layer without lower layers. What the layer does not have may be in it
/// already, in a directory of the name `contents`.
fn fill(dir: &Path, layer: &Path, file: File, contents: Option<String>) -> Result<(), FrontError> {
    let len = file.metadata().during("stat", layer)?.len();
    let has_come = |name: &String| {
        let found = dir.join(name).symlink_metadata();
        found.is_ok_and(|found| found.is_dir())
    };
    let contents = contents.filter(has_come);
    remove_contents_but(dir, contents.as_deref()).during("empty", dir)?;
    let tar = BufReader::with_capacity(1 << 20, file);
    let options = ImportOptions {
        contents,
        ..ImportOptions::for_checkpoint(len, Compression::None)
    };
    import_into_upperdir(tar, &OverlayStack::new(dir, []), &options)
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
