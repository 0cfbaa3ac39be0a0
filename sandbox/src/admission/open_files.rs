//! What the images have open, against what the processes of the new container could make: CRIU makes it with its own
//! capabilities.

use transship_checkpoint::criu_images::open_files::PrivilegedFile;

use super::allowance::Allowance;
use super::capabilities::{
    AUDIT_READ, BLOCK_SUSPEND, BPF, Capabilities, IPC_LOCK, NET_ADMIN, NET_BIND_SERVICE, NET_RAW,
    SYS_ADMIN, SYS_RESOURCE, WAKE_ALARM,
};
use super::{Admission, Environment, Refusal};

/// Compares each. Buffers of sockets are cut: a node may allow less than the one before, and a program asks for as much
/// as it gets.
pub(super) fn compare(
    files: &[PrivilegedFile],
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    for file in files {
        match *file {
            PrivilegedFile::RawSocket => {
                needs(&[NET_RAW], "a raw or packet socket", allowed, admission);
            }
            PrivilegedFile::Tun => needs(&[NET_ADMIN], "a TUN device", allowed, admission),
            PrivilegedFile::Fanotify => needs(&[SYS_ADMIN], "a fanotify group", allowed, admission),
            PrivilegedFile::BpfMap => needs(&[BPF, SYS_ADMIN], "a BPF map", allowed, admission),
            PrivilegedFile::NetlinkGroup => {
                needs(
                    &[NET_ADMIN],
                    "a group of a netlink protocol",
                    allowed,
                    admission,
                );
            }
            PrivilegedFile::AuditLog => needs(&[AUDIT_READ], "the audit log", allowed, admission),
            PrivilegedFile::Mark => {
                needs(
                    &[NET_ADMIN, NET_RAW],
                    "a socket with a mark (SO_MARK)",
                    allowed,
                    admission,
                );
            }
            PrivilegedFile::Priority => {
                let what = "a socket with a priority above 6 (SO_PRIORITY)";
                needs(&[NET_ADMIN, NET_RAW], what, allowed, admission);
            }
            PrivilegedFile::KeepsAwake => {
                let what = "an epoll that keeps the node awake (EPOLLWAKEUP)";
                needs(&[BLOCK_SUSPEND], what, allowed, admission);
            }
            PrivilegedFile::Alarm => {
                let what = "a timerfd that wakes the node";
                needs(&[WAKE_ALARM], what, allowed, admission);
            }
            PrivilegedFile::Pipe(size) => {
                if size > here.largest_pipe {
                    let what = "a pipe that is larger than this node allows (fs.pipe-max-size)";
                    needs(&[SYS_RESOURCE], what, allowed, admission);
                }
            }
            PrivilegedFile::HugePages => {
                let what = "a System V segment of huge pages (SHM_HUGETLB)";
                needs(&[IPC_LOCK], what, allowed, admission);
            }
            PrivilegedFile::Port(port) => {
                let free = here.network.first_free_port;
                if u32::from(port) < free && !allowed.capabilities.has(NET_BIND_SERVICE) {
                    admission.refuse(Refusal::Port { port, free });
                }
            }
            PrivilegedFile::Owner(id) => {
                if id != allowed.user && !allowed.any_user {
                    admission.refuse(Refusal::User {
                        who: "the owner of a file that signals a process (F_SETOWN)".to_owned(),
                        id,
                        allowed: allowed.user,
                    });
                }
            }
            PrivilegedFile::Buffers(found) => {
                let limits = here.network.buffers;
                if limits.cut(found) != found && !allowed.capabilities.has(NET_ADMIN) {
                    admission.buffers = Some(limits);
                }
            }
        }
    }
}

/// Refuses what takes one of the capabilities.
fn needs(
    any_of: &[Capabilities],
    what: &'static str,
    allowed: &Allowance,
    admission: &mut Admission,
) {
    if !any_of.iter().any(|it| allowed.capabilities.has(*it))
        && let Some(needed) = any_of.first()
    {
        admission.refuse(Refusal::OpenFile {
            what,
            needed: *needed,
        });
    }
}
