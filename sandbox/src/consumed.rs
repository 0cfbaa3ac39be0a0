//! A checkpoint is consumed once: who has taken what out of which one.
//!
//! ```text
//! /var/lib/transship/consumed/
//!   pod-<uid>            a pod of the CRI, whatever its sandbox
//!   layer-<hash>         an overlay's upperdir, outside of the CRI; the first line names it
//!   container-<id>       a sandbox, or a container without an overlay, outside of the CRI
//!
//! one line each, fields separated by tabs:
//!   of         UPPERDIR
//!   container  CHECKPOINT  NAME  NAME IN THE POD  CREATED     the last: of the checkpoint; not in records of old
//!   volume     CHECKPOINT  NAME
//!   once       CHECKPOINT  CREATED           nobody else restores the one that was taken then, and it goes
//!   ended      CHECKPOINT  NAME  NAME IN THE POD       it had ended by then, and has ended so again: it has not run
//!   cold       NAME IN THE POD               it was to be restored, and has started from its image
//! ```
//!
//! A container that starts again starts cold: its files have gone on since the checkpoint, its
//! memory would not have. So does one that has begun from its image because nothing could be restored
//! (`dev.transship/on-failure: cold-start`), or because there was nothing yet: whatever comes later is of another life.
//! The record is written when the container is let go, so a restore that was
//! cancelled before that is made again. It is kept beside the store and not in the checkpoint:
//! whoever removes a checkpoint must not keep a pod that had its restore from starting again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use transship_checkpoint::manifest::{Manifest, check_name};

use transship_digest::{Sha256, hex};
use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{make_dir, remove_file, replace_durably};
use crate::pod_dir::UID_FILE;

/// Where the records are.
pub const DEFAULT_CONSUMED_DIR: &str = "/var/lib/transship/consumed";
/// How long the record of a pod is kept that kubelet does not know and that has no sandbox.
pub(crate) const KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const KUBELET_PODS: &str = "/var/lib/kubelet/pods";
const LAYER_PREFIX: &str = "layer-";

/// Who takes something out of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The pod with this uid.
    Pod(String),
    /// The snapshot with this upperdir: a later container of the same id has another one.
    Layer(PathBuf),
    /// The container with this id, or those of the sandbox with this id.
    Container(String),
}

/// What one owner has taken, of all checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumed {
    path: PathBuf,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Of(String),
    Container {
        checkpoint: String,
        name: String,
        asker: String,
        /// Seconds since 1970: another one may get its name; none: not known.
        created: Option<u64>,
    },
    Ended {
        checkpoint: String,
        name: String,
        asker: String,
    },
    Volume {
        checkpoint: String,
        name: String,
    },
    Once {
        checkpoint: String,
        /// Seconds since 1970: another one may get its name.
        created: u64,
    },
    Cold(String),
}

impl Owner {
    fn file_name(&self) -> Result<String, SandboxError> {
        Ok(match self {
            Self::Pod(uid) => {
                check_name("the pod's uid", uid)?;
                format!("pod-{uid}")
            }
            Self::Layer(upperdir) => layer_file(upperdir)?,
            Self::Container(id) => {
                check_name("the container's id", id)?;
                format!("container-{id}")
            }
        })
    }
}

/// Another snapshot may get the path of one that was removed, but not its moment of birth.
fn layer_file(upperdir: &Path) -> Result<String, SandboxError> {
    let meta = fs::metadata(upperdir).during("look at", upperdir)?;
    let born = meta.created().unwrap_or(UNIX_EPOCH);
    let born = born.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(upperdir.as_os_str().as_encoded_bytes());
    hash.update(meta.ino().to_le_bytes());
    hash.update(born.as_nanos().to_le_bytes());
    let hash = hex(&hash.finish()[..16]);
    Ok(format!("{LAYER_PREFIX}{hash}"))
}

