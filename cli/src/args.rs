//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use transship_checkpoint::criu_options::CriuOverrides;
use transship_engine::check::lacking::MayLack;
use transship_engine::conversation::LINK_PATIENCE;
use transship_engine::data_channel::DataAddress;
use transship_engine::migrate::PrecopyBounds;
use transship_engine::restore::{AddressChoice, Target};
use transship_engine::stuck_dump::PROGRESS_PATIENCE;
use transship_sandbox::admission::foreign_spec::Allow;

mod criu;
mod package;

pub(crate) use criu::{CriuArgs, Dumps, Moves, Restores};
pub(crate) use package::{
    DiffArgs, ExportArgs, FormatArg, IdentityArgs, ImportArgs, InspectArgs, LeavingArgs, PruneArgs,
    PullArgs, PushArgs, RegistryArgs,
};

/// Moves running containers from one containerd node to another: memory, writable layer, namespaces.
#[derive(Debug, Parser)]
#[command(name = "transship", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Which containerd, which of its namespaces, and how to print.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; what was there before is there now
  2  the command line is wrong
  3  the container, checkpoint or node does not exist
  4  refused before anything was touched; the reasons are printed
  5  the other node failed or cannot be reached; the source runs on
  6  the connection broke in the moment of commitment; the source is left paused: transship recover";

const CHECK_EXIT_CODES: &str = "\
Each line is one of
  ok       as it should be
  note     works, with the limit that is told
  problem  does not work; what to do is told

Exit codes:
  0  no problem
  1  a problem, or several
  3  the container or pod does not exist
  4  it does not run";

const RECOVER_EXIT_CODES: &str = "\
Exit codes:
  0  all are decided, or there were none
  3  there is no such migration
  6  some are not decided; their sources stay paused";

