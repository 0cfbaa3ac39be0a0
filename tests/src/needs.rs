//! What a test needs of the machine, told by the prefix of its name.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::{Settings, Tree};

/// In the machine, and nowhere else: tests with the prefix `vm_` may do to it what they want.
const MARKER: &str = "/etc/transship-vm";

/// A need; `root_`, `node_` and `vm_` are the prefixes of test names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// All rights on a real kernel.
    Root,
    /// Throwaway nodes: root, and a tree or mmdebstrap to make it.
    Node(Tree),
    /// The machine of `make test-vm`: systemd, cgroup v2, and nothing that must not be spoilt.
    Vm,
}

/// Which needs must be met, and how a machine without one is treated.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    required: Vec<String>,
}

impl Needs {
    /// Reads the value of `REQUIRE`: "root,node". A test whose need is listed fails
    /// when it is missing; another is skipped.
    pub fn from_require(value: &str) -> Needs {
        Needs {
            required: value
                .split(',')
                .map(|need| need.trim().to_owned())
                .collect(),
        }
    }

    /// True if a test with this need must not be skipped.
    pub fn requires(&self, need: Need) -> bool {
        let name = match need {
            Need::Root => "root",
            Need::Node(_) => "node",
            Need::Vm => "vm",
        };
        self.required.iter().any(|required| required == name)
    }
}

impl Need {
    /// Says what is missing; `None` when the need is met.
    pub fn missing(self, settings: &Settings) -> Option<String> {
        if self == Need::Vm && !Path::new(MARKER).is_file() {
            return Some("not in the machine of `make test-vm`".to_owned());
        }
        if !nix::unistd::geteuid().is_root() {
            return Some("not root".to_owned());
        }
        let Need::Node(tree) = self else { return None };
        let mut tools = vec!["unshare", "nsenter", "ip"];
        if tree.cached(&settings.cache_dir).is_none() {
            tools.push("mmdebstrap");
        }
        tools
            .into_iter()
            .find(|tool| !runs(tool))
            .map(|tool| format!("no {tool}: run `make setup`"))
    }
}

fn runs(tool: &str) -> bool {
    let version = if tool == "ip" { "-V" } else { "--version" };
    Command::new(Path::new(tool))
        .arg(version)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_listed_is_required() {
        let needs = Needs::from_require("root, node");
        assert!(needs.requires(Need::Root));
        assert!(needs.requires(Need::Node(Tree::Forky)));
        assert!(!needs.requires(Need::Vm));
        assert!(!Needs::from_require("").requires(Need::Root));
        assert!(!Needs::from_require("root").requires(Need::Node(Tree::Trixie)));
    }
}
