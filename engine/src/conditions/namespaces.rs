//! Namespaces: processes that have left those of the first one, threads that have left those of their process, and those
//! that CRIU cannot restore.
//!
//! ```text
//!  /proc/PID/ns/net                   CRIU looks here alone, and makes all threads alike
//!  /proc/PID/task/TID/ns/net          setns(2), unshare(2) of one thread
//!  /proc/PID/task/TID/ns/pid_for_children, time_for_children     where its next child will be
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::processes::{Processes, Seen};
use super::programs::threads;
use super::{Hit, Subject};
use crate::process_files;

/// All but the mount namespace, of which CRIU knows several, and that of cgroups.
const KINDS: [&str; 6] = ["ipc", "net", "pid", "time", "user", "uts"];
/// What threads of a process have in common unless one has left it.
const OF_THREADS: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
/// Where children will be, and the namespace that is the same unless they will be elsewhere.
const OF_CHILDREN: [(&str, &str); 2] = [("pid_for_children", "pid"), ("time_for_children", "time")];
/// The action of a seccomp profile.
const ASKS_LISTENER: &str = "SCMP_ACT_NOTIFY";
/// System V memory in `/proc/PID/maps`.
const SYSTEM_V: &str = "/SYSV";

pub(super) fn hits(subject: &Subject, processes: &Processes) -> Vec<Hit> {
    let first = namespaces(subject.init);
    let mut hits = Vec::new();
    for seen in &processes.tree {
        let own = namespaces(seen.pid);
        let other = |kind: &&str| own.get(kind).is_some_and(|it| first.get(kind) != Some(it));
        let other: Vec<&str> = KINDS.iter().copied().filter(|kind| other(kind)).collect();
        if !other.is_empty() && !first.is_empty() {
            let other = other.join(", ");
            hits.push(("nested-namespace", format!("{other} of {}", seen.called())));
        }
        let apart = apart(seen);
        hits.extend(apart.map(|kind| {
            let what = format!("{kind} of a thread of {}", seen.called());
            ("nested-namespace", what)
        }));
    }
    let node = |kind| fs::read_link(format!("/proc/self/ns/{kind}")).ok();
    if first
        .get("user")
        .is_some_and(|user| Some(user) != node("user").as_ref())
    {
        hits.push(("user-namespace", String::new()));
    }
    if asks_listener(subject) {
        hits.push(("seccomp-listener", String::new()));
    }
    if first.get("ipc") == node("ipc").as_ref() {
        let attached = processes.tree.iter().filter(|seen| has_system_v(seen));
        hits.extend(attached.map(|seen| ("node-ipc", seen.called())));
    }
    hits
}

/// Whether its seccomp profile has somebody outside decide: a restore installs filters that nobody listens to.
fn asks_listener(subject: &Subject) -> bool {
    let text = |pointer: &str| subject.spec.get(pointer).and_then(Value::as_str);
    let rules = subject.spec.get("/linux/seccomp/syscalls");
    let rules = rules.and_then(Value::as_array).into_iter().flatten();
    let mut actions = rules
        .map(|rule| rule["action"].as_str())
        .chain([text("/linux/seccomp/defaultAction")]);
    actions.any(|action| action == Some(ASKS_LISTENER))
}

/// The kinds of namespaces that a thread of the process has for itself.
fn apart(seen: &Seen) -> impl Iterator<Item = &'static str> {
    let link = |of: &str, kind: &str| fs::read_link(format!("{of}/ns/{kind}")).ok();
    let process = format!("/proc/{}", seen.pid);
    let first = OF_THREADS.map(|kind| (kind, link(&process, kind)));
    let first = move |wanted: &str| {
        let found = first.iter().find(|(kind, _)| *kind == wanted);
        found.and_then(|(_, namespace)| namespace.clone())
    };
    // A kernel without one of them has it of nobody.
    let known: Vec<_> = { OF_CHILDREN.into_iter() }
        .filter(|(kind, _)| link("/proc/self", kind).is_some())
        .collect();
    let mut found = std::collections::BTreeSet::new();
    for thread in threads(seen) {
        let others = OF_THREADS.into_iter().filter(|kind| {
            let own = link(&thread, kind);
            own.is_some() && own != first(kind)
        });
        found.extend(others);
        // That of processes has none to show before the first of them is there; nor has a thread that has ended, which has
        // no others either.
        let of_children = known.iter().filter(|(kind, same)| {
            let own = link(&thread, kind);
            own != first(same) && link(&thread, same).is_some() && link(&thread, "uts").is_some()
        });
        found.extend(of_children.map(|(kind, _)| *kind));
    }
    found.into_iter()
}

