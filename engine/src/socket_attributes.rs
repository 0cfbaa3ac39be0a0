//! The options of the TCP sockets of frozen processes; see [`transship_checkpoint::tcp_options`].
//!
//! ```text
//!  /proc/PID/fd/N -> socket:[4711] --> pidfd_getfd --> getsockopt    once for each socket, some 3 us
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd as _;

use nix::sched::{CloneFlags, setns};
use procfs::process::{FDTarget, Process};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use transship_checkpoint::task_attributes::Socket;
use transship_checkpoint::tcp_options::TcpOptions;

/// What the network of a process gives to new sockets; it shows the network of who reads it.
const USUAL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
/// More sockets than this are not looked at.
const SOCKETS: usize = 1 << 20;

/// The sockets that have options which are not what a new one has.
pub(crate) fn read(pids: &[u32]) -> Vec<Socket> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    let mut usual = None;
    for pid in pids {
        // A zombie has no descriptors.
        let Ok(process) = Process::new(pid.cast_signed()) else {
            continue;
        };
        let Some(by) = Pid::from_raw(pid.cast_signed())
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        else {
            continue;
        };
        let status = process.status().ok();
        let id = status.and_then(|it| it.nspid?.last().copied());
        for open in process.fd().into_iter().flatten().flatten() {
            let FDTarget::Socket(inode) = open.target else {
                continue;
            };
            if seen.len() >= SOCKETS || !seen.insert(inode) {
                continue;
            }
            let Ok(socket) = pidfd_getfd(by.as_fd(), open.fd, PidfdGetfdFlags::empty()) else {
                continue;
            };
            let usual = usual.get_or_insert_with(|| usual_congestion(*pid).unwrap_or_default());
            if let (Some(options), Some(id)) = (TcpOptions::read(&socket, usual), id)
                && !options.are_ordinary()
            {
                found.push(Socket {
                    process: id.cast_unsigned(),
                    descriptor: open.fd,
                    options,
                });
            }
        }
    }
    found
}

/// The congestion control of new sockets in the network of a process.
fn usual_congestion(pid: u32) -> Option<String> {
    let network = File::open(format!("/proc/{pid}/ns/net")).ok()?;
    let thread = std::thread::Builder::new().name("network".to_owned());
    let asked = thread.spawn(move || {
        setns(&network, CloneFlags::CLONE_NEWNET).ok()?;
        let name = fs::read_to_string(USUAL).ok()?;
        Some(name.trim().to_owned())
    });
    asked.ok()?.join().ok()?
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn root_a_listener_is_found_by_its_descriptor() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let own = std::process::id();
        let (listener, other) = (
            TcpListener::bind("127.0.0.1:0").unwrap(),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        let options = TcpOptions {
            user_timeout: Some(4711),
            ..TcpOptions::default()
        };
        assert!(options.give(&listener, &[]).is_empty());
        let found = read(&[own, u32::MAX >> 1]);
        let of = |descriptor| found.iter().find(|it| it.descriptor == descriptor);
        assert_eq!(of(listener.as_raw_fd()).unwrap().options, options);
        assert_eq!(of(other.as_raw_fd()), None);
        let usual = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap();
        assert_eq!(usual_congestion(own).as_deref(), Some(usual.trim()));
    }
}
