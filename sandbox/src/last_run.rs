//! When a pod of a name has last begun to run on this node: what `dev.transship/restore-latest` restores was
//! taken after that.
//!
//! ```text
//! /var/lib/transship/runs/<namespace>_<pod>     neither name can have an underscore
//!   UID  BEGAN  BEFORE  WAITS    when the pod with this uid got its first sandbox that came up, and when the one of
//!                            the same name before it did: seconds since 1970, separated by tabs; and "waits" if it
//!                            was to be restored then. One of which nothing has been restored or started since has not
//!                            run, as far as pods after it are concerned.
//! /var/lib/transship/runs/.forgotten            the newest BEGAN of the records that are no more
//! ```
//!
//! Records are kept for 90 days, and the newest 20 000: a name without one counts as one that has last begun to run when the
//! newest of those that are gone did. So nothing that was taken before a run is restored after it, whatever is forgotten.
//!
//! A later sandbox of the same pod changes nothing: until one of its containers has run, it may still have what
//! its first sandbox was to have (`consumed` knows of each that has).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};

use transship_checkpoint::manifest::{Manifest, check_name};
use transship_checkpoint::store::Store;
use transship_path_error::During as _;

use crate::consumed::{Consumed, KEPT as CONSUMED_KEPT, Owner, times_restored};
use crate::error::SandboxError;
use crate::files::{make_dir, remove_file, replace_durably};

/// Where the records are.
pub const DEFAULT_RUNS_DIR: &str = "/var/lib/transship/runs";
/// No name of a record: neither part begins with a dot.
const FORGOTTEN: &str = ".forgotten";
/// How long a record is kept.
const KEPT: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How many are.
const MOST: usize = 20_000;

/// A pod, as kubelet names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodRun<'a> {
    /// Its Kubernetes namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its uid.
    pub uid: &'a str,
}

/// What a record has.
struct LastRun {
    uid: String,
    began: u64,
    before: u64,
    waits: bool,
}

const WAITS: &str = "waits";

impl LastRun {
    /// What was taken after that may be restored by another pod.
    fn since(&self, consumed: &Path, now: u64) -> Result<u64, SandboxError> {
        // As long as a record that it has run cannot have been forgotten.
        let is_recent = self.began.saturating_add(CONSUMED_KEPT.as_secs()) > now;
        let may_wait = self.waits && is_recent && self.began <= now;
        Ok(match may_wait && !has_run(consumed, &self.uid)? {
            true => self.before,
            false => self.began,
        })
    }

    /// The record in `path`, if there is one.
    fn read(path: &Path) -> Result<Option<Self>, SandboxError> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.during("read", path)?,
        };
        let mut fields = text.trim_end().split('\t');
        let uid = fields.next().unwrap_or_default().to_owned();
        let mut seconds = || {
            { fields.next() }
                .and_then(|it| it.parse().ok())
                .unwrap_or_default()
        };
        Ok(Some(Self {
            uid,
            began: seconds(),
            before: seconds(),
            waits: fields.next() == Some(WAITS),
        }))
    }
}

/// When the newest of those began that have no record any more.
fn forgotten(dir: &Path) -> Result<u64, SandboxError> {
    let path = dir.join(FORGOTTEN);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        text => Ok(text
            .during("read", &path)?
            .trim_end()
            .parse()
            .unwrap_or_default()),
    }
}

/// Forgets the records that are too old, and the oldest beyond `most`.
fn forget_old(dir: &Path, now: u64, most: usize) -> Result<(), SandboxError> {
    let mut records = Vec::new();
    for entry in fs::read_dir(dir).during("list", dir)? {
        let entry = entry.during("list", dir)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // Written when it began, so not all of them are read; one that is gone was of a writer.
        let meta = entry.metadata().ok().filter(fs::Metadata::is_file);
        let Some(written) = meta.and_then(|meta| meta.modified().ok()) else {
            continue;
        };
        let written = written.duration_since(UNIX_EPOCH);
        records.push((written.map_or(0, |it| it.as_secs()), entry.path()));
    }
    records.sort_unstable();
    let beyond = records.len().saturating_sub(most);
    let is_old = |at: u64| at.saturating_add(KEPT.as_secs()) < now;
    let old = records.iter().enumerate();
    let old: Vec<_> = old
        .filter(|(place, (at, _))| *place < beyond || is_old(*at))
        .map(|(_, record)| record)
        .collect();
    if old.is_empty() {
        return Ok(());
    }
    let before = forgotten(dir)?;
    let mut newest = before;
    for (written, path) in &old {
        // Of one that is damaged: when it was written.
        let began = match LastRun::read(path) {
            Ok(last) => last.map_or(0, |last| last.began),
            Err(_) => *written,
        };
        newest = newest.max(began);
    }
    if newest > before {
        // Before the first of them goes.
        replace_durably(&dir.join(FORGOTTEN), format!("{newest}\n").as_bytes())?;
    }
    old.into_iter().try_for_each(|(_, path)| remove_file(path))
}

