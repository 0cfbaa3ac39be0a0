//! What a program says, within a time.
//!
//! ```text
//!  input ──> stdin │ program, which leads a process group │ stdout, stderr ──> Output
//!                  '── too long: the group is killed ─────────────────────────> none
//! ```
//!
//! Plugins of networks and nft are waited for while containers stand still: one that hangs may keep nobody.

use std::io::{self, Write as _};
use std::process::{Child, Output};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// What a process says that leads a group (`process_group(0)`), until its end; none where it was killed for taking longer.
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
    thread::Builder::new().spawn(move || {
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read it says why.
            drop(stdin.write_all(input.as_bytes()));
        }
        // Nobody waits for it any more where it was killed.
        drop(told.send(child.wait_with_output()));
    })?;
    match ended.recv_timeout(patience) {
        Ok(output) => output.map(Some),
        Err(_) => {
            let _ = killpg(group, Signal::SIGKILL);
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let run = |program: &str| {
            let child = Command::new("sh")
                .args(["-c", program])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0)
                .spawn()
                .unwrap();
            output_within(Duration::from_millis(500), child, "script".into()).unwrap()
        };
        let began = Instant::now();
        // It holds the pipes as well.
        assert!(run("sleep 600 & wait").is_none());
        assert!(began.elapsed() < Duration::from_secs(30));
        assert_eq!(run("cat").unwrap().stdout, b"script");
    }
}
