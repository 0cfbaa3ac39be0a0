//! The leases under which layers are written: one per namespace at a time, for many layers.
//!
//! ```text
//!            0        KEEP     2 KEEP
//! lease 1    |=========|·········|         === takes new layers    ··· is kept for the last of them
//! lease 2         (next Diff) |=========|·········|
//! ```
//!
//! Making a lease is a synced transaction in containerd's database, a fifth of the time of a small
//! Diff; a lease that is there costs nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_client::tonic::metadata::{Ascii, MetadataValue};

use super::store::{CallError, Store};
use crate::error::chain;

/// How long a finished layer is kept, at least, for its caller to refer to it. A checkpoint with `--rw`
/// asks for the layer first and dumps memory then, which takes its time.
const KEEP: Duration = Duration::from_secs(3600);

type Current = HashMap<MetadataValue<Ascii>, Arc<Lease>>;

/// A lease that exists in containerd.
#[derive(Debug)]
pub(super) struct Lease {
    store: Store,
    made: Instant,
}

impl Lease {
    /// The content store under this lease.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }
}

/// The leases of this process.
#[derive(Debug, Clone, Default)]
pub(super) struct Leases(Arc<Mutex<Current>>);

impl Leases {
    /// The lease of the store's namespace that new layers go under; a new one is called `id`.
    pub(super) async fn current(&self, store: &Store, id: &str) -> Result<Arc<Lease>, CallError> {
        let found = self.lock().get(store.namespace()).cloned();
        if let Some(lease) = found.filter(|lease| lease.made.elapsed() < KEEP) {
            return Ok(lease);
        }
        let lease = Arc::new(Lease {
            store: store.with_lease(id).await?,
            made: Instant::now(),
        });
        let namespace = store.namespace().clone();
        let before = self.lock().insert(namespace, Arc::clone(&lease));
        // Whoever has written under the one before keeps it; two at once are no harm.
        if let Some(before) = before.and_then(Arc::into_inner) {
            end(&before).await;
        }
        Ok(lease)
    }

    /// Lets go of a lease when the caller of the last layer under it has had time to refer to it.
    pub(super) fn keep(&self, lease: Arc<Lease>) {
        let leases = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(KEEP).await;
            // Newer layers wait under it, too, or it takes new ones.
            if let Some(lease) = leases.take_if_last(lease) {
                end(&lease).await;
            }
        });
    }

    /// Takes no new layers under a lease that is gone.
    pub(super) fn forget(&self, lease: &Arc<Lease>) {
        self.lock()
            .retain(|_, current| !Arc::ptr_eq(current, lease));
    }

    /// The lease itself when nothing but the list of the current ones refers to it any more.
    fn take_if_last(&self, lease: Arc<Lease>) -> Option<Lease> {
        let mut current = self.lock();
        let listed = current.values().any(|current| Arc::ptr_eq(current, &lease));
        // References are made and given back under the lock, or by the one who holds the last.
        if listed && Arc::strong_count(&lease) == 2 {
            current.retain(|_, current| !Arc::ptr_eq(current, &lease));
        }
        Arc::into_inner(lease)
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn end(lease: &Lease) {
    if let Err(error) = lease.store.end_lease().await {
        tracing::warn!(error = chain(&error), "the lease ends by itself");
    }
}
