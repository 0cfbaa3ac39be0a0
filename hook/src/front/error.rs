//! Why a call of the front fails, by subject.

use std::io;
use std::path::PathBuf;

use transship_checkpoint::annotations::{self, AnnotationError, COLD_CONTAINERS};
use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::criu_options::ConfigLineError;
use transship_checkpoint::manifest::ManifestError;
use transship_checkpoint::namespaces::NamespaceError;
use transship_checkpoint::store::StoreError;
use transship_layer::{ImportError, StackError};
use transship_path_error::PathError;
use transship_sandbox::SandboxError;
use transship_sandbox::admission::AdmissionError;
use transship_sandbox::admission::asker::NotForAsker;
use transship_sandbox::admission::node_config::{ClosedOption, NativeUnsigned, NodeConfigError};

use crate::origin::OriginError;
use crate::runtime::{CRIU_CONFIG_DIR, RuntimeError};

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontError {
    /// An annotation that means nothing.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The rules of this node.
    #[error(transparent)]
    NodeConfig(#[from] NodeConfigError),
    /// An option that is not the author's of the pod to choose.
    #[error(transparent)]
    Closed(#[from] ClosedOption),
    /// A namespace that is gone.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The checkpoint is not for who asks.
    #[error(transparent)]
    NotForAsker(#[from] NotForAsker),
    /// Nobody whom this node trusts has made the checkpoint.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// Something staged that cannot be used.
    #[error(transparent)]
    Stage(#[from] SandboxError),
    /// A checkpoint that cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A container that the checkpoint does not have.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// An image that cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The files of the checkpoint cannot be put into the container.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The real runtime cannot be run.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A value that cannot be in a configuration of CRIU.
    #[error(transparent)]
    CriuConfig(#[from] ConfigLineError),
    /// A checkpoint that does not fit the container that asks for it.
    #[error(transparent)]
    Fit(#[from] FitError),
    /// A restore that does not come to its end.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The hook's program is not where it belongs.
    #[error("{path} is missing: it belongs beside the runtime front")]
    NoHook {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// A checkpoint that does not fit the container, or the pod, that asks for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FitError {
    /// The sandbox that an annotation names.
    #[error("the sandbox {id:?}, whose namespaces the container joins, is not running")]
    NoSandbox {
        /// Its id.
        id: String,
    },
    /// An engine whose annotations do not say who asks.
    #[error(
        "{id:?} has annotations of transship and is a container of another engine ({annotation}): they mean something to \
         containers of containerd alone"
    )]
    OtherEngine {
        /// The container.
        id: String,
        /// What says so.
        annotation: String,
    },
    /// A spec that is not the container's own.
    #[error(
        "{id:?} has annotations of transship and a spec that is not in its bundle, where later calls look for it: make \
         it without --config, of the config.json of its bundle"
    )]
    SpecElsewhere {
        /// The container.
        id: String,
    },
    /// A call that leaves no room for a restore.
    #[error(
        "{id:?} has annotations of transship, which mean nothing to a container that is made by \"run\": make it by \
         \"create\" and \"start\", or without them"
    )]
    RunAtOnce {
        /// The container.
        id: String,
    },
    /// What is mounted in it would be emptied with it.
    #[error(
        "the checkpoint {checkpoint:?} has the content of {dir}, in which {mounted} is mounted, which is no part of it: \
         nothing in it was changed; unmount that first"
    )]
    Mounted {
        /// The checkpoint.
        checkpoint: String,
        /// The directory that is to be filled.
        dir: PathBuf,
        /// Where something is mounted in it.
        mounted: PathBuf,
    },
    /// The pod runs elsewhere.
    #[error(
        "the pod {pod:?} has been moved away (checkpoint {checkpoint:?}) and starts nothing here any more; \
         where it was not, transship recover --pod {pod} --source-runs takes that back"
    )]
    Moved {
        /// Its namespace and name.
        pod: String,
        /// What it has become.
        checkpoint: String,
    },
    /// The pod comes with a migration, and not yet.
    #[error(
        "{id:?} waits for the migration of its pod, which has not come so far; the next attempt waits again"
    )]
    NotArrived {
        /// The container.
        id: String,
    },
    /// The pod comes with a migration, which does not come.
    #[error(
        "the migration that brings {id:?} was given up, and its source runs on: this pod starts nothing, delete it"
    )]
    MigrationGivenUp {
        /// The container.
        id: String,
    },
    /// The checkpoint would give its processes more than the container may have.
    #[error("cannot restore {what}")]
    NotAdmitted {
        /// The container.
        what: String,
        /// Why.
        source: AdmissionError,
    },
    /// The container is made of another image.
    #[error(
        "the container {container:?} of the checkpoint {checkpoint:?} was made of the image {had}, \
         and this one is of {has}: its files belong on other layers"
    )]
    Base {
        /// The container in the checkpoint.
        container: String,
        /// The checkpoint.
        checkpoint: String,
        /// The image that it had.
        had: String,
        /// The image of the new one.
        has: String,
    },
    /// A process id that somebody else has in the process namespace of the pod.
    #[error(
        "the container {container:?} of the checkpoint {checkpoint:?} needs the process id {id}, \
         which {taken_by:?} has in the pod's shared process namespace: containers that are \
         restored must come before those that are not"
    )]
    PidTaken {
        /// The checkpoint.
        checkpoint: String,
        /// The container in it.
        container: String,
        /// The id.
        id: u32,
        /// Name of the process that has it.
        taken_by: String,
    },
    /// A directory that the containers of a pod share, missing in the new pod.
    #[error(
        "the checkpoint {checkpoint:?} needs {what} in the container {container:?}, which this \
         pod does not have there"
    )]
    NoSharedDir {
        /// The checkpoint.
        checkpoint: String,
        /// The container in it.
        container: String,
        /// The directory.
        what: String,
    },
    /// A mount, or a file of a volume, that the new pod does not have as it was.
    #[error("the container {container:?} of the checkpoint {checkpoint:?} {what}: {path}")]
    Volume {
        /// The checkpoint.
        checkpoint: String,
        /// The container in it.
        container: String,
        /// Where, in the container.
        path: PathBuf,
        /// What is different.
        what: String,
    },
    /// A container of the pod that the checkpoint does not have.
    #[error("the checkpoint {checkpoint:?} has no container {container:?}")]
    NotInCheckpoint {
        /// The checkpoint.
        checkpoint: String,
        /// The container's name in the pod.
        container: String,
    },
    /// The same, in a pod that has not been restored from the checkpoint.
    #[error(
        "the checkpoint {checkpoint:?} has no container {container:?} (it has {present}), and no other \
         container of this pod has been restored from it: \
         {COLD_CONTAINERS}: start lets such a container start from its image"
    )]
    NoneRestored {
        /// The checkpoint.
        checkpoint: String,
        /// The container's name in the pod.
        container: String,
        /// Those that the checkpoint has.
        present: String,
    },
    /// A configuration of CRIU that the operator of the node has not written.
    #[error(
        "{annotation} names {path:?} for CRIU, which runs as root what that file says: only files \
         below {CRIU_CONFIG_DIR} are taken, and none that a pod names",
        annotation = annotations::CRIU_CONFIG
    )]
    ForeignCriuConfig {
        /// The file.
        path: String,
    },
}