impl Consumed {
    /// Reads the record of an owner below `dir`.
    ///
    /// # Errors
    /// A name that could lead elsewhere, a damaged record, or a failed system call.
    pub fn by(dir: &Path, owner: &Owner) -> Result<Self, SandboxError> {
        let path = dir.join(owner.file_name()?);
        let mut entries = read(&path)?;
        if let (Owner::Layer(upperdir), true) = (owner, entries.is_empty()) {
            entries.push(Entry::Of(upperdir.to_string_lossy().into_owned()));
        }
        Ok(Self { path, entries })
    }

    /// As which container of the pod the container `name` of the checkpoint has run, or ended again.
    #[must_use]
    pub fn container(&self, checkpoint: &str, name: &str) -> Option<&str> {
        let of = |entry: &&Entry| entry.is_taken(checkpoint, name);
        self.entries.iter().find(of)?.asker()
    }

    /// Whether anything has been taken out of the checkpoint.
    #[must_use]
    pub fn has_any_of(&self, checkpoint: &str) -> bool {
        self.entries.iter().any(|entry| match entry {
            Entry::Container { checkpoint: of, .. }
            | Entry::Ended { checkpoint: of, .. }
            | Entry::Volume { checkpoint: of, .. } => of == checkpoint,
            Entry::Of(_) | Entry::Once { .. } | Entry::Cold(_) => false,
        })
    }

    /// Name of the checkpoint that containers of this owner were made from last.
    #[must_use]
    pub fn taken_from(&self) -> Option<&str> {
        self.entries.iter().rev().find_map(|entry| match entry {
            Entry::Container { checkpoint, .. } | Entry::Ended { checkpoint, .. } => {
                Some(checkpoint.as_str())
            }
            _ => None,
        })
    }

    /// Whether a container of the checkpoint has run.
    #[must_use]
    pub fn has_container_of(&self, checkpoint: &str) -> bool {
        let of = |entry: &Entry| matches!(entry, Entry::Container { checkpoint: of, .. } if of == checkpoint);
        self.entries.iter().any(of)
    }

    /// Whether a container has run that could have written to a volume: of the checkpoint, but for those that `had_ended`
    /// says to be of its containers that did not run, or from its image.
    #[must_use]
    pub fn has_run(&self, checkpoint: &str, had_ended: impl Fn(&str) -> bool) -> bool {
        self.entries.iter().any(|entry| match entry {
            Entry::Container {
                checkpoint: of,
                name,
                ..
            } => of == checkpoint && !had_ended(name),
            Entry::Cold(_) => true,
            Entry::Of(_) | Entry::Ended { .. } | Entry::Volume { .. } | Entry::Once { .. } => false,
        })
    }

    /// Whether anything of this owner has run.
    #[must_use]
    pub fn has_run_at_all(&self) -> bool {
        let is_run = |entry: &Entry| matches!(entry, Entry::Container { .. } | Entry::Cold(_));
        self.entries.iter().any(is_run)
    }

    /// Whether the container `asker` of the pod has started from its image.
    #[must_use]
    pub fn has_started_cold(&self, asker: &str) -> bool {
        self.entries.contains(&Entry::Cold(asker.to_owned()))
    }

    /// Remembers, also beyond a power cut, that `asker` starts from its image.
    ///
    /// # Errors
    /// A system call failed; nothing is remembered then.
    pub fn add_cold(&mut self, asker: &str) -> Result<(), SandboxError> {
        match self.has_started_cold(asker) {
            true => Ok(()),
            false => self.add(Entry::Cold(asker.to_owned())),
        }
    }

