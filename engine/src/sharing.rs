//! The checkpoints of a store lie there as they are restored, and have what is the same in two of them once on the disk, where the
//! file system can (btrfs, XFS): what is new shares blocks with the newest earlier checkpoint of the same containers.
//!
//! ```text
//!  earlier   |====|    |====|====|    |   pages-1.img
//!               ||       ||               the same at the same place: copy_file_range(2), which shares blocks there
//!  new       |====|xxxx|====|xxxx|xxxx|   pages-1.img
//! ```
//!
//! A file with the same digest is taken wherever it is, another one by its name. Memory that stays where it was is at the
//! same place in CRIU's file until the first mapping that has grown; packages and registries find it behind that, too.
//! Both are compared byte by byte before; nobody writes to files of a checkpoint, and the file that has the shared blocks takes the
//! place of the other one when it is on the disk.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use transship_checkpoint::manifest::{self, MANIFEST_FILE, Manifest};
use transship_checkpoint::store::{Checkpoint, Store};

use crate::error::{Context as _, Result};

/// Blocks of these file systems, and pages.
const BLOCK: usize = 4096;
/// Bytes that are compared at once.
const PIECE: usize = 1 << 20;
/// Fewer bytes in a row are left alone: each run is an extent, and many of them make a file slow.
const LEAST: u64 = 64 << 10;
/// A file of which less than one part in so many is the same is left as it is.
const LEAST_PART: u64 = 8;
/// A file in the making, beside the checkpoints: what a power cut leaves of it goes with the drafts.
const ASIDE: &str = "file";

/// Shares what a new checkpoint has in common with the earlier ones of its store. Gives the bytes; 0 where there is nothing, or
/// the file system cannot. The checkpoint is the same afterwards, whatever fails.
pub(crate) fn share(store: &Store, new: &Checkpoint) -> u64 {
    match try_share(store, new) {
        Ok(bytes) => bytes,
        Err(error) => {
            let name = &new.manifest.name;
            tracing::warn!(
                "{name:?} shares nothing with earlier checkpoints: {}",
                error.one_line()
            );
            0
        }
    }
}

fn try_share(store: &Store, new: &Checkpoint) -> Result<u64> {
    if new.sealed.is_some() || !can_share(&new.dir.join(MANIFEST_FILE))? {
        return Ok(0);
    }
    let Some(earlier) = newest_of_same(store, &new.manifest)? else {
        return Ok(0);
    };
    // Somebody may be removing one of them.
    let (Ok(_earlier), Ok(_new)) = (earlier.lock_for_reading(), new.lock_for_reading()) else {
        return Ok(0);
    };
    let by_digest: HashMap<_, _> = files_of(&earlier)
        .map(|(path, file)| ((file.size, file.sha256.as_str()), path))
        .collect();
    let by_name: HashMap<_, _> = files_of(&earlier)
        .map(|(path, _)| (path.clone(), path))
        .collect();
    let aside = store.aside()?;
    let mut shared = 0;
    for (path, file) in files_of(new).filter(|(_, file)| file.size >= LEAST) {
        let same = by_digest.get(&(file.size, file.sha256.as_str()));
        let Some(from) = same.or_else(|| by_name.get(&path)) else {
            continue;
        };
        let (from, to) = (earlier.dir.join(from), new.dir.join(&path));
        let failed = || format!("cannot share blocks of {}", to.display());
        shared += share_file(&from, &to, &aside.dir().join(ASIDE)).with_context(failed)?;
    }
    Ok(shared)
}

/// The files of a checkpoint, by their paths in it.
fn files_of(checkpoint: &Checkpoint) -> impl Iterator<Item = (PathBuf, &manifest::File)> {
    let all = checkpoint.manifest.directories();
    all.flat_map(|(dir, files)| {
        let named = files.iter();
        named.map(move |file| (Path::new(dir).join(&file.path), file))
    })
}

