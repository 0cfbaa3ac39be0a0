//! The networks of a restored container: made again while CRIU restores, before its sockets are.
//!
//! ```text
//!  front    annotation of our own tool --> <work>/networks.json
//!  CRIU, at `post-setup-namespaces` (hold_script): the network namespace is there, and empty
//!           this: lo up, CNI ADD of each;   it fails --> <work>/networks.error, and CRIU gives up
//!  front    a restore that failed, `delete`: CNI DEL of each
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use transship_cni::{Cni, Networks, Place};
use transship_sandbox::raise_loopback_of;

use crate::one_line;

const FILE: &str = "networks.json";
const ERROR: &str = "networks.error";

/// Makes those that were asked for in a restore with this work directory; `pid` is its first task.
pub(crate) fn make(work: &Path, pid: i32) -> io::Result<()> {
    let Some(networks) = read(work)? else {
        return Ok(());
    };
    add_all(&Cni::default(), &networks, pid).inspect_err(|error| {
        // Without it CRIU's words are all there is.
        drop(fs::write(work.join(ERROR), one_line(error)));
    })
}

fn add_all(cni: &Cni, networks: &Networks, pid: i32) -> io::Result<()> {
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
    if fs::read_link(&namespace)? == fs::read_link("/proc/self/ns/net")? {
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

/// Asks for networks in a restore with this work directory.
pub(crate) fn write(work: &Path, json: &str) -> io::Result<()> {
    drop(fs::remove_file(work.join(ERROR)));
    fs::write(work.join(FILE), json)
}

/// Why they were not made.
pub(crate) fn failure(work: &Path) -> Option<String> {
    fs::read_to_string(work.join(ERROR)).ok()
}

/// Gives them back: the container is gone, or was not restored.
pub(crate) fn remove(work: &Path) {
    let networks = read(work).ok().flatten();
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
    drop(fs::remove_file(work.join(FILE)));
}

fn read(work: &Path) -> io::Result<Option<Networks>> {
    match fs::read(work.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        json => Ok(Some(serde_json::from_slice(&json?)?)),
    }
}
