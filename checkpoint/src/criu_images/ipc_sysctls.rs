//! `ipcns-var-<n>.img`: the limits of an IPC namespace (`kernel.shmmax` and the like). CRIU writes
//! them into the namespace that a container joins, so the sandbox would get the limits of the one
//! that the container was dumped in. The image gets what the sandbox has.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Image, ImageError, Kind, list, push_entry};

/// Limits by their file below `/proc/sys`, with their numbers.
pub type IpcSysctls = BTreeMap<&'static str, Vec<u64>>;

/// The files below `/proc/sys` that CRIU writes (`ipc_sysctl_req`), but for those that choose the
/// next id.
pub const NAMES: [&str; 14] = [
    "kernel/sem",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/auto_msgmni",
    "kernel/shmmax",
    "kernel/shmall",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];

/// `ipc_var_entry` of `images/ipc-var.proto`. The fields 15 to 17, the ids that the next objects
/// get, are left out: -1 in every dump, as it is in the sandbox.
#[derive(Clone, PartialEq, prost::Message)]
struct IpcVarEntry {
    #[prost(uint32, repeated, packed = "false", tag = "1")]
    sem_ctls: Vec<u32>,
    #[prost(uint32, required, tag = "2")]
    msg_ctlmax: u32,
    #[prost(uint32, required, tag = "3")]
    msg_ctlmnb: u32,
    #[prost(uint32, required, tag = "4")]
    msg_ctlmni: u32,
    #[prost(uint32, required, tag = "5")]
    auto_msgmni: u32,
    #[prost(uint64, required, tag = "6")]
    shm_ctlmax: u64,
    #[prost(uint64, required, tag = "7")]
    shm_ctlall: u64,
    #[prost(uint32, required, tag = "8")]
    shm_ctlmni: u32,
    #[prost(uint32, required, tag = "9")]
    shm_rmid_forced: u32,
    #[prost(uint32, required, tag = "10")]
    mq_queues_max: u32,
    #[prost(uint32, required, tag = "11")]
    mq_msg_max: u32,
    #[prost(uint32, required, tag = "12")]
    mq_msgsize_max: u32,
    #[prost(uint32, optional, tag = "13")]
    mq_msg_default: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    mq_msgsize_default: Option<u32>,
}

/// Writes `live` into the images of `dir`; a limit that is not in it stays as it was dumped.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn set_sysctls(dir: &Path, live: &IpcSysctls) -> Result<(), ImageError> {
    for (_, path) in list(dir, Kind::IpcVar)? {
        let image = Image::read(&path, Kind::IpcVar)?;
        let Some(mut entry) = image.entries().next::<IpcVarEntry>()? else {
            continue;
        };
        entry.set(live);
        let mut body = Vec::new();
        push_entry(&mut body, &entry);
        image.with_body(body).replace(&path)?;
    }
    Ok(())
}

impl IpcVarEntry {
    fn set(&mut self, live: &IpcSysctls) {
        let numbers = |name| live.get(name).map(Vec::as_slice).unwrap_or_default();
        let first = |name| numbers(name).first().copied();
        let narrow = |name| first(name).and_then(|number| u32::try_from(number).ok());
        let semaphores: Option<Vec<u32>> = numbers("kernel/sem")
            .iter()
            .map(|number| u32::try_from(*number).ok())
            .collect();
        if let Some(semaphores) = semaphores.filter(|all| all.len() == self.sem_ctls.len()) {
            self.sem_ctls = semaphores;
        }
        for (field, name) in [
            (&mut self.msg_ctlmax, "kernel/msgmax"),
            (&mut self.msg_ctlmnb, "kernel/msgmnb"),
            (&mut self.msg_ctlmni, "kernel/msgmni"),
            (&mut self.auto_msgmni, "kernel/auto_msgmni"),
            (&mut self.shm_ctlmni, "kernel/shmmni"),
            (&mut self.shm_rmid_forced, "kernel/shm_rmid_forced"),
            (&mut self.mq_queues_max, "fs/mqueue/queues_max"),
            (&mut self.mq_msg_max, "fs/mqueue/msg_max"),
            (&mut self.mq_msgsize_max, "fs/mqueue/msgsize_max"),
        ] {
            *field = narrow(name).unwrap_or(*field);
        }
        self.shm_ctlmax = first("kernel/shmmax").unwrap_or(self.shm_ctlmax);
        self.shm_ctlall = first("kernel/shmall").unwrap_or(self.shm_ctlall);
        // Both or none: CRIU takes the second for granted when the first is there.
        let defaults = narrow("fs/mqueue/msg_default").zip(narrow("fs/mqueue/msgsize_default"));
        if let Some((count, size)) = defaults {
            (self.mq_msg_default, self.mq_msgsize_default) = (Some(count), Some(size));
        }
    }
}

#[cfg(test)]
pub(super) fn first_entry_for_test(dir: &Path) -> (Vec<u32>, u32, u64) {
    let (_, path) = list(dir, Kind::IpcVar).unwrap().remove(0);
    let image = Image::read(&path, Kind::IpcVar).unwrap();
    let entry: IpcVarEntry = image.entries().next().unwrap().unwrap();
    (entry.sem_ctls, entry.msg_ctlmax, entry.shm_ctlmax)
}
