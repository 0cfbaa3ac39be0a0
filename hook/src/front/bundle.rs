//! A bundle: its `config.json`, and the marker of a restore.
//!
//! ```text
//! <bundle>/
//!   config.json         OCI spec, written by containerd
//!   transship.json      { "version": 1, "phase": "held", "pid": 7, "start_time": 123,
//!                         "stopped": [9], "frozen": "/sys/fs/cgroup/freezer/default/web",
//!                         "own_pod": "web", "comes_with_migration": true,
//!                         "restore": { "owner": { "pod": UID }, "checkpoint": "web",
//!                                      "container": "app", "asker": "app", "staged": PATH } }
//! ```
//!
//! ```text
//!  create: restoring ----> held ----> running     restore: restoring ----> running
//!          (no pid yet)     |  start   ^
//!                           '--> awaiting         of a pod that comes with a migration: its `start` has answered,
//!                           start                 and its tasks are let go when the migration is committed
//!          done -------------------> running     a program that ends at once in the container's place
//! ```
//!
//! The marker goes with the bundle, which containerd removes when the container is deleted. One
//! that says `restoring` while nobody restores was left by a front that was killed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use transship_checkpoint::annotations::{Annotations, CRIU_CONFIG, PREFIX, Role};
use transship_checkpoint::cri_names::annotations::CONTAINER_TYPE;
use transship_checkpoint::spec::{CONFIG_FILE, Spec, replace_file};
use transship_layer::MountedOverlay;
use transship_sandbox::consumed::Owner;
use transship_sandbox::forgotten_bundle::MARKER;

use transship_path_error::During as _;
use transship_sandbox::read_proc;

use super::{FitError, Front, FrontError};
use crate::argv::Arguments;
use crate::freezer::Freezer;
use crate::start_time::is_same;

/// How annotations of CRI-O and podman begin.
const OTHER_ENGINES: [&str; 3] = ["io.kubernetes.cri-o.", "io.podman.", "io.container.manager"];
const MARKER_VERSION: u32 = 1;
/// CRIU's options of the restore, in the bundle.
pub(super) const CRIU_CONFIG_FILE: &str = "transship-criu.conf";

/// The directory of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bundle {
    dir: PathBuf,
    /// Its spec; crun takes one from elsewhere, and from what can be read only once: that is the runtime's alone.
    config: PathBuf,
}

/// A spec, read and understood.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    /// As it came.
    pub(super) original: Vec<u8>,
    /// The same, parsed.
    pub(super) spec: Spec,
    /// Its annotations.
    pub(super) annotations: Annotations,
    /// Whether the CRI made it: then its namespaces are those of a living sandbox.
    pub(super) cri: bool,
    /// The configuration of CRIU that a pod names, which is not in the spec any more.
    pub(super) criu_config: Option<String>,
}

/// How far a restored container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Phase {
    /// The runtime restores it now.
    Restoring,
    /// Its tasks have not been let go yet.
    Held,
    /// The same, and its caller takes it for started.
    Awaiting,
    /// They run.
    Running,
    /// It had ended before the checkpoint, and is to end again without running.
    Done,
}

/// What the front remembers of a container that it restores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    pub(super) version: u32,
    /// How far it is.
    pub(super) phase: Phase,
    /// First process.
    pub(super) pid: i32,
    /// When that process started, in clock ticks since boot: tells it from a later one.
    pub(super) start_time: u64,
    /// Tasks that were stopped when they were dumped, by their pid in the container.
    pub(super) stopped: Vec<u32>,
    /// The cgroup whose freezer holds it; without one it is held by SIGSTOP.
    #[serde(default)]
    pub(super) frozen: Option<PathBuf>,
    /// Whether it is being let go: it says that it runs, and may be held still.
    #[serde(default)]
    pub(super) is_let_go: bool,
    /// Whether its start waits for the commitment of a migration.
    #[serde(default)]
    pub(super) comes_with_migration: bool,
    /// The container's own directory below `pods`, when a namespace was made and pinned there.
    pub(super) own_pod: Option<String>,
    /// What its start consumes.
    #[serde(default)]
    pub(super) restore: Option<HeldRestore>,
}

