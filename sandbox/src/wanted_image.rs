//! Checkpoints that pods want from registries (`dev.transship/restore-image`): the sandbox's hook asks for them,
//! `transship serve` fetches them.
//!
//! ```text
//! /var/lib/transship/images.lock   locked (flock) by the `transship serve` that fetches
//! /var/lib/transship/images/
//!   <64 hex digits>/   one for each digest
//!     wanted           HOST/NAME@sha256:DIGEST, as the pod has it; as old as the last call that wants it
//!     by-<uid>         empty; as old as the first call for the pod with this uid
//!     state            JSON: {"pulling": 34}, {"failed": "why"},
//!                      {"ready": {"checkpoint": NAME, "manifest": SHA-256 of transship.json, "keys": [...]}}
//! ```
//!
//! Whoever can push to a registry writes what a checkpoint says of itself, its Kubernetes namespace, too. So the
//! node names the registries, the pod names the content, and a key that the node names has signed it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use transship_checkpoint::annotations::RESTORE_IMAGE;
use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::{MANIFEST_FILE, MANIFEST_LIMIT, check_name};
use transship_checkpoint::store::Store;
use transship_path_error::During as _;

use crate::admission::node_config::{NODE_CONFIG, NodeConfig};
use crate::error::SandboxError;
use crate::files::{make_dir, remove_tree, replace};

/// Where they are kept.
pub const DEFAULT_IMAGES_DIR: &str = "/var/lib/transship/images";
const LOCK: &str = "lock";
const WANTED: &str = "wanted";
const STATE: &str = "state";
const ASKER: &str = "by-";
/// Longest reference or state that is read, in bytes.
const LIMIT: u64 = 64 << 10;

/// Why there is no checkpoint for a pod that wants one from a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WantedImageError {
    /// No reference by digest.
    #[error("annotation {RESTORE_IMAGE} is {text:?}; it can be HOST/NAME@sha256:DIGEST")]
    Reference {
        /// What it is.
        text: String,
    },
    /// The node's operator has not said that this registry is one.
    #[error(
        "the pod wants a checkpoint of {host}, from where this node takes none; its operator can allow it, by \
         registries = [{host:?}] under [images] in {NODE_CONFIG}"
    )]
    Registry {
        /// The registry.
        host: String,
    },
    /// Nobody has said whose signature counts.
    #[error(
        "the pod wants a checkpoint of a registry, and this node knows no key that would have signed it; its \
         operator can name one, by signed-by under [checkpoints] in {NODE_CONFIG}"
    )]
    NoKey,
    /// Nobody fetches it.
    #[error("nobody fetches {reference}: transship serve does not run on this node")]
    NotServed {
        /// What is wanted.
        reference: String,
    },
    /// It is on its way.
    #[error("pulling, {percent} % of {reference}")]
    Pulling {
        /// What is wanted.
        reference: String,
        /// How much of it is there.
        percent: u8,
    },
    /// It could not be fetched; each call that wants it makes another attempt.
    #[error("{reference} could not be pulled: {reason}")]
    Failed {
        /// What is wanted.
        reference: String,
        /// Why.
        reason: String,
    },
    /// The record of it.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl WantedImageError {
    /// Whether a pod may do without the restore: it was tried, and failed.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    /// Whether it will be there by and by.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Pulling { .. })
    }
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullState {
    /// So many percent are there.
    Pulling(u8),
    /// The last attempt failed, for this reason.
    Failed(String),
    /// It is a checkpoint of this node.
    Ready(Pulled),
}

/// A checkpoint that came from a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// Its name.
    pub checkpoint: String,
    /// The SHA-256 of its manifest, in hexadecimal digits.
    pub manifest: String,
    /// The keys one of which has signed it.
    pub keys: Vec<String>,
}

impl Pulled {
    /// Whether the checkpoint is there, as it was signed, by keys that still count.
    fn is_there(&self, store: &Store, rules: &NodeConfig) -> bool {
        let trusted = &rules.checkpoints.signed_by;
        self.keys.iter().all(|key| trusted.contains(key))
            && manifest_digest(store, &self.checkpoint).as_deref() == Some(&self.manifest)
    }
}

