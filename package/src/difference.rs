//! What changed between two checkpoints of a container: files, processes, pages of memory.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use transship_checkpoint::criu_images::processes;
use transship_checkpoint::manifest::IMAGES_DIR;
use transship_checkpoint::store::Checkpoint;

use crate::contents::{ContainerContents, Contents, USUAL_PAGE};
use crate::error::PackageError;
use crate::layer_changes::Digests;

/// The version of what programs get.
const FORMAT: u32 = 1;

/// What is different in a second checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// The version of this format.
    pub format: u32,
    /// Name of the first one.
    pub old: String,
    /// Name of the second one.
    pub new: String,
    /// Seconds from one to the other.
    pub seconds: i64,
    /// The containers that both have.
    pub containers: Vec<ContainerDifference>,
    /// Those that the first one alone has.
    pub only_old: Vec<String>,
    /// Those that the second one alone has.
    pub only_new: Vec<String>,
}

/// What is different in a container.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ContainerDifference {
    /// Its name.
    pub name: String,
    /// Files: each path with `added`, `changed`, `deleted`, `opaque` or `undone`.
    pub files: Vec<FileDifference>,
    /// The processes of both.
    pub processes: Vec<ProcessDifference>,
    /// Sockets that the first one alone has.
    pub sockets_gone: Vec<String>,
    /// Sockets that the second one alone has.
    pub sockets_new: Vec<String>,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileDifference {
    /// Its path in the container.
    pub path: String,
    /// What happened to it.
    pub change: &'static str,
}

/// A process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ProcessDifference {
    /// Its id in the container.
    pub pid: u32,
    /// Name of the program.
    pub name: String,
    /// `same`, `ended`, `new`, or `another` program with the same id.
    pub change: &'static str,
    /// Pages of memory that are the same in both.
    pub pages_same: u64,
    /// Pages with another content.
    pub pages_changed: u64,
    /// Pages that the second one alone has.
    pub pages_new: u64,
    /// Pages that the first one alone has.
    pub pages_gone: u64,
}

impl Difference {
    /// Compares two checkpoints. A container alone is compared with a container alone, whatever they are
    /// called.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn between(old: &Checkpoint, new: &Checkpoint) -> Result<Self, PackageError> {
        let contents = |it: &Checkpoint| Contents::of(it, Digests::Taken);
        let (before, after) = (contents(old)?, contents(new)?);
        let alone = before.containers.len() == 1 && after.containers.len() == 1;
        let fits =
            |one: &ContainerContents, other: &ContainerContents| alone || one.name == other.name;
        let mut containers = Vec::new();
        for one in &before.containers {
            if let Some(other) = after.containers.iter().find(|it| fits(one, it)) {
                containers.push(difference((old, one), (new, other))?);
            }
        }
        let missing = |these: &Contents, in_those: &Contents| {
            let all = these.containers.iter();
            let lone = all.filter(|it| !in_those.containers.iter().any(|other| fits(it, other)));
            lone.map(|it| it.name.clone()).collect()
        };
        let seconds = |it: &Contents| i64::try_from(it.manifest.created).unwrap_or(i64::MAX);
        Ok(Self {
            format: FORMAT,
            old: before.manifest.name.clone(),
            new: after.manifest.name.clone(),
            seconds: seconds(&after).saturating_sub(seconds(&before)),
            containers,
            only_old: missing(&before, &after),
            only_new: missing(&after, &before),
        })
    }
}

type Side<'a> = (&'a Checkpoint, &'a ContainerContents);

fn difference(
    (old, before): Side<'_>,
    (new, after): Side<'_>,
) -> Result<ContainerDifference, PackageError> {
    let files = before.changes.compared_with(&after.changes);
    let names = |of: &ContainerContents| -> BTreeMap<u32, String> {
        let all = of.processes.iter();
        all.map(|it| (it.pid, it.name.clone())).collect()
    };
    let (names_before, names_after) = (names(before), names(after));
    let pids: BTreeSet<u32> = { names_before.keys() }
        .chain(names_after.keys())
        .copied()
        .collect();
    let processes = pids.into_iter().map(|pid| {
        let (name, change) = match (names_before.get(&pid), names_after.get(&pid)) {
            (Some(one), Some(other)) if one == other => (other, "same"),
            (_, Some(other)) if names_before.contains_key(&pid) => (other, "another"),
            (_, Some(other)) => (other, "new"),
            (Some(one), None) => (one, "ended"),
            (None, None) => return Ok(ProcessDifference::default()),
        };
        let mut found = ProcessDifference {
            pid,
            name: name.clone(),
            change,
            ..ProcessDifference::default()
        };
        count_pages(
            &mut found,
            pages((old, before), pid)?,
            &pages((new, after), pid)?,
        );
        Ok(found)
    });
    let sockets = |of: &ContainerContents| -> BTreeSet<String> {
        let all = of.sockets.iter();
        all.map(|it| {
            let peer = it
                .peer
                .as_ref()
                .map_or(String::new(), |peer| format!(" - {peer}"));
            format!("{} {} {}{peer}", it.protocol, it.state, it.local)
        })
        .collect()
    };
    let (sockets_before, sockets_after) = (sockets(before), sockets(after));
    Ok(ContainerDifference {
        name: after.name.clone(),
        files: files
            .into_iter()
            .map(|(path, change)| FileDifference { path, change })
            .collect(),
        processes: processes.collect::<Result<_, PackageError>>()?,
        sockets_gone: sockets_before.difference(&sockets_after).cloned().collect(),
        sockets_new: sockets_after.difference(&sockets_before).cloned().collect(),
    })
}

type Pages = BTreeMap<u64, processes::PageDigest>;

fn pages((checkpoint, of): Side<'_>, pid: u32) -> Result<Pages, PackageError> {
    let manifest = &checkpoint.manifest;
    let container = manifest.container(Some(&of.name))?;
    let images = checkpoint.container_dir(container).join(IMAGES_DIR);
    let page = manifest.source.page_size.unwrap_or(USUAL_PAGE);
    Ok(processes::page_digests(&images, pid, page)?)
}

fn count_pages(found: &mut ProcessDifference, old: Pages, new: &Pages) {
    for (at, before) in &old {
        match new.get(at) {
            Some(after) if after == before => found.pages_same += 1,
            Some(_) => found.pages_changed += 1,
            None => found.pages_gone += 1,
        }
    }
    found.pages_new = new.len() as u64 - found.pages_same - found.pages_changed;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_by_what_became_of_them() {
        let pages = |all: &[(u64, u8)]| -> Pages {
            all.iter().map(|(at, byte)| (*at, [*byte; 16])).collect()
        };
        let mut found = ProcessDifference::default();
        let old = pages(&[(1, 1), (2, 2), (3, 3)]);
        count_pages(&mut found, old, &pages(&[(1, 1), (2, 9), (4, 4), (5, 5)]));
        let counts = (
            found.pages_same,
            found.pages_changed,
            found.pages_gone,
            found.pages_new,
        );
        assert_eq!(counts, (1, 1, 1, 2));
    }
}
