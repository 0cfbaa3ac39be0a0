//! `/etc/transship/node.toml`: who may restore what on this node.
//!
//! ```text
//! strict = false
//! restore_patience_seconds = 60
//! [may_restore]
//! "staging" = ["shop"]      pods of staging may restore what was taken in shop
//! "ops" = ["*"]             pods of ops may restore everything
//! [pods]
//! allow-options = []        options that their annotations may choose although they loosen what
//!                           confines a container: "lsm-profile", "rootfs", ...
//! [restore]
//! allow = ["hooks"]         what `transship restore` takes from a checkpoint; see foreign_spec
//! [receive]
//! allow = []                what `transship receive` takes from a stream
//! [checkpoints]
//! keep-days = 0             what goes by itself, and what is refused; 0: nothing
//! keep-per-pod = 0
//! keep-gigabytes = 0
//! quota-gigabytes = 0
//! signed-by = []            public keys of minisign: what others have taken is refused without a signature of one
//! allow-native = false      with signed-by: containerd may restore its own checkpoints, which have no signature
//! identity = ""             file (0600) with the keys that open sealed checkpoints for pods
//! [images]
//! registries = []           from which `transship serve` fetches what pods name (`restore-image`)
//! plain-http = []           those of them that are reached without TLS
//! docker-config = ""        directory of Docker's config.json, with the credentials
//! authorities = ""          file of the authorities that sign for them, in PEM; "": those that browsers know
//! ```
//!
//! `asker.rs` says what the rules mean. An unknown key is an error, and then nothing is restored: a rule
//! that is misspelt must not be a rule that is not there.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use transship_checkpoint::annotations::Rootfs;
use transship_checkpoint::criu_options::{CriuOptions, OPTIONS};

use super::foreign_spec::Allowed;

/// Where the file is.
pub const NODE_CONFIG: &str = "/etc/transship/node.toml";

/// The rules of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Whether a checkpoint goes into pods of the service account that it was taken from only.
    pub strict: bool,
    /// Kubernetes namespaces, and those whose checkpoints their pods may restore too; `*`: of all,
    /// also those that are of no pod.
    pub may_restore: BTreeMap<String, Vec<String>>,
    /// How long a restore may make no progress, in seconds.
    pub restore_patience_seconds: u64,
    /// What pods may choose.
    pub pods: PodRules,
    /// For `transship restore`.
    pub restore: Rules,
    /// For `transship receive`.
    pub receive: Rules,
    /// For the directory of checkpoints.
    pub checkpoints: CheckpointRules,
    /// For checkpoints in registries.
    pub images: ImageRules,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            strict: false,
            may_restore: BTreeMap::new(),
            // kubelet waits two minutes for a call.
            restore_patience_seconds: 60,
            pods: PodRules::default(),
            restore: Rules::default(),
            receive: Rules::default(),
            checkpoints: CheckpointRules::default(),
            images: ImageRules::default(),
        }
    }
}

/// Which registries pods may name, and how they are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ImageRules {
    /// HOST or HOST:PORT.
    pub registries: Vec<String>,
    /// Those of them without TLS.
    pub plain_http: Vec<String>,
    /// Directory of Docker's `config.json`; empty: no credentials.
    pub docker_config: PathBuf,
    /// File of authorities in PEM; empty: those that browsers know.
    pub authorities: PathBuf,
}

/// Which checkpoints stay, and which are taken; 0 is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CheckpointRules {
    /// Older ones are removed.
    pub keep_days: u64,
    /// Of each pod, or container outside of one, the newest are kept.
    pub keep_per_pod: usize,
    /// The oldest are removed until all together are smaller, in units of 1 000 000 000 bytes.
    pub keep_gigabytes: u64,
    /// A checkpoint with which all together would be larger is not begun.
    pub quota_gigabytes: u64,
    /// Public keys of minisign.
    pub signed_by: Vec<String>,
    /// Whether containerd's own checkpoints are restored although somebody asks for signatures, which they cannot have.
    pub allow_native: bool,
    /// File of age's identities, or a private key of ssh; empty: none.
    pub identity: PathBuf,
}

/// What checkpoints may ask of this node outside of the CRI.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// Kinds that need no `--allow`.
    pub allow: Allowed,
}

/// What the authors of pods may choose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PodRules {
    /// Names of options of CRIU that are closed to them otherwise, and `rootfs`.
    pub allow_options: Vec<String>,
}

/// A pod, or the checkpoint that it asks for, chooses what the node does not let it choose.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{option} is {value:?}, by an annotation of the pod, by a flag or by the checkpoint, and this node does \
     not let a pod have it; its operator can, by allow-options = [{option:?}] under [pods] in \
     {NODE_CONFIG}"
)]
pub struct ClosedOption {
    /// Name of the option.
    pub option: &'static str,
    /// What it would be.
    pub value: String,
}

