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

use transship_containerd::{Containerd, ContainerdError};

use crate::error::one_line;

/// How long a finished layer is kept, at least, for its caller to refer to it. A checkpoint with `--rw`
/// asks for the layer first and dumps memory then, which takes its time.
const KEEP: Duration = Duration::from_secs(3600);

/// When a lease ends by itself whose differ was killed: as long as with containerd's own clients.
const LEASE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A lease that exists in containerd.
pub(super) type Lease = Kept<Containerd>;

/// Something that is kept for a while, since when.
#[derive(Debug)]
pub(super) struct Kept<T> {
    what: T,
    made: Instant,
}

impl Lease {
    /// containerd under this lease.
    pub(super) fn containerd(&self) -> &Containerd {
        &self.what
    }
}

/// Which lease is used for what, and which one nobody needs any more: all but the calls to containerd.
#[derive(Debug)]
struct Rotation<T> {
    current: HashMap<String, Arc<Kept<T>>>,
}

impl<T> Default for Rotation<T> {
    fn default() -> Self {
        Self {
            current: HashMap::new(),
        }
    }
}

impl<T> Rotation<T> {
    /// The lease that takes new layers; None when one has to be made.
    fn current(&self, namespace: &str, now: Instant) -> Option<Arc<Kept<T>>> {
        let held = self.current.get(namespace)?;
        (now.saturating_duration_since(held.made) < KEEP).then(|| Arc::clone(held))
    }

    /// From now on new layers go under `lease`. Returns the one before when it has no layers left to
    /// keep; else whoever has written under it keeps it. Two at once are no harm.
    fn replace(&mut self, namespace: String, lease: &Arc<Kept<T>>) -> Option<Kept<T>> {
        let before = self.current.insert(namespace, Arc::clone(lease));
        before.and_then(Arc::into_inner)
    }

    /// Takes no new layers under a lease that is gone.
    fn forget(&mut self, lease: &Arc<Kept<T>>) {
        self.current
            .retain(|_, current| !Arc::ptr_eq(current, lease));
    }

    /// Gives a reference back. Returns the lease itself when nothing but the list of the current ones
    /// refers to it any more.
    fn release(&mut self, lease: Arc<Kept<T>>) -> Option<Kept<T>> {
        let is_listed = self
            .current
            .values()
            .any(|current| Arc::ptr_eq(current, &lease));
        // References are made and given back under the lock, or by the one who holds the last.
        if is_listed && Arc::strong_count(&lease) == 2 {
            self.forget(&lease);
        }
        Arc::into_inner(lease)
    }
}

/// The leases of this process.
#[derive(Debug, Clone, Default)]
pub(super) struct Leases(Arc<Mutex<Rotation<Containerd>>>);

impl Leases {
    /// The lease of the namespace that new layers go under; a new one gets the id `id`.
    pub(super) async fn current(
        &self,
        containerd: &Containerd,
        id: &str,
    ) -> Result<Arc<Lease>, ContainerdError> {
        let namespace = containerd.namespace();
        let found = self.lock().current(namespace, Instant::now());
        if let Some(lease) = found {
            return Ok(lease);
        }
        let lease = Arc::new(Kept {
            what: containerd.with_lease_called(id, LEASE_LIFETIME).await?,
            made: Instant::now(),
        });
        let before = self.lock().replace(namespace.to_owned(), &lease);
        if let Some(before) = before {
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
            let last = leases.lock().release(lease);
            if let Some(lease) = last {
                end(&lease).await;
            }
        });
    }

    /// Takes no new layers under a lease that is gone.
    pub(super) fn forget(&self, lease: &Arc<Lease>) {
        self.lock().forget(lease);
    }

    fn lock(&self) -> MutexGuard<'_, Rotation<Containerd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn end(lease: &Lease) {
    if let Err(error) = lease.containerd().end_lease().await {
        tracing::warn!(error = one_line(&error), "the lease ends by itself");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_secs(1);

    fn made(what: &'static str, made: Instant) -> Arc<Kept<&'static str>> {
        Arc::new(Kept { what, made })
    }

    fn name_of(lease: Option<Kept<&'static str>>) -> Option<&'static str> {
        lease.map(|lease| lease.what)
    }

    #[test]
    fn an_hour_s_layers_share_a_lease_and_the_next_hour_s_have_another() {
        let (mut rotation, start) = (Rotation::default(), Instant::now());
        let (here, there) = ("here", "there");
        assert!(rotation.current(here, start).is_none());
        let first = made("first", start);
        assert_eq!(name_of(rotation.replace(here.to_owned(), &first)), None);
        // Under it until the hour is over, and in its own namespace only.
        let shared = rotation.current(here, start + KEEP - MOMENT).unwrap();
        assert!(Arc::ptr_eq(&shared, &first));
        assert!(rotation.current(there, start).is_none());
        assert!(rotation.current(here, start + KEEP).is_none());
        // Two layers are kept under it when the next one begins: not ended before both are done with.
        let second = made("second", start + KEEP);
        assert_eq!(name_of(rotation.replace(here.to_owned(), &second)), None);
        let now = rotation.current(here, start + KEEP + MOMENT).unwrap();
        assert!(Arc::ptr_eq(&now, &second));
        assert_eq!(name_of(rotation.release(first)), None);
        assert_eq!(name_of(rotation.release(shared)), Some("first"));
        // The current one ends with its last layer, too, and then one has to be made.
        assert_eq!(name_of(rotation.release(now)), None);
        assert_eq!(name_of(rotation.release(second)), Some("second"));
        assert!(rotation.current(here, start + KEEP + MOMENT).is_none());
    }

    #[test]
    fn a_lease_without_layers_ends_when_the_next_one_begins() {
        let (mut rotation, start) = (Rotation::default(), Instant::now());
        let here = "here";
        let lease = made("first", start);
        rotation.replace(here.to_owned(), &lease);
        // Its one call was undone and holds it no more.
        drop(lease);
        let second = made("second", start + KEEP);
        assert_eq!(
            name_of(rotation.replace(here.to_owned(), &second)),
            Some("first")
        );
    }

    #[test]
    fn what_somebody_has_removed_takes_no_layers() {
        let (mut rotation, start) = (Rotation::default(), Instant::now());
        let here = "here";
        let lost = made("lost", start);
        rotation.replace(here.to_owned(), &lost);
        rotation.forget(&lost);
        assert!(rotation.current(here, start).is_none());
        let new = made("new", start);
        rotation.replace(here.to_owned(), &new);
        // Who notices late does not forget the one that took its place.
        rotation.forget(&lost);
        assert!(rotation.current(here, start).is_some());
        assert_eq!(name_of(rotation.release(lost)), Some("lost"));
    }
}
