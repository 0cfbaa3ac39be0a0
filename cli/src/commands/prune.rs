//! `transship prune`

use std::fmt::Write as _;
use std::path::Path;

use transship_engine::retention::{Due, Records, Rules, due, prune};
use transship_engine::timeline::human_bytes;
use transship_engine::{Context as _, Error, Result};
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};

use super::{print, store};
use crate::args::{Global, PruneArgs};

pub(crate) fn run(global: &Global, args: &PruneArgs) -> Result<()> {
    let mut rules = Rules {
        max_age: args.max_age,
        max_per_pod: args.max_per_pod,
        max_bytes: args.max_size,
    };
    if rules.is_empty() {
        let config = NodeConfig::read(Path::new(NODE_CONFIG));
        rules = Rules::from(&config.context("cannot tell what is kept")?.checkpoints);
    }
    if rules.is_empty() {
        let message = "nothing says which checkpoints go";
        return Err(Error::refused(message)
            .hint("--max-age, --max-per-pod or --max-size, or [checkpoints] in node.toml"));
    }
    let records = Records::default();
    let gone = match args.dry_run {
        true => due(&store(), &records, &rules)?,
        false => prune(&store(), &records, &rules)?,
    };
    print(global, &gone, || text(&gone))
}

fn text(gone: &[Due]) -> String {
    let mut text = String::new();
    for Due {
        name,
        bytes,
        reason,
        ..
    } in gone
    {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<36}{:>11}  {reason}", human_bytes(*bytes));
    }
    text
}