/// Which containerd, which of its namespaces, and how to print.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// containerd's namespace
    #[arg(
        short,
        long,
        global = true,
        default_value = "default",
        env = "CONTAINERD_NAMESPACE"
    )]
    pub(crate) namespace: String,
    /// containerd's socket
    #[arg(
        short,
        long,
        global = true,
        default_value = "/run/containerd/containerd.sock",
        env = "CONTAINERD_ADDRESS"
    )]
    pub(crate) address: PathBuf,
    /// Print the result as JSON on stdout
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Take a checkpoint of a running container or pod; it goes on running
    Checkpoint(CheckpointArgs),
    /// Make a running container of a checkpoint
    Restore(RestoreArgs),
    /// Move a running container, or a pod, to another node
    Migrate(Box<MigrateArgs>),
    /// Decide migrations whose command has ended before it knew which copy runs
    #[command(after_help = RECOVER_EXIT_CODES)]
    Recover(RecoverArgs),
    /// Write a checkpoint to stdout
    Send(SendArgs),
    /// Read a checkpoint, or a migration, from stdin
    Receive(ReceiveArgs),
    /// Show what is in a checkpoint, or in a package
    Inspect(InspectArgs),
    /// Show what changed from one checkpoint of a container to another
    Diff(DiffArgs),
    /// Write a checkpoint into a file
    Export(ExportArgs),
    /// Make a checkpoint of a file
    Import(ImportArgs),
    /// Put a checkpoint into a registry, with an image that starts cold
    Push(PushArgs),
    /// Make a checkpoint of what push has put into a registry
    Pull(PullArgs),
    /// List the checkpoints of this node
    Ls,
    /// Remove checkpoints
    Rm(RmArgs),
    /// Remove checkpoints by age, number and size
    Prune(PruneArgs),
    /// Write what a snapshot changes as an OCI layer, or read it from one
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Tell whether this node can checkpoint and restore, or a container be moved, and what to do where
    /// it cannot
    #[command(after_help = CHECK_EXIT_CODES)]
    Check(CheckArgs),
    /// Serve the node's API: checkpoint and restore of pods, export and import of snapshots
    Serve {
        /// Unix socket (mode 0600)
        #[arg(long, value_name = "PATH", default_value = transship_proto::node_api::NODE_SOCKET)]
        socket: PathBuf,
    },
    /// Let frozen containers run again when the pipe on stdin ends (this program starts it)
    #[command(hide = true)]
    FreezeGuard(GuardArgs),
    /// Ask which copy of a migration runs when the pipe on stdin ends (this program starts it)
    #[command(hide = true)]
    CommitGuard(GuardArgs),
    /// Remove the copy of a restore that was killed when the pipe on stdin ends (this program starts it)
    #[command(hide = true)]
    CopyGuard(GuardArgs),
    /// Publish in containerd's events what has become of a container (for the runtime front)
    #[command(hide = true)]
    Publish(PublishArgs),
    /// End an arriving migration whose command is gone when the pipe on stdin ends (this program starts
    /// it)
    #[command(hide = true)]
    ReceiveGuard(GuardArgs),
    /// Kill and delete the task of a container (for the runtime front)
    #[command(hide = true)]
    DeleteTask {
        /// Container id
        id: String,
    },
    /// Tell whether containerd has a container of this id: `yes` or `no` (for the runtime front)
    #[command(hide = true)]
    HasContainer {
        /// Container id
        id: String,
    },
    /// Write down the links that CRIU has made in a pod's /dev/shm (for CRIU's action script)
    #[command(hide = true)]
    DumpLinks {
        /// The directory
        dir: PathBuf,
        /// The file that is made
        to: PathBuf,
    },
    /// Open a sealed checkpoint with the node's key (for the hook of a pod)
    #[command(hide = true)]
    OpenSealed {
        /// The checkpoint
        name: String,
    },
    /// Check that this node may restore a checkpoint: it has taken it, or one of its keys has signed it (for the runtime
    /// front and the hook of a pod)
    #[command(hide = true)]
    CheckSignature {
        /// The checkpoint
        name: String,
    },
    /// Print which image a container is made of (for the runtime front)
    #[command(hide = true)]
    ContainerBase {
        /// Container id
        id: String,
        /// Chain id of layers: one that is made of these is not asked for the digest of its image
        #[arg(long, value_name = "CHAIN")]
        expected: Option<String>,
    },
}

/// What a guard is started with.
#[derive(Debug, Args)]
pub(crate) struct GuardArgs {
    /// It is below nobody who could be ended with it
    #[arg(long)]
    pub(crate) alone: bool,
}

/// `transship publish`
#[derive(Debug, Args)]
pub(crate) struct PublishArgs {
    /// The last part of the topic
    #[arg(value_name = "WHAT", value_parser = ["restored", "started-cold", "not-run-again"])]
    pub(crate) what: String,
    /// Container id
    pub(crate) id: String,
    /// The checkpoint's name
    #[arg(long, value_name = "NAME")]
    pub(crate) checkpoint: Option<String>,
    /// Why
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

/// `transship snapshot`
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Write what a container or snapshot changes as an OCI layer (a plain tar)
    Export(SnapshotExportArgs),
    /// Fill a fresh snapshot from an OCI layer (plain, gzip or zstd)
    Import(SnapshotImportArgs),
    /// Write what distinguishes one snapshot from another as an OCI layer (a plain tar)
    Diff(SnapshotDiffArgs),
}

/// `transship snapshot export`
#[derive(Debug, Args)]
pub(crate) struct SnapshotExportArgs {
    /// Container id, or key of a snapshot
    #[arg(value_name = "KEY|CONTAINER")]
    pub(crate) name: String,
    /// File to write, - for stdout
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
    /// Instead of a layer make the directory DIR, a copy of the snapshot's own by reflink: at once and
    /// without taking room, on XFS and btrfs, for an import --raw over the same parent
    #[arg(long, value_name = "DIR", conflicts_with_all = ["output", "no_pause"])]
    pub(crate) raw: Option<PathBuf>,
    /// Snapshotter [default: the container's; for a key transship where the node has it, else
    /// overlayfs]
    #[arg(long)]
    pub(crate) snapshotter: Option<String>,
    /// Let a running container run; if it changes what is being read, the export fails
    #[arg(long)]
    pub(crate) no_pause: bool,
}

