//! Each thread of the images against the spec: credentials, limits, scheduling.

use transship_checkpoint::criu_images::addresses::Addresses;
use transship_checkpoint::criu_images::threads::{TASK_DEAD, Task, Thread};

use super::allowance::{Allowance, LIMITS};
use super::capabilities::{
    Capabilities, IPC_LOCK, SETPCAP, SYS_NICE, SYS_RAWIO, SYS_RESOURCE, WAKE_ALARM,
};
use super::files::makes_or_empties;
use super::{Admission, Environment, Refusal};

/// `SECBIT_KEEP_CAPS` and its lock: all that a process can set without a capability.
const FREE_SECUREBITS: u32 = 1 << 4;
/// What a thread with `SCHED_RESET_ON_FORK` has besides its policy: its children have less, so anybody may set it.
const RESET_ON_FORK: u32 = 0x4000_0000;
/// `RLIMIT_MEMLOCK`.
const MEMLOCK: usize = 8;
/// `SCHED_OTHER`, `SCHED_BATCH`, `SCHED_IDLE`.
const FREE_POLICIES: [u32; 3] = [0, 3, 5];

pub(super) fn name(thread: &Thread) -> String {
    format!("process {} ({:?})", thread.tid, thread.comm)
}

/// Compares one thread.
pub(super) fn compare(
    thread: &Thread,
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    if thread.task.as_ref().is_some_and(|it| it.state == TASK_DEAD) {
        return;
    }
    let who = name(thread);
    compare_credentials(thread, &who, allowed, admission);
    compare_scheduling(thread, &who, allowed, here, admission);
    if let Some(task) = &thread.task {
        compare_limits(thread.tid, task, &who, allowed, here, admission);
        // Without one in the spec a container has that of who starts it.
        let least = allowed.oom_score_adj.unwrap_or(here.oom_score_adj);
        if task.oom_score_adj.unwrap_or_default() < least {
            admission.edit(thread.tid).oom_score_adj = Some(least);
        }
        if task.has_alarm && !allowed.capabilities.has(WAKE_ALARM) {
            admission.refuse(Refusal::Alarm { who });
        }
        // Whoever made the image would name who is to have done what the audit log of this node has of the container.
        if task.login.is_some() {
            admission.edit(thread.tid).no_login = true;
        }
    }
}

fn compare_credentials(thread: &Thread, who: &str, allowed: &Allowance, admission: &mut Admission) {
    let creds = &thread.creds;
    for (set, found) in [
        ("effective", creds.effective),
        ("permitted", creds.permitted),
        ("ambient", creds.ambient),
    ] {
        let extra = Capabilities(found).beyond(allowed.capabilities);
        if !extra.is_empty() {
            admission.refuse(Refusal::Capabilities {
                who: who.to_owned(),
                set,
                extra,
            });
        }
    }
    // What it does not have but could gain is taken away.
    let bounding = Capabilities(creds.bounding);
    if !allowed.bounding.has(bounding) {
        let cut = bounding.common(allowed.bounding);
        admission.edit(thread.tid).bounding = Some(cut.0);
    }
    let inheritable = Capabilities(creds.inheritable);
    if !allowed.capabilities.has(inheritable) {
        let cut = inheritable.common(allowed.capabilities);
        admission.edit(thread.tid).inheritable = Some(cut.0);
    }
    compare_ids(
        who,
        creds.uids.iter(),
        creds.gids.iter().chain(&creds.groups),
        allowed,
        admission,
    );
    if creds.securebits & !FREE_SECUREBITS != 0 && !allowed.capabilities.has(SETPCAP) {
        admission.refuse(Refusal::Securebits {
            who: who.to_owned(),
            bits: creds.securebits,
        });
    }
    if allowed.no_new_privileges && !creds.no_new_privileges {
        admission.edit(thread.tid).no_new_privileges = true;
    }
    let imposed = admission.lsm_profile.as_deref();
    let imposed = imposed.and_then(|profile| Some(profile.split_once(':')?.1.to_owned()));
    if imposed.is_some() && imposed != creds.lsm_profile {
        // CRIU's `--lsm-profile` is for threads alone whose image has one.
        admission.edit(thread.tid).lsm_profile = imposed;
    }
}

