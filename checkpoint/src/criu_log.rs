//! CRIU's log, turned into the line that says what went wrong.
//!
//! ```text
//! (00.012345)      7: Error (criu/files-reg.c:2189): Can't open file /x on restore: No such file
//! (00.013)    pie: 7: Error (criu/pie/restorer.c:1293): Can't create posix timer - 0: -22
//! pie: 1: Error (criu/pie/parasite.c:588): send_fds failed (-22)
//!  since start   who  level  where                       text
//! ```
//!
//! `who` is nobody (CRIU itself), a process id, or the part of CRIU that runs inside of a process
//! (`pie`) or beside it (`uns`), with one; at a dump that part does not know the time. The first error is the cause; those after it are what
//! followed from it. What it means and what to do is in the table of [`crate::conditions`].

use std::io::Read;
use std::path::Path;
use std::{fs::File, io};

use crate::conditions::Condition;
use crate::shown_text::printable;

/// More of a log than this is not read: the first error comes early, the rest is debugging output.
const LOG_LIMIT: u64 = 64 << 20;

/// Errors that do not end a restore.
const HARMLESS: &[&str] = &[
    // Kernel 6.18: CRIU raises the limit beyond what the host allows, and goes on without.
    "rlimit: Can't setup RLIMIT_NOFILE",
];

/// What follows from an earlier error and explains nothing.
const CONSEQUENCES: &[&str] = &[
    "Restoring FAILED",
    "exited, status=",
    "killed by signal",
    "cgroupd: recv req error",
];

/// The first line of `log` that tells why CRIU gave up, without time and place; with what it means and
/// what to do, where that is known.
#[must_use]
pub fn first_error(log: &str) -> Option<String> {
    let errors: Vec<&str> = log
        .lines()
        .filter_map(error_text)
        .filter(|text| !HARMLESS.iter().any(|harmless| text.contains(harmless)))
        .collect();
    let cause = errors
        .iter()
        .find(|text| !CONSEQUENCES.iter().any(|known| text.contains(known)))
        // A process that was killed tells more than that the restore has failed.
        .or_else(|| {
            errors
                .iter()
                .find(|text| Condition::of_error(text).is_some())
        })
        .or(errors.first())?;
    // Names of files are in it, which the container has chosen.
    let shown = printable(cause);
    Some(match Condition::of_error(cause) {
        Some(known) => format!("{shown} ({}; {})", known.what, known.remedy),
        None => shown,
    })
}

/// [`first_error`] of a file.
///
/// # Errors
/// The file cannot be read.
pub fn first_error_of(path: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LOG_LIMIT).read_to_end(&mut bytes)?;
    Ok(first_error(&String::from_utf8_lossy(&bytes)))
}

