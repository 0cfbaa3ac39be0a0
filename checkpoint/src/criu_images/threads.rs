//! `core-<tid>.img` of every thread: whose it is and what it may do; `pstree.img`: which threads make up
//! a process; `ids-<pid>.img`: which namespaces it has.
//!
//! ```text
//! core_entry            3 tc           of the first thread of a process
//!                       5 thread_core
//!   task_core_entry     1 task_state   7 timers    8 rlimits   11, 12 seccomp of CRIU before 3.12
//!                       13 loginuid    14 oom_score_adj
//!   task_timers_entry   4 posix        its 2 clock_id
//!   thread_core_entry   3 sched_nice   4 sched_policy   10 creds   11 seccomp_mode   12 seccomp_filter
//!   creds_entry         1..8 ids   9 cap_inh  10 cap_prm  11 cap_eff  12 cap_bnd  13 secbits
//!                       14 groups  15 lsm_profile  18 no_new_privs  19 cap_amb
//! pstree_entry          1 pid   2 ppid   5 threads
//! task_kobj_ids_entry   5..12 namespaces; a process without has those of its parent
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use super::strict::{edit_submessage, is_ambiguous, set_varints, submessage};
use super::{Image, ImageError, Kind, list, push_bytes, shown};

const TC: u64 = 3;
const THREAD_CORE: u64 = 5;
const OOM_SCORE_ADJ: u64 = 14;
const RLIMITS: u64 = 8;
const TIMERS: u64 = 7;
const LOGIN_UID: u64 = 13;
const CREDS: u64 = 10;
const SECCOMP_MODE: u64 = 11;
const SECCOMP_FILTER: u64 = 12;
const CAP_INH: u64 = 9;
const CAP_BND: u64 = 12;
const LSM_PROFILE: u64 = 15;
const NO_NEW_PRIVS: u64 = 18;
/// Those of `creds_entry` that are lists: the capabilities and the groups.
const REPEATED_CREDS: &[u64] = &[9, 10, 11, 12, 14, 19];
/// Signal actions.
const REPEATED_TC: &[u64] = &[15];

/// `SECCOMP_MODE_FILTER`.
pub const SECCOMP_FILTER_MODE: u32 = 2;
/// `CLOCK_REALTIME_ALARM` and `CLOCK_BOOTTIME_ALARM`, whose timers wake a node that sleeps.
const ALARM_CLOCKS: [u32; 2] = [8, 9];
/// Of a process that no login has made.
const NO_LOGIN: u32 = u32::MAX;
/// `COMPEL_TASK_ALIVE`: it runs.
pub const TASK_ALIVE: u32 = 1;
/// `COMPEL_TASK_STOPPED`: it is to be stopped by SIGSTOP.
pub const TASK_STOPPED: u32 = 3;
/// `COMPEL_TASK_DEAD`: a zombie, of which there is no more than an exit code.
pub const TASK_DEAD: u32 = 2;

/// The namespaces of a task, by the names that an OCI spec has for them.
pub type NamespaceIds = BTreeMap<&'static str, u32>;

/// What a thread will be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Thread {
    /// Its id in the container.
    pub tid: u32,
    /// Name of the program, as far as it is known.
    pub comm: String,
    /// Whose it is and what it may do.
    pub creds: Creds,
    /// `SECCOMP_MODE_*`.
    pub seccomp_mode: u32,
    /// The first filter of its chain in `seccomp.img`.
    pub seccomp_filter: Option<u32>,
    /// `SCHED_*`.
    pub policy: u32,
    /// Nice value.
    pub nice: i32,
    /// What its process has; `None` for the other threads of a process.
    pub task: Option<Task>,
}

/// What a process has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// `COMPEL_TASK_*`.
    pub state: u32,
    /// Soft and hard limits, by the number of the resource.
    pub rlimits: Vec<(u64, u64)>,
    /// `oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// Whether it has a timer that wakes the node.
    pub has_alarm: bool,
    /// Who has logged in, as the audit log of the node names it; none where nobody has.
    pub login: Option<u32>,
}

/// Credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Creds {
    /// Real, effective, saved and file system user id.
    pub uids: [u32; 4],
    /// The same of the group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capabilities that an executed file can let through.
    pub inheritable: u64,
    /// Capabilities that it can use.
    pub permitted: u64,
    /// Capabilities that it uses.
    pub effective: u64,
    /// Capabilities that it can gain by executing a file.
    pub bounding: u64,
    /// Capabilities that it keeps when it executes a file.
    pub ambient: u64,
    /// `SECBIT_*`.
    pub securebits: u32,
    /// Whether executing a file gains nothing.
    pub no_new_privileges: bool,
    /// Label or profile of the LSM.
    pub lsm_profile: Option<String>,
}

