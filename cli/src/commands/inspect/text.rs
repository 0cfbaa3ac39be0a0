//! What is in a checkpoint, as people read it: a few lines of each list, the rest counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use transship_checkpoint::manifest::{Container, Manifest};
use transship_checkpoint::shown_text::printable;
use transship_engine::timeline::human_bytes;
use transship_package::contents::{ContainerContents, Contents, DumpTimes, ProcessContents};

/// Lines of a list that are shown.
const SHOWN: usize = 10;
/// Levels of the tree of processes that are drawn; what is deeper stands one below the other.
const LEVELS: usize = 24;
/// Width of the widest bar, in characters.
const BAR: u64 = 24;

/// What is printed. `note` is added to the size; `all` shows lists to their end.
pub(super) fn text(contents: &Contents, note: &str, all: bool) -> String {
    let manifest = &contents.manifest;
    let mut text = Text {
        out: String::new(),
        shown: if all { usize::MAX } else { SHOWN },
    };
    text.line(0, &manifest.name);
    text.field(2, "taken", &taken(manifest));
    let size = human_bytes(contents.bytes);
    text.field(2, "size", &format!("{size}{note}"));
    if let Some(pod) = &manifest.pod {
        text.field(2, "pod", &format!("{}/{}", pod.namespace, pod.name));
    }
    for (container, inside) in manifest.containers.iter().zip(&contents.containers) {
        text.container(container, inside);
    }
    let shm =
        (!manifest.shared.shm.is_empty()).then_some(("/dev/shm".to_owned(), &manifest.shared.shm));
    let volumes = manifest.shared.volumes.iter();
    let volumes = volumes.map(|it| (format!("emptyDir {}", it.name), &it.containers));
    for (dir, containers) in shm.into_iter().chain(volumes) {
        text.line(2, &format!("{dir}, shared by {}", containers.join(", ")));
    }
    for container in &manifest.not_running {
        let why = match (container.failed, container.done) {
            (Some(code), _) => format!("had ended with {code}"),
            (None, true) => "had ended with 0".to_owned(),
            (None, false) => "did not run".to_owned(),
        };
        text.line(2, &format!("container {} {why}", container.name));
    }
    text.out
}

fn taken(manifest: &Manifest) -> String {
    let source = &manifest.source;
    let created = UNIX_EPOCH + Duration::from_secs(manifest.created);
    let programs = [
        ("containerd", Some(&source.containerd)),
        ("CRIU", source.criu.as_ref()),
        ("runc", source.runc.as_ref()),
    ];
    let programs = programs
        .into_iter()
        .filter_map(|(name, version)| Some((name, version?)));
    let programs = programs.map(|(name, version)| format!(", {name} {version}"));
    format!(
        "{} on {} ({}, Linux {}{})",
        transship_containerd::rfc3339(created),
        source.hostname,
        source.architecture,
        source.kernel,
        programs.collect::<String>()
    )
}

struct Text {
    out: String,
    shown: usize,
}

impl Text {
    // Writing to a string cannot fail.
    fn line(&mut self, indent: usize, line: &str) {
        // Names come from the images: nothing of them reaches the terminal as a command.
        let line = printable(&format!("{:indent$}{line}", ""));
        let _ = writeln!(self.out, "{}", line.trim_end());
    }

    fn field(&mut self, indent: usize, name: &str, value: &str) {
        self.line(indent, &format!("{name:<12}{value}"));
    }

    /// A list with a heading, unless it is empty.
    fn list(&mut self, heading: &str, lines: impl ExactSizeIterator<Item = String>) {
        let count = lines.len();
        if count == 0 {
            return;
        }
        self.line(4, heading);
        for line in lines.take(self.shown) {
            self.line(6, &line);
        }
        if count > self.shown {
            let more = count - self.shown;
            self.line(6, &format!("and {more} more (--all)"));
        }
    }