/// `transship snapshot import`
#[derive(Debug, Args)]
pub(crate) struct SnapshotImportArgs {
    /// Key of an active snapshot without changes of its own, or id of its container, which must not
    /// run
    pub(crate) key: String,
    /// File to read, - for stdin
    #[arg(default_value = "-")]
    pub(crate) file: PathBuf,
    /// Take the files by reflink from a directory that export --raw has made
    #[arg(long, value_name = "DIR", conflicts_with = "file")]
    pub(crate) raw: Option<PathBuf>,
    /// Make the snapshot KEY on top of this committed one (\"\" for none)
    #[arg(long, value_name = "NAME")]
    pub(crate) parent: Option<String>,
    /// Snapshotter [default: the container's; for a key transship where the node has it, else
    /// overlayfs]
    #[arg(long)]
    pub(crate) snapshotter: Option<String>,
}

/// `transship snapshot diff`
#[derive(Debug, Args)]
pub(crate) struct SnapshotDiffArgs {
    /// The older one: key of a snapshot, or container id
    #[arg(value_name = "A")]
    pub(crate) old: String,
    /// The newer one
    #[arg(value_name = "B")]
    pub(crate) new: String,
    /// File to write, - for stdout
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
    /// Snapshotter [default: the containers'; for keys transship where the node has it, else
    /// overlayfs]
    #[arg(long)]
    pub(crate) snapshotter: Option<String>,
    /// Let a running container run; if it changes what is being read, the diff fails or is torn
    #[arg(long)]
    pub(crate) no_pause: bool,
}

/// `transship checkpoint`
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// Container id
    #[arg(required_unless_present = "pod", conflicts_with = "pod")]
    pub(crate) container: Option<String>,
    /// Pod of the CRI instead, by its id or as namespace/name: all its containers, stopped at one
    /// moment
    #[arg(long)]
    pub(crate) pod: Option<String>,
    /// Volumes of the pod whose content comes along; /dev/shm always does
    #[arg(long, value_enum, value_name = "KIND", requires = "pod")]
    pub(crate) volumes: Vec<VolumesArg>,
    /// Name of the checkpoint [default: its id and the date]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Leave the container paused
    #[arg(long)]
    pub(crate) leave_paused: bool,
    /// The pod moves: leave it paused, and let nothing of it start on this node any more, unless the
    /// checkpoint fails (recover --pod takes that back)
    #[arg(long, requires = "pod")]
    pub(crate) moved: bool,
    /// With --moved where another runtime than transship's front would start the pod again: you delete it
    /// before its liveness probes fail
    #[arg(long, requires = "moved")]
    pub(crate) source_pod_will_be_deleted: bool,
    /// How long it may stand still.
    #[command(flatten)]
    pub(crate) freeze: FreezeArgs,
    /// What is told afterwards.
    #[command(flatten)]
    pub(crate) timeline: TimelineArgs,
    /// Try a restore of it at once: into a container of its own, which executes nothing and is removed
    #[arg(long, conflicts_with_all = ["pod", "leave_paused", "encrypt_to"])]
    pub(crate) verify_restore: bool,
    /// Seal it: it is dumped into memory, and comes onto the disk only encrypted, for whoever this is: an age public
    /// key (age1...), a public key of ssh, or a file of them; several times for several readers. It takes as much
    /// memory as its containers have, half of what is available at most
    #[arg(long, value_name = "KEY|FILE")]
    pub(crate) encrypt_to: Vec<String>,
    /// When a dump is given up.
    #[command(flatten)]
    pub(crate) dump: DumpArgs,
    /// What CRIU is told.
    #[command(flatten)]
    pub(crate) criu: CriuArgs<Dumps>,
}

