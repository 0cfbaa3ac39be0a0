//! CRIU's images.
//!
//! Of one kind alone: the file as it is. Of a whole dump:
//!
//! ```text
//! dump := file*        file := length of the name:u8  name  length:u32le  bytes
//! ```
//!
//! Its file `spec.json` is the spec of the container that it is restored into.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use transship_checkpoint::criu_images::ipcns::{self, IpcKind, IpcObject};
use transship_checkpoint::criu_images::memory_apart::MemoryApart;
use transship_checkpoint::criu_images::threads::{TASK_DEAD, Thread, ThreadEdit};
use transship_checkpoint::criu_images::{
    ImageError, cgroups, inet_sockets, inventory, ipc_sysctls, mounts, named_files, open_files,
    packet_rules, pipe_data, posix_timers, regular_files, seccomp, shm_mappings, tasks, terminals,
    threads, timers, unix_sockets, user_namespace, utsns,
};
use transship_checkpoint::criu_log;
use transship_checkpoint::spec::Spec;
use transship_sandbox::admission::{Allowance, Environment, Restored, compare};

use crate::scratch::Scratch;

/// Bytes of a page of the machine that was dumped.
const PAGE: u64 = 4096;
const SPEC: &str = "spec.json";
/// Of a container that may do less than any that was dumped.
const WEAK_SPEC: &str = include_str!("weak_spec.json");
/// `SECCOMP_MODE_FILTER`.
const FILTERS: u32 = 2;
/// Limits of the node, of which no dump has more.
const HARD_LIMITS: [u64; 16] = [u64::MAX; 16];

fn alone(name: &str, data: &[u8], read: impl FnOnce(&Path)) {
    let scratch = Scratch::new();
    let dir = scratch.dir();
    fs::write(dir.join(name), data).expect("it is new");
    read(&dir);
    scratch.check();
}

/// `core-<tid>.img`. What is imposed on a thread is there afterwards.
pub(crate) fn core(data: &[u8]) {
    alone("core-7.img", data, |dir| {
        let _ids = tasks::ids(dir);
        let _stopped = tasks::stopped(dir);
        let _translated = posix_timers::translate_threads(dir, |pid, _| pid.checked_sub(1));
        let _set = posix_timers::set_left(dir, |timer| timer.left.checked_sub(timer.period));
        let Some(thread) = threads::threads(dir).ok().and_then(|mut all| all.pop()) else {
            return;
        };
        if thread
            .task
            .as_ref()
            .is_some_and(|task| task.state == TASK_DEAD)
        {
            return;
        }
        let edit = ThreadEdit {
            no_new_privileges: true,
            bounding: Some(thread.creds.bounding & 0xff),
            inheritable: Some(0),
            seccomp_filter: Some(0),
            lsm_profile: Some("weaker".to_owned()),
            oom_score_adj: thread.task.as_ref().map(|_| 700),
            rlimits: thread.task.as_ref().map(|_| vec![(1, 2); 16]),
            no_login: thread.task.is_some(),
        };
        threads::edit(dir, 7, &edit).expect("it could be read");
        let edited = threads::threads(dir).expect("what was edited can be read");
        let mut wanted = thread;
        wanted.creds.no_new_privileges = true;
        wanted.creds.bounding &= 0xff;
        wanted.creds.inheritable = 0;
        wanted.creds.lsm_profile = edit.lsm_profile;
        wanted.seccomp_mode = FILTERS;
        wanted.seccomp_filter = Some(0);
        if let Some(task) = &mut wanted.task {
            task.login = None;
            task.oom_score_adj = edit.oom_score_adj;
            task.rlimits = vec![(1, 2); 16];
        }
        assert_eq!(edited, [wanted]);
    });
}

/// `files.img`.
pub(crate) fn files(data: &[u8]) {
    alone("files.img", data, |dir| {
        let _connections = inet_sockets::connections(dir);
        let before = open_files::privileged(dir).ok();
        let _named = named_files::named_files(dir);
        let _terminals = terminals::terminals(dir);
        let clock = timers::WallClock {
            frozen_at: 0,
            now: 1 << 40,
        };
        let _corrected = timers::correct(dir, clock, |id| Some(id.into()));
        let moved = |name: &str| {
            let found = regular_files::FoundFile {
                name: format!("/other{name}"),
                size: 5,
                mode: 0o100_644,
            };
            Ok::<_, ImageError>(Some(found))
        };
        if regular_files::find_again(dir, moved).is_ok() {
            let mut names = Vec::new();
            let again = regular_files::find_again(dir, |name| {
                names.push(name.to_owned());
                Ok::<_, ImageError>(None)
            });
            again.expect("what was edited can be read");
            assert!(
                names.iter().all(|name| name.starts_with("/other")),
                "{names:?}"
            );
        }
        if unix_sockets::rename(dir, |_, _| Some(b"/renamed".to_vec())).is_ok() {
            let again = unix_sockets::rename(dir, |_, path| {
                assert_eq!(path, b"/renamed");
                None
            });
            again.expect("what was edited can be read");
        }
        let after = open_files::privileged(dir).ok();
        assert_eq!(before, after, "an edit has changed what is open");
    });
}

