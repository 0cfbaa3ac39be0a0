//! The table of docs/programs.md: a row of a program is written when the program has moved as expected.
//!
//! ```text
//! | name | package and version | alone | in a sandbox | in a pod |      sorted by name
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use transship_testbed::Testbed;

use super::{Expected, Program};

/// `make test-programs` sets it; else the table stays as it is.
const WRITE: &str = "TRANSSHIP_WRITE_TABLE";
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/programs.md");
/// Ends the head of the table.
const RULE: &str = "|---|---|---|---|---|\n";

pub(super) fn keep(bed: &Testbed, program: &Program) -> anyhow::Result<()> {
    let version = program.image.version(bed.settings(), program.package)?;
    let package = match program.ours {
        Some(_) => "our own, in a Debian".to_owned(),
        None => format!("{} {version}", program.package),
    };
    let ways = [program.alone, program.in_a_sandbox, program.in_a_pod];
    let mut row = format!("| {} | {package} |", program.name);
    for (number, way) in ways.into_iter().enumerate() {
        // The CRI of the tests asks for the default profile.
        let run = if number < 2 { program.run } else { &[] };
        row += &format!(" {} |", cell(way, run));
    }
    println!("{row}");
    if std::env::var_os(WRITE).is_some() {
        let text = fs::read_to_string(FILE).context(FILE)?;
        fs::write(Path::new(FILE), with_row(&text, &row).context(FILE)?).context(FILE)?;
    }
    Ok(())
}

fn cell(way: Expected, run: &[&str]) -> String {
    let with = |words: &[&str]| format!("`{}`", words.join(" "));
    match (way, run) {
        (Expected::Works, []) => "works".to_owned(),
        (Expected::Works, run) => format!("works with `ctr run` {}", with(run)),
        (Expected::With(flags), []) => format!("works with {}", with(flags)),
        (Expected::With(flags), run) => {
            format!("works with `ctr run` {} and {}", with(run), with(flags))
        }
        (Expected::Refused(reason), _) => format!("refused: {reason}"),
    }
}

/// The text with this row in its table; `None` where it has no table.
fn with_row(text: &str, row: &str) -> Option<String> {
    let (head, rest) = text.split_once(RULE)?;
    let end = rest.find("\n\n").map_or(rest.len(), |at| at + 1);
    let (table, tail) = rest.split_at(end);
    let name = |row: &str| row.split('|').nth(1).unwrap_or_default().to_owned();
    let mut rows: BTreeMap<_, _> = table.lines().map(|row| (name(row), row)).collect();
    rows.insert(name(row), row);
    let rows: String = rows.values().flat_map(|row| [*row, "\n"]).collect();
    Some(format!("{head}{RULE}{rows}{tail}"))
}
