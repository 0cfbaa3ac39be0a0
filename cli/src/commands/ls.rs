//! `transship ls`

use std::fmt::Write as _;

use transship_engine::Result;
use transship_engine::listing::{Listed, list};
use transship_engine::timeline::human_bytes;

use super::{print, store};
use crate::args::Global;

pub(crate) fn run(global: &Global) -> Result<()> {
    let rows = list(&store())?;
    print(global, &rows, || table(&rows))
}

fn table(rows: &[Listed]) -> String {
    let mut text = format!(
        "{:<36}{:<22}{:>11}  {:<14}{:<24}{}\n",
        "NAME", "CREATED", "SIZE", "FROM", "POD", "CONTAINERS"
    );
    for row in rows {
        // Writing to a string cannot fail.
        let _ = match &row.error {
            Some(error) => writeln!(text, "{:<36}{error}", row.name),
            None => writeln!(
                text,
                "{:<36}{:<22}{:>11}  {:<14}{:<24}{}",
                row.name,
                row.created,
                human_bytes(row.bytes),
                row.source,
                row.pod.as_deref().unwrap_or("-"),
                row.containers.join(" ")
            ),
        };
    }
    text
}