/// The newest checkpoint of the same pod, or of the same containers outside of one.
fn newest_of_same(store: &Store, new: &Manifest) -> Result<Option<Checkpoint>> {
    let of = |manifest: &Manifest| {
        let pod = manifest.pod.as_ref();
        let pod = pod.map(|pod| (pod.namespace.clone(), pod.name.clone()));
        let ids = manifest.containers.iter().map(|it| it.id.clone());
        let ids: Vec<_> = ids.filter(|_| pod.is_none()).collect();
        (pod, ids)
    };
    let listed = store.list()?.into_iter();
    Ok(listed
        .filter(|(name, _)| *name != new.name)
        .filter_map(|(_, found)| found.ok())
        .filter(|found| found.sealed.is_none() && of(&found.manifest) == of(new))
        .max_by_key(|found| found.manifest.created))
}

/// Opens a regular file, and gives its length.
fn open(path: &Path, writes: bool) -> io::Result<(File, u64)> {
    let mut open = OpenOptions::new();
    open.read(true)
        .write(writes)
        .custom_flags(O_NOFOLLOW | O_NONBLOCK);
    let file = open.open(path)?;
    let meta = file.metadata()?;
    match meta.is_file() {
        true => Ok((file, meta.len())),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// Writes the file at `to` anew, with blocks of the one at `from` where both are the same at the same place. Gives the bytes of
/// those. `aside` is where it is made.
///
/// A file that only got those blocks would take as much room as before: btrfs keeps an extent as long as a part of it is used.
fn share_file(from: &Path, to: &Path, aside: &Path) -> io::Result<u64> {
    let ((from, from_length), (old, length)) = (open(from, false)?, open(to, false)?);
    let runs = same_runs((&from, from_length), (&old, length))?;
    let same: u64 = runs.iter().map(|run| run.end - run.start).sum();
    if same < length / LEAST_PART {
        return Ok(0);
    }
    let mut make = OpenOptions::new();
    make.write(true).create_new(true).mode(0o600);
    let new = make.open(aside)?;
    let fill = || {
        new.set_permissions(old.metadata()?.permissions())?;
        new.set_len(length)?;
        let mut at = 0;
        for run in &runs {
            copy_data(&old, &new, at..run.start)?;
            share_run(&from, &new, run)?;
            at = run.end;
        }
        copy_data(&old, &new, at..length)?;
        new.sync_all()?;
        fs::rename(aside, to)
    };
    fill().inspect_err(|_| drop(fs::remove_file(aside)))?;
    Ok(same)
}

/// Where two files are the same, in whole blocks; the last one of both is whole if they have the same length.
fn same_runs(
    (one, one_length): (&File, u64),
    (other, length): (&File, u64),
) -> io::Result<Vec<Range<u64>>> {
    let (mut one_piece, mut other_piece) = (vec![0; PIECE], vec![0; PIECE]);
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    let common = length.min(one_length);
    while at < common {
        let left = usize::try_from(common - at).unwrap_or(PIECE).min(PIECE);
        let piece = match left == PIECE || length == one_length {
            true => left,
            false => left - left % BLOCK,
        };
        if piece == 0 {
            break;
        }
        let (one_piece, other_piece) = (&mut one_piece[..piece], &mut other_piece[..piece]);
        one.read_exact_at(one_piece, at)?;
        other.read_exact_at(other_piece, at)?;
        for (block, other) in one_piece.chunks(BLOCK).zip(other_piece.chunks(BLOCK)) {
            let end = at + block.len() as u64;
            // Zeros are holes.
            if block == other && !is_zero(block) {
                match runs.last_mut().filter(|run| run.end == at) {
                    Some(run) => run.end = end,
                    None => runs.push(at..end),
                }
            }
            at = end;
        }
    }
    runs.retain(|run| run.end - run.start >= LEAST);
    Ok(runs)
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Copies what is no hole.
fn copy_data(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
        from.read_exact_at(&mut piece[..left], at)?;
        for block in piece[..left].chunks(BLOCK) {
            if !is_zero(block) {
                to.write_all_at(block, at)?;
            }
            at += block.len() as u64;
        }
    }
    Ok(())
}

/// Whether the file system of a file shares blocks between files.
fn can_share(path: &Path) -> Result<bool> {
    let failed = || format!("cannot tell whether {} can share blocks", path.display());
    let (file, _) = open(path, true).with_context(failed)?;
    // All of it, into itself: only the file system's word counts.
    match rustix::fs::ioctl_ficlone(file.as_fd(), file.as_fd()) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(true),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOTTY | rustix::io::Errno::NOSYS) => {
            Ok(false)
        }
        Err(error) => Err(io::Error::from(error)).with_context(failed),
    }
}