/// `transship check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Container to look at: everything that keeps it from being moved, at once
    #[arg(conflicts_with_all = ["pod", "node"])]
    pub(crate) container: Option<String>,
    /// Pod of the CRI to look at, by its id or as namespace/name
    #[arg(long, conflicts_with = "node")]
    pub(crate) pod: Option<String>,
    /// Volumes of the pod whose content would come along
    #[arg(long, value_enum, value_name = "KIND", requires = "pod")]
    pub(crate) volumes: Vec<VolumesArg>,
    /// Print what another node has to know of this one, as JSON
    #[arg(long, conflicts_with = "other")]
    pub(crate) node: bool,
    /// Compare with the node on which check --node has printed FILE
    #[arg(long = "for", value_name = "FILE")]
    pub(crate) other: Option<PathBuf>,
    /// What CRIU would be told.
    #[command(flatten)]
    pub(crate) criu: CriuArgs<Dumps>,
}

/// When a dump is given up.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct DumpArgs {
    /// End a dump that writes nothing for so long; the container goes on running
    #[arg(long, value_name = "SECONDS", default_value_t = PROGRESS_PATIENCE.as_secs(),
          value_parser = clap::value_parser!(u64).range(1..))]
    dump_timeout: u64,
    /// What comes along of the log of a pod's container, or of a file that the output goes to: it is put in front
    /// of what the restored container writes
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = LogsArg::Newest)]
    logs: LogsArg,
}

/// Which lines of a log come along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogsArg {
    /// The newest 16 MiB
    Newest,
    /// None
    None,
}

impl DumpArgs {
    pub(crate) fn leave_logs(self) -> bool {
        self.logs == LogsArg::None
    }

    pub(crate) fn patience(self) -> Duration {
        Duration::from_secs(self.dump_timeout)
    }
}

/// Kinds of volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VolumesArg {
    /// emptyDir volumes, of disk and memory
    #[value(name = "emptydir")]
    EmptyDir,
}

/// What the container becomes on the node that it comes to.
#[derive(Debug, Clone, Args)]
pub(crate) struct TargetArgs {
    /// Container whose namespaces are joined in place of those shared before
    #[arg(long, value_name = "CONTAINER", conflicts_with = "new_namespaces")]
    pub(crate) sandbox: Option<String>,
    /// Make namespaces that were shared before the container's own
    #[arg(long)]
    pub(crate) new_namespaces: bool,
    /// Container id [default: the one it had]
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// Snapshotter [default: transship where the node has it, else the one it had]
    #[arg(long)]
    pub(crate) snapshotter: Option<String>,
    /// OCI runtime front of the restored container [default: transship-runc beside this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) runtime_binary: Option<String>,
    /// Where its output goes: file:///path or binary:///path, as in ctr [default: nowhere]
    #[arg(long)]
    pub(crate) log_uri: Option<String>,
    /// What a container that was in networks of CNI by itself gets here: an address that the network has, the
    /// address that it had, or no network [default: new, in the first network of the node]
    #[arg(long, value_enum, value_name = "ADDRESS")]
    pub(crate) network: Option<AddressArg>,
    /// Let the checkpoint have this, which other containers do not have (most of it is root on the
    /// node): hooks, criu-options, devices, host-mounts, capabilities, host-namespaces, cgroup-path,
    /// unmasked-paths, other-fields, image-name, host-ports, log-uri [default: what /etc/transship/node.toml allows]
    #[arg(long, value_name = "KIND")]
    pub(crate) allow: Vec<Allow>,
}

impl TargetArgs {
    pub(crate) fn target(&self, criu: CriuOverrides) -> Target {
        Target {
            id: self.id.clone(),
            sandbox: self.sandbox.clone(),
            new_namespaces: self.new_namespaces,
            snapshotter: self.snapshotter.clone(),
            runtime_binary: self.runtime_binary.clone(),
            log_uri: self.log_uri.clone(),
            address: self.network.map(AddressArg::choice),
            criu,
            allowed: self.allow.iter().copied().collect(),
        }
    }
}

