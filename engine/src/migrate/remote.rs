//! The command that leads to the other node, and `transship receive` there.
//!
//! ```text
//!  stdin, stdout   the talk (`conversation`)
//!  stderr          ──> line by line, with escapes for what a terminal would obey, at most 1 MiB ──> our stderr
//! ```

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, TryRecvError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::process::Signal;
use transship_checkpoint::criu_options::{CriuOption, Phase};
use transship_checkpoint::shown_text::printable;
use transship_checkpoint::wire::WireError;
use transship_sandbox::{ProcessHandle, tree_with_parents};

use super::Request;
use crate::error::{Context, Error, Kind, Result};
use crate::shell_words::quoted;

/// How long the command may take to end by itself.
const END_PATIENCE: u32 = 100;
const END_LOOK: Duration = Duration::from_millis(50);
/// How often its last words are looked for when it has ended.
const REST_LOOKS: u32 = 4;
/// Bytes of a pipe to the command.
const PIPE: i32 = 1 << 20;

/// Bytes of what is said through the command that are shown, and of a line of it.
const MOST_SAID: usize = 1 << 20;
const LINE: u64 = 4096;

/// The running command.
#[derive(Debug)]
pub(super) struct Remote {
    child: Child,
    /// Ends when all that was said has been shown.
    said: mpsc::Receiver<()>,
}

impl Remote {
    /// Runs `COMMAND transship receive ...`; the command goes through a shell, so that it can have
    /// arguments of its own.
    pub(super) fn start(namespace: &str, request: &Request) -> Result<Self> {
        let words = receive_arguments(namespace, request);
        Self::run(&request.to, &request.remote_program, &words)
    }

