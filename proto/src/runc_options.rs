//! Options of containerd's runc shim, `io.containerd.runc.v2`.
//!
//! Field numbers as in containerd's `api/types/runc/options/oci.proto`, unchanged from 1.6 to 2.x.
//! containerd matches the type by its full protobuf name, without the `type.googleapis.com/`
//! prefix.

/// Type URL of [`Options`].
pub const OPTIONS_TYPE: &str = "containerd.runc.v1.Options";
/// Type URL of [`CheckpointOptions`].
pub const CHECKPOINT_OPTIONS_TYPE: &str = "containerd.runc.v1.CheckpointOptions";

/// The shim's options in a container record.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Options {
    /// Uses MS_MOVE instead of pivot_root.
    #[prost(bool, tag = "1")]
    pub no_pivot_root: bool,
    /// Makes no session keyring for the container.
    #[prost(bool, tag = "2")]
    pub no_new_keyring: bool,
    /// cgroup of the shim.
    #[prost(string, tag = "3")]
    pub shim_cgroup: String,
    /// Owner of the container's pipes.
    #[prost(uint32, tag = "4")]
    pub io_uid: u32,
    /// Group of the container's pipes.
    #[prost(uint32, tag = "5")]
    pub io_gid: u32,
    /// The OCI runtime: a name or a path. Empty: `runc`.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    /// The OCI runtime's root directory.
    #[prost(string, tag = "7")]
    pub root: String,
    /// Whether the OCI runtime asks systemd for cgroups.
    #[prost(bool, tag = "9")]
    pub systemd_cgroup: bool,
    /// CRIU images to restore from when a task is created.
    #[prost(string, tag = "10")]
    pub criu_image_path: String,
    /// CRIU's work directory of that restore.
    #[prost(string, tag = "11")]
    pub criu_work_path: String,
    /// Address of the task API (2.x).
    #[prost(string, tag = "12")]
    pub task_api_address: String,
    /// Version of the task API (2.x).
    #[prost(uint32, tag = "13")]
    pub task_api_version: u32,
}

/// Options of `Tasks.Checkpoint`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CheckpointOptions {
    /// Ends the container after the dump. Without it the shim passes `--leave-running`.
    #[prost(bool, tag = "1")]
    pub exit: bool,
    /// Dumps established TCP connections.
    #[prost(bool, tag = "2")]
    pub open_tcp: bool,
    /// Dumps unix sockets with a peer outside.
    #[prost(bool, tag = "3")]
    pub external_unix_sockets: bool,
    /// Dumps a shell job.
    #[prost(bool, tag = "4")]
    pub terminal: bool,
    /// Dumps file locks.
    #[prost(bool, tag = "5")]
    pub file_locks: bool,
    /// Namespaces that are dumped empty.
    #[prost(string, repeated, tag = "6")]
    pub empty_namespaces: Vec<String>,
    /// CRIU's cgroup mode. No shim forwards it to runc.
    #[prost(string, tag = "7")]
    pub cgroups_mode: String,
    /// Where the images go. With it containerd leaves its content store alone.
    #[prost(string, tag = "8")]
    pub image_path: String,
    /// Where CRIU's log goes.
    #[prost(string, tag = "9")]
    pub work_path: String,
}
