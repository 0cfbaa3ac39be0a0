//! What keeps a running container from being moved, seen in `/proc` before anything is frozen: all of
//! it at once.
//!
//! ```text
//!  Subject (spec, options, process ids)
//!     |--> processes: /proc/PID of the container's own tree, read once, with a bound
//!     |       |--> open_files, devices   what descriptors are of, and which have lost their names
//!     |       |--> sockets               kinds, connections;  outside_sockets, unix_backlog --> sock_diag
//!     |       |--> network_lock          whether CRIU can dump them here, and lock their network
//!     |       |--> watches               inotify on the overlay --> paths that CRIU is to look at
//!     |       |--> descriptors           what fdinfo tells of them;  epoll_targets: of an epoll
//!     |       |--> file_places           the mounts of open files, and whether they are seen
//!     |       |--> programs, memory       what they have set for themselves and CRIU does not restore
//!     |       |--> task_state             the same of single threads, and how processes were made
//!     |       |--> netlink_sockets       what waits in them, and their groups --> netlink
//!     |       |--> message_queues, namespaces, privileges, sessions, keyring, multicast, socket_modes, code_room
//!     |       `--> needs                 counted, to be compared with another node
//!     `--> mounts, read_only_root
//!            `--> (name of a condition, on what) --> Found, by the table of transship-checkpoint
//! ```
//!
//! A probe says what is there, never what to do: text and remedy are the table's. Only what CRIU is
//! known to refuse is told of; what is not seen here, CRIU says itself.

use std::collections::BTreeMap;
use std::time::Duration;

use transship_checkpoint::conditions::{CONDITIONS, Condition, Effect};
use transship_checkpoint::criu_options::{ConfigLine, CriuOptions, Losses};
use transship_checkpoint::spec::Spec;

use crate::error::Result;

mod code_room;
mod descriptors;
mod devices;
mod epoll_targets;
mod file_places;
mod keyring;
mod memory;
mod message_queues;
mod mounts;
mod multicast;
mod namespaces;
mod needs;
mod netlink;
mod netlink_sockets;
mod network_lock;
mod network_rules;
mod open_files;
mod outside_sockets;
mod privileges;
mod processes;
mod programs;
mod read_only_root;
mod sessions;
pub(crate) mod sock_diag;
mod socket_modes;
mod sockets;
mod task_state;
mod unix_backlog;
mod watches;

pub use needs::Needs;
pub(crate) use network_lock::way_to_lock;
pub(crate) use processes::Processes;
pub(crate) use sockets::protocol;
pub(crate) use watches::{paths_of_inodes, watched_inodes};

/// The most things of one kind that are named.
const NAMED: usize = 4;
/// Conditions that come and go: connections, and what a look into `/proc` opens for a moment.
const PASSING: [&str; 10] = [
    EXEC,
    "file-locks",
    "tcp",
    "in-flight",
    "unix-backlog",
    "thread-file",
    "privileged-file",
    "udp-cork",
    "netlink-data",
    // A descriptor that goes from one process to another is in neither while they are looked at one after the other.
    "epoll-target",
];
/// What runs beside the container's own processes: a probe of kubelet, or somebody's shell.
const EXEC: &str = "exec";
/// How long what may be about to end is given for it: probes longer than connections.
const MOMENTS: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_millis(1200),
];

/// The container that is looked at.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its id.
    pub id: String,
    /// Its first process.
    pub init: u32,
    /// All processes of its cgroup.
    pub pids: Vec<u32>,
    /// Its OCI spec.
    pub spec: Spec,
    /// What CRIU would be told.
    pub criu: CriuOptions,
}

/// One condition that the container is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub condition: &'static Condition,
    /// What of the container is in it; may be empty.
    pub on: Vec<String>,
    /// Whether somebody has said that this may be lost.
    pub allowed: bool,
}

/// What a look has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// In the order of the table.
    pub found: Vec<Found>,
    /// What CRIU must be told to find the files that are watched.
    pub watched: Vec<ConfigLine>,
    /// What it needs of a node.
    pub needs: Needs,
}

