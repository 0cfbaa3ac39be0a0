//! Which checkpoints of a store go: by age, by number per pod, by size; and those that were to be restored once, and
//! were. Never one that a restore uses.
//!
//! ```text
//!  Rules (node.toml, or flags) ─┐
//!  store ──> Candidate ─────────┴─> due ──> removed
//!            in use: a restore reads its images (the lock of its links), or is staged with them
//!            spent:  a record of consumed checkpoints says that it was restored once
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use transship_checkpoint::store::{Store, StoreError};
use transship_package::oci::remove_abandoned;
use transship_sandbox::DEFAULT_RUN_DIR;
use transship_sandbox::admission::node_config::{CheckpointRules, NodeConfig};
use transship_sandbox::consumed::{DEFAULT_CONSUMED_DIR, is_spent};
use transship_sandbox::opened::staged;
use transship_sandbox::origins::{DEFAULT_ORIGINS_DIR, forget_gone};

use crate::error::{Context, Error, Result, one_line};

/// What stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    /// Older ones go.
    pub max_age: Option<Duration>,
    /// As many of each pod, or of each container outside of one, stay: the newest.
    pub max_per_pod: Option<usize>,
    /// The oldest go until all together have no more bytes.
    pub max_bytes: Option<u64>,
}

impl Rules {
    /// Whether everything stays.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl From<&CheckpointRules> for Rules {
    fn from(rules: &CheckpointRules) -> Self {
        let days = (rules.keep_days > 0).then_some(rules.keep_days);
        let gigabytes = (rules.keep_gigabytes > 0).then_some(rules.keep_gigabytes);
        Self {
            max_age: days.map(|days| Duration::from_secs(days.saturating_mul(24 * 60 * 60))),
            max_per_pod: (rules.keep_per_pod > 0).then_some(rules.keep_per_pod),
            max_bytes: gigabytes.map(|it| it.saturating_mul(1_000_000_000)),
        }
    }
}

/// A checkpoint that could go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    name: String,
    /// Seconds since 1970.
    created: u64,
    /// What it is of: its pod, or its containers.
    of: String,
    bytes: u64,
    in_use: bool,
    spent: bool,
}

/// Where it stands what is done with checkpoints.
#[derive(Debug, Clone)]
pub struct Records {
    /// `/run/transship`.
    pub run_dir: PathBuf,
    /// What has been consumed, by whom.
    pub consumed: PathBuf,
    /// Where they come from.
    pub origins: PathBuf,
}

impl Default for Records {
    fn default() -> Self {
        Self {
            run_dir: DEFAULT_RUN_DIR.into(),
            consumed: DEFAULT_CONSUMED_DIR.into(),
            origins: DEFAULT_ORIGINS_DIR.into(),
        }
    }
}

/// A checkpoint that has to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Due {
    /// Its name.
    pub name: String,
    /// What its files hold, in bytes.
    pub bytes: u64,
    /// Why.
    pub reason: &'static str,
}

const SPENT: &str = "it was to be restored once, and was";
const TOO_OLD: &str = "older than is kept";
const TOO_MANY: &str = "newer ones of the same pod are kept";
const TOO_LARGE: &str = "newer ones fill the size that is kept";

/// The checkpoints that have to go by `rules`, the oldest first. One that cannot be read stays: what it is of
/// is not known.
///
/// # Errors
/// The store cannot be read.
pub fn due(store: &Store, records: &Records, rules: &Rules) -> Result<Vec<Due>> {
    let staged = staged(&records.run_dir);
    let is_staged = |name: &str| staged.iter().any(|it| it.checkpoint == name);
    let checkpoints = store.list()?.into_iter();
    let candidates = checkpoints.filter_map(|(name, opened)| {
        let checkpoint = opened.ok()?;
        let manifest = &checkpoint.manifest;
        let containers = manifest.containers.iter().map(|it| it.id.as_str());
        Some(Candidate {
            in_use: is_staged(&name) || store.is_being_restored(&name).unwrap_or(true),
            // Who cannot read the records keeps it.
            spent: is_spent(&records.consumed, manifest).unwrap_or_default(),
            created: manifest.created,
            of: match &manifest.pod {
                Some(pod) => format!("{}/{}", pod.namespace, pod.name),
                None => containers.collect::<Vec<_>>().join(" "),
            },
            bytes: checkpoint.bytes(),
            name,
        })
    });
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    Ok(judge(candidates.collect(), rules, now))
}

