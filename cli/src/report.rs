//! An error on stderr, and its exit code.

use std::process::ExitCode;

use transship_engine::problem::Problem;
use transship_engine::{Error, Kind};

/// Prints the error with its causes and hints, and gives the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let line = transship_engine::problem::one_line(error);
    eprintln!("transship: {line}");
    let (kind, hints) = kind_and_hints(error);
    for hint in hints {
        eprintln!("  {hint}");
    }
    ExitCode::from(exit_code(kind))
}

/// `transship --help` lists them.
fn exit_code(kind: Kind) -> u8 {
    match kind {
        Kind::Failed => 1,
        Kind::NotFound => 3,
        Kind::Refused => 4,
        Kind::Target => 5,
        Kind::Uncertain => 6,
    }
}

fn kind_and_hints(error: &anyhow::Error) -> (Kind, Vec<&str>) {
    if let Some(problem) = Problem::in_chain(error) {
        let hints = problem.hints().iter().map(String::as_str);
        return (problem.kind(), hints.collect());
    }
    let found = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Error>());
    found.map_or((Kind::Failed, Vec::new()), |error| {
        (error.kind(), error.hints())
    })
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn the_kind_is_found_at_any_depth() {
        let not_found = || Error::not_found("no container \"x\"").hint("ls");
        let below = anyhow::Error::from(not_found()).context("cannot migrate");
        assert_eq!(kind_and_hints(&below), (Kind::NotFound, vec!["ls"]));
        let above = anyhow!("broken pipe")
            .context(Problem::new(Kind::Target, "no answer"))
            .context("cannot migrate");
        assert_eq!(kind_and_hints(&above).0, Kind::Target);
        assert_eq!(exit_code(kind_and_hints(&anyhow!("disk full")).0), 1);
    }
}
