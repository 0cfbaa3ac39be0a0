//! CRIU's log, turned into the line that says what went wrong.
//!
//! ```text
//! (00.012345)      7: Error (criu/files-reg.c:2189): Can't open file /x on restore: No such file
//!  since start   pid  level  where                   text
//! ```
//!
//! The first error is the cause; those after it are what followed from it.

use std::io::Read;
use std::path::Path;
use std::{fs::File, io};

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

/// Errors that name no cause, and what is known of it.
const EXPLANATIONS: &[(&str, &str)] = &[
    (
        "Can't find sysv shmem",
        "it is attached to System V shared memory that another container has restored into the \
         sandbox; CRIU can attach a container only to what it makes itself",
    ),
    (
        "Can't get 1:16 opt",
        "CRIU before 4.2 cannot dump TCP sockets on Linux 6.16 and later (checkpoint-restore/criu#2705)",
    ),
    (
        "Connected TCP socket",
        "--tcp established or --tcp close says what becomes of it",
    ),
    (
        "In-flight connection",
        "--skip-in-flight leaves connections out that have not been accepted",
    ),
    (
        "Can't dump ghost file",
        "--ghost-limit keeps larger files without a name",
    ),
    (
        "Can't create link remap",
        "--link-remap keeps open files that have lost their name",
    ),
];

/// The first line of `log` that tells why CRIU gave up, without time and place; with a second one
/// when that adds to it.
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
        .or(errors.first())?;
    let known = EXPLANATIONS.iter().find(|(text, _)| cause.contains(text));
    Some(known.map_or_else(
        || (*cause).to_owned(),
        |(_, explanation)| format!("{cause} ({explanation})"),
    ))
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
    let rest = line.trim_start().strip_prefix('(')?;
    let rest = rest.split_once(')')?.1.trim_start();
    // The pid of the task that speaks, when it is not CRIU itself.
    let rest = match rest.split_once(':') {
        Some((pid, rest)) if pid.parse::<u32>().is_ok() => rest.trim_start(),
        _ => rest,
    };
    let rest = rest.strip_prefix("Error (")?;
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
(00.012345)      7: Error (criu/files-reg.c:2189): Can't open file /x on restore: No such file\n\
(00.013)      7: Error (criu/files-reg.c:2100): Can't open file /x\n\
(00.014) Error (criu/cr-restore.c:1234): 99 exited, status=1\n\
(00.015) Error (criu/cr-restore.c:2300): Restoring FAILED.\n";
        assert_eq!(
            first_error(log).as_deref(),
            Some("Can't open file /x on restore: No such file")
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
    fn a_consequence_is_better_than_nothing() {
        let log = "(00.015) Error (criu/cr-restore.c:2300): Restoring FAILED.\n";
        assert_eq!(first_error(log).as_deref(), Some("Restoring FAILED."));
        assert_eq!(first_error("(00.1) all is well\nError: none\n"), None);
    }
}
