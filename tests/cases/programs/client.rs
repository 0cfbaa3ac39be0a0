//! Somebody who asks a server again and again, and counts the answers.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Node, poll_until};

use super::Program;

const PATIENCE: Duration = Duration::from_secs(120);
/// Operations that must be acknowledged before, between and after the moves.
const OPERATIONS: u64 = 20;

/// Where an operation is run.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// In the client's container on this node, whose first process this is.
    Outside {
        node: Node,
        client: u32,
        address: String,
    },
    /// In the server's own container.
    Inside { node: Node, server: u32 },
}

impl Place {
    /// The script in bash, with the server's address in `$A`.
    pub(super) fn bash(&self, script: &str) -> Command {
        let mut command = self.enter();
        command.args(["timeout", "60", "bash", "-c"]);
        command.arg(format!("A={}; {script}", self.address()));
        command
    }

    fn address(&self) -> &str {
        match self {
            Place::Outside { address, .. } => address,
            Place::Inside { .. } => "127.0.0.1",
        }
    }

    fn enter(&self) -> Command {
        let (node, pid, namespaces) = match self {
            Place::Outside { node, client, .. } => (node, client, ["--mount"].as_slice()),
            Place::Inside { node, server } => {
                let all = ["--mount", "--net", "--pid"].as_slice();
                (node, server, all)
            }
        };
        let mut command = node.command("nsenter");
        command
            .args(["--target", &pid.to_string()])
            .args(namespaces);
        command
    }
}

/// A shell in a place that runs one operation for each line, and answers with a line.
struct Asker {
    shell: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Asker {
    fn new(place: &Place, operation: &str) -> std::io::Result<Asker> {
        let script = r#"while read -r A; do
            export A
            if said=$(timeout 10 bash -c "$0" 2>&1 </dev/null); then echo; else echo "${?} ${said//$'\n'/; }"; fi
        done"#;
        let mut shell = place
            .enter()
            .args(["bash", "-c", script, operation])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let ask = shell.stdin.take().expect("it was asked for as a pipe");
        let answers = shell.stdout.take().expect("it was asked for as a pipe");
        Ok(Asker {
            shell,
            ask,
            answers: BufReader::new(answers),
        })
    }

    /// Empty when the server has acknowledged, else why not; an error where the shell has ended.
    fn ask(&mut self, address: &str) -> std::io::Result<String> {
        writeln!(self.ask, "{address}")?;
        let mut answer = String::new();
        match self.answers.read_line(&mut answer)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(answer.trim_end().to_owned()),
        }
    }

    /// Ends the shell after what it does now.
    fn end(mut self) {
        drop(self.ask);
        // It may have ended with its container.
        drop(self.shell.wait());
    }
}

/// Where the client asks now.
#[derive(Debug, Default)]
struct Where {
    /// None while there is no server to ask.
    place: Option<Place>,
    moves: u64,
    /// It asks nobody, and its shell has ended.
    rests: bool,
    stop: bool,
    /// Why the last operation was not acknowledged that was not.
    refusal: String,
}

#[derive(Debug)]
pub(super) struct Client<'a> {
    program: &'a Program,
    now: Mutex<Where>,
    changed: Condvar,
    acknowledged: AtomicU64,
    unanswered: AtomicU64,
}

impl<'a> Client<'a> {
    pub(super) fn new(program: &'a Program, place: Place) -> Client<'a> {
        let now = Where {
            place: Some(place),
            ..Where::default()
        };
        Client {
            program,
            now: Mutex::new(now),
            changed: Condvar::new(),
            acknowledged: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
        }
    }

    /// From now on it asks there.
    pub(super) fn move_to(&self, place: Place) {
        self.change(|now| {
            now.place = Some(place);
            now.moves += 1;
        });
    }

    /// Lets it ask nobody, and waits until it has its last answer.
    pub(super) fn rest(&self) {
        self.change(|now| now.place = None);
        let now = self.now.lock().expect("no holder panics");
        let rested = self.changed.wait_while(now, |now| !now.rests);
        drop(rested.expect("no holder panics"));
    }

    fn change(&self, change: impl FnOnce(&mut Where)) {
        change(&mut self.now.lock().expect("no holder panics"));
        self.changed.notify_all();
    }

    /// Asks until the end of `act`, which sees what has come of it.
    pub(super) fn while_asking<T>(
        &self,
        act: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let asked = self.run();
                // Nobody waits for one that is gone.
                self.change(|now| now.rests = true);
                asked
            });
            let done = {
                let _stop = StopAtEnd(self);
                act()
            };
            let asked = asking.join().expect("the client does not panic");
            done.and_then(|value| asked.map(|()| value))
        })
    }

    fn run(&self) -> anyhow::Result<()> {
        let mut asker: Option<(u64, Asker)> = None;
        loop {
            let now = self.now.lock().expect("no holder panics");
            let (place, moves, stop) = (now.place.clone(), now.moves, now.stop);
            drop(now);
            let is_over = |(of, _): &mut (u64, Asker)| stop || place.is_none() || *of != moves;
            if let Some((_, before)) = asker.take_if(is_over) {
                before.end();
            }
            if stop {
                return Ok(());
            }
            let Some(place) = place else {
                self.change(|now| now.rests = true);
                let now = self.now.lock().expect("no holder panics");
                let wait = |now: &mut Where| !now.stop && now.place.is_none();
                let waited = self.changed.wait_while(now, wait);
                waited.expect("no holder panics").rests = false;
                continue;
            };
            let (_, shell) = match &mut asker {
                Some(asker) => asker,
                None => asker.insert((moves, Asker::new(&place, self.program.operation)?)),
            };
            let answer = shell.ask(place.address());
            if matches!(&answer, Ok(said) if said.is_empty()) {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            self.unanswered.fetch_add(1, Ordering::Relaxed);
            let why = answer.unwrap_or_else(|error| {
                // Its container has ended.
                if let Some((_, ended)) = asker.take() {
                    ended.end();
                }
                error.to_string()
            });
            self.change(|now| now.refusal = why);
        }
    }

    pub(super) fn wait_for_more(&self) -> anyhow::Result<()> {
        let before = self.acknowledged.load(Ordering::Relaxed);
        Ok(poll_until("acknowledged operations", PATIENCE, || {
            let more = self.acknowledged.load(Ordering::Relaxed) - before;
            if more >= OPERATIONS {
                return Ok(());
            }
            let unanswered = self.unanswered.load(Ordering::Relaxed);
            let now = self.now.lock().expect("no holder panics");
            Err(format!(
                "{more}, and {unanswered} unanswered: {}",
                now.refusal
            ))
        })?)
    }

    /// Nothing that was acknowledged is lost, and nothing is counted that was not asked. Call it when
    /// nobody asks any more, with a place inside.
    pub(super) fn check(&self, server: &Place) -> anyhow::Result<()> {
        let counted = server.bash(self.program.count).read()?;
        let counted: u64 = counted.trim().parse().with_context(|| counted.clone())?;
        let acknowledged = self.acknowledged.load(Ordering::Relaxed);
        let asked = acknowledged + self.unanswered.load(Ordering::Relaxed);
        ensure!(
            (acknowledged..=asked).contains(&counted),
            "{acknowledged} of {asked} operations were acknowledged, the server counts {counted}"
        );
        Ok(())
    }
}

/// Ends the client, also where the test fails: the scope waits for it.
struct StopAtEnd<'a>(&'a Client<'a>);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.change(|now| now.stop = true);
    }
}
