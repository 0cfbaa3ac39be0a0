//! Pages of memory that the target asks for while the copy runs (`--lazy`).
//!
//! ```text
//!  criu lazy-pages there ──> receive ══ a direct connection ══> here ──process_vm_readv──> the source's processes
//! ```
//!
//! CRIU's dump is held meanwhile, as it is while memory is sent (`dump_hold`), so the processes stand still under it.
//! Their memory is kept until the target says that it has all of it. CRIU has thawed their cgroup, to run its parasite in
//! them, and holds them by ptrace alone: one that is killed would let them run beside the copy. So they are frozen once
//! more before `Commit`; where the source goes on after all, they are thawed for CRIU, which takes its parasite out.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use transship_checkpoint::manifest::Shared;
use transship_checkpoint::wire::Link;
use transship_checkpoint::wire::missing_pages::{answer, confirm_end};

use super::Request;
use super::dump_parts::{DumpParts, Dumping, PartDump};
use super::moving::Moving;
use super::process_memory::can_compare_pages;
use crate::data_channel::{Connection, DataAddress, EndAtDrop};
use crate::dump_hold::DumpHold;
use crate::error::{Context, Error, Result};
use crate::oci_runtime::OciRuntime;
use crate::reasons::Reasons;

/// What is said where no direct connection can be had.
pub(super) const NOT_DIRECT: &str =
    "pages cannot come late (--lazy) without a direct connection to the other node";

/// Adds what speaks against pages that come late, as far as that is known before the other node is asked.
pub(super) fn check(moving: &Moving, request: &Request, reasons: &mut Reasons) {
    if !request.is_lazy {
        return;
    }
    if request.data_address == Some(DataAddress::Nowhere) {
        reasons.add(Error::refused(NOT_DIRECT));
    }
    let mut runtimes = moving.containers.iter().map(|it| &it.runtime);
    if !can_hold_dumps() || !runtimes.all(OciRuntime::can_hold_dumps) {
        reasons.add(not_held());
    }
}

/// Whether dumps can be held on this node, and memory be read meanwhile, by runtimes that know how.
pub(super) fn can_hold_dumps() -> bool {
    can_compare_pages() && DumpHold::is_possible()
}

/// What is said where a dump cannot be held.
pub(super) fn not_held() -> Error {
    let message = "the memory cannot come late (--lazy): a dump cannot be held on this node";
    Error::refused(message).hint("docs/migration.md says where it can")
}

/// Answers as long as it is there.
#[derive(Debug)]
pub(super) struct PageServer {
    dumps: Dumping,
    /// When the dumps began, in the timeline.
    began: Duration,
    /// Whether they were frozen once more.
    is_frozen: bool,
    _end: EndAtDrop,
}

impl PageServer {
    /// Begins to answer through this connection, out of the processes that these dumps hold.
    ///
    /// # Errors
    /// There is no connection, or no thread can be started.
    pub(super) fn serve(
        (connection, link): (Option<(Connection, EndAtDrop)>, Option<Link>),
        dumps: Dumping,
        parts: Arc<DumpParts>,
        began: Duration,
    ) -> Result<Self> {
        let none = || Error::failed("no connection is left");
        let (mut connection, end) = connection.ok_or_else(none)?;
        let serve = move || {
            let read = |wanted, pages: &mut Vec<u8>| parts.read(wanted, pages);
            let served = answer(&mut connection, link.as_ref(), read);
            let served = served.and_then(|()| confirm_end(&mut connection));
            // The other side finds the connection ended, and says what became of the copy.
            if let Err(error) = served {
                tracing::info!("pages are not asked for any more: {error}");
            }
        };
        let name = "pages".to_owned();
        { thread::Builder::new().name(name).spawn(serve) }.context("cannot start a thread")?;
        Ok(Self {
            dumps,
            began,
            is_frozen: false,
            _end: end,
        })
    }

    /// Freezes the containers, whose processes CRIU holds.
    ///
    /// # Errors
    /// They are not frozen, or have not stood still.
    pub(super) async fn freeze_again(&mut self, moving: &Moving) -> Result<()> {
        self.is_frozen = true;
        for source in &moving.containers {
            let paused = source.runtime.pause(source.id()).await;
            if !source.runtime.has_paused(source.id()).await {
                let message = "what is left here cannot be frozen while its memory is sent";
                let error = Error::failed(message);
                return Err(match paused {
                    Err(why) => error.because(why),
                    Ok(()) => error,
                });
            }
        }
        // What nobody held until now may have gone on, while its files had been read.
        match self.dumps.are_held() {
            true => Ok(()),
            false => Err(Error::failed("CRIU has ended before the memory was sent")),
        }
    }

    /// Answers nobody any more, and gives when the dumps began, and how they have ended. CRIU takes its parasite out of
    /// what goes on here, which it cannot while that is frozen; it freezes it again, as it was when the dump began.
    pub(super) async fn end(
        self,
        moving: &Moving,
        goes_on: bool,
    ) -> (Duration, Result<(Vec<PartDump>, Shared)>) {
        let Self {
            dumps,
            began,
            is_frozen,
            ..
        } = self;
        let thaw = async || {
            for source in moving.containers.iter().filter(|_| is_frozen) {
                // One that is not frozen stays so.
                drop(source.runtime.resume(source.id()).await);
            }
        };
        if goes_on {
            thaw().await;
        }
        let ended = dumps.end().await;
        if !goes_on {
            // What was killed has ended; the runtime takes a frozen cgroup for a paused container, and deletes none.
            thaw().await;
        }
        (began, ended)
    }
}