/// What is changed of a thread before CRIU reads it; `None` leaves it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThreadEdit {
    /// Sets `no_new_privs`.
    pub no_new_privileges: bool,
    /// The capabilities that it can gain.
    pub bounding: Option<u64>,
    /// The capabilities that an executed file can let through.
    pub inheritable: Option<u64>,
    /// The first filter of its chain; the mode is that of filters then.
    pub seccomp_filter: Option<u32>,
    /// The label or profile of the LSM.
    pub lsm_profile: Option<String>,
    /// Its `oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// Its limits, by the number of the resource.
    pub rlimits: Option<Vec<(u64, u64)>>,
    /// Nobody has logged in.
    pub no_login: bool,
}

impl ThreadEdit {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "3")]
    tc: Option<TaskCoreEntry>,
    #[prost(message, optional, tag = "5")]
    thread_core: Option<ThreadCoreEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TaskCoreEntry {
    #[prost(uint32, required, tag = "1")]
    task_state: u32,
    #[prost(bytes = "vec", required, tag = "6")]
    comm: Vec<u8>,
    #[prost(message, optional, tag = "7")]
    timers: Option<TaskTimersEntry>,
    #[prost(message, optional, tag = "8")]
    rlimits: Option<TaskRlimitsEntry>,
    #[prost(uint32, optional, tag = "11")]
    old_seccomp_mode: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    old_seccomp_filter: Option<u32>,
    #[prost(uint32, optional, tag = "13")]
    loginuid: Option<u32>,
    #[prost(int32, optional, tag = "14")]
    oom_score_adj: Option<i32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TaskTimersEntry {
    #[prost(message, repeated, tag = "4")]
    posix: Vec<PosixTimerEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct PosixTimerEntry {
    #[prost(uint32, required, tag = "2")]
    clock_id: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TaskRlimitsEntry {
    #[prost(message, repeated, tag = "1")]
    rlimits: Vec<RlimitEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct RlimitEntry {
    #[prost(uint64, required, tag = "1")]
    cur: u64,
    #[prost(uint64, required, tag = "2")]
    max: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct TaskKobjIdsEntry {
    #[prost(uint32, optional, tag = "2")]
    files: Option<u32>,
    #[prost(uint32, optional, tag = "5")]
    pid: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    network: Option<u32>,
    #[prost(uint32, optional, tag = "7")]
    ipc: Option<u32>,
    #[prost(uint32, optional, tag = "8")]
    uts: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    mount: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    user: Option<u32>,
    #[prost(uint32, optional, tag = "11")]
    cgroup: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    time: Option<u32>,
}

impl TaskKobjIdsEntry {
    pub(super) fn namespaces(self) -> NamespaceIds {
        [
            ("pid", self.pid),
            ("network", self.network),
            ("ipc", self.ipc),
            ("uts", self.uts),
            ("mount", self.mount),
            ("user", self.user),
            ("cgroup", self.cgroup),
            ("time", self.time),
        ]
        .into_iter()
        .filter_map(|(name, id)| Some((name, id.filter(|id| *id != 0)?)))
        .collect()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct ThreadCoreEntry {
    #[prost(sint32, optional, tag = "3")]
    sched_nice: Option<i32>,
    #[prost(uint32, optional, tag = "4")]
    sched_policy: Option<u32>,
    #[prost(message, optional, tag = "10")]
    creds: Option<CredsEntry>,
    #[prost(uint32, optional, tag = "11")]
    seccomp_mode: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    seccomp_filter: Option<u32>,
    #[prost(bytes = "vec", optional, tag = "13")]
    comm: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CredsEntry {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
    #[prost(uint32, required, tag = "2")]
    gid: u32,
    #[prost(uint32, required, tag = "3")]
    euid: u32,
    #[prost(uint32, required, tag = "4")]
    egid: u32,
    #[prost(uint32, required, tag = "5")]
    suid: u32,
    #[prost(uint32, required, tag = "6")]
    sgid: u32,
    #[prost(uint32, required, tag = "7")]
    fsuid: u32,
    #[prost(uint32, required, tag = "8")]
    fsgid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "9")]
    cap_inh: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "10")]
    cap_prm: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    cap_eff: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    cap_bnd: Vec<u32>,
    #[prost(uint32, required, tag = "13")]
    secbits: u32,
    #[prost(uint32, repeated, packed = "false", tag = "14")]
    groups: Vec<u32>,
    #[prost(string, optional, tag = "15")]
    lsm_profile: Option<String>,
    #[prost(uint32, optional, tag = "18")]
    no_new_privs: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "19")]
    cap_amb: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PstreeEntry {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, required, tag = "2")]
    ppid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

/// A process and its threads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Its id in the container.
    pub pid: u32,
    /// That of its parent; 0 for the first one.
    pub parent: u32,
    /// Ids of all its threads, the first of which has its id.
    pub threads: Vec<u32>,
    /// Its namespaces; `None` for those of its parent.
    pub namespaces: Option<NamespaceIds>,
    /// The number of its table of open files.
    pub files: Option<u32>,
}

/// The processes of the dump.
///
/// # Errors
/// An image that cannot be read.
pub fn processes(dir: &Path) -> Result<Vec<Process>, ImageError> {
    let path = dir.join("pstree.img");
    let image = Image::read(&path, Kind::Pstree)?;
    let mut entries = image.entries();
    let mut processes = Vec::new();
    while let Some(message) = entries.next_bytes()? {
        if is_ambiguous(message, &[5]) {
            return Err(image.ambiguous());
        }
        let entry: PstreeEntry = image.decode(message)?;
        let ids = ids(dir, entry.pid)?;
        processes.push(Process {
            pid: entry.pid,
            parent: entry.ppid,
            threads: entry.threads,
            namespaces: ids.map(TaskKobjIdsEntry::namespaces),
            files: ids.and_then(|ids| ids.files),
        });
    }
    Ok(processes)
}

fn ids(dir: &Path, pid: u32) -> Result<Option<TaskKobjIdsEntry>, ImageError> {
    let path = dir.join(format!("ids-{pid}.img"));
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(None);
    }
    let image = Image::read(&path, Kind::Ids)?;
    let Some(message) = image.entries().next_bytes()? else {
        return Ok(None);
    };
    if is_ambiguous(message, &[]) {
        return Err(image.ambiguous());
    }
    Ok(Some(image.decode(message)?))
}

