//! Pages of memory that the target asks for while the copy runs (`--lazy`).
//!
//! ```text
//!  criu lazy-pages there ──> receive ══ a direct connection ══> here ──process_vm_readv──> the source's processes
//! ```
//!
//! CRIU's dump is held meanwhile, as it is while memory is sent (`dump_hold`), so the processes stand still under it.
//! Their memory is kept until the target says that it has all of it.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use transship_checkpoint::manifest::Shared;
use transship_checkpoint::wire::missing_pages::{answer, confirm_end};

use super::dump_parts::{DumpParts, Dumping, PartDump};
use crate::data_channel::{Connection, EndAtDrop};
use crate::error::{Context, Error, Result};

/// Answers as long as it is there.
#[derive(Debug)]
pub(super) struct LatePages {
    dumps: Dumping,
    /// When the dumps began, in the timeline.
    began: Duration,
    _end: EndAtDrop,
}

impl LatePages {
    /// Begins to answer through this connection, out of the processes that these dumps hold.
    ///
    /// # Errors
    /// There is no connection, or no thread can be started.
    pub(super) fn serve(
        link: Option<(Connection, EndAtDrop)>,
        dumps: Dumping,
        parts: Arc<DumpParts>,
        began: Duration,
    ) -> Result<Self> {
        let (mut link, end) = link.ok_or_else(|| Error::failed("no connection is left"))?;
        let serve = move || {
            let served = answer(&mut link, |wanted, pages| parts.read(wanted, pages));
            let served = served.and_then(|()| confirm_end(&mut link));
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
            _end: end,
        })
    }

    /// Answers nobody any more, and gives when the dumps began, and their end.
    pub(super) fn end(
        self,
    ) -> (
        Duration,
        impl Future<Output = Result<(Vec<PartDump>, Shared)>>,
    ) {
        let Self { dumps, began, .. } = self;
        (began, dumps.end())
    }
}