/// The name of a condition, and what is in it.
type Hit = (&'static str, String);

impl Found {
    /// One that is not seen in `/proc`.
    pub fn new(name: &str, on: impl IntoIterator<Item = String>) -> Self {
        Self {
            condition: Condition::named(name),
            on: on.into_iter().collect(),
            allowed: false,
        }
    }

    /// What is so, and on what.
    pub fn text(&self) -> String {
        let what = self.condition.what;
        match self.on.as_slice() {
            [] => what.to_owned(),
            on if on.len() <= NAMED => format!("{what} ({})", on.join(", ")),
            on => {
                let more = on.len() - NAMED;
                format!("{what} ({} and {more} more)", on[..NAMED].join(", "))
            }
        }
    }

    /// Whether the container cannot be moved so.
    pub fn hinders(&self) -> bool {
        match self.condition.effect {
            Effect::NoDump | Effect::NoRestore => true,
            Effect::Changes => !self.allowed,
            Effect::Loses => false,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        let Condition { name, remedy, .. } = self.condition;
        match self.condition.effect == Effect::Changes && !self.allowed {
            true => format!("{remedy}; or let that be lost (--allow-lost {name})"),
            false => (*remedy).to_owned(),
        }
    }

    /// What is so, and what to do about it.
    pub fn line(&self) -> String {
        format!("{}: {}", self.text(), self.remedy())
    }
}

/// Looks at a running container.
///
/// # Errors
/// A thread panicked. What cannot be read is not told of.
pub async fn look(subject: &Subject) -> Result<Findings> {
    let mut findings = look_once(subject).await?;
    // As those of probes.
    let mut names = &PASSING[..];
    for moment in MOMENTS {
        let passing = |found: &Found| names.contains(&found.condition.name);
        if !findings.found.iter().any(passing) {
            break;
        }
        tokio::time::sleep(moment).await;
        let again = subject.clone();
        let again = tokio::task::spawn_blocking(move || passing_of(&again)).await?;
        findings.found.retain_mut(|found| {
            let still = again.iter().find(|it| it.condition == found.condition);
            if passing(found) {
                found
                    .on
                    .retain(|on| still.is_some_and(|still| still.on.contains(on)));
            }
            !passing(found) || !found.on.is_empty()
        });
        names = &[EXEC];
    }
    Ok(findings)
}

/// What CRIU would restore as something else, and nobody has allowed, or would dump for no restore: of frozen processes,
/// which have run on since they were looked at. What takes long to ask, their memory, is left out.
///
/// # Errors
/// A thread panicked.
pub(crate) async fn changes_of_frozen(subject: Subject) -> Result<Vec<Found>> {
    let mut found = tokio::task::spawn_blocking(move || {
        let processes = Processes::read(subject.init, &subject.pids);
        let owned = sockets::owned(&processes);
        let mut hits = descriptors::hits(&processes);
        hits.extend(open_files::hits(&subject, &processes));
        hits.extend(open_files::privileged(&processes));
        hits.extend(privileges::lasting_exec(&processes));
        hits.extend(programs::hits(&processes));
        hits.extend(task_state::hits(subject.init, &processes));
        hits.extend(multicast::hits(&subject, &owned));
        hits.extend(socket_modes::hits(&processes));
        hits.extend(keyring::hits(&subject));
        grouped(hits, &subject.criu.allow_lost)
    })
    .await?;
    // What CRIU refuses it says itself.
    let goes_untold = |effect| matches!(effect, Effect::Changes | Effect::NoRestore);
    found.retain(|it| goes_untold(it.condition.effect) && it.hinders());
    Ok(found)
}

async fn look_once(subject: &Subject) -> Result<Findings> {
    let subject = subject.clone();
    Ok(tokio::task::spawn_blocking(move || look_at(&subject)).await?)
}

/// What is in conditions that come and go.
fn passing_of(subject: &Subject) -> Vec<Found> {
    let processes = Processes::read(subject.init, &subject.pids);
    let owned = sockets::owned(&processes);
    let mut hits = sockets::hits(subject, &owned);
    hits.extend(open_files::privileged(&processes));
    hits.extend(descriptors::hits(&processes));
    hits.extend(descriptors::locks(subject, &processes));
    hits.extend(privileges::exec(&processes));
    hits.extend(epoll_targets::hits(&processes));
    hits.extend(socket_modes::corked(&processes));
    hits.extend(netlink_sockets::hits(subject.init, &owned));
    hits.extend(unix_backlog::hits(
        &owned,
        &sock_diag::unix_sockets(subject.init),
    ));
    grouped(hits, &subject.criu.allow_lost)
}

fn look_at(subject: &Subject) -> Findings {
    let processes = Processes::read(subject.init, &subject.pids);
    let mut hits = open_files::hits(subject, &processes);
    hits.extend(processes.unseen());
    hits.extend(open_files::privileged(&processes));
    hits.extend(devices::hits(&processes));
    hits.extend(descriptors::hits(&processes));
    hits.extend(descriptors::locks(subject, &processes));
    hits.extend(epoll_targets::hits(&processes));
    hits.extend(file_places::hits(subject, &processes));
    hits.extend(sessions::hits(subject, &processes));
    hits.extend(programs::hits(&processes));
    hits.extend(task_state::hits(subject.init, &processes));
    hits.extend(memory::hits(&processes));
    hits.extend(keyring::hits(subject));
    let owned = sockets::owned(&processes);
    hits.extend(sockets::hits(subject, &owned));
    hits.extend(network_lock::hits(subject, &owned));
    let unix = match owned.is_empty() {
        true => BTreeMap::new(),
        false => sock_diag::unix_sockets(subject.init),
    };
    hits.extend(outside_sockets::hits(subject, &owned, &unix));
    hits.extend(unix_backlog::hits(&owned, &unix));
    hits.extend(multicast::hits(subject, &owned));
    hits.extend(network_rules::hits(subject));
    hits.extend(socket_modes::hits(&processes));
    hits.extend(socket_modes::corked(&processes));
    hits.extend(netlink_sockets::hits(subject.init, &owned));
    hits.extend(message_queues::hits(&processes));
    hits.extend(namespaces::hits(subject, &processes));
    hits.extend(privileges::hits(&processes));
    hits.extend(privileges::exec(&processes));
    hits.extend(code_room::hits(&processes));
    hits.extend(mounts::hits(subject));
    hits.extend(read_only_root::hits(&subject.spec));
    let (watched, lost) = watches::find(subject, &processes);
    hits.extend(lost);
    Findings {
        found: grouped(hits, &subject.criu.allow_lost),
        watched,
        needs: needs::of(&subject.spec, &processes),
    }
}

/// One `Found` for each condition, in the order of the table, naming each thing once.
fn grouped(hits: Vec<Hit>, may_be_lost: &Losses) -> Vec<Found> {
    let of = |condition: &'static Condition| {
        let mine = hits.iter().filter(|(name, _)| *name == condition.name);
        let mut on: Vec<String> = mine.map(|(_, on)| on.clone()).collect();
        let there = !on.is_empty();
        on.retain(|on| !on.is_empty());
        let mut seen = std::collections::BTreeSet::new();
        on.retain(|on| seen.insert(on.clone()));
        let allowed = may_be_lost.contain(condition.name);
        there.then_some(Found {
            condition,
            on,
            allowed,
        })
    };
    CONDITIONS.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_is_told_once_in_the_order_of_the_table() {
        let hits = vec![
            ("tcp", "a".to_owned()),
            ("mptcp", "7 (x)".to_owned()),
            ("tcp", "b".to_owned()),
            ("tcp", "a".to_owned()),
            ("exec", String::new()),
            ("personality", String::new()),
            ("multicast", String::new()),
        ];
        let found = grouped(hits, &"multicast".parse().unwrap());
        let lines: Vec<String> = found.iter().map(Found::text).collect();
        assert_eq!(lines.len(), 5, "{lines:?}");
        assert!(lines[0].contains("Multipath") && lines[0].ends_with("(7 (x))"));
        assert_eq!(lines[1], "it has TCP connections (a, b)");
        assert!(found[2].hinders() && !lines[2].contains("(x"), "{lines:?}");
        assert!(found[3].hinders() && found[3].line().ends_with("(--allow-lost personality)"));
        assert!(!found[4].hinders() && !found[4].line().contains("--allow-lost"));
    }

    #[test]
    fn of_many_some_are_named() {
        let on = (0..9).map(|at| at.to_string());
        let text = Found::new("tcp", on).text();
        assert_eq!(text, "it has TCP connections (0, 1, 2, 3 and 5 more)");
    }

    fn frozen(init: u32) -> Subject {
        Subject {
            id: String::new(),
            init,
            pids: Vec::new(),
            spec: Spec::parse(b"{}").unwrap(),
            criu: CriuOptions::default(),
        }
    }

    /// What is found as soon as the program has come so far.
    async fn first_of_frozen(subject: &Subject) -> Vec<Found> {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            let found = changes_of_frozen(subject.clone()).await.unwrap();
            if !found.is_empty() || std::time::Instant::now() > deadline {
                return found;
            }
        }
    }

    #[tokio::test]
    async fn a_change_is_seen_in_the_freeze_unless_it_may_be() {
        let mut child = std::process::Command::new("setarch")
            .args(["-R", "sleep", "1000"])
            .spawn()
            .unwrap();
        let mut subject = frozen(child.id());
        let found = first_of_frozen(&subject).await;
        subject.criu.allow_lost = "personality".parse().unwrap();
        let allowed = changes_of_frozen(subject).await.unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let names: Vec<_> = found.iter().map(|it| it.condition.name).collect();
        assert_eq!(names, ["personality"]);
        assert!(allowed.is_empty(), "{allowed:?}");
    }

    #[tokio::test]
    async fn what_no_restore_can_use_is_seen_in_the_freeze() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "exec 5</proc/self; exec sleep 1000"])
            .spawn()
            .unwrap();
        let subject = frozen(child.id());
        let found = first_of_frozen(&subject).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let names: Vec<_> = found.iter().map(|it| it.condition.name).collect();
        assert_eq!(names, ["thread-file"]);
    }

    #[tokio::test]
    async fn a_program_without_oddities_is_clean() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id();
        let subject = Subject {
            id: String::new(),
            init: pid,
            pids: vec![pid],
            spec: Spec::parse(b"{}").unwrap(),
            criu: CriuOptions::default(),
        };
        let findings = look(&subject).await.unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let hinders: Vec<_> = findings.found.iter().filter(|it| it.hinders()).collect();
        // Where it runs, the mounts, the user, the session and its terminal are those of the caller.
        let own = [
            "hook-mount",
            "node-mount",
            "rlimit",
            "outside-session",
            "outside-socket",
            "tcp",
            "device",
        ];
        assert!(
            hinders.iter().all(|it| own.contains(&it.condition.name)),
            "{hinders:?}"
        );
    }
}
