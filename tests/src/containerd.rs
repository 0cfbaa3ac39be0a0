//! containerd in a node: its configuration, its CNI network, its start.
//!
//! Configuration formats: version 2 (containerd 1.6, 1.7: one CRI plugin
//! `io.containerd.grpc.v1.cri`) and version 3 (2.x: split into `io.containerd.cri.v1.images` and
//! `.runtime`; containerd docs/cri/config.md).

use std::time::Duration;

use crate::node::Node;
use crate::run::CommandRun as _;
use crate::{TestbedError, Tree, poll_until};

/// Socket of the snapshotter in each node.
const SNAPSHOTTER_SOCKET: &str = "/run/transship/snapshotter.sock";
/// Socket of the differ in each node.
const DIFF_SOCKET: &str = "/run/transship/diff.sock";
/// Root of the snapshotter: containerd 1.6 looks for its usage at this place alone.
const SNAPSHOTTER_ROOT: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.transship";
/// The CRI's image for sandboxes; [`crate::Image::pause`] has this name.
pub(crate) const PAUSE_IMAGE: &str = "transship.test/pause:1";

const START_DEADLINE: Duration = Duration::from_secs(30);

/// What of ours a node's containerd is told about.
#[derive(Debug, Clone, Default)]
pub struct ContainerdConfig {
    /// Names the proxy snapshotter `transship` and makes it the CRI's own. Start it first.
    pub transship_snapshotter: bool,
    /// Names the proxy differ `transship` and asks it before the walking one. containerd 1.6
    /// panics on a proxy plugin of type "diff", so it is left out there.
    pub transship_diff: bool,
    /// BinaryName of the CRI's runtime `runc`; for `ctr run` give `--runc-binary` too.
    pub runtime_binary: Option<String>,
    /// The CRI's runtime asks systemd for cgroups; for `ctr run` give `--runc-systemd-cgroup` too.
    pub systemd_cgroup: bool,
    /// Prefixes of annotations that the CRI hands to the runtime besides ours, such as `org.criu.*`.
    pub more_annotations: &'static [&'static str],
    /// TOML to put after all else.
    pub extra: String,
}

impl ContainerdConfig {
    /// The configuration with everything of ours in place.
    pub fn transship() -> ContainerdConfig {
        ContainerdConfig {
            transship_snapshotter: true,
            transship_diff: true,
            runtime_binary: Some("/usr/local/bin/transship-runc".to_owned()),
            ..ContainerdConfig::default()
        }
    }

    /// Writes config.toml for the containerd of this tree.
    pub fn to_toml(&self, tree: Tree) -> String {
        let mut toml = if tree.has_containerd_2() {
            self.cri_of_2()
        } else {
            self.cri_of_1()
        };
        if self.transship_snapshotter {
            toml += &format!(
                "[proxy_plugins.transship]\n  type = \"snapshot\"\n  address = \"{SNAPSHOTTER_SOCKET}\"\n"
            );
            if tree != Tree::Bookworm {
                toml += &format!("  exports = {{ root = \"{SNAPSHOTTER_ROOT}\" }}\n");
            }
            if tree.has_containerd_2() {
                toml += "  capabilities = [\"remap-ids\"]\n";
            }
        }
        if self.transship_diff && tree != Tree::Bookworm {
            toml += &format!(
                "[proxy_plugins.transship-diff]\n  type = \"diff\"\n  address = \"{DIFF_SOCKET}\"\n"
            );
            toml += "[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"transship-diff\", \"walking\"]\n";
        }
        if self.transship_snapshotter && tree != Tree::Bookworm {
            // The transfer service unpacks only for snapshotters that are listed; a list replaces
            // its default, which is the built-in overlayfs.
            let ours = if self.transship_diff {
                "transship-diff"
            } else {
                "walking"
            };
            for (snapshotter, differ) in [("transship", ours), ("overlayfs", "walking")] {
                toml += &format!(
                    "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  \
                     platform = \"linux/amd64\"\n  snapshotter = \"{snapshotter}\"\n  \
                     differ = \"{differ}\"\n"
                );
            }
        }
        toml + &self.extra
    }

    fn cri_of_1(&self) -> String {
        let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
        format!(
            "version = 2\n\
             [{cri}]\n  sandbox_image = \"{PAUSE_IMAGE}\"\n  restrict_oom_score_adj = true\n\
             [{cri}.cni]\n  bin_dir = \"/usr/lib/cni\"\n\
             [{cri}.containerd]\n  snapshotter = \"{snapshotter}\"\n\
             {runtime}",
            snapshotter = self.snapshotter(),
            runtime = self.runtime(cri),
        )
    }

