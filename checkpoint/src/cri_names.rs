//! Names by which kubelet and containerd's CRI plugin mark what belongs to a pod.
//!
//! ```text
//!  kubelet ──labels───> CRI plugin ──labels + KIND──────────> container record
//!                                  ──annotations (cri.*)────> OCI runtime spec ──> runtime
//! ```
//!
//! Labels can be set by an image, too (its `LABEL` lines become labels of the record): they name things
//! and decide nothing. In a pod, annotations `io.kubernetes.cri.*` come from the CRI plugin alone.

/// containerd's namespace of all pods.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// Labels of container records.
pub mod labels {
    /// On all records of the CRI: [`KIND_CONTAINER`] or [`KIND_SANDBOX`].
    pub const KIND: &str = "io.cri-containerd.kind";
    /// Value of [`KIND`] for a container of a pod.
    pub const KIND_CONTAINER: &str = "container";
    /// Value of [`KIND`] for the sandbox of a pod.
    pub const KIND_SANDBOX: &str = "sandbox";
    /// The container's name in its pod.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    /// Name of the pod.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Kubernetes' namespace of the pod.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Uid of the pod.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
}

/// Annotations of runtime specs.
pub mod annotations {
    /// `sandbox` or `container`.
    pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
    /// The container's name in its pod.
    pub const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
    /// Id of the sandbox.
    pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
    /// The name of the pod.
    pub const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
    /// Kubernetes' namespace of the pod.
    pub const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
    /// Uid of the pod.
    pub const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
}