/// What a restore takes out of a checkpoint, once its container has been let go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HeldRestore {
    /// Who takes it.
    pub(super) owner: Owner,
    /// The checkpoint.
    pub(super) checkpoint: String,
    /// The container in it.
    pub(super) container: String,
    /// What it is called where it runs.
    pub(super) asker: String,
    /// The staged restore.
    pub(super) staged: PathBuf,
    /// The checkpoint was taken then (seconds since 1970), and goes with this restore.
    #[serde(default)]
    pub(super) once: Option<u64>,
}

impl HeldRestore {
    /// Of a container that had ended: nothing is staged for it.
    pub(super) fn of_done(owner: Owner, checkpoint: &str, container: &str, asker: &str) -> Self {
        Self {
            owner,
            checkpoint: checkpoint.to_owned(),
            container: container.to_owned(),
            asker: asker.to_owned(),
            staged: PathBuf::new(),
            once: None,
        }
    }

    /// Whether it is one of [`Self::of_done`].
    pub(super) fn had_ended(&self) -> bool {
        self.staged.as_os_str().is_empty()
    }
}

impl Marker {
    /// Of a container that had ended.
    pub(super) fn done(restore: HeldRestore) -> Self {
        Self {
            phase: Phase::Done,
            ..Self::restoring(None, Some(restore))
        }
    }

    /// Whether it has been restored and held; then its tasks are let go, and the runtime has nothing to start.
    pub(super) fn was_held(&self) -> bool {
        match self.phase {
            Phase::Restoring | Phase::Done => false,
            Phase::Held | Phase::Awaiting => true,
            // Neither one that had ended, nor one that the runtime let go by itself.
            Phase::Running => self.pid != 0 && self.restore.is_some(),
        }
    }

    /// Whether the one who was letting it go was killed before its tasks went: it has not run.
    pub(super) fn stands_still(&self) -> bool {
        let is_there =
            self.phase == Phase::Running && self.is_let_go && is_same(self.pid, self.start_time);
        let frozen = self.frozen.as_deref().filter(|_| is_there);
        frozen.is_some_and(|dir| Freezer::at(dir).is_frozen().unwrap_or_default())
    }

    pub(super) fn restoring(own_pod: Option<String>, restore: Option<HeldRestore>) -> Self {
        let (pid, start_time, stopped) = (0, 0, Vec::new());
        Self {
            version: MARKER_VERSION,
            phase: Phase::Restoring,
            pid,
            start_time,
            stopped,
            frozen: None,
            is_let_go: false,
            comes_with_migration: false,
            own_pod,
            restore,
        }
    }
}

impl Bundle {
    pub(super) fn of(arguments: &Arguments) -> Self {
        // Without --bundle it is the working directory, as for the runtime.
        let bundle = Self::at(&arguments.bundle().unwrap_or_else(|| PathBuf::from(".")));
        // By this name crun means the bundle's.
        let elsewhere = arguments.config().filter(|it| it != Path::new(CONFIG_FILE));
        Self {
            config: elsewhere.unwrap_or(bundle.config),
            ..bundle
        }
    }

    pub(super) fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            config: dir.join(CONFIG_FILE),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file that has its spec; none where that is not read here.
    pub(super) fn config_file(&self) -> Option<&Path> {
        let is_readable = !self.has_spec_elsewhere()
            || fs::metadata(&self.config).is_ok_and(|file| file.is_file());
        is_readable.then_some(&self.config)
    }

    /// Whether the spec is a file of somebody else's.
    pub(super) fn has_spec_elsewhere(&self) -> bool {
        self.config != self.dir.join(CONFIG_FILE)
    }

