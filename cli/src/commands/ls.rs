//! `transship ls`

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;
use transship_checkpoint::store::Checkpoint;

use super::{print, store};
use crate::args::Global;
use transship_engine::timeline::human_bytes;

#[derive(Serialize)]
struct Row {
    name: String,
    created: String,
    bytes: u64,
    containers: Vec<String>,
    source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

pub(crate) fn run(global: &Global) -> Result<()> {
    let rows: Vec<Row> = store()
        .list()?
        .into_iter()
        .map(|(name, opened)| match opened {
            Ok(checkpoint) => row(name, &checkpoint),
            Err(error) => Row {
                name,
                created: String::new(),
                bytes: 0,
                containers: Vec::new(),
                source: String::new(),
                error: Some(transship_engine::problem::one_line(&error.into())),
            },
        })
        .collect();
    print(global, &rows, || table(&rows))
}

fn row(name: String, checkpoint: &Checkpoint) -> Row {
    let manifest = &checkpoint.manifest;
    let created = std::time::UNIX_EPOCH + std::time::Duration::from_secs(manifest.created);
    Row {
        name,
        created: transship_containerd::rfc3339(created),
        bytes: manifest.size(),
        containers: manifest
            .containers
            .iter()
            .map(|container| container.name.clone())
            .collect(),
        source: manifest.source.hostname.clone(),
        error: None,
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<36}{:<22}{:>11}  {:<14}{}\n",
        "NAME", "CREATED", "SIZE", "FROM", "CONTAINERS"
    );
    for row in rows {
        // Writing to a string cannot fail.
        let _ = match &row.error {
            Some(error) => writeln!(text, "{:<36}{error}", row.name),
            None => writeln!(
                text,
                "{:<36}{:<22}{:>11}  {:<14}{}",
                row.name,
                row.created,
                human_bytes(row.bytes),
                row.source,
                row.containers.join(" ")
            ),
        };
    }
    text
}
