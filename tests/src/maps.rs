//! The head of each crate names all its modules: it is the map by which the crate is read.

use std::fs;
use std::path::{Path, PathBuf};

/// What needs no word: errors, and what is compiled for tests alone.
fn speaks_for_itself(module: &str) -> bool {
    module == "error" || module.ends_with("tests")
}

/// `lib.rs` and `main.rs` of all members, and of the runtime front.
fn heads(root: &Path) -> Vec<PathBuf> {
    let members = fs::read_dir(root).unwrap();
    let sources = members.map(|member| member.unwrap().path().join("src"));
    let files =
        sources.flat_map(|dir| ["lib.rs", "main.rs", "front/mod.rs"].map(|name| dir.join(name)));
    files.filter(|path| path.is_file()).collect()
}

fn modules(source: &str) -> impl Iterator<Item = &str> {
    let lines = source.lines().filter(|line| !line.starts_with([' ', '\t']));
    lines.filter_map(|line| {
        let (before, name) = line.strip_suffix(';')?.rsplit_once("mod ")?;
        let is_item = before.is_empty() || before.starts_with("pub");
        is_item.then_some(name)
    })
}

#[test]
fn every_module_is_on_the_map() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut missing = Vec::new();
    let mut found = 0;
    for path in heads(root) {
        let source = fs::read_to_string(&path).unwrap();
        let head: String = source
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect();
        let words = head.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for module in modules(&source).filter(|name| !speaks_for_itself(name)) {
            found += 1;
            if !words.clone().any(|word| word == module) {
                missing.push(format!("{}: {module}", path.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(found > 200, "{found}");
}
