//! An error on stderr, and its exit code.

use std::process::ExitCode;

use transship_engine::{Error, Kind};

/// Prints the error with its causes and hints, and gives the exit code.
pub(crate) fn report(error: &Error) -> ExitCode {
    eprintln!("transship: {}", error.one_line());
    for hint in error.hints() {
        eprintln!("  {hint}");
    }
    exit_code(error.kind())
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
