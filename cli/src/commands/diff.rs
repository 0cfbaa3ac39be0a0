//! `transship diff A B`

use std::fmt::Write as _;

use transship_checkpoint::shown_text::printable;
use transship_engine::Result;
use transship_package::difference::{ContainerDifference, Difference, ProcessDifference};

use super::{opened, print};
use crate::args::{DiffArgs, Global};

pub(crate) fn run(global: &Global, args: &DiffArgs) -> Result<()> {
    let old = opened(&args.old, &args.keys, global.json)?;
    let new = opened(&args.new, &args.keys, global.json)?;
    let difference = Difference::between(&old.checkpoint, &new.checkpoint)?;
    print(global, &difference, || text(&difference))
}

// Writing to a string cannot fail.
fn text(difference: &Difference) -> String {
    let mut text = format!(
        "{} -> {} ({} s later)\n",
        difference.old, difference.new, difference.seconds
    );
    for container in &difference.containers {
        describe(&mut text, container);
    }
    for (which, names) in [
        (&difference.old, &difference.only_old),
        (&difference.new, &difference.only_new),
    ] {
        for name in names {
            let _ = writeln!(text, "  container {name}: only in {which}");
        }
    }
    text
}

fn describe(text: &mut String, container: &ContainerDifference) {
    let _ = writeln!(text, "  container {}", container.name);
    if !container.processes.is_empty() {
        let _ = writeln!(
            text,
            "    {:<32}{:>12}{:>12}{:>12}{:>12}",
            "pages of memory", "same", "changed", "new", "gone"
        );
    }
    for process in &container.processes {
        let ProcessDifference {
            pid,
            name,
            change,
            pages_same,
            pages_changed,
            pages_new,
            pages_gone,
        } = process;
        let note = match *change {
            "same" => String::new(),
            change => format!(" ({change})"),
        };
        let called = printable(&format!("{pid} {name}{note}"));
        let _ = writeln!(
            text,
            "    {called:<32}{pages_same:>12}{pages_changed:>12}{pages_new:>12}{pages_gone:>12}"
        );
    }
    for file in &container.files {
        let _ = writeln!(text, "    {:<10}{}", file.change, printable(&file.path));
    }
    for socket in &container.sockets_gone {
        let _ = writeln!(text, "    {:<10}{}", "closed", printable(socket));
    }
    for socket in &container.sockets_new {
        let _ = writeln!(text, "    {:<10}{}", "opened", printable(socket));
    }
}
