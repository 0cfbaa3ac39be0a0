//! The word by which the target lets its copy run, and what follows: the end of the source, or its going on.
//!
//! ```text
//!  Commit ──> Running ──> (AllPages) ──> the record: the copy runs ──> the source is killed and ended
//!     │                                      ──> Durable ──> it is removed, and the record
//!     ├─> refused before Running, or asked: aborted ──> the source goes on
//!     └─> no answer ──> the record stays, and the source as it is
//! ```

use std::time::Duration;

use tokio::time::timeout;
use transship_checkpoint::wire::{Message, Outcome, unexpected};

use super::Transaction;
use crate::error::{Context, Error, Result};
use crate::frozen::Committed;
use crate::interrupt::Interrupt;
use crate::migrate::ask::Question;
use crate::migrate::recover::undecided;
use crate::migrate::{
    end_source, is_refusal_of_target, keep_source, network, remove_source, resume_source,
    unmark_moved,
};

/// How long the target may take to let go what it holds.
const COMMIT_DEADLINE: Duration = Duration::from_secs(60);
/// How long an interrupt waits for the answer to `Commit`.
const COMMIT_GRACE: Duration = Duration::from_secs(10);
/// How long it may take until the copy has all of its memory.
const PAGES_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// How long plugins may still be at work that take the source out of its networks.
const GIVING_AWAY: Duration = Duration::from_secs(30);
/// How long the target may take to write all files of the copy to its disk.
const DURABLE_DEADLINE: Duration = Duration::from_secs(3600);