/// All threads, in order of their ids.
///
/// # Errors
/// An image that cannot be read, says a thing twice, or comes from a CRIU before 3.12, which kept
/// credentials elsewhere.
pub fn threads(dir: &Path) -> Result<Vec<Thread>, ImageError> {
    let images = list(dir, Kind::Core)?;
    images
        .into_iter()
        .map(|(tid, path)| read_thread(tid, &Image::read(&path, Kind::Core)?))
        .collect()
}

fn read_thread(tid: u32, image: &Image) -> Result<Thread, ImageError> {
    let mut entries = image.entries();
    let message = entries.next_bytes()?.ok_or_else(|| entries.cut_off())?;
    if entries.next_bytes()?.is_some() || has_ambiguous_part(message) {
        return Err(image.ambiguous());
    }
    let core: CoreEntry = image.decode(message)?;
    let dead = core
        .tc
        .as_ref()
        .is_some_and(|tc| tc.task_state == TASK_DEAD);
    let old = core
        .tc
        .as_ref()
        .is_some_and(|tc| tc.old_seccomp_mode.or(tc.old_seccomp_filter).is_some());
    let thread = core.thread_core.unwrap_or_default();
    let creds = match thread.creds {
        Some(creds) if !old => image.creds(creds)?,
        None if dead && !old => Creds::default(),
        _ => return Err(image.outdated()),
    };
    let comm = match (&core.tc, thread.comm) {
        (_, Some(comm)) => shown(&comm),
        (Some(tc), None) => shown(&tc.comm),
        (None, None) => String::new(),
    };
    let task = core.tc.map(|tc| Task {
        state: tc.task_state,
        rlimits: tc
            .rlimits
            .map(|it| it.rlimits.iter().map(|it| (it.cur, it.max)).collect())
            .unwrap_or_default(),
        oom_score_adj: tc.oom_score_adj,
        has_alarm: { tc.timers.iter() }
            .flat_map(|timers| &timers.posix)
            .any(|timer| ALARM_CLOCKS.contains(&timer.clock_id)),
        login: tc.loginuid.filter(|id| *id != NO_LOGIN),
    });
    Ok(Thread {
        tid,
        comm,
        creds,
        seccomp_mode: thread.seccomp_mode.unwrap_or_default(),
        seccomp_filter: thread.seccomp_filter,
        policy: thread.sched_policy.unwrap_or_default(),
        nice: thread.sched_nice.unwrap_or_default(),
        task,
    })
}