    /// Whether the volume `name` of the checkpoint has been taken.
    #[must_use]
    pub fn has_volume(&self, checkpoint: &str, name: &str) -> bool {
        self.entries.contains(&Entry::Volume {
            checkpoint: checkpoint.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Remembers, also beyond a power cut, that the container `name` of a checkpoint (its name, and when it was taken) runs
    /// as `asker`.
    ///
    /// # Errors
    /// A system call failed; nothing is remembered then.
    pub fn add_container(
        &mut self,
        (checkpoint, created): (&str, Option<u64>),
        name: &str,
        asker: &str,
    ) -> Result<(), SandboxError> {
        let is_known = |entry: &Entry| match entry {
            Entry::Container {
                checkpoint: of,
                name: it,
                created: taken,
                ..
            } => of == checkpoint && it == name && is_same_time(*taken, created),
            _ => false,
        };
        if self.entries.iter().any(is_known) {
            return Ok(());
        }
        self.add(Entry::Container {
            checkpoint: checkpoint.to_owned(),
            name: name.to_owned(),
            asker: asker.to_owned(),
            created,
        })
    }

    /// Remembers, also beyond a power cut, that the container `name` of the checkpoint has ended again as `asker`, without
    /// running.
    ///
    /// # Errors
    /// A system call failed; nothing is remembered then.
    pub fn add_ended(
        &mut self,
        checkpoint: &str,
        name: &str,
        asker: &str,
    ) -> Result<(), SandboxError> {
        if self.container(checkpoint, name).is_some() {
            return Ok(());
        }
        self.add(Entry::Ended {
            checkpoint: checkpoint.to_owned(),
            name: name.to_owned(),
            asker: asker.to_owned(),
        })
    }

    /// Remembers that the volume `name` has its content.
    ///
    /// # Errors
    /// A system call failed; nothing is remembered then.
    pub fn add_volume(&mut self, checkpoint: &str, name: &str) -> Result<(), SandboxError> {
        self.add(Entry::Volume {
            checkpoint: checkpoint.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Takes back [`Self::add_container`] and [`Self::add_ended`]: it has not come to that.
    ///
    /// # Errors
    /// A system call failed.
    pub fn give_back(&mut self, checkpoint: &str, name: &str) -> Result<(), SandboxError> {
        if self.container(checkpoint, name).is_none() {
            return Ok(());
        }
        self.change(|_, entries| {
            entries.retain(|entry| !entry.is_taken(checkpoint, name));
            Ok(())
        })
    }

    /// Remembers that the checkpoint, taken at `created`, goes when nothing of it waits, and is nobody else's.
    ///
    /// # Errors
    /// [`SandboxError::Spent`], or a failing system call; nothing is remembered then.
    pub fn add_once(&mut self, checkpoint: &str, created: u64) -> Result<(), SandboxError> {
        let once = Entry::Once {
            checkpoint: checkpoint.to_owned(),
            created,
        };
        if self.entries.contains(&once) {
            return Ok(());
        }
        self.change(|own, entries| {
            check_not_spent(own, checkpoint, Some(created))?;
            entries.push(once);
            Ok(())
        })
    }

    /// Checks that the checkpoint (taken at `created`; none: it is not there any more) is not another owner's alone.
    ///
    /// # Errors
    /// [`SandboxError::Spent`], or a failing system call.
    pub fn check_not_spent(
        &self,
        checkpoint: &str,
        created: Option<u64>,
    ) -> Result<(), SandboxError> {
        check_not_spent(&self.path, checkpoint, created)
    }

    /// Forgets the owner.
    ///
    /// # Errors
    /// A system call failed.
    pub fn forget(dir: &Path, owner: &Owner) -> Result<(), SandboxError> {
        remove_file(&dir.join(owner.file_name()?))
    }

    fn add(&mut self, entry: Entry) -> Result<(), SandboxError> {
        self.change(|_, entries| {
            entries.push(entry);
            Ok(())
        })
    }

    /// Containers of a pod may be restored side by side: what others have written since is kept.
    fn change(
        &mut self,
        change: impl FnOnce(&Path, &mut Vec<Entry>) -> Result<(), SandboxError>,
    ) -> Result<(), SandboxError> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        make_dir(dir)?;
        let _lock = lock(dir)?;
        let mut entries = read(&self.path)?;
        if entries.is_empty() {
            entries.extend(self.entries.iter().find(|it| it.is_of()).cloned());
        }
        change(&self.path, &mut entries)?;
        if entries.iter().all(Entry::is_of) {
            remove_file(&self.path)?;
        } else {
            let text: String = entries.iter().map(Entry::line).collect();
            replace_durably(&self.path, text.as_bytes())?;
        }
        self.entries = entries;
        Ok(())
    }
}

/// How many pods and containers have been restored from a checkpoint, as far as there are records of them.
///
/// # Errors
/// The records cannot be listed.
pub fn times_restored(dir: &Path, manifest: &Manifest) -> Result<usize, SandboxError> {
    let records = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        records => records.during("list", dir)?,
    };
    let mut times = 0;
    for record in records {
        let path = record.during("list", dir)?.path();
        // One that is written at this moment, or that is damaged, which its own pod is told of.
        let Ok(entries) = read(&path) else { continue };
        // A container that it lacks has started cold.
        let restored = |entry: &Entry| match entry {
            Entry::Container {
                checkpoint,
                name,
                created,
                ..
            } => {
                *checkpoint == manifest.name
                    && is_same_time(*created, Some(manifest.created))
                    && manifest.containers.iter().any(|it| it.name == *name)
            }
            _ => false,
        };
        times += usize::from(entries.iter().any(restored));
    }
    Ok(times)
}

/// Whether somebody has restored the checkpoint as one that is restored once.
///
/// # Errors
/// The records cannot be listed.
pub fn is_spent(dir: &Path, manifest: &Manifest) -> Result<bool, SandboxError> {
    is_once_of_another(dir, None, &manifest.name, Some(manifest.created))
}

fn check_not_spent(own: &Path, checkpoint: &str, created: Option<u64>) -> Result<(), SandboxError> {
    let dir = own.parent().unwrap_or(Path::new("/"));
    match is_once_of_another(dir, Some(own), checkpoint, created)? {
        true => Err(SandboxError::Spent {
            checkpoint: checkpoint.to_owned(),
        }),
        false => Ok(()),
    }
}

fn is_once_of_another(
    dir: &Path,
    own: Option<&Path>,
    name: &str,
    taken: Option<u64>,
) -> Result<bool, SandboxError> {
    let is_it = |entry: &Entry| match entry {
        Entry::Once {
            checkpoint,
            created,
        } => checkpoint == name && taken.is_none_or(|taken| taken == *created),
        _ => false,
    };
    let records = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        records => records.during("list", dir)?,
    };
    for record in records {
        let path = record.during("list", dir)?.path();
        if own != Some(path.as_path())
            && let Ok(entries) = read(&path)
            && entries.iter().any(is_it)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether these may be the time of one checkpoint, where it is known.
fn is_same_time(one: Option<u64>, other: Option<u64>) -> bool {
    one.zip(other).is_none_or(|(one, other)| one == other)
}

/// Held by whoever writes a record, or removes one.
fn lock(dir: &Path) -> Result<Flock<File>, SandboxError> {
    let file = File::open(dir).during("open", dir)?;
    Ok(Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .during("lock", dir)?)
}

fn read(path: &Path) -> Result<Vec<Entry>, SandboxError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.during("read", path)?,
    };
    let entries = text.lines().map(|line| {
        Entry::parse(line).ok_or_else(|| SandboxError::Damaged {
            path: path.to_path_buf(),
            what: format!("line {line:?}"),
        })
    });
    entries.collect()
}

impl Entry {
    fn is_of(&self) -> bool {
        matches!(self, Self::Of(_))
    }

    /// Whether it says that the container `name` of the checkpoint has been taken.
    fn is_taken(&self, checkpoint: &str, name: &str) -> bool {
        match self {
            Self::Container {
                checkpoint: of,
                name: it,
                ..
            }
            | Self::Ended {
                checkpoint: of,
                name: it,
                ..
            } => of == checkpoint && it == name,
            Self::Of(_) | Self::Volume { .. } | Self::Once { .. } | Self::Cold(_) => false,
        }
    }

    /// The container of the pod that it is about.
    fn asker(&self) -> Option<&str> {
        match self {
            Self::Container { asker, .. } | Self::Ended { asker, .. } | Self::Cold(asker) => {
                Some(asker)
            }
            Self::Of(_) | Self::Volume { .. } | Self::Once { .. } => None,
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split('\t').collect();
        Some(match *fields.as_slice() {
            ["of", upperdir] => Self::Of(upperdir.to_owned()),
            ["container", checkpoint, name, asker, ref created @ ..] => Self::Container {
                checkpoint: checkpoint.to_owned(),
                name: name.to_owned(),
                asker: asker.to_owned(),
                created: match *created {
                    [] => None,
                    [created] => Some(created.parse().ok()?),
                    _ => return None,
                },
            },
            ["ended", checkpoint, name, asker] => Self::Ended {
                checkpoint: checkpoint.to_owned(),
                name: name.to_owned(),
                asker: asker.to_owned(),
            },
            ["volume", checkpoint, name] => Self::Volume {
                checkpoint: checkpoint.to_owned(),
                name: name.to_owned(),
            },
            ["once", checkpoint, created] => Self::Once {
                checkpoint: checkpoint.to_owned(),
                created: created.parse().ok()?,
            },
            ["cold", asker] => Self::Cold(asker.to_owned()),
            _ => return None,
        })
    }

    /// Names hold no control characters; a path that does is of no snapshotter.
    fn line(&self) -> String {
        let line = match self {
            Self::Of(upperdir) => format!("of\t{upperdir}"),
            Self::Container {
                checkpoint,
                name,
                asker,
                created,
            } => {
                let created = created.map(|it| format!("\t{it}")).unwrap_or_default();
                format!("container\t{checkpoint}\t{name}\t{asker}{created}")
            }
            Self::Ended {
                checkpoint,
                name,
                asker,
            } => format!("ended\t{checkpoint}\t{name}\t{asker}"),
            Self::Volume { checkpoint, name } => format!("volume\t{checkpoint}\t{name}"),
            Self::Once {
                checkpoint,
                created,
            } => format!("once\t{checkpoint}\t{created}"),
            Self::Cold(asker) => format!("cold\t{asker}"),
        };
        line.replace('\n', " ") + "\n"
    }
}

/// Removes the records below `dir` of owners that are gone: of layers that were removed, of
/// sandboxes outside of the CRI that have no directory in `run_dir`, and of pods that neither kubelet
/// nor `run_dir` knows, after 30 days.
///
/// # Errors
/// The directory cannot be listed.
pub fn remove_records_of_the_gone(dir: &Path, run_dir: &Path) -> Result<(), SandboxError> {
    // A record that is being written has another name for a moment.
    let _lock = lock(dir)?;
    let living = living_pods(run_dir);
    for entry in fs::read_dir(dir).during("list", dir)? {
        let path = entry.during("list", dir)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let gone = if let Some(uid) = name.strip_prefix("pod-") {
            let age = fs::metadata(&path)
                .and_then(|meta| meta.modified())
                .map(|then| SystemTime::now().duration_since(then).unwrap_or_default());
            let is_alive = living.iter().any(|it| it == uid);
            if is_alive {
                // After a boot it has no sandbox yet, and kubelet's directory may be another one.
                drop(File::open(&path).and_then(|file| file.set_modified(SystemTime::now())));
            }
            age.is_ok_and(|age| age > KEPT)
                && !is_alive
                && !Path::new(KUBELET_PODS).join(uid).is_dir()
        } else if let Some(id) = name.strip_prefix("container-") {
            !run_dir.join("pods").join(id).is_dir()
        } else if name.starts_with(LAYER_PREFIX) {
            !is_record_of_its_layer(&path, &name)
        } else {
            false
        };
        if gone {
            remove_file(&path)?;
        }
    }
    Ok(())
}

fn is_record_of_its_layer(path: &Path, name: &str) -> bool {
    let text = fs::read_to_string(path).unwrap_or_default();
    let first = text.lines().next().and_then(Entry::parse);
    let Some(Entry::Of(upperdir)) = first else {
        return true;
    };
    layer_file(Path::new(&upperdir)).is_ok_and(|file| file == name)
}

/// The uids of the pods whose sandboxes have a directory.
pub(crate) fn living_pods(run_dir: &Path) -> Vec<String> {
    let pods = fs::read_dir(run_dir.join("pods"));
    pods.into_iter()
        .flatten()
        .flatten()
        .filter_map(|pod| fs::read_to_string(pod.path().join(UID_FILE)).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_takes_each_thing_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("consumed");
        let read = |uid: &str| Consumed::by(&dir, &Owner::Pod(uid.to_owned())).unwrap();
        let mut one = read("u1");
        assert_eq!(one.container("web", "app"), None);
        assert!(!one.has_any_of("web"));
        one.add_container(("web", Some(100)), "app", "app").unwrap();
        one.add_volume("web", "my data").unwrap();
        assert_eq!(read("u1"), one);
        // Another process, which has looked before, does not take anything away.
        let mut other = read("u1");
        one.add_container(("web", Some(100)), "late", "late")
            .unwrap();
        other.add_volume("web", "other").unwrap();
        assert!(read("u1").has_volume("web", "other"));
        assert_eq!(read("u1").container("web", "late"), Some("late"));
        assert_eq!(read("u1").container("web", "app"), Some("app"));
        assert_eq!(read("u1").container("db", "app"), None);
        assert!(one.has_volume("web", "my data") && !one.has_volume("web", "app"));
        assert!(!read("u2").has_any_of("web"));
        assert!(Consumed::by(&dir, &Owner::Pod("../x".into())).is_err());

        one.give_back("web", "app").unwrap();
        assert_eq!(read("u1").container("web", "app"), None);
        assert!(read("u1").has_any_of("web"), "the volume stays");
    }

    #[test]
    fn what_had_ended_is_taken_and_has_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("consumed");
        let read = || Consumed::by(&dir, &Owner::Pod("u1".to_owned())).unwrap();
        for _ in 0..2 {
            read().add_ended("web", "init", "setup").unwrap();
        }
        let one = read();
        assert_eq!(one.entries.len(), 1);
        assert_eq!(one.container("web", "init"), Some("setup"));
        assert_eq!(one.taken_from(), Some("web"));
        assert!(one.has_any_of("web"));
        assert!(!one.has_run_at_all() && !one.has_container_of("web"));
        assert!(!one.has_run("web", |_| false));
        read().give_back("web", "init").unwrap();
        assert!(!read().has_any_of("web"));
        read().add_ended("web", "init", "setup").unwrap();
        read()
            .add_container(("web", Some(1)), "app", "app")
            .unwrap();
        assert!(read().has_run_at_all());
    }

    #[test]
    fn restores_are_counted_and_cold_starts_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("consumed");
        let json = br#"{"format":{"version":1},"name":"web","created":100,
            "source":{"hostname":"","architecture":"","kernel":"","containerd":""},
            "containers":[{"name":"app","id":"","namespace":"","image":{"name":"","digest":"","chain_id":""},
                           "snapshotter":"","runtime":"","files":[]}]}"#;
        let manifest = Manifest::parse(json).unwrap();
        assert_eq!(times_restored(&dir, &manifest).unwrap(), 0);
        for (uid, checkpoint, name) in [
            ("u1", "web", "app"),
            ("u1", "web", "more"),
            ("u2", "web", "app"),
            ("u3", "web", "more"),
            ("u4", "db", "app"),
        ] {
            let mut record = Consumed::by(&dir, &Owner::Pod(uid.to_owned())).unwrap();
            record
                .add_container((checkpoint, Some(100)), name, name)
                .unwrap();
        }
        assert_eq!(times_restored(&dir, &manifest).unwrap(), 2);
    }

    #[test]
    fn what_is_restored_once_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("consumed");
        let by = |uid: &str| Consumed::by(&dir, &Owner::Pod(uid.to_owned())).unwrap();
        by("u1").check_not_spent("web", Some(100)).unwrap();
        by("u1").add_once("web", 100).unwrap();
        by("u1")
            .add_container(("web", Some(100)), "app", "app")
            .unwrap();
        by("u1").add_once("web", 100).unwrap();
        assert_eq!(by("u1").taken_from(), Some("web"));
        by("u1").check_not_spent("web", Some(100)).unwrap();
        let spent = |result: Result<(), SandboxError>| match result {
            Err(SandboxError::Spent { checkpoint }) => checkpoint == "web",
            _ => false,
        };
        assert!(spent(by("u2").check_not_spent("web", Some(100))));
        assert!(spent(by("u2").check_not_spent("web", None)));
        assert!(spent(by("u2").add_once("web", 100)));
        // Another one of its name.
        by("u2").check_not_spent("web", Some(200)).unwrap();
        by("u2").add_once("web", 200).unwrap();
        assert!(by("u3").check_not_spent("web", Some(300)).is_ok());
    }

