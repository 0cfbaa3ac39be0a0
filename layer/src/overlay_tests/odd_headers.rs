//! Headers and ends of archives as few programs write them, and as Go, and so containerd, reads them.

use super::hostile_layers::tar;
use crate::tar_read::{TarEntry, TarReader};

/// Writes over fields of the first header and sums it anew.
fn with_fields(mut tar: Vec<u8>, fields: &[(usize, &[u8])]) -> Vec<u8> {
    for (at, bytes) in fields {
        tar[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    tar[148..156].fill(b' ');
    let sum: u64 = tar[..512].iter().map(|byte| u64::from(*byte)).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar
}

/// `path mode:uid mtime device` of each entry.
fn read(tar: &[u8]) -> Result<Vec<String>, String> {
    let mut reader = TarReader::new(tar);
    let mut entry = TarEntry::default();
    let mut read = Vec::new();
    while reader
        .next_entry(&mut entry)
        .map_err(|error| error.to_string())?
    {
        read.push(format!(
            "{} {:o}:{} {} {:?}",
            String::from_utf8_lossy(&entry.path),
            entry.mode,
            entry.uid,
            entry.mtime.secs,
            entry.device
        ));
    }
    Ok(read)
}

#[test]
fn fields_are_read_as_go_reads_them() {
    let file = || tar().file("x", "").end();
    let gnu: (usize, &[u8]) = (257, b"ustar  \0");
    let prefix = |prefix: &'static [u8]| (345, prefix);
    for (what, tar, said) in [
        (
            "NULs before a number",
            with_fields(file(), &[(100, b"\0\x00755\0\0\0")]),
            "x 755:0 1000000 (0, 0)",
        ),
        (
            "blanks before a number",
            with_fields(file(), &[(108, b"    17 \0")]),
            "x 644:15 1000000 (0, 0)",
        ),
        (
            "no end of a number",
            with_fields(file(), &[(108, b"00000017")]),
            "x 644:15 1000000 (0, 0)",
        ),
        (
            "base 256",
            with_fields(file(), &[(108, b"\x80\0\0\0\0\x01\0\x02")]),
            "x 644:65538 1000000 (0, 0)",
        ),
        (
            "signs in records",
            tar()
                .pax(&[("uid", b"+7"), ("mtime", b"+5.25")])
                .file("x", "")
                .end(),
            "x 644:7 5 (0, 0)",
        ),
        (
            "a prefix in GNU's header",
            with_fields(file(), &[gnu, prefix(b"dir/of/go1.7")]),
            "dir/of/go1.7/x 644:0 1000000 (0, 0)",
        ),
        (
            "times in GNU's header",
            with_fields(file(), &[gnu, prefix(b"00000000007\x0000000000007\0")]),
            "x 644:0 1000000 (0, 0)",
        ),
        (
            "star's prefix ends where its times begin",
            with_fields(
                file(),
                &[
                    prefix(&[b'p'; 131]),
                    (476, b"00000000007 00000000007 "),
                    (508, b"tar\0"),
                ],
            ),
            &format!("{}/x 644:0 1000000 (0, 0)", "p".repeat(131)),
        ),
        (
            "no device numbers before POSIX",
            with_fields(
                tar().raw(b"x", b'3', b"", 0, b"").end(),
                &[(257, &[0; 8]), (329, b"0000001\x000000003\0")],
            ),
            "x 644:0 1000000 (0, 0)",
        ),
        (
            "an empty long name",
            tar().raw(b"long", b'L', b"", 1, b"\0").file("x", "").end(),
            "x 644:0 1000000 (0, 0)",
        ),
        (
            "a global header between a record and its entry",
            tar()
                .pax(&[("path", b"other")])
                .raw(b"global", b'g', b"", 0, b"")
                .file("x", "")
                .end(),
            "x 644:0 1000000 (0, 0)",
        ),
    ] {
        assert_eq!(read(&tar), Ok(vec![said.to_owned()]), "{what}");
    }
}

#[test]
fn archives_end_where_they_end_for_go() {
    let whole = tar().file("a", "1").file("b", "23").end();
    let (padding, blocks) = (512 - 2, 1024);
    let entries = whole.len() - blocks;
    for (what, tar, count) in [
        ("two blocks", whole.clone(), 2),
        ("one block", whole[..entries + 512].to_vec(), 2),
        ("no block", whole[..entries].to_vec(), 2),
        ("in the padding", whole[..entries - 7].to_vec(), 2),
        ("no padding", whole[..entries - padding].to_vec(), 2),
        (
            "behind an extended header",
            [
                &whole[..entries],
                &tar().pax(&[("path", b"c")]).end()[..1024],
            ]
            .concat(),
            2,
        ),
        (
            "what is no tar behind the end",
            [&whole[..], b"other"].concat(),
            2,
        ),
        ("nothing", Vec::new(), 0),
    ] {
        assert_eq!(read(&tar).map(|read| read.len()), Ok(count), "{what}");
    }
    for (what, tar) in [
        ("in the data", &whole[..entries - padding - 1]),
        ("in a header", &whole[..entries - 600]),
        ("in the last block", &whole[..entries + 1000]),
        ("in the first block", &whole[..entries + 100]),
    ] {
        assert!(read(tar).is_err(), "{what}");
    }
}

#[test]
fn what_go_refuses_is_refused() {
    let file = || tar().file("x", "").end();
    let field = |at: usize, bytes: &'static [u8]| with_fields(file(), &[(at, bytes)]);
    let record = |key: &str, value: &'static [u8]| tar().pax(&[(key, value)]).file("x", "").end();
    let star = with_fields(file(), &[(508, b"tar\0"), (476, b"00000000008 ")]);
    for (what, tar) in [
        ("a minor number of a file", field(337, b"00000x0\0")),
        (
            "digits behind the end of a number",
            field(108, b"17 \0\x0017\0"),
        ),
        ("a line feed behind a number", field(100, b"0000644\n")),
        ("star's time", star),
        ("a negative size", field(124, &[0xff; 12])),
        ("a change time", record("ctime", b"now")),
        ("a user name", record("uname", b"a\0b")),
        ("a key", record("a\0b", b"")),
        ("a map without a count", record("GNU.sparse.map", b"0,0")),
        (
            "a sparse directory",
            tar()
                .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")])
                .dir("x/")
                .end(),
        ),
        (
            "a global header without records",
            tar().raw(b"g", b'g', b"", 1, b"x").file("x", "").end(),
        ),
    ] {
        assert!(read(&tar).is_err(), "{what}");
    }
    // Go takes them, and Linux would cut them off to another device.
    for (at, number, is_device) in [
        (329, b"0007777\0", true),
        (329, b"0010000\0", false),
        (337, b"3777777\0", true),
        (337, b"4000000\0", false),
    ] {
        let device = with_fields(file(), &[(156, b"3"), (at, number)]);
        assert_eq!(read(&device).is_ok(), is_device, "{number:?}");
    }
    // Of equal keys the last one is looked at, and only where an entry follows.
    for records in [
        &[("uid", &b"x"[..]), ("uid", b"7")][..],
        &[("uid", b"x"), ("uid", b"")],
    ] {
        assert!(read(&tar().pax(records).file("x", "").end()).is_ok());
    }
    let fault = || tar().pax(&[("uid", b"x")]);
    assert!(read(&fault().pax(&[("uid", b"7")]).file("x", "").end()).is_ok());
    assert!(read(&fault().end()).is_ok());
}

/// Go reads the time of the last access where GNU tar and star have it; containerd sets the later one of both.
#[test]
fn times_of_access_are_those_of_the_format() {
    let star: [(usize, &[u8]); 2] = [(257, b"ustar\x0000"), (508, b"tar\0")];
    let gnu: [(usize, &[u8]); 1] = [(257, b"ustar  \0")];
    let of = |format: &[(usize, &'static [u8])], at, field: &'static [u8]| {
        let fields = [format, &[(at, field)]].concat();
        let tar = with_fields(tar().file("x", "").end(), &fields);
        let mut entry = TarEntry::default();
        assert!(TarReader::new(&tar[..]).next_entry(&mut entry).unwrap());
        entry.atime.map(|time| time.secs)
    };
    assert_eq!(of(&gnu, 345, b"00000000017\0"), Some(15));
    assert_eq!(of(&gnu, 345, b"\0"), None);
    assert_eq!(of(&gnu, 345, b"a/prefix"), None);
    assert_eq!(of(&star, 476, b"00000000017\0"), Some(15));
    assert_eq!(of(&[], 345, b"00000000017\0"), None);
}