/// What is told afterwards.
#[derive(Debug, Args)]
pub(crate) struct TimelineArgs {
    /// Draw what took how long into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) timeline: Option<PathBuf>,
}

/// How long containers may stand still.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct FreezeArgs {
    /// Give up when the container has stood still for this long, such as 800ms or 5s; it goes on
    /// running. A dump by CRIU that has begun is waited for
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) max_freeze: Option<Duration>,
}

/// When the link of a migration is given up.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LinkArgs {
    /// Give up a migration whose link is silent for this long; the container goes on running
    #[arg(long, value_name = "SECONDS", default_value_t = LINK_PATIENCE.as_secs(),
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    link_timeout: u64,
}

impl LinkArgs {
    pub(crate) fn patience(self) -> Duration {
        Duration::from_secs(self.link_timeout)
    }
}

/// Which address a container of its own network has afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AddressArg {
    /// One that the network there has
    New,
    /// The one that it had; it is removed here before
    Keep,
    /// None: it has no network
    None,
}

impl AddressArg {
    fn choice(self) -> AddressChoice {
        match self {
            Self::New => AddressChoice::New,
            Self::Keep => AddressChoice::Keep,
            Self::None => AddressChoice::None,
        }
    }
}

/// A number of bytes with a suffix, as in 16M.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("the suffixes are K, M, G and T".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "it is no number".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "it is too large".to_owned())
}

/// `transship restore`
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Name of the checkpoint
    pub(crate) name: String,
    /// Which of its containers, when it has several
    #[arg(long)]
    pub(crate) container: Option<String>,
    /// The keys for one that is sealed.
    #[command(flatten)]
    pub(crate) keys: IdentityArgs,
    /// What it becomes.
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// What CRIU is told, where that is not what it was told at the dump.
    #[command(flatten)]
    pub(crate) criu: CriuArgs<Restores>,
}

/// `transship migrate`
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Container id
    #[arg(required_unless_present = "pod", conflicts_with = "pod")]
    pub(crate) container: Option<String>,
    /// Pod of the CRI instead, by its id or as namespace/name: all its containers, frozen at one moment, into a
    /// pod that is made through the CRI of the other node, where no kubelet may run
    #[arg(long, conflicts_with_all = ["sandbox", "new_namespaces", "id", "snapshotter", "runtime_binary",
          "log_uri", "network"])]
    pub(crate) pod: Option<String>,
    /// Volumes of the pod whose content comes along; /dev/shm always does
    #[arg(long, value_enum, value_name = "KIND", requires = "pod")]
    pub(crate) volumes: Vec<VolumesArg>,
    /// The pod on the other node is made by its kubelet, or another client of the CRI there: wait for it. It has the
    /// annotation dev.transship/receive, whose value is printed before the freeze
    #[arg(long, requires = "pod")]
    pub(crate) wait_for_pod: bool,
    /// Command that runs its arguments on the other node, such as 'ssh node-b'
    #[arg(long, value_name = "COMMAND")]
    pub(crate) to: String,
    /// The program's path on the other node
    #[arg(long, value_name = "PATH", default_value = "transship")]
    pub(crate) remote_program: String,
    /// Command to run here while neither copy runs: after the checkpoint has arrived, before the
    /// restore (detach a volume, move an address). If it fails, the migration is undone.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) before_restore: Option<String>,
    /// Keep the container's record and snapshot on this node, stopped; of a pod sandbox and containers
    #[arg(long)]
    pub(crate) keep_source: bool,
    /// How long it may stand still.
    #[command(flatten)]
    pub(crate) freeze: FreezeArgs,
    /// What is told afterwards.
    #[command(flatten)]
    pub(crate) timeline: TimelineArgs,
    /// Command that asks the program as its clients do, such as 'redis-cli -h 10.0.0.5 ping': run here over and over, and
    /// the longest time without an answer is told afterwards. Nothing is moved unless it succeeds within a second; the copy
    /// has ten seconds to answer
    #[arg(long, value_name = "COMMAND")]
    pub(crate) probe: Option<String>,
    /// When the link is given up.
    #[command(flatten)]
    pub(crate) link: LinkArgs,
    /// How often memory is gone through and sent while the container still runs, at most; 0: all of it, and all files,
    /// only in the freeze
    #[arg(long, value_name = "ROUNDS", default_value_t = PrecopyBounds::default().rounds)]
    pub(crate) max_precopy_rounds: u32,
    /// How long that may take, at most, and the same again for files; the file that is under way is sent to its end
    /// [default: 1m]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) max_precopy_time: Option<Duration>,
    /// Let the copy run as soon as all but its memory is there; what of it has not gone before comes while it runs.
    /// Needs --accept-loss
    #[arg(long, conflicts_with = "pod")]
    pub(crate) lazy: bool,
    /// Accept that a copy is lost whose source or link goes before it has all of its memory
    #[arg(long, requires = "lazy")]
    pub(crate) accept_loss: bool,
    /// What the other node may lack of what is compared before the freeze: criu-version, huge-pages, limit, memory,
    /// processor, security-module
    #[arg(long, value_name = "NAME[,NAME]")]
    pub(crate) may_lack: Option<MayLack>,
    /// Address at which the other node listens for the bulk of the data, none for the command's pipe
    /// [default: the one that ssh has reached it by]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) data_address: Option<DataAddress>,
    /// When a dump is given up.
    #[command(flatten)]
    pub(crate) dump: DumpArgs,
    /// What it becomes.
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// What CRIU is told.
    #[command(flatten)]
    pub(crate) criu: CriuArgs<Moves>,
}

