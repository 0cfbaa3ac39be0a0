//! An error on stderr, and its exit code; text as a terminal may have it.

use std::process::ExitCode;

use transship_checkpoint::shown_text::{printable, printable_lines};
use transship_engine::{Error, Kind};

use crate::progress::say;

/// Prints the error with its causes and hints, and gives the exit code.
pub(crate) fn report(error: &Error) -> ExitCode {
    for line in lines(error) {
        say(&line);
    }
    exit_code(error.kind())
}

fn lines(error: &Error) -> Vec<String> {
    let line = error.one_line().replace('\n', " ");
    let mut lines = vec![format!("transship: {}", printable_lines(&line))];
    for hint in error.hints() {
        lines.push(format!("  {}", printable(hint)));
    }
    lines
}

/// `transship --help` lists them.
pub(crate) fn exit_code(kind: Kind) -> ExitCode {
    ExitCode::from(match kind {
        Kind::Failed => 1,
        Kind::NotFound => 3,
        Kind::Refused => 4,
        Kind::Target => 5,
        Kind::Uncertain => 6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image is called as an archive or a stream says.
    #[test]
    fn what_to_do_next_is_no_command_to_the_terminal() {
        let hint = "ctr images pull \u{1b}]0;x\u{7}\nnext";
        let error = Error::refused("no image \u{9b}2J").hint(hint);
        let lines = lines(&error);
        assert_eq!(lines.len(), 2);
        assert!(
            !lines.iter().any(|line| line.chars().any(char::is_control)),
            "{lines:?}"
        );
    }
}
