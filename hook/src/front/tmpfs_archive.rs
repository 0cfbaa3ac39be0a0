//! What CRIU lets GNU tar unpack into a tmpfs, as far as it leads elsewhere.
//!
//! ```text
//! tmpfs-dev-<device>.tar.gz.img     gzip: a tar of the whole file system, as `tar --create .` writes it
//! ```
//!
//! tar unpacks as root, and follows a link of the archive that it has just made. So an archive is known only if it is as tar
//! itself writes it ([`super::canonical_tar`]), and has no name at or below a link: all that a dump makes is like that.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use transship_checkpoint::beneath::{Links, open_regular};
use transship_layer::decompress;
use transship_sandbox::admission::MadeLinks;

use super::canonical_tar::read_members;

/// Most links that are remembered, and bytes of their names.
const MOST_LINKS: usize = 100_000;
const MOST_NAMES: usize = 16 << 20;
/// How a file of gzip begins.
const GZIP: &[u8] = &[0x1f, 0x8b];

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
        let mut file = BufReader::new(file);
        // Of what else gzip(1) unpacks nothing is known.
        if !file.fill_buf().ok()?.starts_with(GZIP) {
            return None;
        }
        let mut unpacked = decompress(file).ok()?.take(self.room.get());
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
    read_members(unpacked, &mut |member| {
        let mut name = member.name;
        { name.iter_mut() }.for_each(|byte| *byte = if *byte == b'/' { 0 } else { *byte });
        // None of them is below another, so the last one before it tells of all.
        let before = links.range(..=name.clone()).next_back();
        if before.is_some_and(|link| is_below(&name, link)) {
            return None;
        }
        // Another name of a link is one, too.
        if member.is_link {
            bytes += name.len();
            let after = links.range(name.clone()..).next();
            let hides_links = after.is_some_and(|link| is_below(link, &name));
            if hides_links || bytes > MOST_NAMES || links.len() == MOST_LINKS {
                return None;
            }
            links.insert(name);
        }
        Some(())
    })?;
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

    /// A header of GNU tar.
    fn header(name: &str, kind: u8, link: &str, size: usize) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..265].copy_from_slice(b"ustar  \0");
        block
    }

    fn signed(mut block: Vec<u8>) -> Vec<u8> {
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn member(name: &str, kind: u8, link: &str) -> Vec<u8> {
        signed(header(name, kind, link, 0))
    }

    fn read_tar(blocks: &[Vec<u8>]) -> Option<Vec<PathBuf>> {
        let mut tar = blocks.concat();
        tar.resize(tar.len() + 2 * BLOCK, 0);
        Some(read_links(tar.as_slice())?.into_iter().collect())
    }

    fn read(members: &[(&str, u8, &str)]) -> Option<Vec<PathBuf>> {
        let members = { members.iter() }.map(|(name, kind, link)| member(name, *kind, link));
        read_tar(&members.collect::<Vec<_>>())
    }

    #[test]
    fn links_are_known_only_where_tar_follows_none() {
        let link = |name| (name, b'2', "/root");
        let dir = |name| (name, b'5', "");
        let known = |names: &[&str]| Some(names.iter().map(PathBuf::from).collect());
        assert_eq!(
            read(&[dir("./"), dir("./d/"), link("./d/x")]),
            known(&["d/x"])
        );
        assert_eq!(
            read(&[
                link("./fd"),
                dir("./fd-x/"),
                link("./fd-x/y"),
                dir("./fd.d/")
            ]),
            known(&["fd", "fd-x/y"])
        );
        assert_eq!(read(&[("./x", b'1', "./y")]), known(&["x"]));
        for members in [
            // Through a link, to another name than the one that it has.
            vec![("./d", b'2', "."), link("./d/evil")],
            vec![dir("./e/"), ("./d", b'2', "e"), link("./d/evil")],
            vec![
                ("./d", b'2', "."),
                link("./a"),
                link("./c"),
                dir("./d/evil/"),
            ],
            // In its place.
            vec![link("./d"), dir("./d/")],
            vec![link("./d/x"), link("./d")],
            // Names that tar never writes.
            vec![dir("./d/"), link("./d/../x")],
            vec![link("./d//x")],
            vec![link("./d/./x")],
            vec![link(".")],
            vec![link("x")],
            vec![link("/x")],
            vec![link("./x/")],
            vec![dir("./x")],
        ] {
            assert_eq!(read(&members), None, "{members:?}");
        }
    }

    /// Each of them is another archive to GNU tar 1.34 than to a reader of Go's kind.
    #[test]
    fn what_can_be_read_in_two_ways_is_not_known() {
        let evil = || member("./evil", b'2', "/etc");
        let changed = |kind, size, change: &dyn Fn(&mut Vec<u8>)| {
            let mut block = header("./f", kind, "", size);
            change(&mut block);
            signed(block)
        };
        let put = |at: usize, bytes: &'static [u8]| {
            move |block: &mut Vec<u8>| block[at..at + bytes.len()].copy_from_slice(bytes)
        };
        assert_eq!(read_tar(&[changed(b'0', 512, &|_| {}), evil()]), read(&[]));
        for (what, blocks) in [
            ("a prefix", vec![changed(b'2', 0, &put(345, b"zzz"))]),
            (
                "a file that is a directory",
                vec![changed(b'0', 512, &put(0, b"./f/")), evil()],
            ),
            (
                "a link with data",
                vec![changed(b'2', 512, &|_| {}), evil()],
            ),
            (
                "a size behind NULs",
                vec![changed(b'0', 512, &put(124, b"\0\0")), evil()],
            ),
            (
                "a size of blanks",
                vec![changed(b'0', 512, &put(124, b"       1000 ")), evil()],
            ),
            (
                "another format",
                vec![changed(b'2', 0, &put(257, b"ustar\x0000"))],
            ),
            ("star", vec![changed(b'2', 0, &put(508, b"tar\0"))]),
            ("pax", vec![changed(b'x', 0, &|_| {}), evil()]),
            ("pax for all", vec![changed(b'g', 0, &|_| {}), evil()]),
            ("a volume", vec![changed(b'V', 0, &|_| {}), evil()]),
            ("the rest of one", vec![changed(b'M', 0, &|_| {}), evil()]),
            ("a dump of names", vec![changed(b'D', 0, &|_| {}), evil()]),
            ("contiguous", vec![changed(b'7', 0, &|_| {}), evil()]),
            ("of old", vec![changed(0, 0, &|_| {}), evil()]),
            ("two names", vec![changed(b'2', 0, &put(4, b"\0x"))]),
            ("a wrong sum", vec![header("./f", b'2', "", 0)]),
        ] {
            assert_eq!(read_tar(&blocks), None, "{what}");
        }
        let mut behind = member("./d/", b'5', "");
        behind.resize(4 * BLOCK, 0);
        behind.extend(evil());
        assert_eq!(read_links(behind.as_slice()), None, "behind the end");
    }

    #[test]
    fn sparse_files_have_the_pieces_that_tar_reads() {
        let sparse = |pieces: &[(u64, u64)], size: usize, real: u64| {
            let mut block = header("./f", b'S', "", size);
            for (piece, at) in pieces.iter().zip((386..).step_by(24)) {
                let text = format!("{:011o}\0{:011o}\0", piece.0, piece.1);
                block[at..at + 24].copy_from_slice(text.as_bytes());
            }
            block[483..495].copy_from_slice(format!("{real:011o}\0").as_bytes());
            let mut all = signed(block);
            all.resize(BLOCK + size.next_multiple_of(BLOCK), 0);
            read_tar(&[all])
        };
        assert!(sparse(&[(1024, 512), (4096, 100)], 612, 4196).is_some());
        assert!(sparse(&[(8192, 0)], 0, 8192).is_some());
        assert!(sparse(&[(0, 512), (512, 0)], 512, 512).is_some());
        // tar reads a block for each of them.
        assert!(sparse(&[(0, 1), (512, 1), (1024, 510)], 512, 2048).is_none());
        assert!(sparse(&[(0, 1024)], 512, 1024).is_none());
        assert!(sparse(&[(0, 512)], 512, 100).is_none());
        assert!(sparse(&[(512, 512), (0, 512)], 1024, 1024).is_none());
    }

    /// Whatever is changed in an archive: if it is known, tar makes no other symbolic links of it.
    #[test]
    fn what_is_known_is_what_tar_makes() {
        const CHANGES: &[u8] = b"\0\0\x01\x80\xff /./0127xgLKSVDMN";
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str, data: &[u8]| {
            let mut all = signed(header(name, b'0', "", data.len()));
            all.extend(data);
            all.resize(all.len().next_multiple_of(BLOCK), 0);
            all
        };
        let mut sparse = header("./holes", b'S', "", BLOCK);
        sparse[386..410].copy_from_slice(b"00000001000\x0000000001000\0");
        sparse[483..495].copy_from_slice(b"00000002000\0");
        let mut sparse = signed(sparse);
        sparse.extend(member("./evil", b'2', "x"));
        let mut long = signed(header("././@LongLink", b'L', "", 121));
        long.extend(format!("./{}", "n".repeat(118)).into_bytes());
        long.resize(2 * BLOCK, 0);
        let base = [
            member("./", b'5', ""),
            member("./d/", b'5', ""),
            member("./d/link", b'2', "x"),
            // What a header of another length would show.
            file("./f", &member("./evil", b'2', "x")),
            long,
            member("./short", b'2', "x"),
            sparse,
            file("./last", b"data"),
        ];
        // xorshift64: the same each time.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |most: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % most as u64).unwrap()
        };
        let cases = std::env::var("PROPTEST_CASES")
            .ok()
            .and_then(|it| it.parse().ok());
        let cases: usize = cases.unwrap_or(2000);
        let mut known = 0;
        for case in 0..cases {
            let mut blocks = base.clone();
            for _ in 0..=below(2) {
                let block = &mut blocks[below(base.len())];
                let (at, change) = (below(BLOCK), CHANGES[below(CHANGES.len())]);
                block[at] = change;
                let rest = block.split_off(BLOCK);
                *block = signed(std::mem::take(block));
                block.extend(rest);
            }
            let mut tar = blocks.concat();
            tar.resize(tar.len() + 2 * BLOCK, 0);
            let Some(links) = read_links(tar.as_slice()) else {
                continue;
            };
            known += 1;
            let (archive, out) = (root.path().join("tar"), root.path().join("out"));
            fs::write(&archive, &tar).unwrap();
            fs::create_dir(&out).unwrap();
            let unpack = Command::new("tar")
                .args(["--extract", "--no-unquote", "--no-wildcards", "--file"])
                .arg(&archive)
                .arg("--directory")
                .arg(&out)
                .output();
            // A member that it cannot make ends CRIU, too; what it has made by then is looked at all the same.
            drop(unpack.unwrap());
            let mut dirs = vec![out.clone()];
            while let Some(dir) = dirs.pop() {
                for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                    let path = entry.path();
                    let below = path.strip_prefix(&out).unwrap();
                    let kind = entry.file_type().unwrap();
                    let is_known = !kind.is_symlink() || links.contains(below);
                    assert!(is_known, "{case}: {below:?} and not {links:?}");
                    dirs.extend(kind.is_dir().then(|| path.clone()));
                }
            }
            fs::remove_dir_all(&out).unwrap();
        }
        assert!(known > cases / 10, "{known} of {cases}");
    }

    #[test]
    fn names_are_bounded() {
        let long = |name: &str| {
            let mut data = format!("{name}\0").into_bytes();
            let mut tar = signed(header("././@LongLink", b'L', "", data.len()));
            data.resize(data.len().next_multiple_of(BLOCK), 0);
            tar.extend(data);
            tar.extend(member("./x", b'2', "/root"));
            tar
        };
        let name = |parts: usize| format!("./{}b", "a/".repeat(parts));
        assert!(read_tar(&[long(&name(2000))]).is_some());
        assert!(read_tar(&[long(&name(2048))]).is_none());
        let many = (0..5000).map(|n| long(&format!("./{n}/{}b", "a/".repeat(2000))));
        assert!(read_tar(&many.collect::<Vec<_>>()).is_none());
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
        fs::hard_link(tmpfs.join("file"), tmpfs.join("other")).unwrap();
        let long = "n".repeat(120);
        fs::create_dir(tmpfs.join(&long)).unwrap();
        std::os::unix::fs::symlink(&long, tmpfs.join(&long).join(&long)).unwrap();
        let sparse = fs::File::create(tmpfs.join("sparse")).unwrap();
        for at in (0..40).map(|piece| piece << 20) {
            std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", at).unwrap();
        }
        sparse.set_len(50 << 20).unwrap();
        nix::unistd::mkfifo(&tmpfs.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
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
        let known = links(8 << 20).unwrap();
        let names: Vec<_> = known.iter().map(|it| it.to_str().unwrap()).collect();
        let of_long = format!("{long}/{long}");
        assert_eq!(&names[..3], ["d/up", "fd", of_long.as_str()]);
        // One of the two names of a file is a link to the other.
        assert_eq!(names.len(), 4, "{names:?}");
        let mut whole = Vec::new();
        let file = BufReader::new(fs::File::open(&archive).unwrap());
        decompress(file).unwrap().read_to_end(&mut whole).unwrap();
        let whole = whole.len() as u64;
        assert!(links(whole + 1).is_some());
        for room in (0..=whole).step_by(BLOCK) {
            assert_eq!(links(room), None);
        }
        // Two mounts, and one archive; another one has what is left.
        let archives = TmpfsArchives::of(&images, whole + 1);
        assert!(archives.links_of(7).is_some() && archives.links_of(7).is_some());
        fs::copy(&archive, images.join("tmpfs-dev-8.tar.gz.img")).unwrap();
        assert_eq!(archives.links_of(8), None);
    }
}
