//! What a testbed is on the machine, and what of it is still there.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::IoContext as _;
use crate::{Testbed, TestbedError};

/// The traces of a testbed: taken while it lives, looked for when it is gone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Footprint {
    /// Its directory; mounts are looked for by this path too.
    dir: PathBuf,
    cgroups: Vec<PathBuf>,
    /// Namespaces of its nodes as /proc names them ("net:[4026531840]"), with the node.
    namespaces: BTreeMap<String, String>,
}

impl Footprint {
    /// Takes the traces of a living testbed.
    pub fn of(bed: &Testbed) -> Result<Footprint, TestbedError> {
        let mut print = Footprint {
            dir: bed.dir().to_owned(),
            cgroups: Vec::new(),
            namespaces: BTreeMap::new(),
        };
        for node in bed.nodes() {
            print.cgroups.extend(
                node.cgroups()
                    .hierarchies
                    .iter()
                    .map(|h| h.node_dir.clone()),
            );
            let dir = PathBuf::from(format!("/proc/{}/ns", node.pid()));
            for kind in ["mnt", "pid", "net", "uts", "ipc", "cgroup"] {
                let path = dir.join(kind);
                let namespace = fs::read_link(&path).during("read", &path)?;
                let namespace = namespace.to_string_lossy().into_owned();
                print.namespaces.insert(namespace, node.name().to_owned());
            }
        }
        Ok(print)
    }

    /// Names everything that still exists; empty when nothing is left.
    ///
    /// A namespace lives by a process in it, an open descriptor or a bind mount: all three are
    /// looked for. An interface lives in a namespace; that none came into the caller's is looked
    /// for by its name, which ends in no other program's.
    pub fn remains(&self) -> Result<Vec<String>, TestbedError> {
        let mut remains = Vec::new();
        for path in std::iter::once(&self.dir).chain(&self.cgroups) {
            if path.try_exists().during("look for", path)? {
                remains.push(path.display().to_string());
            }
        }
        for process in fs::read_dir("/proc").during("read", "/proc")?.flatten() {
            let path = process.path();
            if !process.file_name().as_encoded_bytes()[0].is_ascii_digit() {
                continue;
            }
            for place in ["ns", "fd"] {
                // A process may end while it is looked at.
                let Ok(links) = fs::read_dir(path.join(place)) else {
                    continue;
                };
                for link in links.flatten() {
                    let Ok(target) = fs::read_link(link.path()) else {
                        continue;
                    };
                    if let Some(node) = self.namespaces.get(&*target.to_string_lossy()) {
                        let link = link.path();
                        remains.push(format!("{} of node {node}", link.display()));
                    }
                }
            }
        }
        let mounts = "/proc/self/mountinfo";
        for line in fs::read_to_string(mounts).during("read", mounts)?.lines() {
            let of_node = line
                .split(' ')
                .any(|word| self.namespaces.contains_key(word));
            if of_node || line.contains(&*self.dir.to_string_lossy()) {
                remains.push(format!("mount {line}"));
            }
        }
        let interfaces = "/sys/class/net";
        for interface in fs::read_dir(interfaces)
            .during("read", interfaces)?
            .flatten()
        {
            let name = interface.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix("link").map(str::parse::<u32>);
            if number.is_some_and(|number| number.is_ok()) {
                remains.push(format!("interface {name}"));
            }
        }
        Ok(remains)
    }
}
