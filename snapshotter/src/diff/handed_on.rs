//! Calls of Apply that containerd's next differ is doing for this one.
//!
//! ```text
//! transfer service ── Apply ──> this differ: beyond it
//!                                    │
//!    containerd's diff service <── Apply, the same request
//!         ├── Apply ──> this differ: known, Unimplemented
//!         └── Apply ──> "walking"
//! ```
//!
//! containerd's diff service goes on to its next differ by itself. The transfer service, through which
//! containerd 2 pulls and imports, has one differ only (`unpack_config.differ`), and takes its
//! `Unimplemented` for the end of the pull.

use std::sync::{Mutex, MutexGuard, PoisonError};

use containerd_client::services::v1::ApplyRequest;

/// The layer, and where it goes. containerd reads a request and writes it anew, so only what survives that
/// is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Work {
    digest: String,
    mounts: Vec<(String, String, Vec<String>)>,
}

impl Work {
    fn of(request: &ApplyRequest) -> Self {
        let mounts = request.mounts.iter();
        Self {
            digest: request
                .diff
                .as_ref()
                .map(|layer| layer.digest.clone())
                .unwrap_or_default(),
            mounts: mounts
                .map(|mount| {
                    (
                        mount.r#type.clone(),
                        mount.source.clone(),
                        mount.options.clone(),
                    )
                })
                .collect(),
        }
    }
}

/// All of them; the same work may be asked for twice at a time.
#[derive(Debug, Default)]
pub(super) struct HandedOn(Mutex<Vec<Work>>);

/// One of them; it is over when this is dropped.
#[derive(Debug)]
pub(super) struct Mark<'a> {
    all: &'a HandedOn,
    work: Work,
}

impl HandedOn {
    fn works(&self) -> MutexGuard<'_, Vec<Work>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the call is one that was handed on and has come back.
    pub(super) fn contains(&self, request: &ApplyRequest) -> bool {
        self.works().contains(&Work::of(request))
    }

    /// Notes a call that is about to be handed on.
    pub(super) fn begin(&self, request: &ApplyRequest) -> Mark<'_> {
        let work = Work::of(request);
        self.works().push(work.clone());
        Mark { all: self, work }
    }
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        let mut works = self.all.works();
        if let Some(at) = works.iter().position(|work| *work == self.work) {
            works.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_client::types::{Descriptor, Mount};

    #[test]
    fn a_call_comes_back_as_long_as_it_is_handed_on() {
        let request = |digest: &str, upperdir: &str| ApplyRequest {
            diff: Some(Descriptor {
                digest: digest.to_owned(),
                ..Descriptor::default()
            }),
            mounts: vec![Mount {
                r#type: "overlay".to_owned(),
                options: vec![format!("upperdir={upperdir}")],
                ..Mount::default()
            }],
            ..ApplyRequest::default()
        };
        let handed_on = HandedOn::default();
        let first = handed_on.begin(&request("sha256:1", "/a"));
        let again = handed_on.begin(&request("sha256:1", "/a"));
        assert!(handed_on.contains(&request("sha256:1", "/a")));
        assert!(!handed_on.contains(&request("sha256:1", "/b")));
        assert!(!handed_on.contains(&request("sha256:2", "/a")));
        drop(again);
        assert!(handed_on.contains(&request("sha256:1", "/a")));
        drop(first);
        assert!(!handed_on.contains(&request("sha256:1", "/a")));
    }
}
