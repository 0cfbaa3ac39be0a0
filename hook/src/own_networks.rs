//! The networks of a restored container: made again while CRIU restores, before its sockets are.
//!
//! ```text
//!  front    annotation of our own tool --> <work>/networks.json
//!  CRIU, at `post-setup-namespaces` (hold_script): the network namespace is there, and empty
//!           this: lo up (a socket may be connected over it), CNI ADD of each, sysctls of the spec, lock
//!                 it fails --> <work>/networks.error, and CRIU gives up
//!  front    `start`: unlocked; the neighbours are told where its addresses are now
//!           a restore that failed, `delete`: CNI DEL of each
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use transship_cni::{Cni, Networks, Place, keep_addresses};
use transship_sandbox::{
    SandboxError, announce_addresses_of, lock_network, raise_loopback_of, set_network_sysctls,
    unlock_network,
};

use crate::one_line;

const FILE: &str = "networks.json";
/// Sysctls of a network namespace that is the container's own.
const SYSCTLS: &str = "network-sysctls.json";
const ERROR: &str = "networks.error";
/// Is there if packets are kept from the networks as long as the container is held.
const LOCKS: &str = "networks.locked";

/// Makes those that were asked for in a restore with this work directory; `pid` is its first task. No packet comes or
/// goes there before [`open`], if connections come along.
pub(crate) fn make(work: &Path, pid: i32) -> io::Result<()> {
    let made = match read::<Networks>(&work.join(FILE))? {
        Some(networks) => add_all(&Cni::default(), &networks, pid),
        None if !has_own(pid)? => return Ok(()),
        None => raise_loopback_of(pid).map_err(io::Error::other),
    };
    let made = made.and_then(|()| set_sysctls(work, pid));
    let made = made.and_then(|()| match is_locked(work) {
        true => lock_network(&namespace_of(pid)).map_err(io::Error::other),
        false => Ok(()),
    });
    made.inspect_err(|error| {
        // Without it CRIU's words are all there is.
        drop(fs::write(work.join(ERROR), one_line(error)));
    })
}

fn add_all(cni: &Cni, networks: &Networks, pid: i32) -> io::Result<()> {
    let namespace = namespace_of(pid);
    if !has_own(pid)? {
        return Err(io::Error::other("it has no network namespace of its own"));
    }
    raise_loopback_of(pid).map_err(io::Error::other)?;
    let place = Place {
        container: &networks.container,
        namespace: Some(&namespace),
    };
    for (made, attachment) in networks.attachments.iter().enumerate() {
        cni.add(place, attachment).map_err(|error| {
            for attachment in &networks.attachments[..made] {
                // The first failure is the one that is told.
                drop(cni.del(place, attachment));
            }
            io::Error::other(error)
        })?;
    }
    Ok(())
}

/// Sets those that [`write_sysctls`] was given.
pub(crate) fn set_sysctls(work: &Path, pid: i32) -> io::Result<()> {
    match read::<BTreeMap<String, String>>(&work.join(SYSCTLS))? {
        Some(sysctls) if has_own(pid)? => {
            set_network_sysctls(pid, &sysctls).map_err(io::Error::other)
        }
        _ => Ok(()),
    }
}

/// Whether it has a network namespace that is not that of this program.
fn has_own(pid: i32) -> io::Result<bool> {
    Ok(fs::read_link(namespace_of(pid))? != fs::read_link("/proc/self/ns/net")?)
}

/// Whether networks that are asked for (as `write` is given them) keep the addresses that they had.
pub(crate) fn are_kept(json: &str) -> io::Result<bool> {
    let networks: Networks = serde_json::from_str(json)?;
    Ok(keep_addresses(&networks.attachments))
}

/// Asks for networks in a restore with this work directory. With `locks` no packet comes or goes before [`open`].
pub(crate) fn write(work: &Path, json: &str, locks: bool) -> io::Result<()> {
    drop(fs::remove_file(work.join(ERROR)));
    if locks {
        fs::write(work.join(LOCKS), "")?;
    }
    fs::write(work.join(FILE), json)
}

/// Asks for sysctls in a network namespace that the restore with this work directory makes.
pub(crate) fn write_sysctls(work: &Path, sysctls: &BTreeMap<String, String>) -> io::Result<()> {
    let file = work.join(SYSCTLS);
    match sysctls.is_empty() {
        true => match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
        false => fs::write(file, serde_json::to_vec(sysctls)?),
    }
}

/// Lets packets come and go, before the first task does.
pub(crate) fn open(work: &Path, pid: i32) -> Result<(), SandboxError> {
    match is_locked(work) {
        true => unlock_network(&namespace_of(pid)),
        false => Ok(()),
    }
}

fn is_locked(work: &Path) -> bool {
    work.join(LOCKS).symlink_metadata().is_ok()
}

fn namespace_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// Tells the neighbours of those that were made where they are now.
pub(crate) fn announce(work: &Path, pid: i32) {
    if work.join(FILE).symlink_metadata().is_ok() {
        // The first packet of the copy tells it as well.
        drop(announce_addresses_of(pid));
    }
}

/// Why they were not made.
pub(crate) fn failure(work: &Path) -> Option<String> {
    fs::read_to_string(work.join(ERROR)).ok()
}

/// Gives them back: the container is gone, or was not restored.
pub(crate) fn remove(work: &Path) {
    let networks = read::<Networks>(&work.join(FILE)).ok().flatten();
    let Some(networks) = networks else {
        return;
    };
    let place = Place {
        container: &networks.container,
        namespace: None,
    };
    for attachment in &networks.attachments {
        // The interface has gone with its namespace; what keeps the address may be asked again.
        drop(Cni::default().del(place, attachment));
    }
    drop(fs::remove_file(work.join(LOCKS)));
    drop(fs::remove_file(work.join(FILE)));
}

fn read<T: DeserializeOwned>(file: &Path) -> io::Result<Option<T>> {
    match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        json => Ok(Some(serde_json::from_slice(&json?)?)),
    }
}
