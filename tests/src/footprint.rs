//! What a testbed is on the machine, and what of it is still there.
//!
//! ```text
//! Traces::of(bed) ─ (as JSON to another process) ─> Footprint::follow ─ teardown ─> remains()
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Testbed, TestbedError};
use transship_path_error::During as _;

/// Kinds of namespaces that each node has of its own, as in /proc/PID/ns.
const NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "uts", "ipc", "cgroup"];

/// Where a living testbed is to be found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Traces {
    /// Its directory; mounts are looked for by this path too.
    dir: PathBuf,
    cgroups: Vec<PathBuf>,
    /// PID 1 of each node by the node's name.
    pids: BTreeMap<String, i32>,
}

impl Traces {
    /// Takes the traces of a living testbed.
    pub fn of(bed: &Testbed) -> Traces {
        let nodes = bed.nodes();
        let cgroups = nodes.iter().flat_map(|node| &node.cgroups().hierarchies);
        Traces {
            dir: bed.dir().to_owned(),
            cgroups: cgroups
                .map(|hierarchy| hierarchy.node_dir.clone())
                .collect(),
            pids: nodes
                .iter()
                .map(|node| (node.name().to_owned(), node.pid()))
                .collect(),
        }
    }
}

/// The means to find out what is left of a testbed.
///
/// It holds the nodes' namespaces open: the number of one that has gone is given to the next that
/// is made, which may be that of a testbed in another process.
#[derive(Debug)]
pub struct Footprint {
    traces: Traces,
    /// By name ("net:[4026531840]"): the node, and the descriptor that keeps the name taken.
    namespaces: BTreeMap<String, (String, File)>,
}

impl Footprint {
    /// Takes hold of the namespaces of a testbed that still lives.
    ///
    /// # Errors
    /// When /proc or the cgroups of the testbed cannot be read.
    pub fn follow(traces: Traces) -> Result<Footprint, TestbedError> {
        let mut namespaces = BTreeMap::new();
        for (node, pid) in &traces.pids {
            for kind in NAMESPACES {
                let path = PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
                let file = File::open(&path).during("open", &path)?;
                let name = fs::read_link(&path).during("read", &path)?;
                namespaces.insert(name.to_string_lossy().into_owned(), (node.clone(), file));
            }
        }
        Ok(Footprint { traces, namespaces })
    }

    /// Names everything that still exists; empty when nothing is left.
    ///
    /// A namespace lives by a process in it, an open descriptor or a bind mount: all three are
    /// looked for. An interface lives in a namespace; that none came into the caller's is looked
    /// for by its name.
    ///
    /// # Errors
    /// When the machine cannot be asked.
    pub fn remains(&self) -> Result<Vec<String>, TestbedError> {
        let mut remains = self.paths()?;
        remains.extend(self.processes()?);
        remains.extend(self.mounts()?);
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

    /// What needs someone to remove it: the testbed's directory and its cgroups.
    ///
    /// # Errors
    /// When the machine cannot be asked.
    pub fn paths(&self) -> Result<Vec<String>, TestbedError> {
        let mut left = Vec::new();
        for path in std::iter::once(&self.traces.dir).chain(&self.traces.cgroups) {
            if path.try_exists().during("look for", path)? {
                left.push(path.display().to_string());
            }
        }
        Ok(left)
    }

    /// Processes in a node's namespace or with a descriptor of one, other than this one's.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<String>, TestbedError> {
        let own = std::process::id().to_string();
        let mut left = Vec::new();
        for process in fs::read_dir("/proc").during("read", "/proc")?.flatten() {
            let name = process.file_name();
            if !name.as_encoded_bytes()[0].is_ascii_digit() || name == *own {
                continue;
            }
            for place in ["ns", "fd"] {
                // A process may end while it is looked at.
                let Ok(links) = fs::read_dir(process.path().join(place)) else {
                    continue;
                };
                for link in links.flatten() {
                    let Ok(target) = fs::read_link(link.path()) else {
                        continue;
                    };
                    if let Some((node, _)) = self.namespaces.get(&*target.to_string_lossy()) {
                        left.push(format!("{} of node {node}", link.path().display()));
                    }
                }
            }
        }
        Ok(left)
    }

    fn mounts(&self) -> Result<Vec<String>, TestbedError> {
        let path = "/proc/self/mountinfo";
        let dir = self.traces.dir.to_string_lossy();
        let mounts = fs::read_to_string(path).during("read", path)?;
        let ours = mounts.lines().filter(|line| {
            line.contains(&*dir)
                || line
                    .split(' ')
                    .any(|word| self.namespaces.contains_key(word))
        });
        Ok(ours.map(|line| format!("mount {line}")).collect())
    }
}
