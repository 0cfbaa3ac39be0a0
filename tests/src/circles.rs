//! No modules of a crate use each other in a circle: each can be read when those that it uses are known.
//!
//! A module and those inside of it are one: what its children use of others, and others of them, counts for their parents,
//! up to the one in which both are. Names are followed to where they come from, through `use` and `pub use`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Where a module is, from the head of its crate on: as in `["restore", "held"]`.
type Module = Vec<String>;

/// Modules, and what each of them uses, with the two that are meant.
type Uses = BTreeMap<Module, BTreeMap<Module, (Module, Module)>>;

/// How many names may lead to another one.
const MOST_NAMES: usize = 8;

/// The words and signs of a source: names, `::`, and every other character by itself. Blanks, comments, texts and unit
/// tests are left out.
fn tokens(source: &str) -> Vec<String> {
    let source = source.split("\n#[cfg(test)]\nmod tests").next();
    let chars: Vec<char> = source.unwrap_or_default().chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let is_word = |c: &char| c.is_alphanumeric() || *c == '_';
        let word = rest.iter().take_while(|c| is_word(c)).count();
        at += match rest {
            _ if word > 0 => {
                tokens.push(rest[..word].iter().collect());
                word
            }
            ['/', '/', ..] => rest.iter().take_while(|c| **c != '\n').count(),
            [':', ':', ..] => {
                tokens.push("::".to_owned());
                2
            }
            ['"', text @ ..] => 2 + text_length(text, '"'),
            ['\'', '\\', ..] => 2 + text_length(&rest[1..], '\''),
            ['\'', _, '\'', ..] => 3,
            [one, ..] => {
                tokens.extend((!one.is_whitespace()).then(|| one.to_string()));
                1
            }
            [] => 0,
        };
    }
    tokens
}

fn text_length(text: &[char], end: char) -> usize {
    let mut is_escaped = false;
    let goes_on = |c: &&char| {
        let ends = **c == end && !is_escaped;
        is_escaped = **c == '\\' && !is_escaped;
        !ends
    };
    text.iter().take_while(goes_on).count()
}

/// A path, and the name that `use` gives to what it leads to.
type Named = (Vec<String>, String);

/// Reads a path that begins at a token, or all of a group of them; gives the token behind it.
fn read_path(
    tokens: &[String],
    mut at: usize,
    mut path: Vec<String>,
    to: &mut Vec<Named>,
) -> usize {
    let is = |at: usize, text: &str| tokens.get(at).is_some_and(|token| token == text);
    if is(at, "{") {
        while !is(at, "}") && at < tokens.len() {
            at = read_path(tokens, at + 1, path.clone(), to);
        }
        return at + 1;
    }
    let Some(name) = tokens.get(at).filter(|name| *name != "}") else {
        return at;
    };
    path.push(name.clone());
    if is(at + 1, "::") {
        return read_path(tokens, at + 2, path, to);
    }
    let renamed = tokens.get(at + 2).filter(|_| is(at + 1, "as"));
    let (name, end) = match renamed {
        Some(name) => (name, at + 3),
        None => (name, at + 1),
    };
    if name == "self" {
        path.pop();
    }
    let name = match name.as_str() {
        "self" => path.last().cloned().unwrap_or_default(),
        name => name.to_owned(),
    };
    to.push((path, name));
    end
}

/// The modules of a crate.
struct Modules {
    tokens: BTreeMap<Module, Vec<String>>,
    /// What `use` has named in a module.
    names: BTreeMap<(Module, String), Vec<String>>,
}

impl Modules {
    fn of<'s>(sources: impl IntoIterator<Item = (Module, &'s str)>) -> Self {
        let sources = sources.into_iter();
        let mut this = Self {
            tokens: sources.map(|(at, source)| (at, tokens(source))).collect(),
            names: BTreeMap::new(),
        };
        for (module, tokens) in &this.tokens {
            let uses = tokens.iter().enumerate().filter(|(_, it)| *it == "use");
            for (at, _) in uses {
                let mut named = Vec::new();
                read_path(tokens, at + 1, Vec::new(), &mut named);
                for (path, name) in named {
                    if let Some(path) = this.whole_path(module, &path) {
                        this.names.insert((module.clone(), name), path);
                    }
                }
            }
        }
        this
    }

    /// A path as it is from the head of the crate on; none where it leads into another crate.
    fn whole_path(&self, module: &Module, path: &[String]) -> Option<Vec<String>> {
        let mut whole = module.clone();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => (whole, rest) = (Vec::new(), &path[1..]),
            "self" => rest = &path[1..],
            "super" => {
                while rest.first().is_some_and(|it| it == "super") {
                    whole.pop();
                    rest = &rest[1..];
                }
            }
            child => {
                let child = [module.as_slice(), &[child.to_owned()]].concat();
                self.tokens.get(&child)?;
            }
        }
        whole.extend_from_slice(rest);
        Some(whole)
    }

    /// The module that has what a path leads to.
    fn home(&self, path: &[String], names_left: usize) -> Module {
        let lengths = (0..=path.len()).rev();
        let mut modules = lengths.map(|length| path[..length].to_vec());
        let module = modules.find(|module| self.tokens.contains_key(module));
        let module = module.unwrap_or_default();
        let next = path.get(module.len());
        let named = next.and_then(|next| self.names.get(&(module.clone(), next.clone())));
        match named {
            Some(named) if names_left > 0 && !path.starts_with(named) => {
                let behind = &path[module.len() + 1..];
                self.home(&[named, behind].concat(), names_left - 1)
            }
            _ => module,
        }
    }

    fn uses(&self) -> Uses {
        let mut uses = Uses::new();
        for (module, tokens) in &self.tokens {
            let mut paths = Vec::new();
            for (at, token) in tokens.iter().enumerate() {
                let begins = at == 0 || tokens[at - 1] != "::";
                if begins && matches!(token.as_str(), "crate" | "super" | "self") {
                    read_path(tokens, at, Vec::new(), &mut paths);
                }
            }
            for (path, _) in paths {
                let Some(path) = self.whole_path(module, &path) else {
                    continue;
                };
                let used = self.home(&path, MOST_NAMES);
                let same = module.iter().zip(&used).take_while(|(a, b)| a == b).count();
                if same < module.len().min(used.len()) {
                    let from = uses.entry(module[..=same].to_vec()).or_default();
                    from.entry(used[..=same].to_vec())
                        .or_insert((module.clone(), used));
                }
            }
        }
        uses
    }
}