    fn cri_of_2(&self) -> String {
        let images = "plugins.\"io.containerd.cri.v1.images\"";
        let cri = "plugins.\"io.containerd.cri.v1.runtime\"";
        format!(
            "version = 3\n\
             [{images}]\n  snapshotter = \"{snapshotter}\"\n\
             [{images}.pinned_images]\n  sandbox = \"{PAUSE_IMAGE}\"\n\
             [{cri}]\n  restrict_oom_score_adj = true\n\
             [{cri}.cni]\n  bin_dirs = [\"/usr/lib/cni\"]\n\
             {runtime}",
            snapshotter = self.snapshotter(),
            runtime = self.runtime(cri),
        )
    }

    fn snapshotter(&self) -> &'static str {
        if self.transship_snapshotter {
            "transship"
        } else {
            "overlayfs"
        }
    }

    /// `restrict_oom_score_adj` above has its reason here: without CAP_SYS_RESOURCE every sandbox
    /// dies with "can't get final child's PID from pipe: EOF".
    fn runtime(&self, cri: &str) -> String {
        let runc = format!("{cri}.containerd.runtimes.runc");
        let passed: Vec<&str> = [&["dev.transship/*"], self.more_annotations].concat();
        let mut toml = format!(
            "[{runc}]\n  runtime_type = \"io.containerd.runc.v2\"\n  \
             pod_annotations = {passed:?}\n  container_annotations = {passed:?}\n"
        );
        toml += &format!(
            "[{runc}.options]\n  SystemdCgroup = {}\n",
            self.systemd_cgroup
        );
        if let Some(binary) = &self.runtime_binary {
            toml += &format!("  BinaryName = \"{binary}\"\n");
        }
        toml
    }
}

/// A node's containerd that answers.
#[derive(Debug, Clone)]
pub struct Containerd {
    node: Node,
}

impl Node {
    /// Writes containerd's configuration and that of its network.
    ///
    /// # Errors
    /// When the node cannot be written to.
    pub fn configure_containerd(&self, config: &ContainerdConfig) -> Result<(), TestbedError> {
        self.write_file("/etc/containerd/config.toml", config.to_toml(self.tree()))?;
        self.write_cni_config()
    }

    /// Starts containerd with this configuration and waits until it answers.
    ///
    /// # Errors
    /// When containerd ends or does not answer; the error has the end of its log.
    pub fn start_containerd(&self, config: &ContainerdConfig) -> Result<Containerd, TestbedError> {
        self.configure_containerd(config)?;
        self.start_daemon("containerd", &["containerd"])?;
        self.wait_for_daemon("containerd", &["ctr", "version"])?;
        Ok(Containerd { node: self.clone() })
    }

    /// Starts transship-snapshotter and waits for its socket.
    ///
    /// # Errors
    /// When the binary is missing, or the daemon ends or does not listen; the error has the end of its log.
    pub fn start_snapshotter(&self) -> Result<(), TestbedError> {
        self.start_snapshotter_with(&[])
    }

    /// Starts transship-snapshotter with more arguments than its root and address.
    ///
    /// # Errors
    /// As [`Node::start_snapshotter`].
    pub fn start_snapshotter_with(&self, arguments: &[&str]) -> Result<(), TestbedError> {
        let binary = "transship-snapshotter";
        if !self.has_binary(binary) {
            return Err(TestbedError::Missing {
                what: format!("{binary} in node {}", self.name()),
                remedy: "build it: `cargo build --workspace --bins`".to_owned(),
            });
        }
        self.shell("mkdir -p -m 0700 /run/transship").run()?;
        let mut program = vec![
            binary,
            "--root",
            SNAPSHOTTER_ROOT,
            "--address",
            SNAPSHOTTER_SOCKET,
        ];
        program.extend_from_slice(arguments);
        self.start_daemon("snapshotter", &program)?;
        self.wait_for_daemon("snapshotter", &["test", "-S", SNAPSHOTTER_SOCKET])
    }

