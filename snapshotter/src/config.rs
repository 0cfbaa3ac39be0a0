//! The configuration file and what it means; `config/snapshotter.toml` shows every key.
//!
//! Flags of the command line win over the file, the file over the defaults. An unknown key is an error
//! that names the nearest known one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::durable_commit::DurableCommit;

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of the database and the snapshots. containerd 1.6 reads the disk use of a snapshotter
    /// named `transship` from exactly the default path.
    pub root: PathBuf,
    /// Unix socket of the snapshots service.
    pub address: PathBuf,
    /// Unix socket of the diff service; empty: none.
    pub diff_address: PathBuf,
    /// containerd's socket: the diff service reads and writes layers through it.
    pub containerd_address: PathBuf,
    /// How log lines look.
    pub log_format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives of tracing's EnvFilter. Read again at
    /// SIGHUP.
    pub log_level: String,
    /// Options of every overlay mount, such as `volatile` or `metacopy=off`.
    pub mount_options: Vec<String>,
    /// Turn the labels `containerd.io/snapshot/{uid,gid}mapping` into mount options (idmapped mounts).
    pub remap_ids: bool,
    /// Show the label `containerd.io/snapshot/overlay.upperdir`.
    pub upperdir_label: bool,
    /// Delete directories before Remove answers, instead of in the background.
    pub sync_remove: bool,
    /// Before which answers of Commit the file system is synced, so that layers survive a power failure.
    pub durable_commit: DurableCommit,
    /// Address for Prometheus (`127.0.0.1:9257`); without one there are no metrics.
    pub metrics_address: Option<SocketAddr>,
    /// Calls that are worked on at the same time; more wait their turn. Each takes a thread, and those
    /// that wait for the disk together share one sync.
    pub concurrent_calls: usize,
    /// Page cache of the metadata database in MiB.
    pub metadata_cache_mib: usize,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/containerd/io.containerd.snapshotter.v1.transship".into(),
            address: "/run/transship/snapshotter.sock".into(),
            diff_address: "/run/transship/diff.sock".into(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            log_format: LogFormat::Text,
            log_level: "info".to_owned(),
            mount_options: Vec::new(),
            remap_ids: true,
            upperdir_label: false,
            sync_remove: false,
            durable_commit: DurableCommit::default(),
            metrics_address: None,
            concurrent_calls: 16,
            metadata_cache_mib: 2,
        }
    }
}

/// The names of all keys.
const KEYS: &[&str] = &[
    "root",
    "address",
    "diff_address",
    "containerd_address",
    "log_format",
    "log_level",
    "mount_options",
    "remap_ids",
    "upperdir_label",
    "sync_remove",
    "durable_commit",
    "metrics_address",
    "concurrent_calls",
    "metadata_cache_mib",
];

/// Keys of earlier releases. They mean nothing, and are no errors: the file of a node outlives its daemon.
const RETIRED_KEYS: &[&str] = &["import_dir"];

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or a value has the wrong type.
    #[error("cannot understand {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: Box<toml::de::Error>,
    },
    /// The file has a key that means nothing.
    #[error("{}: unknown key {key:?}; did you mean {nearest:?}?", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key as written.
        key: String,
        /// The known key that is most like it.
        nearest: &'static str,
    },
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// A file that cannot be read or understood.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let parse = |source| ConfigError::Parse {
            path: path.to_path_buf(),
            source: Box::new(source),
        };
        let mut table: toml::Table = text.parse().map_err(parse)?;
        table.retain(|key, _| !RETIRED_KEYS.contains(&key));
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let nearest = KEYS
                .iter()
                .min_by_key(|known| strsim::levenshtein(key, known));
            return Err(ConfigError::UnknownKey {
                path: path.to_path_buf(),
                key: key.clone(),
                nearest: nearest.expect("there are keys"),
            });
        }
        table.try_into().map_err(parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_shows_every_key_with_its_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/snapshotter.toml");
        let sample = Config::read(&path).unwrap();
        assert_eq!(sample, Config::default());
        // A key without a default is shown as a comment.
        let text = std::fs::read_to_string(&path)
            .unwrap()
            .replace("# metrics_", "metrics_");
        Config::parse(&text, &path).unwrap();
        let table: toml::Table = text.parse().unwrap();
        let mut keys: Vec<_> = table.keys().map(String::as_str).collect();
        let mut known = KEYS.to_vec();
        keys.sort_unstable();
        known.sort_unstable();
        assert_eq!(keys, known);
    }

    #[test]
    fn commits_wait_for_images_for_all_or_for_none() {
        let parse = |value: &str| {
            let text = format!("durable_commit = {value}");
            Config::parse(&text, Path::new("/etc/x.toml")).map(|config| config.durable_commit)
        };
        assert_eq!(parse("\"images\"").unwrap(), DurableCommit::Images);
        assert_eq!(parse("true").unwrap(), DurableCommit::Always);
        assert_eq!(parse("false").unwrap(), DurableCommit::Never);
        let error = crate::error::one_line(&parse("\"image\"").unwrap_err());
        assert!(
            error.contains("expected \"images\", true or false"),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_known_one() {
        let error = Config::parse("sync_removal = true", Path::new("/etc/x.toml")).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"/etc/x.toml: unknown key "sync_removal"; did you mean "sync_remove"?"#
        );
    }

    #[test]
    fn a_retired_key_is_ignored() {
        let config = Config::parse("import_dir = \"/x\"", Path::new("/etc/x.toml")).unwrap();
        assert_eq!(config, Config::default());
    }
}