    fn container(&mut self, container: &Container, inside: &ContainerContents) {
        let name = &container.name;
        let id = match *name == container.id {
            true => String::new(),
            false => format!("{} in ", container.id),
        };
        let namespace = &container.namespace;
        self.line(2, &format!("container {name} ({id}namespace {namespace})"));
        let image = &container.image;
        self.field(4, "image", &format!("{} {}", image.name, image.digest));
        let joined = match container.joined.as_slice() {
            [] => "its own".to_owned(),
            joined => format!("joins {} of a sandbox", joined.join(", ")),
        };
        self.field(4, "namespaces", &joined);
        let sizes = [
            ("memory", inside.memory_bytes),
            ("images", inside.image_bytes),
            ("upperdir", inside.layer_bytes),
        ];
        let most = sizes
            .iter()
            .map(|(_, bytes)| *bytes)
            .max()
            .unwrap_or_default();
        for (what, bytes) in sizes {
            let line = format!("{:>11}  {}", human_bytes(bytes), bar(bytes, most));
            self.field(4, what, &line);
        }
        let locks = if container.criu.file_locks {
            "kept"
        } else {
            "not kept"
        };
        let tcp = format!("{:?}", container.criu.tcp).to_lowercase();
        self.field(4, "tcp", &format!("{tcp}, file locks {locks}"));
        if let Some(dump) = &inside.dump {
            self.field(4, "dump", &times(dump));
        }
        self.list("processes", tree(&inside.processes).into_iter());
        let mapped = inside.mappings.iter().filter(|it| it.memory_bytes > 0);
        let mapped: Vec<_> = mapped.collect();
        let most = mapped.first().map_or(0, |it| it.memory_bytes);
        let mapped = mapped.into_iter().map(|it| {
            let (bytes, bar) = (human_bytes(it.memory_bytes), bar(it.memory_bytes, most));
            format!(
                "{bytes:>11}  {bar:<24}  {} pid {} {}",
                it.rights, it.pid, it.what
            )
        });
        self.list("largest mappings", mapped);
        let open = inside.files.iter();
        self.list(
            "open files",
            open.map(|it| format!("{}  {}", it.path, by(&it.by))),
        );
        let sockets = inside.sockets.iter().map(|it| {
            let peer = it
                .peer
                .as_ref()
                .map_or(String::new(), |peer| format!(" - {peer}"));
            let what = format!("{:<5}{:<12}{}{peer}", it.protocol, it.state, it.local);
            format!("{what}  {}", by(&it.by))
        });
        self.list("sockets", sockets);
        let other = inside.other.iter();
        self.list(
            "also open",
            other.map(|(kind, count)| format!("{count} x {kind}")),
        );
        let mounts = inside.mounts.iter().map(|it| {
            let from = if it.external { ", from outside" } else { "" };
            let how = if it.read_only { ", read-only" } else { "" };
            format!("{}  {}{from}{how}", it.destination, it.kind)
        });
        self.list("mounts", mounts);
        let needs = inside.requirements.iter();
        self.list(
            "needs",
            needs.map(|it| format!("{} {}: {}", it.kind, it.what, it.why)),
        );
        self.changes(inside);
    }

    fn changes(&mut self, inside: &ContainerContents) {
        let changes = &inside.changes;
        if changes.count == 0 {
            return;
        }
        let total = human_bytes(changes.bytes);
        let heading = format!("changed files ({}, {total})", changes.count);
        // The largest say most.
        let mut sorted: Vec<_> = changes.changes.iter().collect();
        sorted.sort_by_key(|it| std::cmp::Reverse(it.bytes));
        let lines = sorted.into_iter().map(|it| {
            let what = match (it.change, it.kind) {
                ("put", Some("file")) => human_bytes(it.bytes),
                ("put", Some(kind)) => kind.to_owned(),
                (change, _) => change.to_owned(),
            };
            format!("{what:>11}  {}", it.path)
        });
        self.list(&heading, lines);
    }
}

/// At least one mark for what is not nothing.
fn bar(bytes: u64, most: u64) -> String {
    let width = (u128::from(bytes) * u128::from(BAR)).div_ceil(u128::from(most.max(1)));
    "█".repeat(usize::try_from(width).unwrap_or_default())
}

fn by(who: &[(u32, u32)]) -> String {
    let each = who.iter().take(4).map(|(pid, fd)| format!("{pid}:{fd}"));
    let more = if who.len() > 4 { " ..." } else { "" };
    format!("({}{more})", each.collect::<Vec<_>>().join(" "))
}

