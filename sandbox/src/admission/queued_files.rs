//! What is open in the images and in no process: files on their way from one to another, and sockets of others.
//!
//! What a process has open is looked at before it runs; a file that was sent, and that its sender has closed, shows
//! nowhere. CRIU finds regular files and directories by names, so none of these is admitted there. Pipes, sockets and
//! what else has no name are those of the container, wherever they are.

use super::allowance::Allowance;
use super::deleted_files::sets_id;
use super::files::with_id;
use super::threads::compare_ids;
use super::{Admission, Refusal, Restored};

/// Compares each.
pub(super) fn compare(restored: &Restored, allowed: &Allowance, admission: &mut Admission) {
    let queued = &restored.queued_files;
    for file in { queued.sent.iter() }.filter_map(|id| with_id(restored, *id)) {
        admission.refuse(Refusal::File {
            path: file.path.clone(),
            why: "which is sent to a socket and which no process has open",
        });
    }
    if queued.has_external_socket && !allowed.external_sockets {
        admission.refuse(Refusal::ExternalSocket);
    }
    for (mode, uid, gid) in &queued.socket_files {
        let who = "the file of a unix socket";
        compare_ids(who, [*uid].iter(), [*gid].iter(), allowed, admission);
        if sets_id(*mode) && !allowed.any_user {
            admission.refuse(Refusal::Damaged {
                what: format!("{who} has a set-user-id or set-group-id bit"),
            });
        }
    }
}