/// The SHA-256 of the manifest of a checkpoint, in hexadecimal digits; none when it is not there.
#[must_use]
pub fn manifest_digest(store: &Store, name: &str) -> Option<String> {
    let checkpoint = store.find(name).ok()?;
    if let Some(sealed) = &checkpoint.sealed {
        return Some(sealed.manifest.clone());
    }
    let path = Path::new(MANIFEST_FILE);
    let json = read_regular(&checkpoint.dir, path, Links::Refused, MANIFEST_LIMIT).ok()?;
    Some(transship_digest::sha256_hex(json))
}

/// A checkpoint in a registry that a pod wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedImage {
    /// As the pod has it.
    pub reference: String,
    dir: PathBuf,
}

impl WantedImage {
    /// The one of `reference`, below `images`.
    ///
    /// # Errors
    /// [`WantedImageError::Reference`].
    pub fn new(images: &Path, reference: &str) -> Result<Self, WantedImageError> {
        let digest = reference.rsplit_once("@sha256:").and_then(|(name, hex)| {
            let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            let is_digest = hex.len() == 64 && hex.bytes().all(is_digit);
            let is_name = name.contains('/') && name.bytes().all(|it| it.is_ascii_graphic());
            (is_digest && is_name && (reference.len() as u64) < LIMIT).then_some(hex)
        });
        let digest = digest.ok_or_else(|| WantedImageError::Reference {
            text: reference.to_owned(),
        })?;
        Ok(Self {
            reference: reference.to_owned(),
            dir: images.join(digest),
        })
    }

    /// The digits of its digest, whatever registry it comes from.
    #[must_use]
    pub fn digest(&self) -> &str {
        self.reference.rsplit(':').next().unwrap_or_default()
    }

    fn host(&self) -> &str {
        self.reference.split('/').next().unwrap_or_default()
    }

    /// The name of the checkpoint that it is on this node, for the pod with the uid `asker`: for this one another attempt
    /// is made, however an earlier one has ended.
    ///
    /// # Errors
    /// It is not there (yet), or is not to be.
    pub fn checkpoint(
        &self,
        rules: &NodeConfig,
        store: &Store,
        asker: Option<&str>,
    ) -> Result<String, WantedImageError> {
        let (host, reference) = (self.host().to_owned(), self.reference.clone());
        if !rules.images.registries.contains(&host) {
            return Err(WantedImageError::Registry { host });
        }
        if rules.checkpoints.signed_by.is_empty() {
            return Err(WantedImageError::NoKey);
        }
        let state = self.state()?;
        if let Some(PullState::Ready(pulled)) = &state
            && pulled.is_there(store, rules)
        {
            return Ok(pulled.checkpoint.clone());
        }
        self.want()?;
        let is_of_this = self.has_ended_for(asker)?;
        if !is_served(self.dir.parent().unwrap_or(Path::new("/")))? {
            return Err(WantedImageError::NotServed { reference });
        }
        Err(match state {
            Some(PullState::Failed(reason)) if is_of_this => {
                WantedImageError::Failed { reference, reason }
            }
            Some(PullState::Pulling(percent)) => WantedImageError::Pulling { reference, percent },
            Some(PullState::Ready(_) | PullState::Failed(_)) | None => WantedImageError::Pulling {
                reference,
                percent: 0,
            },
        })
    }

    /// Asks for it.
    fn want(&self) -> Result<(), SandboxError> {
        make_dir(&self.dir)?;
        replace(&self.dir.join(WANTED), self.reference.as_bytes())
    }