/// containerd restores by itself what nobody can have signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node takes what others have with a signature alone (signed-by under [checkpoints] in {NODE_CONFIG}), and a \
     checkpoint that containerd restores by itself has none; its operator can let it, by allow-native = true there"
)]
pub struct NativeUnsigned;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeConfigError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not this format.
    #[error("{path} cannot be parsed, so nothing is restored")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
}

impl NodeConfig {
    /// Reads the file; without one all rules are the default ones.
    ///
    /// # Errors
    /// It is there and cannot be used.
    pub fn read(path: &Path) -> Result<Self, NodeConfigError> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(NodeConfigError::Read {
                    path: path.to_path_buf(),
                    source,
                });
            }
            Ok(text) => text,
        };
        toml::from_str(&text).map_err(|source| NodeConfigError::Parse {
            path: path.to_path_buf(),
            source: Box::new(source),
        })
    }

    /// Checks that a pod may be dumped or restored with these options of CRIU.
    ///
    /// # Errors
    /// The first option that is not the author's to choose.
    pub fn check_options(&self, options: &CriuOptions) -> Result<(), ClosedOption> {
        for option in &OPTIONS {
            if let Some(value) = option.closed_value(options) {
                self.check_open(option.name, value)?;
            }
        }
        Ok(())
    }

    /// Checks that a pod may say that its files are there already.
    ///
    /// # Errors
    /// It says so, and may not.
    pub fn check_rootfs(&self, rootfs: Rootfs) -> Result<(), ClosedOption> {
        match rootfs {
            Rootfs::FromImage => Ok(()),
            Rootfs::Filled => self.check_open("rootfs", "filled".to_owned()),
        }
    }

    /// Checks that containerd may restore by itself (`ctr containers restore`, the CRI's own): nothing tells then who has
    /// made the images.
    ///
    /// # Errors
    /// Somebody asks for signatures, and has not allowed it.
    pub fn check_native(&self) -> Result<(), NativeUnsigned> {
        let CheckpointRules {
            signed_by,
            allow_native,
            ..
        } = &self.checkpoints;
        match signed_by.is_empty() || *allow_native {
            true => Ok(()),
            false => Err(NativeUnsigned),
        }
    }

    fn check_open(&self, option: &'static str, value: String) -> Result<(), ClosedOption> {
        match self.pods.allow_options.iter().any(|it| it == option) {
            true => Ok(()),
            false => Err(ClosedOption { option, value }),
        }
    }

    /// How long a restore may make no progress.
    #[must_use]
    pub fn restore_patience(&self) -> Duration {
        Duration::from_secs(self.restore_patience_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loosens_is_the_operators_to_choose() {
        let mut config = NodeConfig::default();
        let mut options = CriuOptions::default();
        assert!(config.check_options(&options).is_ok());
        options.lsm_profile = Some("apparmor:unconfined".into());
        let error = config.check_options(&options).unwrap_err().to_string();
        assert_eq!(
            error,
            "lsm-profile is \"apparmor:unconfined\", by an annotation of the pod, by a flag or by the \
             checkpoint, and this node does not let a pod have it; its operator can, by allow-options = \
             [\"lsm-profile\"] under [pods] in /etc/transship/node.toml"
        );
        assert!(config.check_rootfs(Rootfs::Filled).is_err());
        config.pods.allow_options = vec!["lsm-profile".into(), "rootfs".into()];
        assert!(config.check_options(&options).is_ok());
        assert!(config.check_rootfs(Rootfs::Filled).is_ok());
        options.shell_job = true;
        assert!(config.check_options(&options).is_err());
    }

    #[test]
    fn what_has_no_signature_is_asked_for_one_by_containerd_as_well() {
        let read = |text: &str| toml::from_str::<NodeConfig>(text).unwrap();
        for (rules, is_open) in [
            ("", true),
            ("[checkpoints]\nsigned-by = [\"RWQ1\"]", false),
            (
                "[checkpoints]\nsigned-by = [\"RWQ1\"]\nallow-native = true",
                true,
            ),
        ] {
            assert_eq!(read(rules).check_native().is_ok(), is_open, "{rules}");
        }
    }

    #[test]
    fn a_misspelt_rule_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        assert_eq!(NodeConfig::read(&path).unwrap(), NodeConfig::default());
        for text in ["strikt = true\n", "[receive]\nallow = [\"all\"]\n"] {
            fs::write(&path, text).unwrap();
            let error = NodeConfig::read(&path).unwrap_err();
            assert!(error.to_string().contains("nothing is restored"), "{error}");
        }
    }

    /// The sample says what the defaults are.
    #[test]
    fn the_sample_is_the_default() {
        let sample = include_str!("../../../config/node.toml");
        let config: NodeConfig = toml::from_str(sample).unwrap();
        assert_eq!(config, NodeConfig::default());
    }
}
