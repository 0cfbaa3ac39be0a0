//! The screens of README.md are what the commands print.
//!
//! ```text
//!  README.md: ```console         node a, where "web" runs     compared line by line,
//!             $ transship ...  ─────────────────────────────>  numbers and bars left out
//!             what it prints
//! ```

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Testbed, Tree, journey};

use crate::Case;

const README: &str = include_str!("../../README.md");

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "readme_screens",
        tree: Tree::Forky,
        run: the_screens_are_what_the_commands_print,
    })
}

struct Screen {
    command: String,
    output: Vec<String>,
}

/// The commands of the README's `console` blocks, each with what is shown below it.
fn screens() -> Vec<Screen> {
    let mut screens: Vec<Screen> = Vec::new();
    let mut is_inside = false;
    for line in README.lines() {
        match (is_inside, line) {
            (false, "```console") => is_inside = true,
            (true, "```") => is_inside = false,
            (true, line) => match (line.strip_prefix("$ "), screens.last_mut()) {
                (Some(command), _) => screens.push(Screen {
                    command: command.to_owned(),
                    output: Vec::new(),
                }),
                (None, Some(screen)) => screen.output.push(line.to_owned()),
                (None, None) => {}
            },
            (false, _) => {}
        }
    }
    screens
}

/// Without what differs from one run to the next: numbers with their units, digests, bars, spaces.
fn shape(line: &str) -> String {
    let mut words = Vec::new();
    for word in line.split(|c: char| c.is_whitespace() || "█─".contains(c)) {
        // The kernel is the machine's.
        if words.last().is_some_and(|last| last == "Linux") {
            words.push("VERSION".to_owned());
            continue;
        }
        let is_unit = ["ms", "s", "B", "kB", "MB", "GB"].contains(&word);
        if word.is_empty() || is_unit && words.last().is_some_and(|last| last == "0") {
            continue;
        }
        let word = match word.split_once("sha256:") {
            Some((before, _)) => format!("{before}sha256"),
            None => word.to_owned(),
        };
        let is_number = |c: char| c.is_ascii_digit() || c == '.';
        let mut kept = String::new();
        for c in word.chars() {
            match (is_number(c), kept.ends_with('0')) {
                (true, true) => {}
                (true, false) => kept.push('0'),
                (false, _) => kept.push(c),
            }
        }
        words.push(kept);
    }
    words.join(" ")
}

fn the_screens_are_what_the_commands_print(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    journey::run_sandbox(&a, "sandbox")?;
    journey::run_counter(&a, "web", "sandbox", 16, &[])?;
    journey::run_sandbox(&b, "web-sandbox")?;
    journey::wait_for_count(&a, "web", 5)?;
    let ssh = bed.ssh(&a, &b)?;
    let screens = screens();
    ensure!(
        screens.len() >= 4,
        "the README has {} screens",
        screens.len()
    );
    let mut wrong = String::new();
    for screen in screens {
        let command = screen.command.replace("ssh node-b", &ssh);
        let printed = a.shell(&command).read().context(screen.command.clone())?;
        let shown = screen.output.iter().map(|line| shape(line));
        if !printed.lines().map(shape).eq(shown) {
            wrong = format!("{wrong}$ {}\n{printed}", screen.command);
        }
    }
    ensure!(
        wrong.is_empty(),
        "the README shows something else:\n{wrong}"
    );
    Ok(())
}