    /// Whether it has not been removed.
    pub(super) fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.config).is_ok()
    }

    pub(super) fn path(&self, file: impl AsRef<Path>) -> PathBuf {
        self.dir.join(file)
    }

    /// Makes the directory for CRIU's log and the files of a restore, unless it is there.
    pub(super) fn make_work_dir(&self) -> Result<PathBuf, FrontError> {
        let work = self.path("work");
        match fs::create_dir(&work) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.during("create", &work)?,
        }
        Ok(work)
    }

    /// The spec if it carries an annotation of ours; `None` also for one that cannot be read: the
    /// runtime tells its user what is wrong with it.
    pub(super) fn our_config(&self, id: &str) -> Result<Option<Config>, FrontError> {
        let json = self.config_file().map(fs::read_to_string);
        let Some(Ok(json)) = json else {
            return Ok(None);
        };
        // Most containers are not ours, and a spec takes 50 times longer to parse than to search.
        // JSON may write a slash as "\/".
        if !json.contains(PREFIX.trim_end_matches('/')) {
            return Ok(None);
        }
        Ok(self
            .config(id, json.into_bytes())?
            .filter(|config| config.annotations.ours))
    }

    /// The spec; `None` when it cannot be read.
    pub(super) fn any_config(&self, id: &str) -> Result<Option<Config>, FrontError> {
        let Ok(json) = fs::read(&self.config) else {
            return Ok(None);
        };
        self.config(id, json)
    }

    fn config(&self, id: &str, original: Vec<u8>) -> Result<Option<Config>, FrontError> {
        let Ok(mut spec) = Spec::parse(&original) else {
            return Ok(None);
        };
        let all = spec.annotations();
        let annotations = Annotations::read(id, Some(&all))?;
        // Who asks stands in the annotations of the CRI, which other engines call otherwise.
        let of_other = |key: &&String| OTHER_ENGINES.iter().any(|it| key.starts_with(it));
        if annotations.ours
            && let Some(annotation) = all.keys().find(of_other)
        {
            let (id, annotation) = (id.to_owned(), annotation.clone());
            return Err(FitError::OtherEngine { id, annotation }.into());
        }
        let cri = all.contains_key(CONTAINER_TYPE);
        // Of a pod its author chooses them, and CRIU executes what such a file names.
        let own = std::path::absolute(self.path(CRIU_CONFIG_FILE)).ok();
        let is_own = all.get(CRIU_CONFIG).map(Path::new) == own.as_deref();
        let criu_config = match cri && !is_own {
            true => spec.remove_annotation(CRIU_CONFIG),
            false => None,
        };
        Ok(Some(Config {
            original,
            spec,
            annotations,
            cri,
            criu_config,
        }))
    }

    pub(super) fn replace_config(&self, spec: &Spec) -> Result<(), FrontError> {
        let path = &self.config;
        Ok(replace_file(path, spec).during("rewrite", path)?)
    }

    pub(super) fn write_marker(&self, marker: &Marker) -> Result<(), FrontError> {
        let path = self.path(MARKER);
        let new = self.path("transship.json.new");
        let json = serde_json::to_vec(marker).expect("numbers and strings are JSON");
        fs::write(&new, json).during("write", &new)?;
        Ok(fs::rename(&new, &path).during("write", &path)?)
    }

    pub(super) fn marker(&self) -> Result<Option<Marker>, FrontError> {
        let path = self.path(MARKER);
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Ok(Err(error).during("read", &path)?),
        };
        Ok(serde_json::from_slice(&json)
            .map(Some)
            .map_err(io::Error::from)
            .during("read", &path)?)
    }

    /// Removes the marker of an earlier container in the same bundle.
    pub(super) fn remove_marker(&self) {
        drop(fs::remove_file(self.path(MARKER)));
    }

    /// The upperdir under the container's root, which tells one container from a later one with
    /// the same id. `None` for a root that is no overlay.
    pub(super) fn layer(&self) -> Option<PathBuf> {
        let root = self.path("rootfs").canonicalize().ok()?;
        let mounts = read_proc("/proc/self/mountinfo").ok()?;
        Some(MountedOverlay::on(&root, &mounts).ok()?.stack.top)
    }
}