fn judge(mut all: Vec<Candidate>, rules: &Rules, now: u64) -> Vec<Due> {
    // The newest first: they fill what is kept.
    all.sort_by(|one, other| (other.created, &other.name).cmp(&(one.created, &one.name)));
    let mut of_pod: BTreeMap<String, usize> = BTreeMap::new();
    let mut bytes: u64 = 0;
    let mut due = Vec::new();
    for candidate in all {
        let Candidate {
            name,
            created,
            of,
            bytes: its_bytes,
            in_use,
            spent,
        } = candidate;
        let count = of_pod.entry(of).or_default();
        let age = Duration::from_secs(now.saturating_sub(created));
        let reason = if spent {
            Some(SPENT)
        } else if rules.max_age.is_some_and(|most| age > most) {
            Some(TOO_OLD)
        } else if rules.max_per_pod.is_some_and(|most| *count >= most) {
            Some(TOO_MANY)
        } else if { rules.max_bytes }.is_some_and(|most| bytes.saturating_add(its_bytes) > most) {
            Some(TOO_LARGE)
        } else {
            None
        };
        match reason.filter(|_| !in_use) {
            Some(reason) => due.push(Due {
                name,
                bytes: its_bytes,
                reason,
            }),
            None => {
                *count += 1;
                bytes = bytes.saturating_add(its_bytes);
            }
        }
    }
    due.reverse();
    due
}

/// Removes what has to go, and returns it.
///
/// # Errors
/// A checkpoint cannot be removed; those before it are gone.
pub fn prune(store: &Store, records: &Records, rules: &Rules) -> Result<Vec<Due>> {
    // One that cannot be removed must not keep all others.
    if let Err(error) = store.remove_orphans() {
        tracing::warn!(error = %one_line(&error), "drafts that nobody works on stay");
    }
    remove_abandoned(store)?;
    let due = due(store, records, rules)?;
    for checkpoint in &due {
        match store.remove(&checkpoint.name) {
            // Somebody was faster, or has begun to read it.
            Err(StoreError::NotFound { .. } | StoreError::InUse { .. }) => {}
            removed => removed?,
        }
    }
    forget_origins(&records.origins);
    Ok(due)
}

/// Removes a checkpoint, unless a restore reads it at this moment.
///
/// # Errors
/// [`crate::Kind::NotFound`]; [`crate::Kind::Refused`] while a restore reads it.
pub fn remove(store: &Store, name: &str) -> Result<()> {
    if store.is_being_restored(name).unwrap_or_default() {
        let message = format!("a restore reads the checkpoint {name:?} at this moment");
        return Err(Error::refused(message).hint("try again when it is done"));
    }
    match store.remove(name) {
        Err(error @ StoreError::NotFound { .. }) => Err(Error::not_found(error.to_string())),
        Err(error @ StoreError::InUse { .. }) => Err(Error::refused(error.to_string())),
        removed => {
            removed?;
            forget_origins(Path::new(DEFAULT_ORIGINS_DIR));
            Ok(())
        }
    }
}

/// What they are of has gone, whatever becomes of them.
fn forget_origins(origins: &Path) {
    if let Err(error) = forget_gone(origins) {
        tracing::warn!(error = %one_line(&error), "records of what has been removed stay");
    }
}

/// How many bytes the store may still get by node.toml, and at most `most`, where somebody says so.
///
/// # Errors
/// node.toml or the store cannot be read.
pub fn most_taken(store: &Store, config: &Path, most: Option<u64>) -> Result<u64> {
    let most = most.unwrap_or(u64::MAX);
    Ok(match quota(config)? {
        Some(quota) => most.min(quota.saturating_sub(bytes_of_all(store)?)),
        None => most,
    })
}

fn quota(config: &Path) -> Result<Option<u64>> {
    let config = NodeConfig::read(config).context("cannot tell how much may be kept")?;
    let gigabytes = config.checkpoints.quota_gigabytes;
    Ok((gigabytes > 0).then(|| gigabytes.saturating_mul(1_000_000_000)))
}

fn bytes_of_all(store: &Store) -> Result<u64> {
    let opened = store.list()?.into_iter().filter_map(|(_, it)| it.ok());
    Ok(opened.fold(0, |sum, it| sum.saturating_add(it.bytes())))
}