fn error_text(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let rest = match line.strip_prefix('(') {
        Some(timed) => timed.split_once(')')?.1.trim_start(),
        None => line,
    };
    let (who, rest) = rest.split_once("Error (")?;
    let of_speaker = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | ' ' | '-');
    if !who.chars().all(of_speaker) {
        return None;
    }
    let text = rest.split_once("): ")?.1.trim();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_the_first_that_matters() {
        let log = "\
(00.000100) Error (criu/rlimit.c:10): rlimit: Can't setup RLIMIT_NOFILE for self\n\
(00.001) Warn  (criu/x.c:1): nothing\n\
(00.012345)      7: Error (criu/files-reg.c:2189): Can't open file /x on restore: Permission denied\n\
(00.013)      7: Error (criu/files-reg.c:2100): Can't open file /x\n\
(00.014) Error (criu/cr-restore.c:1234): 99 exited, status=1\n\
(00.015) Error (criu/cr-restore.c:2300): Restoring FAILED.\n";
        assert_eq!(
            first_error(log).as_deref(),
            Some("Can't open file /x on restore: Permission denied")
        );
    }

    #[test]
    fn what_is_known_of_a_cause_is_said() {
        let log = "(00.1) Error (criu/sockets.c:1): Can't get 1:16 opt: Protocol not available\n";
        let text = first_error(log).unwrap();
        assert!(
            text.starts_with("Can't get 1:16 opt") && text.contains("CRIU before 4.2"),
            "{text}"
        );
    }

    #[test]
    fn every_part_of_criu_is_heard() {
        for who in ["", "     7: ", "pie: 1: ", "pie: ", "uns: ", "lazy-pages: "] {
            let log = format!(
                "(00.2) {who}Error (criu/pie/restorer.c:1293): Can't create posix timer - 0: -22\n\
                 (00.3) Error (criu/cr-restore.c:2300): Restoring FAILED.\n"
            );
            let text = first_error(&log).unwrap();
            assert!(
                text.starts_with("Can't create posix timer - 0: -22 (")
                    && text.contains("SIGEV_THREAD_ID"),
                "{who:?}: {text}"
            );
        }
        // A program's own words are none of CRIU's.
        assert_eq!(first_error("(00.1) said \"x\" Error (a): b\n"), None);
    }

    /// Beginnings of what CRIU 4.2.1 has said of containers in these conditions.
    #[test]
    fn real_logs_are_understood() {
        let limit = "(00.001) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: \
                     Operation not permitted\n";
        for (name, said) in [
            (
                "mptcp",
                "(00.218151) Error (criu/sk-inet.c:137): inet: Unsupported proto 262 for socket 2ac01f\n\
                 (00.218156) Error (criu/sk-inet.c:139): inet: For Go programs, consider using \
                 \"GODEBUG=multipathtcp=0\" to disable MPTCP\n",
            ),
            (
                "socket-kind",
                "(00.016244) Error (criu/sockets.c:767): sockets: BUG! Unknown socket collected (family 40)\n",
            ),
            (
                "io-uring",
                "pie: 1: Error (criu/pie/parasite.c:588): send_fds failed (-22)\n\
                 (00.035323) Error (criu/parasite-syscall.c:280): Can't retrieve FDs from socket\n",
            ),
            (
                "io-uring",
                "(00.1) Error (criu/proc_parse.c:1): Unknown shit 600 (anon_inode:[io_uring])\n",
            ),
            (
                "tcp",
                "(00.038431) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using \
                 --tcp-established option.\n",
            ),
            (
                "ghost-limit",
                "(00.084809) Error (criu/files-reg.c:1031): Can't dump ghost file /data/ghost of 2097152 size, \
                 increase limit\n",
            ),
            (
                "link-remap",
                "(00.067312) Error (criu/files-reg.c:1122): Can't create link remap for /dev/shm/sem.made. Use \
                 link-remap option.\n",
            ),
            (
                "hidden-mount",
                "(00.020205) Error (criu/files-reg.c:1790): Can't lookup mount=188 for fd=3 path=/orders\n",
            ),
        ] {
            let log = format!(
                "{limit}{said}(00.9) Error (criu/cr-dump.c:1545): Dump files (pid: 4) failed\n"
            );
            let text = first_error(&log).unwrap();
            assert!(
                text.contains(Condition::named(name).remedy),
                "{name}: {text}"
            );
        }
    }

    #[test]
    fn who_was_killed_is_told_of() {
        let log = "(00.1) Error (criu/cr-restore.c:1): 9567 killed by signal 9: Killed\n\
                   (00.2) Error (criu/cr-restore.c:2): Restoring FAILED.\n";
        let text = first_error(log).unwrap();
        assert!(text.contains("memory limit"), "{text}");
    }

    #[test]
    fn a_consequence_is_better_than_nothing() {
        let log = "(00.015) Error (criu/cr-restore.c:2300): Restoring FAILED.\n";
        assert_eq!(first_error(log).as_deref(), Some("Restoring FAILED."));
        assert_eq!(first_error("(00.1) all is well\nError: none\n"), None);
    }
}