/// The rules of a network, for `nft` and for `iptables-restore`.
pub(crate) fn packet_rules(data: &[u8]) {
    for name in ["nftables-7.img", "iptables-7.img"] {
        alone(name, data, |dir| {
            if packet_rules::has_rules(dir, &BTreeSet::new()).is_ok() {
                assert!(!data.contains(&0), "the tools read to different ends");
            }
        });
    }
}

/// `pipes-data.img`, which may be of any size.
pub(crate) fn pipes_data(data: &[u8]) {
    alone("pipes-data.img", data, |dir| {
        let _largest = pipe_data::largest_pipe(dir);
    });
}

/// `mm-<pid>.img`, whose attached segments are all in the sandbox.
pub(crate) fn mm(data: &[u8]) {
    alone("mm-7.img", data, |dir| {
        let present: Vec<IpcObject> = (0..64).map(segment).collect();
        if shm_mappings::detach(dir, &present).is_ok() {
            let again = shm_mappings::detach(dir, &present);
            assert_eq!(
                again.expect("what was edited can be read"),
                [],
                "attached still"
            );
        }
    });
}

fn segment(id: u32) -> IpcObject {
    IpcObject {
        kind: IpcKind::Shm,
        id,
        key: 0,
    }
}

/// `utsns-<n>.img`.
pub(crate) fn utsns(data: &[u8]) {
    alone("utsns-9.img", data, |dir| {
        let names = utsns::UtsNames {
            node: "sandbox".to_owned(),
            domain: "(none)".to_owned(),
        };
        if utsns::set_names(dir, &names).is_ok() {
            let found = utsns::names(dir).expect("what was written can be read");
            assert_eq!(found, Some(names));
        }
    });
}

/// `ipcns-var-<n>.img`.
pub(crate) fn ipcns_var(data: &[u8]) {
    alone("ipcns-var-9.img", data, |dir| {
        let live = ipc_sysctls::NAMES
            .into_iter()
            .map(|name| (name, vec![7; 4]))
            .collect();
        if ipc_sysctls::set_sysctls(dir, &live).is_ok() {
            ipc_sysctls::set_sysctls(dir, &live).expect("what was written can be read");
        }
    });
}

fn ipc_objects(name: &str, data: &[u8]) {
    alone(name, data, |dir| {
        let Ok(objects) = ipcns::objects(dir) else {
            return;
        };
        let (gone, kept) = objects.split_at(objects.len() / 2);
        ipcns::remove_objects(dir, gone).expect("they could be read");
        let left = ipcns::objects(dir).expect("what was written can be read");
        let wanted: Vec<_> = kept
            .iter()
            .filter(|it| !gone.contains(it))
            .cloned()
            .collect();
        assert_eq!(left, wanted);
    });
}

/// `ipcns-shm-<n>.img`.
pub(crate) fn ipcns_shm(data: &[u8]) {
    ipc_objects("ipcns-shm-9.img", data);
}

/// `ipcns-msg-<n>.img`.
pub(crate) fn ipcns_msg(data: &[u8]) {
    ipc_objects("ipcns-msg-9.img", data);
}

/// `ipcns-sem-<n>.img`.
pub(crate) fn ipcns_sem(data: &[u8]) {
    ipc_objects("ipcns-sem-9.img", data);
}

/// `pstree.img`.
pub(crate) fn pstree(data: &[u8]) {
    alone("pstree.img", data, |dir| drop(threads::processes(dir)));
}

/// `ids-<pid>.img`, of the only process.
pub(crate) fn ids(data: &[u8]) {
    alone("ids-1.img", data, |dir| {
        // pid 1, ppid 0, pgid 1, sid 1, threads 1.
        let process =
            b"\x19\x43\x56\x54\x30\x30\x27\x50\x0a\0\0\0\x08\x01\x10\0\x18\x01\x20\x01\x28\x01";
        fs::write(dir.join("pstree.img"), process).expect("it is new");
        drop(threads::processes(dir));
    });
}

/// `inventory.img`.
pub(crate) fn inventory(data: &[u8]) {
    alone("inventory.img", data, |dir| drop(inventory::read(dir)));
}