    /// Whether its state is newer than the first call for this pod, which this one may be.
    fn has_ended_for(&self, asker: Option<&str>) -> Result<bool, SandboxError> {
        // Outside of the CRI nothing tells pods apart.
        let Some(uid) = asker else { return Ok(true) };
        check_name("the pod's uid", uid)?;
        let path = self.dir.join(format!("{ASKER}{uid}"));
        let mut open = OpenOptions::new();
        match open.write(true).create_new(true).mode(0o600).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => {
                return opened
                    .map(|_| false)
                    .during("make", &path)
                    .map_err(Into::into);
            }
        }
        let time = |path: &Path| fs::metadata(path).and_then(|it| it.modified());
        let first = time(&path).during("look at", &path)?;
        Ok(time(&self.dir.join(STATE)).is_ok_and(|state| state > first))
    }

    /// How far it is; none: nobody has begun.
    ///
    /// # Errors
    /// The record is damaged, or cannot be read.
    pub fn state(&self) -> Result<Option<PullState>, SandboxError> {
        let Some(json) = read(&self.dir.join(STATE))? else {
            return Ok(None);
        };
        match serde_json::from_str(&json) {
            Ok(state) => Ok(Some(state)),
            Err(error) => Err(SandboxError::Damaged {
                path: self.dir.join(STATE),
                what: error.to_string(),
            }),
        }
    }

    /// Records how far it is.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_state(&self, state: &PullState) -> Result<(), SandboxError> {
        let json = serde_json::to_vec(state).expect("names and numbers are always JSON");
        replace(&self.dir.join(STATE), &json)
    }

    /// Whether somebody has wanted it since its state was written.
    #[must_use]
    pub fn is_wanted_again(&self) -> bool {
        let time = |file: &str| fs::metadata(self.dir.join(file)).and_then(|it| it.modified());
        match (time(WANTED), time(STATE)) {
            (Ok(wanted), Ok(state)) => wanted >= state,
            (wanted, _) => wanted.is_ok(),
        }
    }

    /// When somebody wanted it last.
    #[must_use]
    pub fn wanted_at(&self) -> Option<SystemTime> {
        fs::metadata(self.dir.join(WANTED)).ok()?.modified().ok()
    }

    /// Forgets it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn forget(&self) -> Result<(), SandboxError> {
        remove_tree(&self.dir)
    }
}

/// All that are wanted, or were.
///
/// # Errors
/// The directory cannot be listed.
pub fn list(images: &Path) -> Result<Vec<WantedImage>, SandboxError> {
    let entries = match fs::read_dir(images) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.during("list", images)?,
    };
    let mut wanted = Vec::new();
    for entry in entries {
        let dir = entry.during("list", images)?.path();
        if let Ok(Some(reference)) = read(&dir.join(WANTED))
            && let Ok(image) = WantedImage::new(images, &reference)
            && image.dir == dir
        {
            wanted.push(image);
        }
    }
    Ok(wanted)
}

/// Held by who fetches them; none: somebody else does.
///
/// # Errors
/// A system call failed.
pub fn serve(images: &Path) -> Result<Option<Flock<File>>, SandboxError> {
    make_dir(images)?;
    let path = images.with_extension(LOCK);
    let mut open = OpenOptions::new();
    open.write(true).create(true).truncate(false).mode(0o600);
    let file = open.open(&path).during("open", &path)?;
    Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok())
}

fn is_served(images: &Path) -> Result<bool, SandboxError> {
    let path = images.with_extension(LOCK);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.during("open", &path)?,
    };
    Ok(Flock::lock(file, FlockArg::LockSharedNonblock).is_err())
}

