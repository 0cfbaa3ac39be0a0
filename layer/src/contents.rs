//! Contents of files that a layer names and does not have: they have gone to the other side before, while the directory
//! was in use.
//!
//! ```text
//!  upperdir in use   ──> send_contents ──> number, data ──> the other side: a directory of files "0", "1", ...
//!       │                     └──> KnownContents: of which inode, and when that was changed last
//!  upperdir at rest  ──> export ──> an entry without data and with the PAX record TRANSSHIP.content=<number>
//!                                            import: the file <number> gets its place and its attributes
//! ```
//!
//! A content that was read is that of the file at rest if nothing has been written in between, and that is seen by the
//! change time, which nobody can set back:
//!
//! - What is mapped and dirty is written to the disk first. The kernel protects its pages then, so that the next write to
//!   them is noticed and changes the time. Only file systems are read that are known to do so ([`NOTICES_WRITES`]).
//! - The last change has to be [`QUIET`] before the read: a write moves the time before it moves the data, and kernels
//!   before 6.13 move it by a tick of the timer.
//!
//! What is mounted below the directory is left out: each file system is a question of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::open;
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::fdatasync;

use crate::directory_names::{DirectoryNames, Given, KEPT_PIECES};
use crate::directory_stack::{DIRECTORY_FLAGS, DirectoryStack, LeaveError, open_directory};
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::open_for_export::open_regular;

/// Key of the record.
pub(crate) const CONTENT_KEY: &[u8] = b"TRANSSHIP.content";
/// The smallest file whose content is sent: what it saves is more than what the call for the disk costs.
const LEAST_BYTES: u64 = 256 << 10;
/// Whose kernel code protects the pages that it has written to the disk, and moves the change time at the next write to
/// them. tmpfs and hugetlbfs do not, overlay syncs nothing where it is mounted `volatile`, and files of other nodes change
/// without this kernel.
const NOTICES_WRITES: [FsType; 4] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    F2FS_SUPER_MAGIC,
];
/// How long nobody has changed a file whose content is sent.
const QUIET: Duration = Duration::from_secs(2);

/// The contents that the other side has.
#[derive(Debug, Default)]
pub struct KnownContents {
    files: HashMap<(u64, u64), (InodeAttributes, u64)>,
    bytes: u64,
}

/// Why contents could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum ContentsError<E> {
    /// A system call failed.
    #[error("cannot read the files in {path}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Who sends them said so.
    #[error(transparent)]
    Send(E),
}

impl KnownContents {
    /// Files whose content is there, unless they have been changed since.
    #[must_use]
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// Bytes of them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of the content that a file has, which is at rest.
    pub(crate) fn number_of(&self, now: &InodeAttributes) -> Option<u64> {
        let (then, number) = self.files.get(&now.identity)?;
        then.unchanged_in(now).then_some(*number)
    }
}

