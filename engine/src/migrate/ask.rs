//! What became of the copy, asked of the other node over a connection of its own.
//!
//! ```text
//!  > Ask { migration }
//!  < Answer { runs | aborted | undecided | lost, node }    of another node: undecided
//! ```

use std::time::Duration;

use transship_checkpoint::wire::{Message, Outcome, unexpected};

use super::remote::Remote;
use crate::conversation::Conversation;
use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;

/// How long one question may take: the target writes the copy to its disk before it answers.
const ANSWER_DEADLINE: Duration = Duration::from_secs(600);
/// The pause between two questions, at first and at most.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whom to ask, and for what.
#[derive(Debug, Clone)]
pub(super) struct Question<'a> {
    /// The command that leads to the other node.
    pub(super) to: &'a str,
    /// The program's path there.
    pub(super) remote_program: &'a str,
    /// containerd's namespace.
    pub(super) namespace: &'a str,
    /// The migration.
    pub(super) migration: &'a str,
    /// The node that has the copy, as it has called itself; empty: one that does not say it.
    pub(super) node: &'a str,
    /// How long the link may be silent.
    pub(super) link_patience: Duration,
}

/// Whether the node that is asked for is the one that answers, as far as both are known.
fn is_of(asked: &str, answers: &str) -> bool {
    asked.is_empty() || answers.is_empty() || asked == answers
}

impl Question<'_> {
    /// Asks once.
    ///
    /// # Errors
    /// [`Kind::Target`]: there is no answer within `deadline`.
    async fn ask(&self, deadline: Duration, interrupt: &Interrupt) -> Result<Outcome> {
        let words = [
            format!("--namespace={}", self.namespace),
            "receive".to_owned(),
            format!("--link-timeout={}", self.link_patience.as_secs()),
        ];
        let mut remote = Remote::run(self.to, self.remote_program, &words)?;
        let (input, output) = remote.pipes()?;
        let mut conversation = Conversation::new(input, output, interrupt.clone());
        let migration = self.migration.to_owned();
        let asked = async {
            conversation.send(Message::Ask { migration }).await?;
            conversation.watch(self.link_patience)?;
            let answer = "what became of the copy";
            let answer = conversation.receive_within(answer, deadline, Duration::ZERO);
            match answer.await? {
                Message::Answer { outcome, node } if is_of(self.node, &node) => Ok(outcome),
                Message::Answer { .. } => {
                    let to = self.to;
                    tracing::warn!("{to:?} leads to another node than that which has the copy");
                    Ok(Outcome::Undecided)
                }
                other => Err(unexpected("what became of the copy", &other).into()),
            }
        };
        let answer = asked.await;
        conversation.close();
        remote.end(answer.is_err()).await;
        answer.map_err(|error: Error| {
            let to = self.to;
            let message = format!("the other node, asked through {to:?}, does not say which runs");
            Error::new(Kind::Target, message).because(error)
        })
    }

    /// Asks until the answer is one, nobody wants it any more, or `patience` has gone by, in the middle of a question, too; none
    /// of it: for ever.
    ///
    /// # Errors
    /// As [`Self::ask`], or an interrupt.
    pub(super) async fn ask_on(
        &self,
        patience: Option<Duration>,
        interrupt: &Interrupt,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Outcome> {
        let deadline = patience.map(|patience| tokio::time::Instant::now() + patience);
        let mut pause = PAUSE;
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(tokio::time::Instant::now()));
            let left = left.map_or(ANSWER_DEADLINE, |left| left.max(self.link_patience));
            let answer = self.ask(left.min(ANSWER_DEADLINE), interrupt).await;
            interrupt.check()?;
            let decided = matches!(answer, Ok(Outcome::Runs | Outcome::Aborted | Outcome::Lost));
            if decided || deadline.is_some_and(|at| tokio::time::Instant::now() > at) {
                return answer;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                interrupted = interrupt.wait() => return Err(interrupted.into()),
            }
            if !is_wanted() {
                return answer;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_node_is_not_believed() {
        assert!(is_of("a", "a") && !is_of("a", "b"));
        assert!(is_of("", "b") && is_of("a", ""), "an older peer");
    }
}
