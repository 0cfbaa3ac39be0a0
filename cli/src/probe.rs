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
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Serialize;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use transship_engine::{Context as _, Error, Result};

/// For one answer. A program that stands still takes a connection and says nothing.
const ANSWER: Duration = Duration::from_secs(1);
/// For the first answer once it is done: routes and neighbours have to learn where an address is now.
const AFTERWARDS: Duration = Duration::from_secs(10);
/// Between two questions: the asking is not to take the processor from the migration.
const EVERY: Duration = Duration::from_millis(50);

/// Asks over and over until it is told to end.
pub(crate) struct Probe {
    asking: JoinHandle<Answers>,
    until: watch::Sender<Until>,
}

/// How long it asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    Told,
    /// Once it has an answer to what is asked from now on.
    Answered,
    Now,
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
        drop(asked);
        let (until, told) = watch::channel(Until::Told);
        let command = command.to_owned();
        let asking = tokio::spawn(async move { ask(&command, told).await });
        Ok(Self { asking, until })
    }

    /// Waits for an answer of what runs now, unless `interrupted` comes before.
    pub(crate) async fn finish(mut self, interrupted: impl Future) -> Option<Answers> {
        self.until.send_replace(Until::Answered);
        tokio::select! {
            answers = &mut self.asking => answers.ok(),
            _ = interrupted => {
                self.stop().await;
                None
            }
        }
    }

    /// Ends it, and all that asks.
    pub(crate) async fn stop(self) {
        self.until.send_replace(Until::Now);
        // It has nothing to tell.
        drop(self.asking.await);
    }
}

async fn ask(command: &str, until: watch::Receiver<Until>) -> Answers {
    let (mut last, mut waits) = (Instant::now(), Vec::new());
    let mut done_at: Option<Instant> = None;
    let mut questions = JoinSet::new();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let at_the_end = loop {
        tokio::select! {
            _ = ticks.tick() => {
                let told = *until.borrow();
                if told == Until::Now || done_at.is_some_and(|at| at.elapsed() > AFTERWARDS) {
                    break false;
                }
                // One that was asked before may be answered by who is gone.
                let is_afterwards = done_at.is_some();
                if let Ok(mut asked) = start(command) {
                    questions.spawn(async move {
                        let answered = succeeds(&mut asked).await;
                        answered.then(|| (Instant::now(), is_afterwards))
                    });
                }
                if done_at.is_none() && told == Until::Answered {
                    done_at = Some(Instant::now());
                }
            }
            Some(ended) = questions.join_next() => {
                let Ok(Some((at, is_afterwards))) = ended else {
                    continue;
                };
                waits.push(at.saturating_duration_since(last));
                last = last.max(at);
                if is_afterwards {
                    break true;
                }
            }
        }
    };
    questions.shutdown().await;
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

/// Starts the command in a process group of its own: a Ctrl-C is not meant for it, and what has not answered is killed with
/// all that it has started.
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
        let (answers, ()) = tokio::join!(probe.finish(std::future::pending::<()>()), come_back);
        let answers = answers.unwrap();
        assert!(answers.at_the_end);
        assert!(answers.longest_wait_seconds >= 0.5, "{answers:?}");
    }

    #[tokio::test]
    async fn what_is_asked_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pids");
        let command = format!(
            "echo $$ >>{0}; test $(wc -l <{0}) = 1 || exec sleep 1000",
            file.display()
        );
        let probe = Probe::begin(&command).await.unwrap();
        while std::fs::read_to_string(&file).unwrap().lines().count() < 4 {
            tokio::time::sleep(EVERY).await;
        }
        assert!(probe.finish(async {}).await.is_none());
        let asked = std::fs::read_to_string(&file).unwrap();
        // Killed, it takes a moment.
        let lives = |pid: &str| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline"));
            command.is_ok_and(|command| command.starts_with(b"sleep"))
        };
        for _ in 0..200 {
            if !asked.lines().any(lives) {
                return;
            }
            tokio::time::sleep(EVERY).await;
        }
        panic!("one of them is alive: {asked}");
    }
}