/// Sends the contents of large files below `top`, which may be in use, as long as `go_on` says so: `send` gets the number of
/// each, and reads it to its end. What is changed meanwhile is sent in vain, and is not in what this gives.
///
/// # Errors
/// Those of `send`, and system calls that fail.
pub fn send_contents<E>(
    top: &Path,
    go_on: &dyn Fn() -> bool,
    send: &mut dyn FnMut(u64, &mut dyn Read) -> Result<(), E>,
) -> Result<KnownContents, ContentsError<E>> {
    let failed = |source: io::Error| ContentsError::Io {
        path: top.to_path_buf(),
        source,
    };
    let mut known = KnownContents::default();
    let root = open(top, DIRECTORY_FLAGS, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let kind = fstatfs(&root).map_err(|errno| failed(errno.into()))?;
    if !NOTICES_WRITES.contains(&kind.filesystem_type()) {
        return Ok(known);
    }
    let device = fstat(&root).map_err(|errno| failed(errno.into()))?.st_dev;
    let mut number = 0;
    let mut walk = Walk {
        stack: DirectoryStack::new(),
    };
    walk.enter(root).map_err(failed)?;
    while let Some(file) = walk.next_file().map_err(failed)? {
        if !go_on() {
            break;
        }
        let Some(before) = quiet(&file, device).map_err(failed)? else {
            continue;
        };
        if known.files.contains_key(&before.identity) {
            // Under another name.
            continue;
        }
        let mut data = (&file).take(before.size);
        send(number, &mut data).map_err(ContentsError::Send)?;
        let after = fstat(&file).map_err(|errno| failed(errno.into()))?;
        if data.limit() == 0 && before.unchanged_in(&after.into()) {
            known.bytes += before.size;
            known.files.insert(before.identity, (before, number));
        }
        number += 1;
    }
    Ok(known)
}

/// What a file of the device is whose content is worth sending; none of others.
fn quiet(file: &File, device: u64) -> io::Result<Option<InodeAttributes>> {
    let stat = fstat(file)?;
    let large = InodeAttributes::from(stat).size >= LEAST_BYTES;
    if stat.st_dev != device || !large || has_holes(&stat) || !has_rested(&stat) {
        return Ok(None);
    }
    fdatasync(file)?;
    let stat = fstat(file)?;
    Ok(has_rested(&stat).then(|| stat.into()))
}

/// Its data is not all here: it has holes, or is that of a lower layer (metacopy).
fn has_holes(stat: &FileStat) -> bool {
    stat.st_blocks.saturating_mul(512) < stat.st_size
}

fn has_rested(stat: &FileStat) -> bool {
    let changed = Duration::from_secs(u64::try_from(stat.st_ctime).unwrap_or(u64::MAX));
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.is_ok_and(|now| changed.saturating_add(QUIET) < now)
}

/// The regular files of a tree that others change, by descriptors: nothing that a container does to it leads out of it.
struct Walk {
    stack: DirectoryStack<DirectoryNames>,
}

impl Walk {
    fn enter(&mut self, directory: OwnedFd) -> io::Result<()> {
        let identity = InodeAttributes::from(fstat(&directory)?).identity;
        let names = match DirectoryNames::begin(directory.as_fd(), Given::Stay) {
            // It was removed when it had been opened.
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(()),
            names => names?,
        };
        if self.stack.depth() > KEPT_PIECES
            && let Some(outer) = self.stack.note_mut()
        {
            outer.forget();
        }
        self.stack.push(directory, identity, names);
        Ok(())
    }

    fn next_file(&mut self) -> io::Result<Option<File>> {
        while let Some((fd, names)) = self.stack.innermost_mut() {
            let Some((name, inode_type)) = names.next(fd.as_fd())? else {
                match self.stack.leave() {
                    // Somebody has moved it: what is left of the tree goes in the freeze.
                    Err(LeaveError::Moved) => return Ok(None),
                    left => left.map_err(io::Error::from)?,
                }
                continue;
            };
            match inode_type {
                Some(InodeType::Directory) => match open_directory(fd, name) {
                    Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                    directory => self.enter(directory?)?,
                },
                Some(InodeType::Regular) => {
                    // One that has gone, or is another kind of file now, is none of ours.
                    if let Ok(file) = open_regular(fd.as_fd(), name, name) {
                        return Ok(Some(file.into()));
                    }
                }
                _ => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
    use std::process::{Command, Stdio};

    use super::*;
    use crate::overlay_tests::cross_read::have;
    use crate::{
        ExportOptions, ImportError, ImportOptions, OverlayStack, export_upperdir,
        import_into_upperdir, remove_contents_but,
    };
    use std::sync::Arc;

    const LARGE: usize = 256 << 10;

    /// More names than are held at once, in more directories than keep theirs.
    #[test]
    fn each_file_is_met_once_however_many_there_are() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut inner = dir.path().to_path_buf();
        for _ in 0..KEPT_PIECES + 3 {
            inner.push("m");
            fs::create_dir(&inner).unwrap();
            for name in ["a", "z"] {
                fs::write(inner.join(name), "").unwrap();
            }
        }
        for name in 0..2500 {
            fs::write(dir.path().join(name.to_string()), "").unwrap();
            fs::write(inner.join(name.to_string()), "").unwrap();
        }
        let mut walk = Walk {
            stack: DirectoryStack::new(),
        };
        let root = open(dir.path(), DIRECTORY_FLAGS, Mode::empty()).unwrap();
        walk.enter(root).unwrap();
        let mut met = std::collections::HashSet::new();
        while let Some(file) = walk.next_file().unwrap() {
            assert!(met.insert(file.metadata().unwrap().ino()));
        }
        assert_eq!(met.len(), 2 * 2500 + 2 * (KEPT_PIECES + 3));
    }

    /// On a file system of the disk.
    fn dir() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    fn write_large(path: &Path, byte: u8) {
        fs::write(path, vec![byte; LARGE]).unwrap();
    }

    fn rest() {
        std::thread::sleep(QUIET + Duration::from_millis(1100));
    }

    /// Sends what is below `top` to files in `to`.
    fn send_to(top: &Path, to: &Path) -> KnownContents {
        let mut send = |number: u64, data: &mut dyn Read| -> io::Result<()> {
            io::copy(data, &mut File::create_new(to.join(number.to_string()))?)?;
            Ok(())
        };
        send_contents(top, &|| true, &mut send).unwrap()
    }

    #[test]
    fn what_nobody_has_changed_is_named_and_gets_its_place() {
        let (from, to) = (dir(), dir());
        let top = from.path();
        fs::create_dir(top.join("d")).unwrap();
        for (name, byte) in [("d/same", 1), ("changed", 2), ("grown", 3), ("renamed", 4)] {
            write_large(&top.join(name), byte);
        }
        fs::hard_link(top.join("d/same"), top.join("link")).unwrap();
        fs::write(top.join("small"), "small").unwrap();
        File::create(top.join("holes"))
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        fs::set_permissions(top.join("d/same"), fs::Permissions::from_mode(0o751)).unwrap();
        rest();
        write_large(&top.join("young"), 5);

        let contents = to.path().join("contents");
        fs::create_dir(&contents).unwrap();
        let known = send_to(top, &contents);
        assert_eq!((known.count(), known.bytes()), (4, 4 * LARGE as u64));
        // The length and the time of the data are as before, and only the kernel knows.
        let changed = File::options()
            .write(true)
            .open(top.join("changed"))
            .unwrap();
        let times =
            fs::FileTimes::new().set_modified(changed.metadata().unwrap().modified().unwrap());
        changed.write_all_at(b"x", 100).unwrap();
        changed.set_times(times).unwrap();
        let grown = File::options()
            .append(true)
            .open(top.join("grown"))
            .unwrap();
        (&grown).write_all(b"more").unwrap();
        fs::rename(top.join("renamed"), top.join("d/moved")).unwrap();

        let stack = OverlayStack::new(top, &[]);
        let options = ExportOptions {
            known: Some(Arc::new(known)),
            ..ExportOptions::default()
        };
        let mut tar = Vec::new();
        let stats = export_upperdir(&stack, &mut tar, &options).unwrap();
        // A new name changes the time, too: it is sent again, and no harm is done.
        assert_eq!(stats.known_files, 1);

        let options = ImportOptions {
            contents: Some("contents".to_owned()),
            ..ImportOptions::default()
        };
        import_into_upperdir(&tar[..], &OverlayStack::new(to.path(), &[]), &options).unwrap();
        let there = |name: &str| fs::read(to.path().join(name)).unwrap();
        let here = |name: &str| fs::read(top.join(name)).unwrap();
        for name in [
            "d/same", "link", "changed", "grown", "d/moved", "small", "holes", "young",
        ] {
            assert!(there(name) == here(name), "{name}");
        }
        let meta = |root: &Path, name: &str| {
            let meta = fs::metadata(root.join(name)).unwrap();
            (meta.mode(), meta.nlink(), meta.mtime_nsec(), meta.uid())
        };
        for name in ["", "d/same", "link"] {
            assert_eq!(meta(to.path(), name), meta(top, name), "{name}");
        }
        assert!(!contents.try_exists().unwrap());
    }

    #[test]
    fn a_write_to_mapped_memory_is_a_change() {
        if !have("python3") {
            return;
        }
        let (from, to) = (dir(), dir());
        let path = from.path().join("mapped");
        write_large(&path, 1);
        // A process that has it mapped, and has written to it: its page is writable now, and no time moves any more.
        let mut child = Command::new("python3")
            .args(["-c", MAPS])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut orders, mut answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut write = |byte: u8| {
            orders.write_all(&[byte]).unwrap();
            answers.read_exact(&mut [0]).unwrap();
            InodeAttributes::from(fstat(File::open(&path).unwrap()).unwrap())
        };
        // Whoever syncs the file system meanwhile lets the second write be seen.
        let is_unseen = (0..10).any(|_| {
            let first = write(2);
            rest();
            first.unchanged_in(&write(3))
        });
        assert!(is_unseen, "the second write is seen");
        let known = send_to(from.path(), to.path());
        assert_eq!(known.count(), 1);
        assert_eq!(known.number_of(&write(4)), None);
        drop(orders);
        child.wait().unwrap();
    }

    const MAPS: &str = "
import mmap, os, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
while byte := os.read(0, 1):
    memory[0] = byte[0]
    os.write(1, b'.')
";

    #[test]
    fn a_content_is_there_once_and_only_where_one_has_come() {
        let from = dir();
        write_large(&from.path().join("a"), 1);
        rest();
        let sent = dir();
        let options = ExportOptions {
            known: Some(Arc::new(send_to(from.path(), sent.path()))),
            ..ExportOptions::default()
        };
        let mut tar = Vec::new();
        export_upperdir(&OverlayStack::new(from.path(), &[]), &mut tar, &options).unwrap();
        let to = dir();
        let import = |contents: Option<&str>| {
            let options = ImportOptions {
                contents: contents.map(str::to_owned),
                ..ImportOptions::default()
            };
            import_into_upperdir(&tar[..], &OverlayStack::new(to.path(), &[]), &options)
        };
        let refused = |result: Result<_, ImportError>| {
            let error: ImportError = result.map(|_: crate::ImportStats| ()).unwrap_err();
            assert!(error.to_string().contains("has not come before"), "{error}");
        };
        refused(import(None));
        fs::create_dir(to.path().join("contents")).unwrap();
        refused(import(Some("contents")));
        // Whoever opens it waits for somebody else, as one of a device may start something.
        let fifo = to.path().join("contents/0");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        refused(import(Some("contents")));
        assert!(fifo.try_exists().unwrap());
    }

    #[test]
    fn an_import_that_breaks_off_is_begun_anew() {
        let (from, to) = (dir(), dir());
        write_large(&from.path().join("a"), 1);
        rest();
        let contents = to.path().join("contents");
        fs::create_dir(&contents).unwrap();
        let known = Arc::new(send_to(from.path(), &contents));
        // It is not among the contents, and comes behind what is.
        write_large(&from.path().join("b"), 2);
        let options = ExportOptions {
            known: Some(known),
            ..ExportOptions::default()
        };
        let mut tar = Vec::new();
        export_upperdir(&OverlayStack::new(from.path(), &[]), &mut tar, &options).unwrap();
        let import = |tar: &[u8]| {
            let options = ImportOptions {
                contents: Some("contents".to_owned()),
                ..ImportOptions::default()
            };
            import_into_upperdir(tar, &OverlayStack::new(to.path(), &[]), &options)
        };
        import(&tar[..tar.len() / 2]).unwrap_err();
        assert!(to.path().join("a").try_exists().unwrap());
        remove_contents_but(to.path(), Some("contents")).unwrap();
        import(&tar).unwrap();
        for name in ["a", "b"] {
            let [there, here] = [to.path(), from.path()].map(|it| fs::read(it.join(name)).unwrap());
            assert!(there == here, "{name}");
        }
        assert_eq!(fs::metadata(to.path().join("a")).unwrap().nlink(), 1);
        assert!(!contents.try_exists().unwrap());
    }
}
