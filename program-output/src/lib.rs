//! What a program says, within a time.
//!
//! ```text
//!  input ──> stdin │ program, which leads a process group │ stdout, stderr ──> Output, within a bound
//!                  '── too long: the group is killed ─────────────────────────> none
//! ```
//!
//! Plugins of networks and nft are waited for while containers stand still: one that hangs may keep nobody.

use std::io::{self, Read, Write as _};
use std::process::{Child, Output};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Bytes that are read of each pipe: a container can make the rules more that nft lists.
const MOST_BYTES: u64 = 4 << 20;

/// What a process says that leads a group (`process_group(0)`), until its end; none where it was killed for taking longer.
/// Of more than 4 MiB the beginning is read, and the program is told by its pipe that nobody reads on.
///
/// # Errors
/// It cannot be waited for, or there is no thread for it.
pub fn output_within(
    patience: Duration,
    mut child: Child,
    input: String,
) -> io::Result<Option<Output>> {
    let group = Pid::from_raw(child.id().cast_signed());
    let (told, ended) = mpsc::channel();
    let stdout = read_beside(child.stdout.take())?;
    let stderr = read_beside(child.stderr.take())?;
    thread::Builder::new().spawn(move || {
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read it says why.
            drop(stdin.write_all(input.as_bytes()));
        }
        let read = |reader: JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
        let (stdout, stderr) = (read(stdout), read(stderr));
        let output = child.wait().map(|status| Output {
            status,
            stdout,
            stderr,
        });
        // Nobody waits for it any more where it was killed.
        drop(told.send(output));
    })?;
    match ended.recv_timeout(patience) {
        Ok(output) => output.map(Some),
        Err(_) => {
            let _ = killpg(group, Signal::SIGKILL);
            Ok(None)
        }
    }
}

fn read_beside(pipe: Option<impl Read + Send + 'static>) -> io::Result<JoinHandle<Vec<u8>>> {
    thread::Builder::new().spawn(move || {
        let mut said = Vec::new();
        // What was read until it failed is what it has said.
        drop(pipe.map(|pipe| pipe.take(MOST_BYTES).read_to_end(&mut said)));
        said
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let run = |patience, program: &str| {
            let child = Command::new("sh")
                .args(["-c", program])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0)
                .spawn()
                .unwrap();
            output_within(patience, child, "script".into()).unwrap()
        };
        // It holds the pipes as well.
        assert!(run(Duration::from_millis(500), "sleep 600 & wait").is_none());
        let patience = Duration::from_secs(600);
        assert_eq!(run(patience, "cat").unwrap().stdout, b"script");
        // It would go on for ever.
        let output = run(patience, "exec yes").unwrap();
        assert_eq!(output.stdout.len() as u64, MOST_BYTES);
        assert!(!output.status.success());
    }
}