    /// Runs `ctr` with these arguments and gives its stdout.
    ///
    /// # Errors
    /// When ctr fails, with the end of its stderr.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String, TestbedError> {
        self.command("ctr").args(arguments).read()
    }

    /// Waits until `probe` succeeds; ends early when the daemon has.
    ///
    /// # Errors
    /// When the daemon has ended or the probe does not succeed in time; the error has the end of its log.
    pub fn wait_for_daemon(&self, name: &str, probe: &[&str]) -> Result<(), TestbedError> {
        let mut end = None;
        let answer = poll_until(&format!("start of {name}"), START_DEADLINE, || {
            end = self.daemon_end(name);
            if end.is_some() {
                return Ok(());
            }
            let mut command = self.command(probe[0]);
            command
                .args(&probe[1..])
                .run()
                .map_err(|error| error.to_string())
        });
        let reason = match (answer, end) {
            (Ok(()), None) => return Ok(()),
            (Err(error), _) => error.to_string(),
            (Ok(()), Some(status)) => format!("{name} ended with {status}"),
        };
        let log = self.log_tail(&format!("/var/log/{name}.log"));
        Err(TestbedError::NodeStart {
            node: self.name().to_owned(),
            reason: reason + "\n" + &log,
        })
    }
}

impl Containerd {
    /// The version of the running daemon, as in "1.7.24".
    ///
    /// # Errors
    /// When ctr fails or answers something else.
    pub fn version(&self) -> Result<String, TestbedError> {
        let text = self.node.ctr(&["version"])?;
        // "Server:\n  Version:  1.6.20~ds1"; Debian's packages differ in the "v".
        let version = text
            .split_once("Server:")
            .and_then(|(_, server)| server.split_once("Version:"))
            .and_then(|(_, rest)| rest.split_whitespace().next());
        let Some(version) = version else {
            return Err(TestbedError::Unexpected {
                what: "answer of ctr version",
                text,
            });
        };
        let plain = version.trim_start_matches('v');
        Ok(plain
            .split(['~', '+', '-'])
            .next()
            .unwrap_or(plain)
            .to_owned())
    }

    /// Stops containerd with this signal ("TERM", "KILL"); its containers go on.
    ///
    /// # Errors
    /// When it does not run, or cannot be signalled.
    pub fn stop(self, signal: &str) -> Result<(), TestbedError> {
        self.node.stop_daemon("containerd", signal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_differ_is_kept_from_a_containerd_that_would_panic() {
        let config = ContainerdConfig::transship();
        let old = config.to_toml(Tree::Bookworm);
        assert!(old.starts_with("version = 2\n"));
        assert!(old.contains("type = \"snapshot\""));
        assert!(!old.contains("\"diff\"") && !old.contains("exports"));
        let new = config.to_toml(Tree::Forky);
        assert!(new.starts_with("version = 3\n"));
        assert!(new.contains("type = \"diff\""));
        assert!(new.contains("differ = \"transship-diff\""));
        assert!(new.contains("BinaryName = \"/usr/local/bin/transship-runc\""));
    }

    /// The samples say nothing that the nodes of the tests do not run with.
    #[test]
    fn samples_are_what_the_nodes_run_with() {
        for (tree, sample) in [
            (Tree::Bookworm, "containerd-1.6.toml"),
            (Tree::Trixie, "containerd-1.7.toml"),
            (Tree::Forky, "containerd-2.toml"),
        ] {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/").to_owned() + sample;
            let text = std::fs::read_to_string(&path).unwrap();
            let sample: toml::Value = toml::from_str(&text).unwrap();
            let node = toml::from_str(&ContainerdConfig::transship().to_toml(tree)).unwrap();
            missing(&sample, &node, &mut vec![path]);
        }
    }

    fn missing(sample: &toml::Value, node: &toml::Value, way: &mut Vec<String>) {
        match (sample, node) {
            (toml::Value::Table(sample), toml::Value::Table(node)) => {
                for (key, value) in sample {
                    way.push(key.clone());
                    let found = node.get(key);
                    missing(
                        value,
                        found.unwrap_or_else(|| panic!("{way:?} is not there")),
                        way,
                    );
                    way.pop();
                }
            }
            (sample, node) => assert_eq!(sample, node, "{way:?}"),
        }
    }

    #[test]
    fn the_plain_configuration_knows_nothing_of_us() {
        for tree in Tree::ALL {
            let toml = ContainerdConfig::default().to_toml(tree);
            assert!(!toml.contains("proxy_plugins") && !toml.contains("BinaryName"));
            assert!(toml.contains("snapshotter = \"overlayfs\""));
        }
    }
}
