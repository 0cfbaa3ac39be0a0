//! An error on stderr, and its exit code; text as a terminal may have it.

use std::process::ExitCode;

use transship_engine::{Error, Kind};

/// Prints the error with its causes and hints, and gives the exit code.
pub(crate) fn report(error: &Error) -> ExitCode {
    let line = error.one_line().replace('\n', " ");
    eprintln!("transship: {}", shown(&line));
    for hint in error.hints() {
        eprintln!("  {hint}");
    }
    exit_code(error.kind())
}

/// Text in which names of others may be: of files, processes, containers, nodes. What a terminal would obey is
/// escaped, but for the ends of lines.
pub(crate) fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() && character != '\n' {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
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

    #[test]
    fn a_terminal_obeys_nobodys_names() {
        assert_eq!(
            shown("a\n\u{1b}[2J\r\u{9b}b\u{e9}\n"),
            "a\n\\u{1b}[2J\\r\\u{9b}b\u{e9}\n"
        );
    }
}