fn namespaces(pid: u32) -> BTreeMap<&'static str, PathBuf> {
    // One that has ended meanwhile is in none.
    let link = |kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    KINDS
        .into_iter()
        .filter_map(|kind| Some((kind, link(kind)?)))
        .collect()
}

fn has_system_v(seen: &Seen) -> bool {
    use procfs::process::MMapPath;
    let mut maps = process_files::maps(seen.pid).into_iter().flatten();
    maps.any(|map| match &map.pathname {
        MMapPath::Vsys(_) => true,
        MMapPath::Path(path) => path.to_string_lossy().starts_with(SYSTEM_V),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::criu_options::CriuOptions;
    use transship_checkpoint::spec::Spec;

    use super::*;

    #[test]
    fn a_profile_with_a_listener_is_known() {
        let asks = |spec: &str| {
            asks_listener(&Subject {
                id: String::new(),
                init: 1,
                pids: Vec::new(),
                spec: Spec::parse(spec.as_bytes()).unwrap(),
                criu: CriuOptions::default(),
            })
        };
        let profile = |action: &str| {
            format!(
                r#"{{"linux":{{"seccomp":{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                {{"names":["mount"],"action":"{action}"}}]}}}}}}"#
            )
        };
        assert!(asks(&profile("SCMP_ACT_NOTIFY")));
        assert!(!asks(&profile("SCMP_ACT_ALLOW")) && !asks("{}"));
    }

    #[test]
    fn what_has_ended_is_in_no_other_namespace() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let is_dead = || {
            let stat = procfs::process::Process::new(child.id().cast_signed());
            stat.unwrap().stat().unwrap().state == 'Z'
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !is_dead() {
            assert!(std::time::Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
        let processes = Processes::read(child.id(), &[]);
        assert_eq!(processes.tree.len(), 1);
        let found: Vec<_> = apart(&processes.tree[0]).collect();
        child.wait().unwrap();
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn root_a_process_in_another_namespace_is_named() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let script = "unshare --uts sleep 1000 & echo; wait";
        let mut shell = std::process::Command::new("sh")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let init = shell.id();
        let subject = Subject {
            id: String::new(),
            init,
            pids: Vec::new(),
            spec: Spec::parse(b"{}").unwrap(),
            criu: CriuOptions::default(),
        };
        let children = format!("/proc/{init}/task/{init}/children");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let (child, hits) = loop {
            let text = fs::read_to_string(&children).unwrap();
            let child = text
                .split_whitespace()
                .next()
                .map(|it| it.parse::<u32>().unwrap());
            // Between the looks at the process and at its thread it may be between two namespaces: asked
            // is the program that `unshare` has become.
            let is_asleep = |pid| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm"));
                name.is_ok_and(|name| name.trim_end() == "sleep")
            };
            if let Some(child) = child.filter(|pid| is_asleep(*pid)) {
                let hits = hits(&subject, &Processes::read(init, &[init, child]));
                if !hits.is_empty() {
                    break (child, hits);
                }
            }
            assert!(
                std::time::Instant::now() < deadline,
                "no child in another namespace"
            );
            std::thread::yield_now();
        };
        let kill = |pid: u32| {
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        };
        kill(child);
        shell.wait().unwrap();
        assert_eq!(hits.len(), 1, "{hits:?}");
        assert_eq!(hits[0].0, "nested-namespace");
        assert!(
            hits[0].1.starts_with(&format!("uts of {child} (")),
            "{hits:?}"
        );
    }
}
