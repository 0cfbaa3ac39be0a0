//! What CRIU lets GNU tar unpack into a tmpfs, as far as it leads elsewhere.
//!
//! ```text
//! tmpfs-dev-<device>.tar.gz.img     gzip: a tar of the whole file system, as `tar --create .` writes it
//! ```
//!
//! tar unpacks as root, and follows a link of the archive that it has just made. So an archive is known only if it has
//! each name once, no name through a link, and nothing that is not read here: all that tar itself writes is like that.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use transship_checkpoint::beneath::{Links, open_regular};
use transship_layer::{Archive, MemberKind, decompress};
use transship_sandbox::admission::MadeLinks;

/// Most links that are remembered, and bytes of their names.
const MOST_LINKS: usize = 100_000;
const MOST_NAMES: usize = 16 << 20;
/// Longest name that a file system takes (`PATH_MAX`).
const LONGEST_NAME: usize = 4096;

/// The archives in a directory of images.
pub(super) struct TmpfsArchives<'a> {
    dir: &'a Path,
    /// Bytes that may still come out of them: the container's memory, in which all of them will be.
    room: Cell<u64>,
    /// Each is read once, however many mounts and files ask for it.
    read: RefCell<BTreeMap<String, MadeLinks>>,
}

impl<'a> TmpfsArchives<'a> {
    pub(super) fn of(dir: &'a Path, room: u64) -> Self {
        Self {
            dir,
            room: Cell::new(room),
            read: RefCell::default(),
        }
    }

    /// The links that will be in the tmpfs of this device; none where that cannot be told, or where more comes out of the archives than
    /// there is room for.
    pub(super) fn links_of(&self, device: u32) -> MadeLinks {
        // That of CRIU before 2.0 has a name that no image may have.
        let name = format!("tmpfs-dev-{device}.tar.gz.img");
        if self.dir.join(&name).symlink_metadata().is_err() {
            return Some(Rc::default());
        }
        let mut read = self.read.borrow_mut();
        let links = read.entry(name).or_insert_with_key(|name| self.read(name));
        links.clone()
    }

    fn read(&self, name: &str) -> MadeLinks {
        let file = open_regular(self.dir, Path::new(name), Links::Refused).ok()?;
        let mut unpacked = decompress(BufReader::new(file)).ok()?.take(self.room.get());
        let links = read_links(&mut unpacked);
        self.room.set(unpacked.limit());
        // What is cut off at a block looks like an end.
        links.filter(|_| unpacked.limit() > 0).map(Rc::new)
    }
}