fn read(path: &Path) -> Result<Option<String>, SandboxError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.during("open", path)?,
    };
    let mut text = String::new();
    file.take(LIMIT)
        .read_to_string(&mut text)
        .during("read", path)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use transship_checkpoint::manifest::Manifest;
    use transship_checkpoint::store::Durability;

    const REFERENCE: &str = "registry.example/web@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn rules() -> NodeConfig {
        let mut rules = NodeConfig::default();
        rules.images.registries = vec!["registry.example".into()];
        rules.checkpoints.signed_by = vec!["RWQ1".into(), "RWQ2".into()];
        rules
    }

    fn checkpoint(store: &Store, name: &str) {
        let manifest = Manifest {
            name: name.into(),
            created: 1,
            ..Manifest::default()
        };
        let draft = store.draft(name).unwrap();
        draft.commit(manifest, Durability::Ephemeral).unwrap();
    }

    #[test]
    fn nothing_is_fetched_that_the_node_does_not_allow() {
        let root = tempfile::tempdir().unwrap();
        let (images, store) = (root.path().join("images"), Store::at(root.path().join("s")));
        for text in [
            "registry.example/web:1",
            "web@sha256:0123",
            "registry.example/web@sha256:0123",
            "registry.example/w\neb@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ] {
            let error = WantedImage::new(&images, text).unwrap_err();
            assert!(
                matches!(error, WantedImageError::Reference { .. }),
                "{error}"
            );
        }
        let image = WantedImage::new(&images, REFERENCE).unwrap();
        let ask = |rules: &NodeConfig| {
            let error = image.checkpoint(rules, &store, None).unwrap_err();
            error.to_string()
        };
        let error = ask(&NodeConfig::default());
        assert!(
            error.contains("registries = [\"registry.example\"]"),
            "{error}"
        );
        let mut no_key = rules();
        no_key.checkpoints.signed_by.clear();
        assert!(ask(&no_key).contains("signed-by"));
        assert!(!images.try_exists().unwrap(), "nothing is asked for");
    }

    #[test]
    fn a_wanted_one_is_there_by_and_by() {
        let root = tempfile::tempdir().unwrap();
        let (images, store) = (root.path().join("images"), Store::at(root.path().join("s")));
        let image = WantedImage::new(&images, REFERENCE).unwrap();
        let ask_for = |rules: &NodeConfig, asker| {
            let found = image.checkpoint(rules, &store, asker);
            found.map_err(|error| error.to_string())
        };
        let ask = |rules: &NodeConfig| ask_for(rules, None);
        assert!(
            ask(&rules())
                .unwrap_err()
                .contains("transship serve does not run")
        );
        let serving = serve(&images).unwrap().unwrap();
        assert!(serve(&images).unwrap().is_none());
        assert_eq!(
            ask(&rules()).unwrap_err(),
            format!("pulling, 0 % of {REFERENCE}")
        );
        assert_eq!(list(&images).unwrap(), vec![image.clone()]);
        image.set_state(&PullState::Pulling(34)).unwrap();
        assert_eq!(
            ask(&rules()).unwrap_err(),
            format!("pulling, 34 % of {REFERENCE}")
        );
        image
            .set_state(&PullState::Failed("no room".into()))
            .unwrap();
        assert!(
            ask(&rules())
                .unwrap_err()
                .ends_with("could not be pulled: no room")
        );
        assert!(image.is_wanted_again());
        // That was before this pod: for it there will be another attempt.
        for _ in 0..2 {
            let answer = ask_for(&rules(), Some("new")).unwrap_err();
            assert!(answer.starts_with("pulling, 0 %"), "{answer}");
        }
        let later = SystemTime::now() + std::time::Duration::from_secs(1);
        let state = File::options().write(true).open(image.dir.join(STATE));
        state.unwrap().set_modified(later).unwrap();
        let answer = ask_for(&rules(), Some("new")).unwrap_err();
        assert!(answer.ends_with("no room"), "{answer}");
        ask_for(&rules(), Some("../x")).unwrap_err();
        checkpoint(&store, "web");
        let ready = |name: &str| {
            PullState::Ready(Pulled {
                checkpoint: name.into(),
                manifest: manifest_digest(&store, "web").unwrap(),
                keys: vec!["RWQ2".into()],
            })
        };
        image.set_state(&ready("web")).unwrap();
        assert_eq!(ask(&rules()).unwrap(), "web");
        let mut other_key = rules();
        other_key.checkpoints.signed_by = vec!["RWQ1".into()];
        assert!(ask(&other_key).is_err(), "its key does not count any more");
        store.remove("web").unwrap();
        checkpoint(&store, "other");
        assert!(ask(&rules()).unwrap_err().starts_with("pulling, 0 %"));
        drop(serving);
        image.forget().unwrap();
        assert!(list(&images).unwrap().is_empty());
    }
}