/// Compares ids of users and groups with those that a process of the container may take.
pub(super) fn compare_ids<'a>(
    who: &str,
    mut uids: impl Iterator<Item = &'a u32>,
    mut gids: impl Iterator<Item = &'a u32>,
    allowed: &Allowance,
    admission: &mut Admission,
) {
    let stranger = uids.find(|id| **id != allowed.user);
    if let Some(id) = stranger.filter(|_| !allowed.any_user) {
        admission.refuse(Refusal::User {
            who: who.to_owned(),
            id: *id,
            allowed: allowed.user,
        });
    }
    let stranger = gids.find(|id| !allowed.groups.contains(id));
    if let Some(id) = stranger.filter(|_| !allowed.any_group) {
        let who = who.to_owned();
        admission.refuse(Refusal::Group { who, id: *id });
    }
}

fn compare_scheduling(
    thread: &Thread,
    who: &str,
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    if allowed.has_scheduler || allowed.capabilities.has(SYS_NICE) {
        return;
    }
    let what = if !FREE_POLICIES.contains(&(thread.policy & !RESET_ON_FORK)) {
        format!("the scheduling policy {}", thread.policy)
    } else if thread.nice < here.nice.min(0) {
        format!("the nice value {}", thread.nice)
    } else {
        return;
    };
    admission.refuse(Refusal::Scheduling {
        who: who.to_owned(),
        what,
    });
}

fn compare_limits(
    tid: u32,
    task: &Task,
    who: &str,
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    if allowed.capabilities.has(SYS_RESOURCE) {
        return;
    }
    let mut limits = task.rlimits.clone();
    // Of a limit that the image does not name the process would keep CRIU's.
    for number in limits.len()..LIMITS.len() {
        let spec = allowed.limits.get(&number);
        limits.extend(
            spec.or(here.hard_limits.get(number))
                .map(|most| (*most, *most)),
        );
    }
    for (number, (soft, hard)) in limits.iter_mut().enumerate() {
        if let Some(most) = allowed.limits.get(&number) {
            if *hard > *most {
                admission.refuse(Refusal::Limit {
                    who: who.to_owned(),
                    resource: LIMITS.get(number).copied().unwrap_or("a limit"),
                    found: *hard,
                    allowed: *most,
                });
            }
        } else if let Some(most) = here.hard_limits.get(number) {
            // A node has its own defaults, and a container without limits of its own has them.
            *hard = (*hard).min(*most);
            *soft = (*soft).min(*hard);
        }
    }
    if limits != task.rlimits {
        admission.edit(tid).rlimits = Some(limits);
    }
}

/// Memory at the lowest addresses makes of a pointer that the kernel forgot to set one that a process has set: CRIU may
/// map it, a process may not. What is locked is never swapped out.
pub(super) fn compare_addresses(
    found: &Addresses,
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    let low = found.lowest.filter(|at| *at < here.lowest_address);
    if let Some(at) = low.filter(|_| !allowed.capabilities.has(SYS_RAWIO)) {
        admission.refuse(Refusal::Address {
            found: at,
            allowed: here.lowest_address,
        });
    }
    if makes_or_empties(found.open_flags) {
        let pid = found.pid;
        admission.refuse(Refusal::Damaged {
            what: format!("process {pid} has mapped a file that would be made or emptied"),
        });
    }
    // A process may lower its limit when it has locked its memory: the hard one of the container counts.
    let most = allowed.limits.get(&MEMLOCK);
    let most = most.or(here.hard_limits.get(MEMLOCK)).copied();
    let more = most.filter(|most| found.locked > *most);
    if let Some(most) = more.filter(|_| !allowed.capabilities.has(IPC_LOCK)) {
        admission.refuse(Refusal::LockedMemory {
            pid: found.pid,
            found: found.locked,
            allowed: most,
        });
    }
}