/// One circle, if there is any: who uses whom.
fn circle(mut uses: Uses) -> Option<Vec<String>> {
    // Whoever uses nobody that is left is in no circle.
    loop {
        let left: BTreeSet<Module> = uses.keys().cloned().collect();
        for used in uses.values_mut() {
            used.retain(|module, _| left.contains(module));
        }
        uses.retain(|_, used| !used.is_empty());
        if uses.len() == left.len() {
            break;
        }
    }
    let mut way: Vec<&Module> = vec![uses.keys().next()?];
    let mut steps = Vec::new();
    loop {
        let (next, (user, used)) = uses[way[way.len() - 1]].iter().next()?;
        steps.push(format!("{} uses {}", user.join("::"), used.join("::")));
        if let Some(begin) = way.iter().position(|module| *module == next) {
            return Some(steps.split_off(begin));
        }
        way.push(next);
    }
}

/// The sources of a crate, but for its programs and what is compiled for tests alone.
fn read_sources(dir: &Path, module: &Module, to: &mut Vec<(Module, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if name.ends_with("tests") || name == "bin" {
            continue;
        }
        let inner = match name {
            "lib" | "main" | "mod" => module.clone(),
            name => [module.as_slice(), &[name.to_owned()]].concat(),
        };
        if path.is_dir() {
            read_sources(&path, &inner, to);
        } else if path.extension().is_some_and(|it| it == "rs") {
            to.push((inner, fs::read_to_string(&path).unwrap()));
        }
    }
}

#[test]
fn no_modules_use_each_other_in_a_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut circles = Vec::new();
    let mut found = 0;
    for member in fs::read_dir(root).unwrap() {
        let source = member.unwrap().path().join("src");
        if !source.is_dir() {
            continue;
        }
        let mut sources = Vec::new();
        read_sources(&source, &Module::new(), &mut sources);
        let sources = sources.iter();
        let modules = Modules::of(sources.map(|(module, text)| (module.clone(), text.as_str())));
        let uses = modules.uses();
        found += uses.values().map(BTreeMap::len).sum::<usize>();
        let circle = circle(uses);
        circles.extend(circle.map(|steps| format!("{}: {}", source.display(), steps.join(", "))));
    }
    assert!(circles.is_empty(), "{circles:#?}");
    assert!(found > 500, "{found}");
}

#[test]
fn a_circle_is_found_wherever_its_names_come_from() {
    let seen = |sources: &[(&str, &str)]| {
        let sources = sources.iter().map(|(module, source)| {
            let module = module.split("::").filter(|name| !name.is_empty());
            (module.map(str::to_owned).collect(), *source)
        });
        circle(Modules::of(sources).uses())
    };
    let head = ("", "mod a; mod b; pub use b::Thing;");
    let uses_a = ("b", "fn f() -> char { '\"' } use crate::{a::{self}, z};");
    for user in [
        "use crate::b;",
        "use super::{c, b::{d, Thing as Other}};",
        "use crate::Thing;",
        "fn f() { crate::b::g() }",
        "use crate::Thing as T; fn f(_: self::T) {}",
    ] {
        let circle = seen(&[head, ("a", user), uses_a]);
        assert_eq!(circle.unwrap(), ["a uses b", "b uses a"], "{user}");
    }
    for user in [
        "// use crate::b;",
        "fn f() -> &'static str { \"crate::b\" }",
        "use b::Thing;",
        "\n#[cfg(test)]\nmod tests { use crate::b; }",
    ] {
        assert_eq!(seen(&[head, ("a", user), uses_a]), None, "{user}");
    }
    // Children count for their parents, and are one with them.
    let circle = seen(&[
        head,
        ("a", "mod c; use c::X;"),
        ("a::c", "use super::Y; use crate::b::Thing;"),
        uses_a,
    ]);
    assert_eq!(circle.unwrap(), ["a::c uses b", "b uses a"]);
    let inner = seen(&[("a", "mod c; use c::X;"), ("a::c", "use super::Y;")]);
    assert_eq!(inner, None);
}