fn has_ambiguous_part(core: &[u8]) -> bool {
    let part = |message: &[u8], number| submessage(message, number).unwrap_or_default().to_vec();
    let (tc, thread) = (part(core, TC), part(core, THREAD_CORE));
    is_ambiguous(core, &[])
        || is_ambiguous(&tc, REPEATED_TC)
        || is_ambiguous(&part(&tc, RLIMITS), &[1])
        || is_ambiguous(&part(&tc, TIMERS), &[4])
        || is_ambiguous(&thread, &[])
        || is_ambiguous(&part(&thread, CREDS), REPEATED_CREDS)
}

impl Image {
    fn creds(&self, entry: CredsEntry) -> Result<Creds, ImageError> {
        let set = |words: &[u32]| match *words {
            [] => Ok(0),
            [low] => Ok(u64::from(low)),
            [low, high] => Ok(u64::from(low) | u64::from(high) << 32),
            _ => Err(self.ambiguous()),
        };
        Ok(Creds {
            uids: [entry.uid, entry.euid, entry.suid, entry.fsuid],
            gids: [entry.gid, entry.egid, entry.sgid, entry.fsgid],
            groups: entry.groups,
            inheritable: set(&entry.cap_inh)?,
            permitted: set(&entry.cap_prm)?,
            effective: set(&entry.cap_eff)?,
            bounding: set(&entry.cap_bnd)?,
            ambient: set(&entry.cap_amb)?,
            securebits: entry.secbits,
            no_new_privileges: entry.no_new_privs.is_some_and(|it| it != 0),
            lsm_profile: entry.lsm_profile,
        })
    }
}

/// Changes the image of one thread in `dir`, which may be a link into a checkpoint: the link is
/// replaced, what it leads to stays.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn edit(dir: &Path, tid: u32, edit: &ThreadEdit) -> Result<(), ImageError> {
    let path = dir.join(format!("core-{tid}.img"));
    let image = Image::read(&path, Kind::Core)?;
    let mut entries = image.entries();
    let core = entries.next_bytes()?.ok_or_else(|| entries.cut_off())?;
    let mut body = Vec::new();
    push_bytes(&mut body, &edited(core, edit));
    image.with_body(body).replace(&path)
}

fn edited(core: &[u8], edit: &ThreadEdit) -> Vec<u8> {
    let words = |set: u64| [set & 0xffff_ffff, set >> 32];
    let mut core = edit_submessage(core, THREAD_CORE, |thread| {
        let mut thread = thread.to_vec();
        if let Some(filter) = edit.seccomp_filter {
            let mode = u64::from(SECCOMP_FILTER_MODE);
            thread = set_varints(&thread, SECCOMP_MODE, &[mode]);
            thread = set_varints(&thread, SECCOMP_FILTER, &[u64::from(filter)]);
        }
        edit_submessage(&thread, CREDS, |creds| {
            let mut creds = creds.to_vec();
            if edit.no_new_privileges {
                creds = set_varints(&creds, NO_NEW_PRIVS, &[1]);
            }
            if let Some(set) = edit.bounding {
                creds = set_varints(&creds, CAP_BND, &words(set));
            }
            if let Some(set) = edit.inheritable {
                creds = set_varints(&creds, CAP_INH, &words(set));
            }
            if let Some(profile) = &edit.lsm_profile {
                creds = edit_submessage(&creds, LSM_PROFILE, |_| profile.clone().into_bytes());
            }
            creds
        })
    });
    if let Some(score) = edit.oom_score_adj {
        core = edit_submessage(&core, TC, |tc| {
            set_varints(tc, OOM_SCORE_ADJ, &[i64::from(score).cast_unsigned()])
        });
    }
    if edit.no_login {
        core = edit_submessage(&core, TC, |tc| {
            set_varints(tc, LOGIN_UID, &[u64::from(NO_LOGIN)])
        });
    }
    if let Some(limits) = &edit.rlimits {
        let entry = TaskRlimitsEntry {
            rlimits: limits
                .iter()
                .map(|&(cur, max)| RlimitEntry { cur, max })
                .collect(),
        };
        core = edit_submessage(&core, TC, |tc| {
            edit_submessage(tc, RLIMITS, |_| prost::Message::encode_to_vec(&entry))
        });
    }
    core
}
