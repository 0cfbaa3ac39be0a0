//! What a container needs of a node that it comes to: counted before it is frozen, for a comparison.

use procfs::process::FDTarget;
use transship_checkpoint::spec::Spec;

use super::processes::{Processes, Seen};
use crate::process_files;

/// What a container needs of a node, beyond what every container does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// The most mappings of one of its processes.
    pub mappings: u64,
    /// The highest limit of open files of its processes.
    pub open_files: u64,
    /// The highest process id, as it sees them.
    pub process_id: u64,
    /// How many inotify instances it has.
    pub inotify_instances: u64,
    /// Bytes of memory, which are bytes of a checkpoint, too.
    pub memory: u64,
    /// The most bytes of huge pages of one of its processes. What they share each of them has.
    pub huge_pages: u64,
    /// Its profile of AppArmor.
    pub apparmor: Option<String>,
    /// Its label of SELinux.
    pub selinux: Option<String>,
}

pub(super) fn of(spec: &Spec, processes: &Processes) -> Needs {
    let most = |of: fn(&Seen) -> u64| processes.tree.iter().map(of).max().unwrap_or_default();
    let text = |pointer: &str| Some(spec.get(pointer)?.as_str()?.to_owned());
    let memory = processes.tree.iter().map(resident).sum();
    Needs {
        mappings: most(|seen| {
            process_files::maps(seen.pid).map_or(0, |maps| count(maps.into_iter()))
        }),
        open_files: most(open_files),
        process_id: most(|seen| {
            let ids = seen.status.nspid.as_deref().unwrap_or_default();
            ids.last().map_or(0, |id| u64::from(id.cast_unsigned()))
        }),
        inotify_instances: count(processes.descriptors().filter(
            |(_, _, target)| matches!(target, FDTarget::AnonInode(kind) if kind == "inotify"),
        )),
        memory,
        huge_pages: most(|seen| seen.status.hugetlbpages.unwrap_or_default() * 1024),
        apparmor: text("/process/apparmorProfile"),
        selinux: text("/process/selinuxLabel"),
    }
}

fn count(of: impl Iterator) -> u64 {
    of.fold(0, |count, _| count + 1)
}

fn open_files(seen: &Seen) -> u64 {
    use procfs::process::LimitValue;
    match seen
        .process()
        .and_then(|it| it.limits())
        .map(|limits| limits.max_open_files.hard_limit)
    {
        Ok(LimitValue::Value(most)) => most,
        _ => 0,
    }
}

/// Bytes that lie in memory.
fn resident(seen: &Seen) -> u64 {
    seen.status.vmrss.unwrap_or_default() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_needs_what_it_has() {
        let own = std::process::id();
        let spec = br#"{"process":{"apparmorProfile":"p"}}"#;
        let needs = of(&Spec::parse(spec).unwrap(), &Processes::read(own, &[own]));
        assert!(needs.mappings > 5 && needs.memory > 0 && needs.process_id > 0);
        assert_eq!(needs.apparmor.as_deref(), Some("p"));
    }
}