fn times(dump: &DumpTimes) -> String {
    let ms = |us: u32| format!("{:.1} ms", f64::from(us) / 1000.0);
    format!(
        "frozen by CRIU for {}: memory found in {}, written in {}; {} of {} pages",
        ms(dump.frozen_us),
        ms(dump.memory_dump_us),
        ms(dump.memory_write_us),
        dump.pages_written,
        dump.pages_scanned
    )
}

/// The processes as a tree; those below a process whose id others have too are drawn once.
fn tree(processes: &[ProcessContents]) -> Vec<String> {
    let known: BTreeSet<u32> = processes.iter().map(|it| it.pid).collect();
    let is_root = |it: &ProcessContents| !known.contains(&it.parent) || it.parent == it.pid;
    let mut below: BTreeMap<u32, Vec<&ProcessContents>> = BTreeMap::new();
    for child in processes.iter().filter(|it| !is_root(it)) {
        below.entry(child.parent).or_default().push(child);
    }
    let mut lines = Vec::new();
    // The next one to be drawn is the last.
    let mut due: Vec<_> = { processes.iter() }
        .filter(|it| is_root(it))
        .map(|root| (root, String::new(), String::new(), 0))
        .rev()
        .collect();
    while let Some((process, mark, indent, level)) = due.pop() {
        lines.push(format!("{mark}{}", described(process)));
        let children = below.remove(&process.pid).unwrap_or_default();
        for (at, child) in children.into_iter().rev().enumerate() {
            let (mark, deeper) = match at {
                0 => ("└─ ", "   "),
                _ => ("├─ ", "│  "),
            };
            let deeper = if level < LEVELS { deeper } else { "" };
            due.push((
                child,
                format!("{indent}{mark}"),
                format!("{indent}{deeper}"),
                level + 1,
            ));
        }
    }
    lines
}

fn described(process: &ProcessContents) -> String {
    let mut notes = vec![human_bytes(process.memory_bytes)];
    if process.threads > 1 {
        notes.push(format!("{} threads", process.threads));
    }
    if process.uid != 0 {
        notes.push(format!("uid {}", process.uid));
    }
    if process.state != "running" {
        notes.push(process.state.to_owned());
    }
    let called = match process.arguments.as_slice() {
        [] => process.name.clone(),
        arguments => arguments.join(" ").escape_debug().to_string(),
    };
    let called: String = called.chars().take(60).collect();
    format!("{} {called}  ({})", process.pid, notes.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32) -> ProcessContents {
        ProcessContents {
            pid,
            parent,
            name: "sh".into(),
            arguments: Vec::new(),
            executable: None,
            state: "running",
            uid: 0,
            threads: 1,
            memory_bytes: 0,
        }
    }

    fn drawn(all: &[(u32, u32)]) -> Vec<String> {
        let all: Vec<_> = all
            .iter()
            .map(|(pid, parent)| process(*pid, *parent))
            .collect();
        let lines = tree(&all).into_iter();
        lines.map(|line| line.replace(" sh  (0 B)", "")).collect()
    }

    #[test]
    fn a_tree_is_drawn_as_it_is() {
        let drawn = drawn(&[(1, 0), (2, 1), (3, 2), (4, 1), (5, 4), (9, 8)]);
        assert_eq!(drawn, ["1", "├─ 2", "│  └─ 3", "└─ 4", "   └─ 5", "9"]);
    }

    /// A container may have as many as its node lets it, and images say what they like.
    #[test]
    fn neither_depth_nor_a_circle_is_too_much() {
        let chain: Vec<_> = (1..200_000).map(|pid| (pid, pid - 1)).collect();
        let lines = drawn(&chain);
        assert_eq!(lines.len(), chain.len());
        assert!(lines.iter().all(|it| it.len() < 200));
        assert_eq!(drawn(&[(2, 0), (1, 2), (2, 1), (3, 3)]).len(), 4);
        assert!(drawn(&[(1, 2), (2, 1)]).is_empty());
    }
}
