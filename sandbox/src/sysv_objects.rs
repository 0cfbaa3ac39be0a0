//! The System V objects of a living IPC namespace.
//!
//! ```text
//! /proc/sysvipc/{shm,msg,sem}
//!        key      shmid perms ...       a heading, then a line an object:
//!     305419896       0  1600 ...       key (decimal, signed), id, ...
//! ```
//!
//! CRIU makes the objects of its images before it makes the tasks, and leaves them when the restore
//! fails afterwards: the next attempt would find them ("File exists"), and so would a container that
//! starts cold, with what another program has left in them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use transship_checkpoint::criu_images::ipcns::{IpcKind, IpcObject};

use crate::error::SandboxError;
use crate::pins::in_thread;

/// The kinds with their files, and the flags of ipcrm(1) for their ids.
const KINDS: [(IpcKind, &str, &str); 3] = [
    (IpcKind::Shm, "/proc/sysvipc/shm", "--shmem-id"),
    (IpcKind::Msg, "/proc/sysvipc/msg", "--queue-id"),
    (IpcKind::Sem, "/proc/sysvipc/sem", "--semaphore-id"),
];

/// What an IPC namespace had before a restore.
#[derive(Debug)]
pub struct LiveIpc {
    namespace: PathBuf,
    before: BTreeSet<IpcObject>,
}

impl LiveIpc {
    /// Looks at the namespace at `path`.
    ///
    /// # Errors
    /// It cannot be entered.
    pub fn of(path: &Path) -> Result<Self, SandboxError> {
        Ok(Self {
            namespace: path.to_path_buf(),
            before: in_thread("enter", path, || {
                enter(path)?;
                live_objects()
            })?,
        })
    }

    /// Removes what is there in the place of `new`: the same id, or the same key. `present` is somebody's. While others are in
    /// the namespace, nobody knows who uses what.
    ///
    /// # Errors
    /// [`SandboxError::IpcInUse`]; or one cannot be removed.
    pub(crate) fn make_way(
        &self,
        new: &[IpcObject],
        present: &[IpcObject],
        has_others: &dyn Fn() -> bool,
    ) -> Result<(), SandboxError> {
        let is_in_place_of = |there: &IpcObject, object: &IpcObject| {
            let same_key = there.key == object.key && object.key != 0;
            there.kind == object.kind && (there.id == object.id || same_key)
        };
        let in_the_way: Vec<&IpcObject> = { self.before.iter() }
            .filter(|there| !present.contains(there))
            .filter(|there| new.iter().any(|object| is_in_place_of(there, object)))
            .collect();
        let Some(first) = in_the_way.first() else {
            return Ok(());
        };
        if has_others() {
            return Err(SandboxError::IpcInUse {
                kind: first.kind.name(),
                id: first.id,
                key: first.key,
            });
        }
        let path = &self.namespace;
        in_thread("remove the System V objects in", path, || {
            enter(path)?;
            remove(in_the_way.into_iter())
        })
    }

    /// Removes those of `objects` that have come since; what was there before is somebody else's.
    ///
    /// # Errors
    /// One cannot be removed.
    pub fn remove_new(&self, objects: &[IpcObject]) -> Result<(), SandboxError> {
        let path = &self.namespace;
        in_thread("remove the System V objects in", path, || {
            enter(path)?;
            let live = live_objects()?;
            let new = |it: &&IpcObject| live.contains(it) && !self.before.contains(it);
            remove(objects.iter().filter(new))
        })
    }
}

fn enter(path: &Path) -> io::Result<()> {
    Ok(setns(File::open(path)?, CloneFlags::CLONE_NEWIPC)?)
}

fn live_objects() -> io::Result<BTreeSet<IpcObject>> {
    let mut objects = BTreeSet::new();
    for (kind, file, _) in KINDS {
        objects.extend(parse(kind, &fs::read_to_string(file)?));
    }
    Ok(objects)
}

fn parse(kind: IpcKind, table: &str) -> impl Iterator<Item = IpcObject> {
    table.lines().skip(1).filter_map(move |line| {
        let mut words = line.split_whitespace();
        let key = words.next()?.parse::<i32>().ok()?.cast_unsigned();
        let id = words.next()?.parse().ok()?;
        Some(IpcObject { kind, id, key })
    })
}

// A program for it: the standard library has no such call, and this crate has no unsafe code.
fn remove<'a>(objects: impl Iterator<Item = &'a IpcObject>) -> io::Result<()> {
    let mut command = Command::new("ipcrm");
    for object in objects {
        let flag = KINDS.iter().find(|(kind, ..)| *kind == object.kind);
        command.args(flag.map(|(.., flag)| flag));
        command.arg(object.id.to_string());
    }
    if command.get_args().next().is_none() {
        return Ok(());
    }
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("ipcrm: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(said.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_the_kernel_are_read() {
        let table = "       key      shmid perms                  size  cpid\n\
                     -559038737          3  1600                  4096    17\n\
                     \x20        0          4  1600                  4096    17\n";
        let found: Vec<_> = parse(IpcKind::Shm, table).collect();
        let object = |key, id| IpcObject {
            kind: IpcKind::Shm,
            id,
            key,
        };
        assert_eq!(found, [object(0xdead_beef, 3), object(0, 4)]);
    }

    /// In an IPC namespace of its own, that of a child.
    #[test]
    fn root_what_has_come_since_goes() {
        if !nix::unistd::geteuid().is_root() {
            let required = std::env::var("REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|need| need == "root"),
                "REQUIRE lists root, but this is not"
            );
            eprintln!("skipped: needs root");
            return;
        }
        let mut child = Command::new("unshare");
        child.args([
            "--ipc",
            "sh",
            "-c",
            "ipcmk -Q; read go; ipcmk -M 4096; ipcmk -S 1; read end",
        ]);
        let mut child = child
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = io::BufRead::lines(io::BufReader::new(child.stdout.take().unwrap()));
        said.next().unwrap().unwrap();
        let namespace = PathBuf::from(format!("/proc/{}/ns/ipc", child.id()));
        let live = LiveIpc::of(&namespace).unwrap();
        assert_eq!(live.before.len(), 1);
        io::Write::write_all(child.stdin.as_mut().unwrap(), b"go\n").unwrap();
        said.next().unwrap().unwrap();
        said.next().unwrap().unwrap();
        let now = LiveIpc::of(&namespace).unwrap();
        assert_eq!(now.before.len(), 3);
        let all: Vec<_> = now.before.iter().cloned().collect();
        live.remove_new(&all).unwrap();
        assert_eq!(LiveIpc::of(&namespace).unwrap().before, live.before);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