/// `mountpoints-<n>.img`.
pub(crate) fn mountpoints(data: &[u8]) {
    alone("mountpoints-12.img", data, |dir| {
        let Ok(before) = mounts::mounts(dir) else {
            return;
        };
        let new = ["/data", "/data/below"].map(|destination| mounts::NewMount {
            key: destination.to_owned(),
            destination: destination.to_owned(),
            flags: 1,
        });
        mounts::add(dir, &new).expect("there is one table");
        let after = mounts::mounts(dir).expect("what was written can be read");
        assert!(after[0].starts_with(&before[0]), "what was there is there");
        let added = after[0][before[0].len()..].iter();
        assert!(
            added
                .map(|it| it.destination.as_str())
                .eq(["/data", "/data/below"])
        );
    });
}

/// `seccomp.img`.
pub(crate) fn seccomp(data: &[u8]) {
    alone("seccomp.img", data, |dir| {
        let Ok(filters) = seccomp::filters(dir) else {
            return;
        };
        seccomp::write_filters(dir, &filters).expect("the directory can be written to");
        assert_eq!(
            seccomp::filters(dir).expect("what was written can be read"),
            filters
        );
    });
}

/// `cgroup.img`.
pub(crate) fn cgroup(data: &[u8]) {
    alone("cgroup.img", data, |dir| drop(cgroups::read(dir)));
}

/// `userns-<n>.img`.
pub(crate) fn userns(data: &[u8]) {
    alone("userns-10.img", data, |dir| {
        drop(user_namespace::mappings(dir));
    });
}

/// What CRIU logs, which has words of the container in it.
pub(crate) fn log(data: &[u8]) {
    let _reason = criu_log::first_error(&String::from_utf8_lossy(data));
}

/// A whole dump. What is admitted is, with what was imposed, no more than the spec allows.
pub(crate) fn dump(data: &[u8]) {
    let scratch = Scratch::new();
    let dir = scratch.dir();
    let mut spec = Spec::parse(WEAK_SPEC.as_bytes()).expect("it is a spec");
    for (name, bytes) in unpack(data) {
        match name {
            SPEC => spec = Spec::parse(bytes).unwrap_or(spec),
            // The last one of a name counts.
            name => fs::write(dir.join(name), bytes).expect("its name is plain"),
        }
    }
    let allowed = Allowance::of(&spec, &Path::to_path_buf);
    let here = Environment {
        machine: "x86_64".to_owned(),
        hard_limits: HARD_LIMITS.to_vec(),
        present: allowed
            .masked
            .iter()
            .chain(&allowed.read_only)
            .cloned()
            .collect(),
        lsm: Some("apparmor"),
        ..Environment::default()
    };
    if let Ok(Some(apart)) = MemoryApart::take(&dir, PAGE) {
        let again = MemoryApart::take(&dir, PAGE).expect("what was left can be read");
        assert!(again.is_none(), "{apart:?} was left");
    }
    let Ok(restored) = Restored::read(&dir) else {
        return;
    };
    let admission = compare(&restored, None, &allowed, &here);
    if admission.check().is_err() {
        return;
    }
    admission.apply(&dir).expect("the images could be read");
    scratch.check();
    let edited = Restored::read(&dir).expect("what was edited can be read");
    let is_filtered =
        |thread: &Thread| thread.seccomp_mode == FILTERS && thread.seccomp_filter.is_some();
    let lives = |thread: &&Thread| {
        thread
            .task
            .as_ref()
            .is_none_or(|task| task.state != TASK_DEAD)
    };
    if allowed.seccomp.is_some() {
        assert!(
            edited.threads.iter().filter(lives).all(is_filtered),
            "a thread without a filter"
        );
    }
    let but_filters = Allowance {
        seccomp: None,
        ..allowed
    };
    let second = compare(&edited, None, &but_filters, &here);
    assert!(second.refusals.is_empty(), "{:?}", second.refusals);
    assert!(!second.has_edits(), "{:?}", second.edits);
}

/// The files of a packed dump whose names are plain.
fn unpack(mut data: &[u8]) -> Vec<(&str, &[u8])> {
    let mut files = Vec::new();
    while let Some((name, rest)) = data
        .split_first()
        .and_then(|(len, rest)| rest.split_at_checked((*len).into()))
    {
        let Some((len, rest)) = rest.split_first_chunk() else {
            break;
        };
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let (bytes, rest) = rest.split_at(len.min(rest.len()));
        data = rest;
        let name = std::str::from_utf8(name).unwrap_or_default();
        if !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) {
            files.push((name, bytes));
        }
    }
    files
}