/// Refuses a checkpoint of about `bytes` with which the store would be larger than node.toml allows.
///
/// # Errors
/// [`crate::Kind::Refused`]; or node.toml or the store cannot be read.
pub fn check_quota(store: &Store, config: &Path, bytes: u64) -> Result<()> {
    let Some(quota) = quota(config)? else {
        return Ok(());
    };
    let there = bytes_of_all(store)?;
    if there.saturating_add(bytes) <= quota {
        return Ok(());
    }
    let shown = |bytes| crate::timeline::human_bytes(bytes);
    let message = format!(
        "the checkpoints of this node hold {}, this one would add about {}, and {} are allowed \
         (quota-gigabytes under [checkpoints] in node.toml)",
        shown(there),
        shown(bytes),
        shown(quota)
    );
    Err(Error::refused(message).hint("transship prune --max-per-pod 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, created: u64, of: &str) -> Candidate {
        Candidate {
            name: name.into(),
            created,
            of: of.into(),
            bytes: 10,
            in_use: false,
            spent: false,
        }
    }

    fn all() -> Vec<Candidate> {
        vec![
            candidate("a1", 100, "shop/a"),
            candidate("a2", 200, "shop/a"),
            candidate("a3", 300, "shop/a"),
            candidate("b1", 150, "shop/b"),
        ]
    }

    #[test]
    fn a_quota_holds_for_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        let (store, config) = (
            Store::at(dir.path().join("s")),
            dir.path().join("node.toml"),
        );
        assert_eq!(most_taken(&store, &config, None).unwrap(), u64::MAX);
        std::fs::write(&config, "[checkpoints]\nquota-gigabytes = 2\n").unwrap();
        for (flag, most) in [
            (None, 2_000_000_000),
            (Some(7), 7),
            (Some(3 << 40), 2_000_000_000),
        ] {
            assert_eq!(most_taken(&store, &config, flag).unwrap(), most);
        }
        check_quota(&store, &config, 2_000_000_000).unwrap();
        check_quota(&store, &config, 2_000_000_001).unwrap_err();
    }

    #[test]
    fn what_a_power_cut_has_left_goes_with_the_next_prune() {
        use std::os::unix::fs::DirBuilderExt as _;

        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("s"));
        let records = Records {
            run_dir: dir.path().join("run"),
            consumed: dir.path().join("consumed"),
            origins: dir.path().join("origins"),
        };
        let prune = || prune(&store, &records, &Rules::default()).unwrap();
        assert!(prune().is_empty());
        for left in [".new-web.1", ".new-aside.1.0"] {
            let mut private = std::fs::DirBuilder::new();
            let private = private.recursive(true).mode(0o700);
            private.create(store.root().join(left)).unwrap();
            std::fs::write(store.root().join(left).join("file"), "half").unwrap();
        }
        prune();
        assert_eq!(std::fs::read_dir(store.root()).unwrap().count(), 0);
    }

    fn names(due: &[Due]) -> Vec<(&str, &str)> {
        let each = due.iter().map(|it| (it.name.as_str(), it.reason));
        each.collect()
    }

    #[test]
    fn each_rule_takes_the_oldest() {
        let none = Rules::default();
        assert!(judge(all(), &none, 1000).is_empty() && none.is_empty());
        let old = Rules {
            max_age: Some(Duration::from_secs(820)),
            ..none
        };
        assert_eq!(
            names(&judge(all(), &old, 1000)),
            [("a1", TOO_OLD), ("b1", TOO_OLD)]
        );
        let many = Rules {
            max_per_pod: Some(2),
            ..none
        };
        assert_eq!(names(&judge(all(), &many, 1000)), [("a1", TOO_MANY)]);
        let large = Rules {
            max_bytes: Some(25),
            ..none
        };
        assert_eq!(
            names(&judge(all(), &large, 1000)),
            [("a1", TOO_LARGE), ("b1", TOO_LARGE)]
        );
    }

    #[test]
    fn what_was_restored_once_goes_whatever_the_rules() {
        let mut spent = all();
        spent[1].spent = true;
        spent[2].spent = true;
        spent[2].in_use = true;
        let due = judge(spent, &Rules::default(), 1000);
        assert_eq!(names(&due), [("a2", SPENT)]);
    }

    #[test]
    fn one_in_use_stays_and_counts() {
        let mut in_use = all();
        in_use[0].in_use = true;
        let rules = Rules {
            max_age: Some(Duration::from_secs(1)),
            max_per_pod: Some(1),
            max_bytes: Some(5),
        };
        let due = judge(in_use, &rules, 1000);
        assert_eq!(
            names(&due),
            [("b1", TOO_OLD), ("a2", TOO_OLD), ("a3", TOO_OLD)]
        );
        // A clock that was set back makes nothing old.
        assert!(
            judge(
                all(),
                &Rules {
                    max_age: rules.max_age,
                    ..Rules::default()
                },
                0
            )
            .is_empty()
        );
    }
}
