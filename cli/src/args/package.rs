//! The flags of the commands that look into checkpoints, pack them, and clean them up.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use transship_engine::import::Lies;
use transship_package::DEFAULT_LEVEL;
use transship_package::oci::{Reference, RegistryError};

use super::parse_size;

/// `transship inspect`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Name of a checkpoint, file that export has written, HOST/NAME:TAG in a registry, of which memory stays there, or
    /// oci:DIR or oci:DIR:TAG, an OCI image layout
    #[arg(value_name = "NAME|FILE|REF|oci:DIR")]
    pub(crate) name: String,
    /// Compare every file with its digest; those of a package always are
    #[arg(long)]
    pub(crate) verify: bool,
    /// Show all of each list, not its first lines
    #[arg(long)]
    pub(crate) all: bool,
    /// The keys for a package that is encrypted.
    #[command(flatten)]
    pub(crate) keys: IdentityArgs,
    /// How the registry is reached.
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// `transship diff`
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// Name of the older checkpoint
    #[arg(value_name = "A")]
    pub(crate) old: String,
    /// Name of the newer one
    #[arg(value_name = "B")]
    pub(crate) new: String,
    /// The keys for those that are sealed.
    #[command(flatten)]
    pub(crate) keys: IdentityArgs,
}

/// `transship export`
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Name of the checkpoint; the package of one that is sealed is copied as it lies, encrypted, unless --identity opens
    /// it
    pub(crate) name: String,
    /// File to write, - for stdout
    pub(crate) file: PathBuf,
    /// For whom: transship itself, or another engine, whose archive has one container and is neither
    /// compressed nor encrypted nor signed
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FormatArg::Transship)]
    pub(crate) format: FormatArg,
    /// Which container of the checkpoint, for another engine, when it has several
    #[arg(long)]
    pub(crate) container: Option<String>,
    /// Who can read it: an age public key (age1...), a public key of ssh, or a file of them; several times
    /// for several readers
    #[arg(long, value_name = "KEY|FILE")]
    pub(crate) encrypt_to: Vec<String>,
    /// Sign it with this secret key of minisign, which has no password (minisign -G -W)
    #[arg(long, value_name = "FILE")]
    pub(crate) sign: Option<PathBuf>,
    /// The keys for one that is sealed.
    #[command(flatten)]
    pub(crate) keys: LeavingArgs,
    /// How hard zstd tries, from 1 to 19; 0: nothing is compressed
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(0..=19))]
    pub(crate) level: i32,
}

/// Formats of packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// Everything, also a whole pod
    Transship,
    /// What containerd's CRI writes, and restores up to 2.3
    Containerd,
    /// What CRI-O writes and restores
    Crio,
    /// What podman restores (container restore --import), when it has the image: a container with namespaces of
    /// its own. containerd is asked for the image
    Podman,
    /// An OCI image layout, a directory in which checkpoints share what is the same: FILE is the directory,
    /// which may have others already, and the checkpoint's name becomes its tag
    Oci,
}

/// `transship import`
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// File to read, - for stdin; or the directory of an OCI image layout
    pub(crate) file: PathBuf,
    /// Which one of an OCI image layout [default: the only one]
    #[arg(long)]
    pub(crate) tag: Option<String>,
    /// What the checkpoint is called [default: as it was]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The keys for a package that is encrypted.
    #[command(flatten)]
    pub(crate) keys: TakingArgs,
    /// Take it only with a signature of this public key of minisign; several times for several keys
    /// [default: those of node.toml]
    #[arg(long, value_name = "KEY")]
    pub(crate) signed_by: Vec<String>,
    /// Most that is taken, such as 64G [default: what fits on the disk]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_size: Option<u64>,
}

/// Keys for what is encrypted.
#[derive(Debug, Args)]
pub(crate) struct IdentityArgs {
    /// File with your identities of age, or your private key of ssh, for what is encrypted
    #[arg(long, value_name = "FILE")]
    pub(crate) identity: Vec<PathBuf>,
}

/// How what is sealed leaves the node.
#[derive(Debug, Args)]
pub(crate) struct LeavingArgs {
    /// The keys.
    #[command(flatten)]
    pub(crate) keys: IdentityArgs,
    /// Let one that is sealed leave this node in clear, with its memory
    #[arg(long, requires = "identity")]
    pub(crate) in_clear: bool,
}

/// How what is encrypted is taken.
#[derive(Debug, Args)]
pub(crate) struct TakingArgs {
    /// The keys.
    #[command(flatten)]
    pub(crate) keys: IdentityArgs,
    /// Keep what is encrypted on the disk of this node in clear [default: as it came]
    #[arg(long, requires = "identity")]
    in_clear: bool,
}

impl TakingArgs {
    pub(crate) fn lies(&self) -> Lies {
        match self.in_clear {
            true => Lies::InClear,
            false => Lies::Sealed,
        }
    }
}

/// `transship prune`
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Remove those that are older, such as 30days or 12h
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) max_age: Option<Duration>,
    /// Keep as many of each pod, or of each container outside of one: the newest
    #[arg(long, value_name = "NUMBER")]
    pub(crate) max_per_pod: Option<usize>,
    /// Remove the oldest until all together are smaller, such as 100G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_size: Option<u64>,
    /// Only tell which would go
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// `transship push`
#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Name of the checkpoint
    pub(crate) name: String,
    /// HOST/NAME:TAG in a registry
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub(crate) reference: Reference,
    /// Sign it with this secret key of minisign, which has no password (minisign -G -W)
    #[arg(long, value_name = "FILE")]
    pub(crate) sign: Option<PathBuf>,
    /// How hard zstd tries, from 1 to 19
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) level: i32,
    /// Who can read it: an age public key (age1...), a public key of ssh, or a file of them; several times
    /// for several readers. There is no image then, and nothing in common with other checkpoints
    #[arg(long, value_name = "KEY|FILE")]
    pub(crate) encrypt_to: Vec<String>,
    /// The keys for one that is sealed.
    #[command(flatten)]
    pub(crate) keys: LeavingArgs,
    /// Push the checkpoint alone, without an image that starts each of its containers cold
    #[arg(long)]
    pub(crate) artifact_only: bool,
    /// How the registry is reached.
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// `transship pull`
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// HOST/NAME:TAG or HOST/NAME@sha256:DIGEST in a registry
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub(crate) reference: Reference,
    /// What the checkpoint is called [default: as it was]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Take it only with a signature of this public key of minisign; several times for several keys
    /// [default: those of node.toml]
    #[arg(long, value_name = "KEY")]
    pub(crate) signed_by: Vec<String>,
    /// Most that is taken, such as 64G [default: what fits on the disk]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_size: Option<u64>,
    /// The keys for one that is encrypted.
    #[command(flatten)]
    pub(crate) keys: TakingArgs,
    /// How the registry is reached.
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// How a registry is reached. Who asks stands in Docker's config.json.
#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    /// Without TLS
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// Whoever the registry says it is
    #[arg(long, conflicts_with = "plain_http")]
    pub(crate) skip_verify: bool,
    /// File of the authorities that sign for it, in PEM [default: those that browsers know]
    #[arg(long, value_name = "FILE", conflicts_with = "plain_http")]
    pub(crate) tlscacert: Option<PathBuf>,
    /// Directory of Docker's config.json, which has the credentials [default: ~/.docker]
    #[arg(long, value_name = "DIR", env = "DOCKER_CONFIG")]
    pub(crate) docker_config: Option<PathBuf>,
}

fn parse_reference(text: &str) -> Result<Reference, String> {
    text.parse()
        .map_err(|error: RegistryError| error.to_string())
}