impl Front<'_> {
    /// Who takes what the container is restored from.
    pub(super) fn owner(&self, id: &str, config: &Config, bundle: &Bundle) -> Owner {
        let annotations = &config.annotations;
        if let Some(uid) = annotations.pod_uid.clone().filter(|_| config.cri) {
            return Owner::Pod(uid);
        }
        if annotations.restore.is_some()
            && let Some(upperdir) = bundle.layer()
        {
            return Owner::Layer(upperdir);
        }
        Owner::Container(match &annotations.role {
            Role::Member { sandbox } => sandbox.clone(),
            Role::Sandbox | Role::Alone => id.to_owned(),
        })
    }

    /// The bundle of a container whose id alone is given: the shim keeps its log in it, and the
    /// runtime keeps its path in the container's state.
    pub(super) fn bundle_of(&self, id: &str) -> Option<Bundle> {
        let beside_log = self
            .globals
            .log
            .as_deref()
            .and_then(Path::parent)
            .map(Path::to_path_buf);
        if let Some(dir) = beside_log
            && fs::symlink_metadata(dir.join(CONFIG_FILE)).is_ok()
        {
            return Some(Bundle::at(&dir));
        }
        bundle_in_state(&self.state_dir(id)?).map(|dir| Bundle::at(&dir))
    }
}

/// runc: `state.json`, the label `bundle=...`; crun: `status`, the field `bundle`.
fn bundle_in_state(dir: &Path) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct RuncState {
        config: RuncConfig,
    }
    #[derive(Deserialize)]
    struct RuncConfig {
        labels: Option<Vec<String>>,
    }
    #[derive(Deserialize)]
    struct CrunStatus {
        bundle: PathBuf,
    }
    if let Ok(json) = fs::read(dir.join("state.json")) {
        let state: RuncState = serde_json::from_slice(&json).ok()?;
        let labels = state.config.labels.unwrap_or_default();
        return labels
            .iter()
            .find_map(|label| label.strip_prefix("bundle=").map(PathBuf::from));
    }
    let json = fs::read(dir.join("status")).ok()?;
    serde_json::from_slice::<CrunStatus>(&json)
        .ok()
        .map(|status| status.bundle)
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn states_of_both_runtimes_name_the_bundle() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(bundle_in_state(dir.path()), None);
        fs::write(dir.path().join("status"), r#"{"pid":1,"bundle":"/b"}"#).unwrap();
        assert_eq!(bundle_in_state(dir.path()), Some("/b".into()));
        let state = r#"{"id":"x","config":{"labels":["org.x=1","bundle=/c"],"rootfs":"/r"}}"#;
        fs::write(dir.path().join("state.json"), state).unwrap();
        assert_eq!(bundle_in_state(dir.path()), Some("/c".into()));
    }

    #[test]
    fn a_spec_that_can_be_read_only_once_is_left_to_the_runtime() {
        let dir = tempfile::tempdir().unwrap();
        let ours = r#"{"annotations":{"dev.transship/restore":"x"}}"#;
        let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
        fs::write(&file, ours).unwrap();
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        for (config, is_read) in [(file, true), (fifo, false)] {
            let bundle = Bundle {
                config,
                ..Bundle::at(dir.path())
            };
            assert!(bundle.has_spec_elsewhere());
            assert_eq!(bundle.our_config("me").unwrap().is_some(), is_read);
        }
        assert!(!Bundle::at(dir.path()).has_spec_elsewhere());
    }

    #[test]
    fn only_our_annotations_make_it_ours() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        for (json, ours) in [
            (None, false),
            (Some("{"), false),
            (Some("{ dev.transship/"), false),
            (
                Some(r#"{"process":{"args":["dev.transship/restore"]}}"#),
                false,
            ),
            (
                Some(r#"{"annotations":{"dev.transship/restore":"x"}}"#),
                true,
            ),
            (
                Some(r#"{"annotations":{"dev.transship\/restore":"x"}}"#),
                true,
            ),
        ] {
            if let Some(json) = json {
                fs::write(bundle.path(CONFIG_FILE), json).unwrap();
            }
            assert_eq!(bundle.our_config("me").unwrap().is_some(), ours, "{json:?}");
        }
    }

    #[test]
    fn containers_of_other_engines_ask_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        for (ours, is_refused) in [("dev.transship/restore", true), ("other", false)] {
            let json =
                format!(r#"{{"annotations":{{"{ours}":"x","io.kubernetes.cri-o.Name":"x"}}}}"#);
            fs::write(bundle.path(CONFIG_FILE), json).unwrap();
            assert_eq!(bundle.any_config("me").is_err(), is_refused, "{ours}");
        }
    }
}