fn read_links(unpacked: impl Read) -> Option<BTreeSet<PathBuf>> {
    // With NUL, which no name has, in the place of each slash: so what is below a name follows it at once.
    let (mut links, mut bytes) = (BTreeSet::<Vec<u8>>::new(), 0);
    let is_below = |name: &[u8], link: &[u8]| {
        name.strip_prefix(link)
            .is_some_and(|rest| matches!(rest, [] | [0, ..]))
    };
    let mut archive = Archive::new(unpacked);
    while let Some(member) = archive.next_member().ok()? {
        let leads_up = member
            .path
            .split(|byte| *byte == b'/')
            .any(|it| it == b"..");
        if member.is_ambiguous || leads_up || member.path.len() > LONGEST_NAME {
            return None;
        }
        let mut name = member.clean_path();
        { name.iter_mut() }.for_each(|byte| *byte = if *byte == b'/' { 0 } else { *byte });
        // None of them is below another, so the last one before it tells of all.
        let before = links.range(..=name.clone()).next_back();
        if before.is_some_and(|link| is_below(&name, link)) {
            return None;
        }
        // Another name of a link is one, too.
        if matches!(member.kind, MemberKind::Symlink | MemberKind::HardLink) {
            bytes += name.len();
            let after = links.range(name.clone()..).next();
            let hides_links = after.is_some_and(|link| is_below(link, &name));
            if hides_links || bytes > MOST_NAMES || links.len() == MOST_LINKS {
                return None;
            }
            links.insert(name);
        }
    }
    // What is behind its end tar does not read.
    archive.finish().ok()?;
    let path = |mut name: Vec<u8>| {
        { name.iter_mut() }.for_each(|byte| *byte = if *byte == 0 { b'/' } else { *byte });
        PathBuf::from(OsString::from_vec(name))
    };
    Some(links.into_iter().map(path).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    const BLOCK: usize = 512;

    /// A header of this type, and its link.
    fn header(name: &str, kind: u8, link: &str) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000755");
        block[124..135].copy_from_slice(b"00000000000");
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn read(members: &[(&str, u8, &str)]) -> Option<Vec<PathBuf>> {
        let mut tar: Vec<u8> = { members.iter() }
            .flat_map(|(name, kind, link)| header(name, *kind, link))
            .collect();
        tar.resize(tar.len() + 2 * BLOCK, 0);
        Some(read_links(tar.as_slice())?.into_iter().collect())
    }

    #[test]
    fn links_are_known_only_where_tar_follows_none() {
        let link = |name| (name, b'2', "/root");
        let dir = |name| (name, b'5', "");
        let known = |names: &[&str]| Some(names.iter().map(PathBuf::from).collect());
        assert_eq!(
            read(&[dir("./"), dir("./d"), link("./d/x")]),
            known(&["d/x"])
        );
        assert_eq!(
            read(&[link("fd"), dir("fd-x"), link("fd-x/y"), dir("fd.d")]),
            known(&["fd", "fd-x/y"])
        );
        assert_eq!(read(&[("x", b'1', "y")]), known(&["x"]));
        for members in [
            // Through a link, to another name than the one that it has.
            vec![("d", b'2', "."), link("d/evil")],
            vec![dir("e"), ("d", b'2', "e"), link("d//evil")],
            vec![("d", b'2', "."), link("a"), link("c"), dir("d/evil")],
            // In its place.
            vec![link("d"), dir("d")],
            vec![link("d/x"), link("d")],
            vec![dir("d"), link("d/../x")],
            vec![link(".")],
        ] {
            let found = read(&members);
            assert!(
                found.is_none() || found == known(&[""]),
                "{members:?}: {found:?}"
            );
        }
    }

    #[test]
    fn names_are_bounded() {
        let long = |name: &str| {
            let mut tar = header("././@LongLink", b'L', "");
            let size = format!("{:011o}", name.len());
            tar[124..135].copy_from_slice(size.as_bytes());
            tar[148..156].copy_from_slice(b"        ");
            let sum: u32 = tar.iter().map(|byte| u32::from(*byte)).sum();
            tar[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            tar.extend(name.as_bytes());
            tar.resize(tar.len().next_multiple_of(BLOCK), 0);
            tar.extend(header("x", b'2', "/root"));
            tar
        };
        let mut one = long(&"a/".repeat(2000));
        one.resize(one.len() + 2 * BLOCK, 0);
        assert!(read_links(one.as_slice()).is_some());
        let mut one = long(&"a/".repeat(2049));
        one.resize(one.len() + 2 * BLOCK, 0);
        assert!(read_links(one.as_slice()).is_none());
        let mut many = Vec::new();
        for n in 0..5000 {
            many.extend(long(&format!("{n}/{}", "a/".repeat(2000))));
        }
        many.resize(many.len() + 2 * BLOCK, 0);
        assert!(read_links(many.as_slice()).is_none());
    }

    #[test]
    fn what_is_cut_off_is_no_end_and_what_tar_writes_is_known() {
        let root = tempfile::tempdir().unwrap();
        let (tmpfs, images) = (root.path().join("tmpfs"), root.path().join("images"));
        fs::create_dir_all(tmpfs.join("d")).unwrap();
        fs::create_dir(&images).unwrap();
        std::os::unix::fs::symlink("/proc/self/fd", tmpfs.join("fd")).unwrap();
        std::os::unix::fs::symlink("../fd", tmpfs.join("d/up")).unwrap();
        fs::write(tmpfs.join("file"), "x").unwrap();
        let archive = images.join("tmpfs-dev-7.tar.gz.img");
        let tar = Command::new("tar")
            .args(["--create", "--gzip", "--no-unquote", "--no-wildcards"])
            .args([
                "--one-file-system",
                "--check-links",
                "--preserve-permissions",
            ])
            .args(["--sparse", "--numeric-owner", "--directory"])
            .arg(&tmpfs)
            .arg(".")
            .output()
            .unwrap();
        assert!(tar.status.success(), "{tar:?}");
        fs::write(&archive, tar.stdout).unwrap();
        let links = |room| TmpfsArchives::of(&images, room).links_of(7);
        let known = links(1 << 20).unwrap();
        let names: Vec<_> = known.iter().map(|it| it.to_str().unwrap()).collect();
        assert_eq!(names, ["d/up", "fd"]);
        for blocks in 1..8 {
            assert_eq!(links(blocks * BLOCK as u64), None);
        }
        // Two mounts, and one archive; another one has what is left.
        let archives = TmpfsArchives::of(&images, 15 << 10);
        assert!(archives.links_of(7).is_some() && archives.links_of(7).is_some());
        fs::copy(&archive, images.join("tmpfs-dev-8.tar.gz.img")).unwrap();
        assert_eq!(archives.links_of(8), None);
    }
}
