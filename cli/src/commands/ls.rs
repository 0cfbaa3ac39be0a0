//! `transship ls`

use std::fmt::Write as _;
use std::path::Path;

use transship_engine::Result;
use transship_engine::listing::{Listed, list, undecided};
use transship_engine::timeline::human_bytes;
use transship_sandbox::consumed::DEFAULT_CONSUMED_DIR;

use super::{print, store};
use crate::args::Global;

pub(crate) fn run(global: &Global) -> Result<()> {
    let mut rows = list(&store(), Path::new(DEFAULT_CONSUMED_DIR))?;
    rows.extend(undecided()?);
    print(global, &rows, || table(&rows))
}

fn times(count: usize) -> String {
    match count {
        0 => "never".to_owned(),
        1 => "once".to_owned(),
        count => format!("{count} times"),
    }
}

/// The largest unit of a time alone: 12s, 5m, 3h, 4d.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn table(rows: &[Listed]) -> String {
    let mut text = format!(
        "{:<36}{:<6}{:>11}  {:<14}{:<11}{:<24}{:<10}{}\n",
        "NAME", "AGE", "SIZE", "FROM", "NAMESPACE", "POD", "RESTORED", "CONTAINERS"
    );
    for row in rows {
        // Writing to a string cannot fail.
        let _ = match (&row.error, &row.undecided) {
            (Some(error), _) => writeln!(text, "{:<36}{error}", row.name),
            (None, Some(migration)) => writeln!(
                text,
                "{:<36}{:<22}paused; whether it runs by {:?} is not decided: transship -n {} recover {}",
                row.name,
                row.created,
                migration.to,
                migration.namespace,
                migration.called()
            ),
            (None, None) => writeln!(
                text,
                "{:<36}{:<6}{:>11}  {:<14}{:<11}{:<24}{:<10}{}{}",
                row.name,
                age(row.age_seconds),
                human_bytes(row.bytes),
                row.source,
                row.namespace,
                row.pod.as_deref().unwrap_or("-"),
                times(row.restored),
                row.containers.join(" "),
                if row.sealed { " (sealed)" } else { "" }
            ),
        };
    }
    text
}
