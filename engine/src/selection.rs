//! What is looked at, checked or dumped: one container, or those of a pod.

/// What the caller means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// The container of this id, in the node's namespace.
    Container(String),
    /// All containers of the pod with this id (or the beginning of it), or `namespace/name`.
    Pod(String),
}