    #[test]
    fn a_layer_of_the_same_path_is_another_one() {
        let root = tempfile::tempdir().unwrap();
        let (dir, run) = (root.path().join("consumed"), root.path().join("run"));
        let upperdir = root.path().join("snapshots/7/fs");
        fs::create_dir_all(&upperdir).unwrap();
        let owner = Owner::Layer(upperdir.clone());
        let mut consumed = Consumed::by(&dir, &owner).unwrap();
        consumed
            .add_container(("web", Some(100)), "c1", "c1")
            .unwrap();
        remove_records_of_the_gone(&dir, &run).unwrap();
        assert!(Consumed::by(&dir, &owner).unwrap().has_any_of("web"));
        assert!(fs::read_dir(&upperdir).unwrap().next().is_none());
        // Not removed first: then the inode could be the same one.
        fs::rename(&upperdir, root.path().join("old")).unwrap();
        fs::create_dir(&upperdir).unwrap();
        assert!(!Consumed::by(&dir, &owner).unwrap().has_any_of("web"));
        remove_records_of_the_gone(&dir, &run).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn records_of_pods_outlive_their_sandboxes_and_those_of_sandboxes_do_not() {
        let root = tempfile::tempdir().unwrap();
        let (dir, run) = (root.path().join("consumed"), root.path().join("run"));
        for owner in [Owner::Pod("u".into()), Owner::Container("s".into())] {
            let mut consumed = Consumed::by(&dir, &owner).unwrap();
            consumed
                .add_container(("web", Some(100)), "app", "app")
                .unwrap();
        }
        remove_records_of_the_gone(&dir, &run).unwrap();
        let names: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|it| it.unwrap().file_name())
            .collect();
        assert_eq!(names, ["pod-u"]);
        let old = SystemTime::now() - 2 * KEPT;
        let record = File::options().write(true).open(dir.join("pod-u")).unwrap();
        record.set_modified(old).unwrap();
        fs::create_dir_all(run.join("pods/s")).unwrap();
        fs::write(run.join("pods/s").join(UID_FILE), "u").unwrap();
        remove_records_of_the_gone(&dir, &run).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "its sandbox lives");
        fs::remove_dir_all(run).unwrap();
        // After a boot, before kubelet has made its sandbox again.
        let nowhere = Path::new("/nowhere");
        remove_records_of_the_gone(&dir, nowhere).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "it was alive");
        record.set_modified(old).unwrap();
        remove_records_of_the_gone(&dir, nowhere).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }
}