/// Gives `to` the blocks that `from` has there.
fn share_run(from: &File, to: &File, run: &Range<u64>) -> io::Result<()> {
    let offset = |at: u64| i64::try_from(at).map_err(io::Error::other);
    let (mut read, mut written, end) = (offset(run.start)?, offset(run.start)?, offset(run.end)?);
    while written < end {
        let left = usize::try_from(end - written).map_err(io::Error::other)?;
        match copy_file_range(from, Some(&mut read), to, Some(&mut written), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::statvfs::statvfs;
    use transship_checkpoint::manifest::Container;
    use transship_checkpoint::store::{Durability, digest_files};

    use super::*;

    const PAGES: usize = 32 << 20;

    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        (0..bytes / 8).flat_map(|_| next().to_le_bytes()).collect()
    }

    fn take(store: &Store, name: &str, created: u64, id: &str, pages: &[u8]) -> Checkpoint {
        let draft = store.draft(name).unwrap();
        fs::create_dir_all(draft.dir().join("c/checkpoint")).unwrap();
        fs::write(draft.dir().join("c/checkpoint/pages-1.img"), pages).unwrap();
        fs::write(draft.dir().join("c/rootfs-diff.tar"), noise(7, 1 << 20)).unwrap();
        fs::write(draft.dir().join("c/small.img"), "small").unwrap();
        let manifest = Manifest {
            name: name.into(),
            created,
            containers: vec![Container {
                name: "c".into(),
                id: id.into(),
                files: digest_files(&draft.dir().join("c")).unwrap(),
                ..Container::default()
            }],
            ..Manifest::default()
        };
        draft.commit(manifest, Durability::Synced).unwrap()
    }

    #[test]
    fn where_nothing_is_shared_nothing_changes() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = Store::at(dir.path());
        take(&store, "one", 1, "a", &noise(1, 1 << 20));
        let two = take(&store, "two", 2, "a", &noise(1, 1 << 20));
        assert_eq!(share(&store, &two), 0, "a tmpfs cannot");
        two.verify().unwrap();
    }

    #[test]
    fn root_a_second_checkpoint_takes_what_has_changed() {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        fs::create_dir(&disk).unwrap();
        let run = |command: &mut Command| assert!(command.status().unwrap().success());
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&disk));
        let used = || {
            let file = File::open(&disk).unwrap();
            nix::unistd::syncfs(&file).unwrap();
            let stat = statvfs(&disk).unwrap();
            (stat.blocks() - stat.blocks_free()) * stat.fragment_size()
        };
        let store = Store::at(disk.join("store"));
        let mut pages = noise(1, PAGES);
        take(&store, "one", 1, "a", &pages);
        take(&store, "other", 3, "b", &noise(2, 1 << 20));
        // A few pages have changed, one is new, and there are some zeros.
        for page in [3, 1000, 1001, 5000] {
            pages[page * BLOCK..(page + 1) * BLOCK].fill(5);
        }
        pages[8000 * BLOCK..8100 * BLOCK].fill(0);
        pages.extend([9; 100]);
        let before = used();
        let two = take(&store, "two", 4, "a", &pages);
        let whole = used() - before;
        let shared = share(&store, &two);
        let left = used() - before;
        assert!(whole >= PAGES as u64, "{whole}");
        assert!(shared >= PAGES as u64, "{shared}");
        assert!(left < PAGES as u64 / 10, "{left} of {whole}");
        two.verify().unwrap();
        let found = fs::read(two.dir.join("c/checkpoint/pages-1.img")).unwrap();
        assert!(found == pages);
        let left = fs::read_dir(&two.dir).unwrap().count();
        assert_eq!(left, 2, "the manifest and the container");
        let left = fs::read_dir(store.root()).unwrap().count();
        assert_eq!(left, 3, "the checkpoints");
        // The one does not go with the other.
        store.remove("one").unwrap();
        two.verify().unwrap();
        umount2(&disk, MntFlags::empty()).unwrap();
    }
}