/// `transship recover`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("by_hand").requires("what"), group = ArgGroup::new("what").args(["container", "pod"]))]
pub(crate) struct RecoverArgs {
    /// Container id, or a pod that migrate --pod was moving, as namespace/name [default: all that are not decided, of
    /// all namespaces]
    pub(crate) container: Option<String>,
    /// Instead a pod that checkpoint --moved has left paused, by its id or as namespace/name
    #[arg(long, requires = "by_hand", conflicts_with = "once")]
    pub(crate) pod: Option<String>,
    /// Ask each other node once only, instead of until it answers
    #[arg(long)]
    pub(crate) once: bool,
    /// Without asking: the copy does not run and never will; let the source run on
    #[arg(long, group = "by_hand")]
    pub(crate) source_runs: bool,
    /// Without asking: the copy runs; end the source. Its files stay
    #[arg(long, group = "by_hand")]
    pub(crate) target_runs: bool,
}

/// `transship send`
#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    /// Name of the checkpoint
    pub(crate) name: String,
    /// The keys for one that is sealed.
    #[command(flatten)]
    pub(crate) keys: LeavingArgs,
}

/// `transship receive`
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Name under which a checkpoint is kept [default: the one it has]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Most that is taken, such as 64G [default: of a checkpoint what fits, of a migration three times
    /// of what its source has told, and 1 GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_size: Option<u64>,
    /// A pod that is migrated here is made by kubelet, or another client of the CRI: wait for it
    #[arg(long)]
    pub(crate) wait_for_pod: bool,
    /// When the link of a migration is given up.
    #[command(flatten)]
    pub(crate) link: LinkArgs,
    /// Address of this node at which the source of a migration may connect directly, encrypted, for the bulk of
    /// the data; none: it may not [default: the one that ssh has been reached by]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) data_address: Option<DataAddress>,
    /// What a container that is migrated here becomes.
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// What CRIU is told, where that is not what it was told at the dump.
    #[command(flatten)]
    pub(crate) criu: CriuArgs<Restores>,
}

/// `transship rm`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Names of the checkpoints
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}
