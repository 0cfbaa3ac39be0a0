//! What keeps a container from being dumped or restored: what it is, how it is seen, what to do.
//!
//! ```text
//!  engine::conditions  looks for them in /proc before a freeze  --> what, remedy
//!  criu_log            finds them in what CRIU has said         --> what, remedy
//!  docs/conditions.md  is this table
//! ```
//!
//! One that `/proc` does not show has no probe: it is known from CRIU's words alone.

use std::fmt::Write as _;

mod table;

pub use table::CONDITIONS;

/// What a condition does to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// CRIU dumps no such container.
    NoDump,
    /// The dump is made, and cannot be restored.
    NoRestore,
    /// It is restored, and lacks something.
    Loses,
    /// It is restored, and its programs are not what they have made of themselves, or not all there: nobody would tell them.
    Changes,
}

impl Effect {
    /// As it stands in the documentation and in what is printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoDump => "not dumped",
            Self::NoRestore => "not restored",
            Self::Loses => "lost",
            Self::Changes => "changed",
        }
    }
}

/// One reason why a container cannot be moved as it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Condition {
    /// A short name, for programs.
    pub name: &'static str,
    /// What it does.
    pub effect: Effect,
    /// What is so, as the end of "it cannot be dumped: ".
    pub what: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
    /// Where it is seen before a freeze; empty when only CRIU can tell.
    pub seen: &'static str,
    /// What CRIU's first error contains.
    pub criu_says: &'static [&'static str],
}

impl Condition {
    /// The condition of this name.
    ///
    /// # Panics
    /// There is none: names are constants of this program, and a test looks for each.
    #[must_use]
    pub fn named(name: &str) -> &'static Self {
        CONDITIONS
            .iter()
            .find(|condition| condition.name == name)
            .expect("names of conditions are constants of this program")
    }

    /// The names of what may be lost where somebody says so.
    pub fn losses() -> impl Iterator<Item = &'static str> {
        let loses = |it: &&Self| matches!(it.effect, Effect::Loses | Effect::Changes);
        CONDITIONS.iter().filter(loses).map(|it| it.name)
    }

    /// The condition that an error of CRIU tells of.
    #[must_use]
    pub fn of_error(text: &str) -> Option<&'static Self> {
        let told = |condition: &&Self| condition.criu_says.iter().any(|said| text.contains(said));
        CONDITIONS.iter().find(told)
    }
}

/// The table of docs/conditions.md.
#[must_use]
pub fn documentation() -> String {
    let mut text = String::from(
        "| name | effect | what | what to do | seen in | CRIU's words |\n|---|---|---|---|---|---|\n",
    );
    let cell = |text: &str| text.replace('|', "\\|");
    for condition in &CONDITIONS {
        let said = condition.criu_says.iter().map(|said| format!("`{said}`"));
        let said = said.collect::<Vec<_>>().join(", ");
        writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {} |",
            condition.name,
            condition.effect.name(),
            cell(condition.what),
            cell(condition.remedy),
            cell(condition.seen),
            cell(&said),
        )
        .expect("a string takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE=1 cargo test -p transship-checkpoint` writes it.
    #[test]
    fn the_documentation_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/conditions.md");
        let text = std::fs::read_to_string(path).unwrap();
        let begin = text.find("| name | effect |").unwrap();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, format!("{}{}", &text[..begin], documentation())).unwrap();
            return;
        }
        assert_eq!(text[begin..], documentation());
    }

    #[test]
    fn every_condition_is_seen_somewhere_and_has_a_remedy() {
        for condition in &CONDITIONS {
            let name = condition.name;
            assert!(std::ptr::eq(Condition::named(name), condition), "{name}");
            assert!(
                !condition.remedy.is_empty() && !condition.what.is_empty(),
                "{name}"
            );
            assert!(
                !condition.seen.is_empty() || !condition.criu_says.is_empty(),
                "{name}"
            );
        }
    }

    #[test]
    fn the_particular_comes_before_the_general() {
        for (at, condition) in CONDITIONS.iter().enumerate() {
            for said in condition.criu_says {
                let first = Condition::of_error(said).unwrap();
                assert!(
                    std::ptr::eq(first, &CONDITIONS[at]),
                    "{said} is {}",
                    first.name
                );
            }
        }
    }
}