/// Whether a container of the pod has been restored, or started from its image.
fn has_run(consumed: &Path, uid: &str) -> Result<bool, SandboxError> {
    Ok(Consumed::by(consumed, &Owner::Pod(uid.to_owned()))?.has_run_at_all())
}

impl PodRun<'_> {
    fn path(&self, dir: &Path) -> Result<PathBuf, SandboxError> {
        for part in [self.namespace, self.name] {
            check_name("the pod's name", part)?;
        }
        Ok(dir.join(format!("{}_{}", self.namespace, self.name)))
    }

    /// When the pod before this one has begun to run; 0: there was none. `consumed` has what pods have restored.
    ///
    /// # Errors
    /// A name that could lead elsewhere, or a failed system call.
    pub fn since(&self, dir: &Path, consumed: &Path, now: u64) -> Result<u64, SandboxError> {
        let last = self.last(dir)?;
        match last.uid == self.uid {
            true => Ok(last.before),
            false => last.since(consumed, now),
        }
    }

    /// Records that the pod begins to run `now`, unless that is known; and whether it `waits` to be restored.
    ///
    /// # Errors
    /// A name that could lead elsewhere, or a failed system call.
    pub fn begin(
        &self,
        dir: &Path,
        consumed: &Path,
        now: u64,
        waits: bool,
    ) -> Result<(), SandboxError> {
        let last = self.last(dir)?;
        if last.uid == self.uid {
            return Ok(());
        }
        make_dir(dir)?;
        let file = File::open(dir).during("open", dir)?;
        // One at a time: a record that is written anew is not forgotten.
        let lock = Flock::lock(file, FlockArg::LockExclusive);
        let _lock = lock.map_err(|(_, errno)| errno).during("lock", dir)?;
        forget_old(dir, now, MOST)?;
        let before = last.since(consumed, now)?;
        let uid = self.uid.replace(['\t', '\n'], " ");
        let waits = if waits { WAITS } else { "" };
        let record = format!("{uid}\t{now}\t{before}\t{waits}\n");
        replace_durably(&self.path(dir)?, record.as_bytes())
    }

    fn last(&self, dir: &Path) -> Result<LastRun, SandboxError> {
        match LastRun::read(&self.path(dir)?)? {
            Some(last) => Ok(last),
            None => Ok(LastRun {
                uid: String::new(),
                began: forgotten(dir)?,
                before: 0,
                waits: false,
            }),
        }
    }

    /// Name of the newest checkpoint of `store` that is of a pod of this namespace and name, was taken after
    /// `since`, and that nobody has consumed by the records in `consumed`.
    ///
    /// # Errors
    /// The store or the records cannot be read.
    pub fn latest(
        &self,
        store: &Store,
        consumed: &Path,
        since: u64,
    ) -> Result<Option<String>, SandboxError> {
        let is_of_this = |manifest: &Manifest| {
            let pod = manifest.pod.as_ref();
            pod.is_some_and(|pod| pod.name == self.name && pod.namespace == self.namespace)
        };
        let listed = store
            .list()
            .map_err(Box::new)?
            .into_iter()
            .filter_map(|(_, opened)| opened.ok());
        let mut newest: Option<Manifest> = None;
        for manifest in listed.map(|checkpoint| checkpoint.manifest) {
            let is_newer = newest
                .as_ref()
                .is_none_or(|it| it.created < manifest.created);
            if is_of_this(&manifest)
                && manifest.created > since
                && is_newer
                && times_restored(consumed, &manifest)? == 0
            {
                newest = Some(manifest);
            }
        }
        Ok(newest.map(|manifest| manifest.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consumed::{Consumed, Owner};
    use std::time::SystemTime;
    use transship_checkpoint::manifest::{Container, Pod};
    use transship_checkpoint::store::Durability;

    fn run(uid: &str) -> PodRun<'_> {
        PodRun {
            namespace: "shop",
            name: "web-0",
            uid,
        }
    }

    #[test]
    fn a_later_sandbox_of_the_same_pod_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("runs");
        for (uid, now, since) in [
            ("a", 100, 0),
            ("a", 150, 0),
            ("b", 200, 100),
            ("b", 250, 100),
        ] {
            assert_eq!(run(uid).since(&dir, &dir, now).unwrap(), since);
            // Another sandbox of it may fail.
            assert_eq!(run(uid).since(&dir, &dir, now).unwrap(), since);
            run(uid).begin(&dir, &dir, now, false).unwrap();
            assert_eq!(run(uid).since(&dir, &dir, now).unwrap(), since);
        }
        // Of "x" nothing has run.
        for uid in ["x", "c"] {
            assert_eq!(run(uid).since(&dir, &dir, 300).unwrap(), 200);
        }
        let thief = PodRun {
            namespace: "../..",
            ..run("a")
        };
        assert!(thief.begin(&dir, &dir, 1, false).is_err());
    }

    #[test]
    fn a_pod_that_waits_for_its_restore_has_not_run() {
        let root = tempfile::tempdir().unwrap();
        let (dir, consumed) = (root.path().join("runs"), root.path().join("consumed"));
        let since = |uid, now| run(uid).since(&dir, &consumed, now).unwrap();
        let begin = |uid, now, waits| run(uid).begin(&dir, &consumed, now, waits).unwrap();
        begin("a", 100, false);
        begin("b", 200, true);
        // Nothing of "b" has come up.
        assert_eq!((since("b", 210), since("c", 210)), (100, 100));
        begin("c", 220, true);
        assert_eq!((since("c", 230), since("d", 230)), (100, 100));
        let mut record = Consumed::by(&consumed, &Owner::Pod("c".into())).unwrap();
        record.add_cold("app").unwrap();
        assert!(record.has_started_cold("app") && !record.has_started_cold("other"));
        assert_eq!((since("c", 240), since("d", 240)), (100, 220));
        begin("d", 250, true);
        // By then nobody knows whether it has.
        let later = 251 + CONSUMED_KEPT.as_secs();
        assert_eq!((since("e", 260), since("e", later)), (220, 250));
    }

    #[test]
    fn what_is_forgotten_restores_nothing_that_was_taken_before() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("runs");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = now.as_secs();
        let of = |name| PodRun { name, ..run("a") };
        let age = |name: &str, days: u64| {
            let path = dir.join(format!("shop_{name}"));
            let file = File::options().write(true).open(path).unwrap();
            let at = SystemTime::now() - Duration::from_secs(days * 24 * 60 * 60);
            file.set_modified(at).unwrap();
        };
        for (name, began, days) in [("web-0", 100, 91), ("web-1", 300, 91), ("web-2", 500, 1)] {
            of(name).begin(&dir, &dir, began, false).unwrap();
            age(name, days);
        }
        of("web-3").begin(&dir, &dir, now, false).unwrap();
        let left = || fs::read_dir(&dir).unwrap().count();
        assert_eq!(left(), 3, "two, and what is known of the others");
        for (name, since) in [("web-0", 300), ("web-1", 300), ("new", 300), ("web-2", 0)] {
            assert_eq!(of(name).since(&dir, &dir, now).unwrap(), since, "{name}");
        }
        forget_old(&dir, now, 1).unwrap();
        assert_eq!(left(), 2);
        assert_eq!(of("web-2").since(&dir, &dir, now).unwrap(), 500);
        assert_eq!(of("web-3").since(&dir, &dir, now).unwrap(), 0);
        // It comes back as what it was.
        of("web-1").begin(&dir, &dir, now, false).unwrap();
        assert_eq!(of("web-1").since(&dir, &dir, now).unwrap(), 500);
    }

    fn take(store: &Store, name: &str, pod: &str, created: u64) {
        let draft = store.draft(name).unwrap();
        let manifest = Manifest {
            name: name.into(),
            created,
            pod: Some(Pod {
                name: pod.into(),
                namespace: "shop".into(),
                ..Pod::default()
            }),
            containers: vec![Container {
                name: "app".into(),
                ..Container::default()
            }],
            ..Manifest::default()
        };
        draft.commit(manifest, Durability::Ephemeral).unwrap();
    }

    #[test]
    fn the_latest_is_of_this_pod_fresh_and_unused() {
        let dir = tempfile::tempdir().unwrap();
        let (store, consumed) = (Store::at(dir.path().join("s")), dir.path().join("consumed"));
        let latest = |since| run("c").latest(&store, &consumed, since).unwrap();
        assert_eq!(latest(0), None);
        for (name, pod, created) in [
            ("one", "web-0", 100),
            ("two", "web-0", 200),
            ("other", "web-1", 300),
        ] {
            take(&store, name, pod, created);
        }
        assert_eq!(latest(0).as_deref(), Some("two"));
        assert_eq!(latest(200), None);
        let mut record = Consumed::by(&consumed, &Owner::Pod("b".into())).unwrap();
        record
            .add_container(("two", Some(200)), "app", "app")
            .unwrap();
        assert_eq!(latest(0).as_deref(), Some("one"));
        // Another one gets its name.
        store.remove("two").unwrap();
        take(&store, "two", "web-0", 400);
        assert_eq!(latest(0).as_deref(), Some("two"));
        // Records of old did not say which one it was.
        record.add_container(("two", None), "app", "app").unwrap();
        assert_eq!(latest(0).as_deref(), Some("two"), "it has that already");
    }
}