    /// Runs `to program words`.
    pub(super) fn run(to: &str, program: &str, words: &[String]) -> Result<Self> {
        let mut child = Command::new("sh")
            .args(["-c", &format!("{to} \"$@\""), "sh", program])
            .args(words.iter().map(|word| quoted(word)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {to:?}"))?;
        let (all, said) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            let show = move || {
                show_lines(stderr, &mut io::stderr());
                drop(all);
            };
            let name = "stderr".to_owned();
            let started = std::thread::Builder::new().name(name).spawn(show);
            started.context("cannot start a thread")?;
        }
        for pipe in [
            child.stdin.as_ref().map(AsFd::as_fd),
            child.stdout.as_ref().map(AsFd::as_fd),
        ] {
            // A frame in one go, where that much is allowed; each switch between two programs costs time.
            let _ = pipe.map(|pipe| fcntl(pipe, FcntlArg::F_SETPIPE_SZ(PIPE)));
        }
        Ok(Self { child, said })
    }

    /// What it writes, and what it reads.
    pub(super) fn pipes(&mut self) -> Result<(ChildStdout, ChildStdin)> {
        let pipes = self.child.stdout.take().zip(self.child.stdin.take());
        pipes.ok_or_else(|| Error::failed("the command has no pipes"))
    }

    /// Waits for the command. One that does not end by itself is killed with all that it has started, a
    /// stopped ssh for instance; so is one whose pipes are still held by a step that was cut short.
    pub(super) async fn end(mut self, cut_short: bool) -> Option<ExitStatus> {
        for _ in 0..if cut_short { 0 } else { END_PATIENCE } {
            match self.child.try_wait() {
                Ok(None) => tokio::time::sleep(END_LOOK).await,
                Ok(status) => {
                    self.show_rest().await;
                    return status;
                }
                Err(_) => return None,
            }
        }
        for below in processes_below(self.child.id()) {
            // It may have ended meanwhile.
            below.signal(Signal::KILL).unwrap_or_default();
        }
        drop(self.child.kill());
        drop(self.child.wait());
        self.show_rest().await;
        None
    }

    /// Its last words. Another program may have the end of the pipe for longer, as an ssh does that others share.
    async fn show_rest(&self) {
        for _ in 0..REST_LOOKS {
            match self.said.try_recv() {
                Err(TryRecvError::Empty) => tokio::time::sleep(END_LOOK).await,
                _ => return,
            }
        }
    }
}

/// Shows what others have written, as far as that is not more than anybody reads; the rest is taken, so that nobody waits
/// for a reader.
fn show_lines(said: impl Read, to: &mut impl Write) {
    let (mut said, mut line) = (BufReader::new(said), Vec::new());
    let mut left = MOST_SAID;
    loop {
        line.clear();
        match said.by_ref().take(LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if left == 0 => continue,
            Ok(read) => left = left.saturating_sub(read),
        }
        let text = String::from_utf8_lossy(&line);
        let shown = printable(text.trim_end_matches(['\r', '\n']));
        // Who has closed our stderr sees nothing.
        drop(writeln!(to, "{shown}"));
        if left == 0 {
            drop(writeln!(
                to,
                "(the other node says more, which is not shown)"
            ));
        }
    }
}

/// The children of a process that has not been waited for, theirs, and so on.
fn processes_below(root: u32) -> Vec<ProcessHandle> {
    let tree = tree_with_parents(root.cast_signed()).unwrap_or_default();
    let below = tree.into_iter().filter(|(_, parent)| parent.is_some());
    // All that can be had, before the first of them ends and its children have another parent.
    below
        .filter_map(|(pid, parent)| ProcessHandle::open_below(pid, parent).ok()?)
        .collect()
}

/// The arguments of `transship` on the other node: how the container is made there. They are
/// arguments, because a node whose operator lets nobody choose them ignores them.
pub fn receive_arguments(namespace: &str, request: &Request) -> Vec<String> {
    let target = &request.target;
    let mut words = vec![
        format!("--namespace={namespace}"),
        "receive".to_owned(),
        format!("--link-timeout={}", request.link_patience.as_secs()),
    ];
    for (flag, value) in [
        ("id", &target.id),
        ("sandbox", &target.sandbox),
        ("snapshotter", &target.snapshotter),
        ("runtime-binary", &target.runtime_binary),
        ("log-uri", &target.log_uri),
        (
            "network",
            &target.address.map(|address| address.to_string()),
        ),
    ] {
        words.extend(value.iter().map(|value| format!("--{flag}={value}")));
    }
    words.extend({ request.data_address.iter() }.map(|at| format!("--data-address={at}")));
    if request.pod.is_some_and(|pod| pod.wait) {
        words.push("--wait-for-pod".to_owned());
    }
    if target.new_namespaces {
        words.push("--new-namespaces".to_owned());
    }
    let at_restore = |name: &str| {
        CriuOption::named(name).is_some_and(|option| option.phase.meets(Phase::Restore))
    };
    let options = target.criu.chosen().filter(|(name, _)| at_restore(name));
    words.extend(options.map(|(name, value)| format!("--{name}={value}")));
    words.extend(
        target
            .allowed
            .iter()
            .map(|allow| format!("--allow={allow}")),
    );
    words
}

/// What the other side has told.
pub(super) fn refused_there(error: Error) -> Error {
    match error.cause::<WireError>() {
        Some(WireError::Failed { .. }) if error.kind() == Kind::Failed => {
            Error::new(Kind::Target, "the other node refused or failed").because(error)
        }
        _ => error,
    }
}

/// Gives failures of the other side their kind.
pub(super) fn blame(error: Error, request: &Request, status: Option<&ExitStatus>) -> Error {
    if error.kind() != Kind::Failed {
        return error;
    }
    let to = &request.to;
    match error.cause::<WireError>() {
        Some(WireError::Failed { .. }) => refused_there(error),
        Some(WireError::Ended { expected }) if *expected == "the target's answer" => {
            let ended = status
                .map(|status| format!(" ({status})"))
                .unwrap_or_default();
            let message = format!(
                "the connection to the other node through {to:?} failed{ended}: there is no \
                 transship that answers, or an older one"
            );
            Error::new(Kind::Target, message)
                .hint(format!(
                    "try it by hand: {to} {} --version",
                    request.remote_program
                ))
                .because(error)
        }
        Some(_) => {
            let message = format!("the connection to the other node through {to:?} failed");
            Error::new(Kind::Target, message)
                .hint(format!(
                    "try it by hand: {to} {} --version",
                    request.remote_program
                ))
                .because(error)
        }
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_the_command_has_started_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // A grandchild that is stopped and holds the pipe open, as a stopped ssh holds the terminal.
        let command = format!(
            "exec 3<>{0}; sh -c 'sh -c \"kill -STOP \\$\\$\"; :' & echo up >&3; wait; :",
            pipe.display()
        );
        let remote = Remote::start("default", &Request::new("web", command)).unwrap();
        let shell = remote.child.id();
        assert_eq!(std::fs::File::open(&pipe).map(|_| ()).ok(), Some(()));
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while processes_below(shell).len() < 2 {
            assert!(std::time::Instant::now() < deadline, "nothing is started");
            tokio::time::sleep(END_LOOK).await;
        }
        let below = processes_below(shell);
        remote.end(true).await;
        for pid in below {
            let pid = pid.pid();
            while procfs::process::Process::new(pid)
                .is_ok_and(|process| process.stat().is_ok_and(|stat| stat.state != 'Z'))
            {
                assert!(std::time::Instant::now() < deadline, "{pid} is left");
                tokio::time::sleep(END_LOOK).await;
            }
        }
    }

    #[test]
    fn what_the_other_node_says_is_shown_and_not_obeyed() {
        let shown = |said: &[u8]| {
            let mut shown = Vec::new();
            show_lines(said, &mut shown);
            String::from_utf8(shown).unwrap()
        };
        assert_eq!(
            shown(b"a warning\r\nand \x1b[2J\xff"),
            "a warning\nand \\u{1b}[2J\u{fffd}\n"
        );
        let flood = shown(&b"again and again\n".repeat(1 << 20));
        assert!(flood.len() < 2 * MOST_SAID, "{}", flood.len());
        assert!(flood.ends_with("which is not shown)\n"));
    }

    #[test]
    fn the_namespace_is_named_always() {
        let request = Request::new("web", "ssh node-b");
        let words = receive_arguments("moved", &request);
        assert_eq!(words, ["--namespace=moved", "receive", "--link-timeout=30"]);
    }
}
