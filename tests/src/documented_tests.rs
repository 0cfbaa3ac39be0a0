//! The tests that the documents name exist.

use std::fs;
use std::path::Path;

/// Documents whose tables name tests in backquotes.
const DOCUMENTS: [&str; 2] = ["docs/security.md", "docs/layers.md"];

/// What a name in backquotes must be found as in the sources: a case on nodes, or a function.
fn source_of(name: &str) -> Option<String> {
    let mut words = name.split('_');
    match words.next()? {
        "node" | "vm" => {
            let rest: Vec<&str> = words.skip(1).collect();
            (!rest.is_empty()).then(|| format!("\"{}\"", rest.join("_")))
        }
        // Metrics.
        "transship" => None,
        // Shorter names are of other things.
        _ => (name.matches('_').count() >= 3).then(|| format!("fn {name}(")),
    }
}

fn read_sources(dir: &Path, sources: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            read_sources(&path, sources);
        } else if name.ends_with(".rs") {
            sources.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn documented_tests_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut sources = String::new();
    read_sources(root, &mut sources);
    let mut found = 0;
    for document in DOCUMENTS {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let is_name = |word: &&str| {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_*".contains(c);
            !word.is_empty() && word.chars().all(plain)
        };
        for name in text.split('`').skip(1).step_by(2).filter(is_name) {
            let Some(source) = source_of(name) else {
                continue;
            };
            assert!(sources.contains(&source), "{document} names {name}");
            found += 1;
        }
    }
    assert!(found > 50, "{found} names");
}
