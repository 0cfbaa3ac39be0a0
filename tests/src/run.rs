//! Running commands whose failure must explain itself.

use std::process::{Command, Output, Stdio};

use crate::TestbedError;

/// As much of stderr as goes into an error: enough for a containerd error chain.
const STDERR_TAIL: usize = 2048;

/// Runs a [`Command`] to its end and turns a bad status into an error with the tail of stderr.
pub trait CommandRun {
    /// Runs the command with empty stdin and gives its stdout as text.
    ///
    /// # Errors
    /// When the command cannot be started, or fails; with the end of its stderr.
    fn read(&mut self) -> Result<String, TestbedError>;

    /// Runs the command with empty stdin; its stdout is dropped.
    ///
    /// # Errors
    /// As [`CommandRun::read`].
    fn run(&mut self) -> Result<(), TestbedError>;

    /// Runs the command, which must fail, and gives what it wrote to stderr.
    ///
    /// # Errors
    /// When the command cannot be started, or succeeds.
    fn read_failure(&mut self) -> Result<String, TestbedError>;

    /// Runs the command with `input` on stdin and gives its stdout.
    ///
    /// # Errors
    /// As [`CommandRun::read`].
    fn feed(&mut self, input: &[u8]) -> Result<Vec<u8>, TestbedError>;
}

impl CommandRun for Command {
    fn read(&mut self) -> Result<String, TestbedError> {
        let output = finish(self)?;
        Ok(String::from_utf8_lossy(&succeed(self, output)?.stdout).into_owned())
    }

    fn run(&mut self) -> Result<(), TestbedError> {
        let output = finish(self)?;
        succeed(self, output).map(drop)
    }

    fn read_failure(&mut self) -> Result<String, TestbedError> {
        let output = finish(self)?;
        if output.status.success() {
            return Err(TestbedError::Unexpected {
                what: "success of a command that had to fail",
                text: format!(
                    "{}: {}",
                    line(self),
                    String::from_utf8_lossy(&output.stdout)
                ),
            });
        }
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn feed(&mut self, input: &[u8]) -> Result<Vec<u8>, TestbedError> {
        use std::io::Write as _;
        let mut child = self
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| TestbedError::Start {
                line: line(self),
                source,
            })?;
        let mut pipe = child.stdin.take();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                // A command that ends early closes the pipe; its status tells why.
                pipe.as_mut().map(|pipe| pipe.write_all(input))
            });
            child.wait_with_output()
        })
        .map_err(|source| TestbedError::Start {
            line: line(self),
            source,
        })?;
        Ok(succeed(self, output)?.stdout)
    }
}

fn finish(command: &mut Command) -> Result<Output, TestbedError> {
    command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| TestbedError::Start {
            line: line(command),
            source,
        })
}

fn succeed(command: &Command, output: Output) -> Result<Output, TestbedError> {
    if output.status.success() {
        return Ok(output);
    }
    let tail = output.stderr.len().saturating_sub(STDERR_TAIL);
    let stderr = String::from_utf8_lossy(&output.stderr[tail..])
        .trim()
        .to_owned();
    Err(TestbedError::Failed {
        line: line(command),
        status: output.status,
        stderr,
    })
}

/// The command line as a person would type it; what leads into a node is left out.
fn line(command: &Command) -> String {
    let mut words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    if words.get(1).is_some_and(|word| word == crate::enter::ROLE) {
        // The first separator ends the cgroup files, the second one nsenter's own arguments.
        let own = words
            .iter()
            .enumerate()
            .filter(|(_, word)| *word == "--")
            .map(|(at, _)| at);
        if let Some(at) = own.take(2).last() {
            words.drain(..=at);
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_carries_the_end_of_stderr() {
        let error = Command::new("sh")
            .args([
                "-c",
                "head -c 5000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 3",
            ])
            .run()
            .unwrap_err()
            .to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("the end"), "{error}");
        assert!(error.len() < STDERR_TAIL + 200);
    }

    #[test]
    fn input_reaches_the_command() {
        assert_eq!(Command::new("cat").feed(b"abc").unwrap(), b"abc");
        assert!(Command::new("true").read_failure().is_err());
        assert_eq!(
            Command::new("sh")
                .args(["-c", "echo no >&2; exit 1"])
                .read_failure()
                .unwrap(),
            "no\n"
        );
    }

    #[test]
    fn the_way_into_a_node_is_not_shown() {
        let mut command = Command::new("/exe");
        command.args([
            crate::enter::ROLE,
            "/c/procs",
            "--",
            "nsenter",
            "-t",
            "7",
            "-a",
            "--",
        ]);
        command.args(["ctr", "run", "--", "x"]);
        assert_eq!(line(&command), "ctr run -- x");
    }
}
