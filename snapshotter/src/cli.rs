//! The command line.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError, LogFormat};

/// Overlayfs snapshots for containerd: serves its snapshots API on a Unix socket, to be named as a
/// proxy plugin of type "snapshot".
#[derive(Debug, Parser)]
#[command(name = "transship-snapshotter", version)]
pub struct Arguments {
    /// Directory of the database and the snapshots
    /// [default: /var/lib/containerd/io.containerd.snapshotter.v1.transship]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,

    /// Unix socket to listen on, made with mode 0600 [default: /run/transship/snapshotter.sock]
    #[arg(long, value_name = "SOCK")]
    pub address: Option<PathBuf>,

    /// Unix socket of the diff service, empty for none [default: /run/transship/diff.sock, none
    /// with another --address than the default]
    #[arg(long, value_name = "SOCK", value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub diff_address: Option<PathBuf>,

    /// containerd's socket, for the diff service [default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCK")]
    pub containerd_address: Option<PathBuf>,

    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,

    /// How log lines on stderr look [default: text]
    #[arg(long, value_name = "FORMAT", global = true)]
    pub log_format: Option<LogFormat>,

    /// Least severe level that is logged: error, warn, info, debug, trace [default: info]
    #[arg(long, value_name = "LEVEL", global = true)]
    pub log_level: Option<String>,

    /// Die by SIGKILL at this step (debug builds, for crash tests)
    #[cfg(debug_assertions)]
    #[arg(long, value_name = "STEP[=COUNT]", hide = true)]
    pub kill_at: Option<crate::fault::KillAt>,

    /// What to do instead of serving
    #[command(subcommand)]
    pub command: Option<Command>,
}

const FSCK_CODES: &str = "Exit codes, as of fsck(8):\n  0  nothing was found\n  1  all that was found is mended\n  \
                          4  something is left\n  8  it could not be checked";

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check that database and directories agree; the daemon must not be running
    #[command(after_help = FSCK_CODES)]
    Fsck {
        /// Mend what can be mended; rebuild the database from the directories when it is lost
        #[arg(long)]
        repair: bool,
    },
}

impl Arguments {
    /// The configuration: defaults, then the file, then the flags.
    ///
    /// # Errors
    /// A configuration file that cannot be read or understood.
    pub fn configuration(&self) -> Result<Config, ConfigError> {
        let mut config = self
            .config
            .as_deref()
            .map_or(Ok(Config::default()), Config::read)?;
        if let Some(root) = &self.root {
            config.root.clone_from(root);
        }
        if let Some(address) = &self.address {
            config.address.clone_from(address);
        }
        if let Some(address) = &self.diff_address {
            config.diff_address.clone_from(address);
        }
        if let Some(address) = &self.containerd_address {
            config.containerd_address.clone_from(address);
        }
        // A daemon beside the usual one must not compete with it for the usual socket.
        let usual = Config::default();
        if config.address != usual.address && config.diff_address == usual.diff_address {
            config.diff_address = PathBuf::new();
        }
        if let Some(format) = self.log_format {
            config.log_format = format;
        }
        if let Some(level) = &self.log_level {
            config.log_level.clone_from(level);
        }
        Ok(config)
    }
}