/// A restore that does not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The restore failed.
    #[error("cannot restore {container:?} from the checkpoint {checkpoint:?}: {reason}")]
    Restore {
        /// The container in the checkpoint.
        container: String,
        /// The checkpoint.
        checkpoint: String,
        /// What CRIU or the runtime said.
        reason: String,
    },
    /// A restore that containerd asked for failed.
    #[error("cannot restore {id:?}: {reason}")]
    NativeRestore {
        /// The container.
        id: String,
        /// What CRIU or the runtime said.
        reason: String,
    },
    /// A restore that containerd asked for, of what has no signature.
    #[error("{id:?} may not be restored: {source}")]
    NativeUnsigned {
        /// The container.
        id: String,
        /// Why not.
        source: NativeUnsigned,
    },
    /// A restore that containerd asked for, and nothing says of what.
    #[error(
        "{id:?} may not be restored: the config.json of its bundle, which the checkpoint has brought, cannot be read"
    )]
    NoSpec {
        /// The container.
        id: String,
    },
    /// A restore that nobody can hold.
    #[error(
        "the restore of {id:?} has to be held until it has been looked at, and in the foreground nothing is: add \
         --detach"
    )]
    InForeground {
        /// The container.
        id: String,
    },
    /// Networks that CRIU's script would make, where it cannot.
    #[error(
        "the networks of {id:?} cannot be made where it joins the pid namespace of others; --network none \
         restores it without them"
    )]
    NoNetworks {
        /// The container.
        id: String,
    },
    /// A restore that must be held was not: another copy may be running.
    #[error("{id:?} was restored but not held before its first instruction, and is removed")]
    NotHeld {
        /// The container.
        id: String,
        /// Which process goes on.
        source: io::Error,
    },
    /// Images whose memory has been given back by an attempt before.
    #[error(
        "{container:?} cannot be restored from the checkpoint {checkpoint:?} a second time: its memory has been \
         given back"
    )]
    GivenBack {
        /// The container in the checkpoint.
        container: String,
        /// The checkpoint.
        checkpoint: String,
    },
    /// Memory of the restored tasks that they cannot have.
    #[error("{id:?} was restored without its memory, and is removed")]
    NoMemory {
        /// The container.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// A restore of which `create` has not heard that it failed.
    #[error("{id:?} was not restored, and cannot be started")]
    FailedAside {
        /// The container.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// The same, of which `create` has not heard.
    #[error("{id:?} was restored without its memory, and cannot be started")]
    NotFilled {
        /// The container.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// Shared memory of the pod that the restored tasks cannot have.
    #[error("{id:?} was restored without the shared memory of its pod, and is removed")]
    NotAttached {
        /// The container.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// A name in the checkpoint has led out of the container.
    #[error("{id:?} was restored with {path:?} open, which is not in its mounts, and is removed")]
    ForeignFile {
        /// The container.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// A file of which the kernel asks who has opened it, and that was CRIU.
    #[error(
        "{id:?} was restored with {path:?} open, which takes {needed}, and the process cannot have it; it is removed"
    )]
    PrivilegedFile {
        /// The container.
        id: String,
        /// The file.
        path: PathBuf,
        /// The capability.
        needed: &'static str,
    },
    /// CRIU 4.0 and 4.1 lose that.
    #[error(
        "{id:?} was restored with its read-only root writable, and is removed: CRIU 4.2 and later keep it as it was"
    )]
    WritableRoot {
        /// The container.
        id: String,
    },
    /// A device that the rules of the spec do not allow, or not so.
    #[error(
        "{id:?} was restored with the device {path:?} open, which its device rules do not allow, and is removed"
    )]
    ClosedDevice {
        /// The container.
        id: String,
        /// The device.
        path: PathBuf,
    },
    /// Memory that cannot come when it is touched.
    #[error("the memory cannot be restored lazily: {what}")]
    LazyPages {
        /// What stands in the way.
        what: String,
    },
    /// A held task has gone.
    #[error("the restored process {pid} of {id:?} is gone")]
    Gone {
        /// The container.
        id: String,
        /// Its first process.
        pid: i32,
    },
    /// It is not held any more, or never was.
    #[error("{id:?} does not wait for the commitment of a migration")]
    NotAwaiting {
        /// The container.
        id: String,
    },
}

