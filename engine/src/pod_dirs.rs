//! The directories that the containers of a pod share, on the source: /dev/shm and emptyDirs.
//!
//! ```text
//!  find: specs --> which there are (a container with a part of one only is refused)
//!  export, while all containers stand still: each --> <draft>/.shared/<file>
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use transship_checkpoint::manifest::{Shared, Volume};
use transship_checkpoint::shared_dirs::{SHARED_DIR, SharedDir};
use transship_checkpoint::spec::Spec;
use transship_layer::{ExportOptions, OverlayStack, export_upperdir_to_file};
use transship_sandbox::shared_dirs::shared_mounts;

use crate::error::{Context, Error, Result};
use crate::source::SourceContainer;

/// What is to be exported: each directory with its path on the node and the containers that have it.
#[derive(Debug, Clone, Default)]
pub struct SharedDirs(BTreeMap<SharedDir, (PathBuf, Vec<String>)>);

/// Finds the directories that these containers of the sandbox share; emptyDirs only if asked for.
pub fn find(containers: &[SourceContainer], sandbox: &str, empty_dirs: bool) -> Result<SharedDirs> {
    let mut dirs: BTreeMap<_, (PathBuf, Vec<String>)> = BTreeMap::new();
    for source in containers {
        let name = &source.container.name;
        let spec = Spec::parse(&source.spec)
            .with_context(|| format!("the spec of {name:?} is no OCI runtime spec"))?;
        for mount in shared_mounts(&spec, sandbox) {
            if let SharedDir::EmptyDir(volume) = &mount.dir {
                if !empty_dirs {
                    continue;
                }
                if mount.part {
                    let message = format!(
                        "{name:?} mounts a subPath of the emptyDir {volume:?}: that mount is made \
                         before the volume can be filled"
                    );
                    return Err(Error::refused(message));
                }
            }
            let (_, users) = dirs.entry(mount.dir).or_insert((mount.source, Vec::new()));
            if !users.contains(name) {
                users.push(name.clone());
            }
        }
    }
    Ok(SharedDirs(dirs))
}

impl SharedDirs {
    /// Exports all into the draft, and says what is there now. Nothing may change meanwhile.
    pub fn export(&self, draft: &Path) -> Result<Shared> {
        let mut shared = Shared::default();
        let to = draft.join(SHARED_DIR);
        for (dir, (path, containers)) in &self.0 {
            let containers = containers.clone();
            match dir {
                SharedDir::Shm => {
                    let mut entries = fs::read_dir(path)
                        .with_context(|| format!("cannot list {}", path.display()))?;
                    if entries.next().is_none() {
                        // As it is in any new sandbox.
                        continue;
                    }
                    shared.shm = containers;
                }
                SharedDir::EmptyDir(volume) => shared.volumes.push(Volume {
                    name: volume.clone(),
                    containers,
                }),
            }
            fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
            export(path, &to.join(dir.file_name()))?;
        }
        Ok(shared)
    }
}

fn export(dir: &Path, to: &Path) -> Result<()> {
    let file = File::create_new(to).with_context(|| format!("cannot make {}", to.display()))?;
    let stack = OverlayStack::new(dir, []);
    let stats = export_upperdir_to_file(&stack, &file, &ExportOptions::default())
        .with_context(|| format!("cannot export {}", dir.display()))?;
    // A socket leaves a whiteout without meaning; CRIU makes those again that somebody has bound.
    if stats.whiteouts > stats.sockets || stats.opaque_directories > 0 || stats.lost_xattrs > 0 {
        let message = format!(
            "{} holds the layers of another container engine, whose overlay marks cannot come along",
            dir.display()
        );
        return Err(Error::failed(message));
    }
    Ok(())
}
