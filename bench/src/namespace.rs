//! Where in containerd the benchmarks work, and what keeps their objects there.

use transship_containerd::labels::GC_ROOT;

/// containerd's namespace of everything that is made here.
pub(crate) const NAMESPACE: &str = "bench";
/// An uncompressed layer.
pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Labels that keep containerd's garbage collection from objects that nothing refers to.
pub(crate) const KEPT: &[(&str, &str)] = &[(GC_ROOT, "bench")];
