//! What a checkpoint would give its processes that the new container does not.

use std::path::PathBuf;

use super::capabilities::Capabilities;

/// One thing in which the images are stronger than the spec of the new container, or that no dump
/// of a container has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Capabilities beyond those of the spec.
    #[error(
        "{who} has {extra} in its {set} set, which the new container's process.capabilities do not give"
    )]
    Capabilities {
        /// The thread.
        who: String,
        /// Which of its sets.
        set: &'static str,
        /// Those that are too many.
        extra: Capabilities,
    },
    /// A user id that is not the spec's.
    #[error("{who} has the user id {id}, and the new container's user is {allowed}")]
    User {
        /// The thread.
        who: String,
        /// Its id.
        id: u32,
        /// The spec's.
        allowed: u32,
    },
    /// A group id that the spec does not name.
    #[error("{who} has the group id {id}, which is none of the new container's groups")]
    Group {
        /// The thread.
        who: String,
        /// The group.
        id: u32,
    },
    /// Securebits that take a capability to set.
    #[error(
        "{who} has securebits {bits:#x}, which take CAP_SETPCAP to set, and the new container has it not"
    )]
    Securebits {
        /// The thread.
        who: String,
        /// The bits.
        bits: u32,
    },
    /// A resource limit above that of the spec.
    #[error("{who} has {resource} {found}, and the new container's is {allowed}")]
    Limit {
        /// The process.
        who: String,
        /// Name of the limit.
        resource: &'static str,
        /// Its hard limit.
        found: u64,
        /// The spec's.
        allowed: u64,
    },
    /// A scheduling that takes a capability.
    #[error("{who} has {what}, which takes CAP_SYS_NICE, and the new container has it not")]
    Scheduling {
        /// The thread.
        who: String,
        /// What it is.
        what: String,
    },
    /// The spec's seccomp profile cannot be put into the images.
    #[error("the new container's seccomp profile cannot be put on {who}: {why}")]
    Seccomp {
        /// The process, or the profile itself.
        who: String,
        /// What stands in the way.
        why: String,
    },
    /// An open file that takes a capability to make.
    #[error("a process has {what} open, which takes {needed}, and the new container has it not")]
    OpenFile {
        /// The kind of file.
        what: &'static str,
        /// What it takes.
        needed: Capabilities,
    },
    /// A socket at a port that not everybody may have.
    #[error(
        "a process has a socket at the port {port}, which takes CAP_NET_BIND_SERVICE below {free} in the new \
         container's network, and the new container has it not"
    )]
    Port {
        /// The port.
        port: u16,
        /// The first one that takes nothing.
        free: u32,
    },
    /// Memory where only the kernel's own mistakes look for it.
    #[error(
        "a process has memory at the address {found:#x}, which takes CAP_SYS_RAWIO below {allowed:#x}, and the new \
         container has it not"
    )]
    Address {
        /// Where it is.
        found: u64,
        /// The lowest address of this node.
        allowed: u64,
    },
    /// More memory that is never swapped out than a process may lock.
    #[error(
        "process {pid} has locked {found} bytes of memory, of which the new container may lock {allowed} without \
         CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// Its id in the container.
        pid: u32,
        /// How much is locked.
        found: u64,
        /// The hard limit.
        allowed: u64,
    },
    /// A timer that wakes a node that sleeps.
    #[error(
        "{who} has a timer that wakes the node (CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM), which takes \
         CAP_WAKE_ALARM, and the new container has it not"
    )]
    Alarm {
        /// The process.
        who: String,
    },
    /// A name that does not stay in the container, or what no dump says of a file.
    #[error("the checkpoint has the file {path:?}, {why}")]
    File {
        /// Its path in the container.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A watch that CRIU opens as root, by a number that it has in a whole file system.
    #[error(
        "a process watches a file that has no name (inotify, fanotify): device {device:#x}, inode {inode}"
    )]
    Watch {
        /// CRIU's number of the device.
        device: u32,
        /// The inode.
        inode: u64,
    },
    /// A socket that CRIU connects to as root.
    #[error(
        "the checkpoint has a unix socket that is of another program, which takes the option ext-unix-sk"
    )]
    ExternalSocket,
    /// A mount that the spec does not have, or has with stricter flags.
    #[error("the checkpoint mounts {what} on {destination:?}, {why}")]
    Mount {
        /// Where.
        destination: PathBuf,
        /// What it is.
        what: String,
        /// In what it differs from the spec.
        why: String,
    },
    /// A path that the spec hides or protects, and the images do not.
    #[error("{path:?} is {wanted} in the new container, and in the checkpoint it is not")]
    Unprotected {
        /// The path.
        path: PathBuf,
        /// `masked` or `read-only`.
        wanted: &'static str,
    },
    /// A task in a namespace of the node, or in one of its own.
    #[error("{who} is not in the container's {namespace} namespace")]
    Namespace {
        /// The process.
        who: String,
        /// Which one.
        namespace: &'static str,
    },
    /// Rules that take a capability to set.
    #[error(
        "the checkpoint has rules for packets of its network (iptables, nftables), which take CAP_NET_ADMIN to set, and \
         the new container has it not"
    )]
    PacketRules,
    /// Another mapping of ids.
    #[error("the checkpoint's user namespace has other id mappings than the new container's")]
    IdMappings,
    /// A cgroup beside the container's.
    #[error("the checkpoint has the cgroup {path:?}, which is not within the container's")]
    Cgroup {
        /// Its path.
        path: String,
    },
    /// A device node that the spec does not have.
    #[error("the checkpointed container has the device {path:?}, which the new one does not")]
    Device {
        /// Its path.
        path: PathBuf,
    },
    /// A file among the images that is none.
    #[error("{name:?} among the images is no image of a container")]
    Stranger {
        /// Its name.
        name: String,
    },
    /// Images that contradict each other.
    #[error("the images are damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: String,
    },
}
