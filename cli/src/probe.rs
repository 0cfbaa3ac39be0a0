//! `--probe COMMAND`: how long a client of the program got no answer while it moved.
//!
//! ```text
//!  every 50 ms   COMMAND --ok
//!                   COMMAND --ok
//!                      COMMAND ------- killed after a second
//!                         COMMAND --fails
//!                                    COMMAND --ok
//!                             |<-------------->|  the longest wait, from one answer to the next
//! ```
//!
//! One does not wait for the other: what a command is told while nobody is there (a first packet that is sent again after
//! a second) is not to be taken for the time that nobody was there.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Serialize;
use tokio::process::{Child, Command};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use transship_engine::{Context as _, Error, Result};

/// For one answer. A program that stands still takes a connection and says nothing.
const ANSWER: Duration = Duration::from_secs(1);
/// For the first answer once it is done: routes and neighbours have to learn where an address is now.
const AFTERWARDS: Duration = Duration::from_secs(10);
/// Between two questions: the asking is not to take the processor from the migration.
const EVERY: Duration = Duration::from_millis(50);

/// Asks over and over until it is [finished](Self::finish) or dropped.
pub(crate) struct Probe {
    asking: JoinHandle<Answers>,
    is_done: Arc<AtomicBool>,
}

/// What a client has seen.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Answers {
    /// How many answers there were.
    count: u64,
    /// Seconds between two of them, at most.
    longest_wait_seconds: f64,
    /// Seconds between two of them otherwise, on average.
    usual_wait_seconds: f64,
    /// Whether it was answered once the copy ran.
    at_the_end: bool,
}

impl Probe {
    /// Begins to ask, when there is a first answer.
    ///
    /// # Errors
    /// There is none.
    pub(crate) async fn begin(command: &str) -> Result<Self> {
        let failed = || format!("the probe {command:?} has no answer before anything is moved");
        let mut asked = start(command).with_context(failed)?;
        if !succeeds(&mut asked).await {
            return Err(Error::refused(failed()).hint("it has to succeed within a second"));
        }
        let is_done = Arc::new(AtomicBool::new(false));
        let (command, until) = (command.to_owned(), Arc::clone(&is_done));
        let asking = tokio::spawn(async move { ask(&command, &until).await });
        Ok(Self { asking, is_done })
    }

    /// Waits for an answer of what runs now.
    pub(crate) async fn finish(mut self) -> Answers {
        self.is_done.store(true, Ordering::Release);
        (&mut self.asking).await.unwrap_or_default()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.asking.abort();
    }
}

async fn ask(command: &str, is_done: &AtomicBool) -> Answers {
    let (mut last, mut waits) = (Instant::now(), Vec::new());
    let mut done_at: Option<Instant> = None;
    let mut questions = JoinSet::new();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let at_the_end = loop {
        tokio::select! {
            _ = ticks.tick() => {
                if done_at.is_some_and(|at| at.elapsed() > AFTERWARDS) {
                    break false;
                }
                // One that was asked before may be answered by who is gone.
                let is_afterwards = done_at.is_some();
                if let Ok(mut asked) = start(command) {
                    questions.spawn(async move { (succeeds(&mut asked).await, is_afterwards) });
                }
                if done_at.is_none() && is_done.load(Ordering::Acquire) {
                    done_at = Some(Instant::now());
                }
            }
            Some(Ok((true, is_afterwards))) = questions.join_next() => {
                let now = Instant::now();
                waits.push(now - last);
                last = now;
                if is_afterwards {
                    break true;
                }
            }
        }
    };
    if !at_the_end {
        waits.push(last.elapsed());
    }
    Answers::of(&waits, at_the_end)
}

impl Answers {
    fn of(waits: &[Duration], at_the_end: bool) -> Self {
        let longest = waits.iter().max().copied().unwrap_or_default();
        let others = u32::try_from(waits.len())
            .unwrap_or(u32::MAX)
            .saturating_sub(1);
        let usual = (waits.iter().sum::<Duration>() - longest).checked_div(others);
        let unanswered = u64::from(!at_the_end);
        Self {
            count: (waits.len() as u64).saturating_sub(unanswered),
            longest_wait_seconds: longest.as_secs_f64(),
            usual_wait_seconds: usual.unwrap_or_default().as_secs_f64(),
            at_the_end,
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let Self {
            longest_wait_seconds: longest,
            usual_wait_seconds: usual,
            ..
        } = self;
        match self.at_the_end {
            true => format!(
                "a client waited for {longest:.3} s at most; it was answered every {usual:.3} s otherwise"
            ),
            false => format!(
                "a client has had no answer for {longest:.1} s: the copy runs, and is not reached from here by the same \
                 way"
            ),
        }
    }
}

/// Starts the command in a process group of its own: a Ctrl-C is not meant for it, and it is killed with all that it starts.
fn start(command: &str) -> std::io::Result<Asked> {
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok(Asked(child))
}

/// Killed when it is dropped.
struct Asked(Child);

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(id) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            // It may have ended.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

async fn succeeds(asked: &mut Asked) -> bool {
    let ended = tokio::time::timeout(ANSWER, asked.0.wait()).await;
    matches!(ended, Ok(Ok(status)) if status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_is_told_beside_the_others() {
        let waits = [10, 12, 400, 14].map(Duration::from_millis);
        let answers = Answers::of(&waits, true);
        assert_eq!(
            answers.text(),
            "a client waited for 0.400 s at most; it was answered every 0.012 s otherwise"
        );
        assert_eq!(answers.count, 4);
        let answers = Answers::of(&waits, false);
        assert_eq!(answers.count, 3);
        assert!(
            answers
                .text()
                .starts_with("a client has had no answer for 0.4 s")
        );
        assert_eq!(Answers::of(&[], false).longest_wait_seconds, 0.0);
    }

    #[tokio::test]
    async fn what_gives_no_answer_before_it_is_refused() {
        for command in ["exit 3", "sleep 1000"] {
            let error = Probe::begin(command).await.err().unwrap().one_line();
            assert!(error.contains("has no answer before"), "{error}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_stays_away_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("up");
        std::fs::write(&file, "").unwrap();
        let probe = Probe::begin(&format!("test -e {}", file.display()))
            .await
            .unwrap();
        std::fs::remove_file(&file).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let come_back = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            std::fs::write(&file, "").unwrap();
        };
        let (answers, ()) = tokio::join!(probe.finish(), come_back);
        assert!(answers.at_the_end);
        assert!(answers.longest_wait_seconds >= 0.5, "{answers:?}");
    }
}