impl Transaction<'_> {
    /// The one moment in which a lost connection leaves it open which copy runs.
    pub(super) async fn commit(&mut self, source: Committed) -> Result<(Option<u32>, Committed)> {
        let from = self.timeline.now();
        let sent = self
            .conversation
            .send_with_grace(Message::Commit, COMMIT_GRACE)
            .await;
        let answer = match sent {
            Ok(()) => {
                self.conversation
                    .receive_within("the copy to run", COMMIT_DEADLINE, COMMIT_GRACE)
                    .await
            }
            Err(error) => Err(error),
        };
        let runs = matches!(answer, Ok(Message::Running { .. }));
        let answer = match answer {
            Ok(Message::Running { pid }) => {
                self.copy_runs(from);
                { self.wait_for_late_pages().await }.map(|()| Message::Running { pid })
            }
            other => other,
        };
        let lost = match answer {
            Ok(Message::Running { pid }) => return Ok((Some(pid), source)),
            Ok(other) => unexpected("the copy to run", &other).into(),
            // The target says that its copy does not run. When it has run, whatever has failed there says nothing.
            Err(error) if is_refusal_of_target(&error) && !runs => {
                return Err(self.resume(source, error).await);
            }
            Err(error) => error,
        };
        // The target must see that nothing more comes.
        self.conversation.close();
        self.progress.step("asking the other node which copy runs");
        match self.ask().await {
            Ok(Outcome::Runs) => {
                self.durable = true;
                self.copy_runs(from);
                Ok((None, source))
            }
            Ok(Outcome::Aborted) => Err(self.resume(source, lost).await),
            Ok(outcome) => Err(undecided(&self.pending, outcome).because(lost)),
            Err(_) => Err(undecided(&self.pending, Outcome::Undecided).because(lost)),
        }
    }

    /// It has been moved. Who gives up now would only leave the rest of the work to somebody else.
    fn copy_runs(&mut self, committed: Duration) {
        self.timeline.thaw();
        self.timeline.step("commit", committed, None);
        self.interrupt = Interrupt::never();
        self.conversation.hear_no_interrupt();
    }

    /// Waits until the copy, which runs, has all pages of its memory.
    async fn wait_for_late_pages(&mut self) -> Result<()> {
        if self.late.is_none() {
            return Ok(());
        }
        self.progress.step("the rest of the memory");
        let from = self.timeline.now();
        let what = "the last page of the copy's memory";
        let came = self
            .conversation
            .receive_within(what, PAGES_DEADLINE, Duration::ZERO);
        let came = came.await?;
        self.compressed = self.conversation.compressed();
        match came {
            Message::AllPages => self.timeline.step("pages", from, None),
            other => return Err(unexpected(what, &other).into()),
        }
        Ok(())
    }

    /// Nobody asks for pages any more: lets the dumps come to their end, which is nobody's concern any more.
    pub(super) async fn end_late_pages(&mut self, source_goes_on: bool) {
        let Some(late) = self.late.take() else {
            return;
        };
        let (from, ended) = late.end(self.moving, source_goes_on).await;
        match ended {
            Ok((dumped, _)) => self.tell_dumps(from, dumped),
            // Its processes may have been killed, which it takes for a failure.
            Err(error) => tracing::debug!("the end of the dump: {}", error.one_line()),
        }
    }

    /// The copy never runs.
    async fn resume(&mut self, source: Committed, error: Error) -> Error {
        self.end_late_pages(true).await;
        let error = self.take_back_network(error).await;
        let thawed = source.thaw().await;
        let error = resume_source(self.node, self.moving, thawed, error).await;
        match unmark_moved(&self.pending).and_then(|()| self.record.clear()) {
            Ok(()) => error,
            Err(left) => left.after(error),
        }
    }

    /// The source is about to go on.
    pub(super) async fn take_back_network(&mut self, error: Error) -> Error {
        if let Some(giving_away) = self.giving_away.take() {
            // Whoever has given up has left it at its work, which would undo this one.
            drop(timeout(GIVING_AWAY, giving_away).await);
        }
        match network::take_back(&self.pending, self.first_pid()).await {
            Ok(()) => error,
            Err(left) => left.after(error),
        }
    }

    /// Asks until the target must have noticed that the link is gone.
    async fn ask(&self) -> Result<Outcome> {
        let question = Question {
            to: &self.request.to,
            remote_program: &self.request.remote_program,
            namespace: self.node.namespace(),
            migration: &self.pending.migration,
            node: &self.pending.node,
            link_patience: self.request.link_patience,
        };
        let patience = self.request.link_patience * 2;
        // Who has the record's lock decides.
        { question.ask_on(Some(patience), &self.interrupt, || true) }.await
    }

    /// The copy runs: ends the source, and removes it as soon as a power cut of the target loses
    /// nothing any more.
    pub(in crate::migrate) async fn finish(&mut self, source: Committed) -> Result<()> {
        let from = self.timeline.now();
        // Processes that have been killed and not been waited for are a task that runs, for containerd.
        self.pending.copy_runs = true;
        self.record.write_copy_runs(&self.pending)?;
        // Not one instruction more here.
        let killed = source.kill(self.end_late_pages(false)).await;
        killed.context("it could not be ended here")?;
        end_source(self.node, &self.pending).await?;
        network::forget(&self.pending).await?;
        self.progress.step("sync");
        if !self.durable {
            self.wait_for_disk().await?;
        }
        self.timeline.step("sync", from, None);
        match self.request.keep_source {
            true => keep_source(self.node, &self.pending).await?,
            false => remove_source(self.node, &self.pending).await?,
        }
        self.record.clear()
    }

    async fn wait_for_disk(&mut self) -> Result<()> {
        let durable = self
            .conversation
            .receive_within("the target's disk", DURABLE_DEADLINE, Duration::ZERO)
            .await;
        let error = match durable {
            Ok(Message::Durable) => return Ok(()),
            Ok(other) => unexpected("the target's disk", &other).into(),
            Err(error) => error,
        };
        self.conversation.close();
        if matches!(self.ask().await, Ok(Outcome::Runs)) {
            return Ok(());
        }
        let (namespace, id) = (self.node.namespace(), self.pending.called());
        Err(Error::failed(
            "whether its files are on the disk there is not known, so they stay here, stopped",
        )
        .hint("this asks again, and removes them here when they are:")
        .hint(format!("  transship -n {namespace} recover {id}"))
        .because(error))
    }
}