/// Why the files of a checkpoint are not in the container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootfsError {
    /// There is no upperdir to fill.
    #[error(
        "the root file system {path} of the container cannot be filled: it is no overlay that is understood"
    )]
    NoOverlay {
        /// The mount point.
        path: PathBuf,
        /// What it is instead.
        source: StackError,
    },
    /// Its lower layers cannot be mounted again.
    #[error(
        "the root file system {path} of the container cannot be filled: its lower layer {lowerdir} is \
         not there any more, as that of a pod with a user namespace of its own (`hostUsers: false`)"
    )]
    LostLayer {
        /// The mount point.
        path: PathBuf,
        /// The lower layer.
        lowerdir: PathBuf,
    },
    /// The layer cannot be imported.
    #[error("cannot fill {upperdir} from {layer}")]
    Import {
        /// The upperdir.
        upperdir: PathBuf,
        /// The layer.
        layer: PathBuf,
        /// Why.
        source: ImportError,
    },
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
}

impl FrontError {
    /// Whether the restore that failed so may have put files into the container.
    pub(super) fn may_have_filled(&self) -> bool {
        !matches!(
            self,
            Self::Rootfs(RootfsError::NoOverlay { .. } | RootfsError::LostLayer { .. })
        )
    }

    /// Whether somebody asks for what is not theirs: then nothing is started, not even cold.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            Self::NotForAsker(error) => error.is_forbidden(),
            Self::NodeConfig(_)
            | Self::Annotation(_)
            | Self::Closed(_)
            | Self::Fit(
                FitError::NotInCheckpoint { .. }
                | FitError::ForeignCriuConfig { .. }
                | FitError::OtherEngine { .. }
                | FitError::SpecElsewhere { .. },
            ) => true,
            _ => false,
        }
    }
}
