//! Names in images, of which CRIU sees what is before the first NUL.
//!
//! Rust compares the whole of a string, and CRIU is a program in C: `/x/..` with a NUL at its end is plain to the one
//! and a way out of the directory to the other. The kernel gives no name with a NUL in it, so none is admitted, in any
//! of the images with names that CRIU reads of a container:
//!
//! ```text
//! files.img        reg 6  isk 17  tunf 2  ify 5: wd 7: fh 4  ffy 6: mark 7: ie 2: fh 4, 8: me 2  usk 14  bpf 13
//!                  sockets: opts 15    usk 11 has NULs at its end, and anywhere when it is abstract
//! cgroup.img       sets 2: ctls 1, 2    controllers 1, 2: dirs 1, 3: properties 1, 2
//! mountpoints-<n>  6 root  7 mountpoint  8 source  9 options  14 fsname  18 ext_key
//! netns-<n>        8 ext_key  netdev-<n>: 5 name   both: sysctls 3
//! core-, fdinfo-, pidns-, utsns-, inventory, memfd: labels, names and keys
//! ```

use std::path::Path;

use super::strict::fields;
use super::{Image, ImageError, Kind, list};

/// Where the names of a message are.
struct Message {
    /// Fields that are names.
    names: &'static [u64],
    /// Fields that are messages.
    parts: &'static [(u64, &'static Message)],
    /// A field that is the name of a unix socket.
    socket: Option<u64>,
}

const fn message(names: &'static [u64], parts: &'static [(u64, &'static Message)]) -> Message {
    Message {
        names,
        parts,
        socket: None,
    }
}

static SOCKET_OPTIONS: Message = message(&[15], &[]);
static HANDLE: Message = message(&[4], &[]);
static UNIX: Message = Message {
    names: &[14],
    parts: &[(10, &SOCKET_OPTIONS)],
    socket: Some(11),
};
static WATCH: Message = message(&[], &[(7, &HANDLE)]);
static MARK: Message = message(
    &[],
    &[
        (7, &message(&[], &[(2, &HANDLE)])),
        (8, &message(&[2], &[])),
    ],
);
static FILE: Message = message(
    &[],
    &[
        (3, &message(&[6], &[])),
        (4, &message(&[17], &[(14, &SOCKET_OPTIONS)])),
        (6, &message(&[], &[(7, &SOCKET_OPTIONS)])),
        (7, &message(&[], &[(12, &SOCKET_OPTIONS)])),
        (11, &message(&[2], &[])),
        (13, &message(&[], &[(5, &WATCH)])),
        (14, &message(&[], &[(6, &MARK)])),
        (16, &UNIX),
        (21, &message(&[13], &[])),
    ],
);
static CGROUP_DIR: Message = message(&[1], &[(2, &CGROUP_DIR), (3, &message(&[1, 2], &[]))]);
static CGROUPS: Message = message(
    &[],
    &[
        (1, &message(&[], &[(2, &message(&[1, 2], &[]))])),
        (2, &message(&[1], &[(2, &CGROUP_DIR)])),
    ],
);
static MOUNT: Message = message(&[6, 7, 8, 9, 14, 18], &[]);
static SYSCTL: Message = message(&[3], &[]);
static NETDEV: Message = message(&[5], &[(9, &SYSCTL), (10, &SYSCTL)]);
static NETNS: Message = message(
    &[8],
    &[
        (3, &SYSCTL),
        (4, &SYSCTL),
        (5, &SYSCTL),
        (6, &SYSCTL),
        (9, &SYSCTL),
        (10, &SYSCTL),
    ],
);
static CORE: Message = message(
    &[],
    &[
        (3, &message(&[6], &[])),
        (5, &message(&[13], &[(10, &message(&[15, 16], &[]))])),
    ],
);
static INVENTORY: Message = message(&[13], &[(12, &message(&[12], &[]))]);

/// The images that have names.
static IMAGES: [(Kind, &Message); 11] = [
    (Kind::Files, &FILE),
    (Kind::Cgroup, &CGROUPS),
    (Kind::Mounts, &MOUNT),
    (Kind::Netns, &NETNS),
    (Kind::Netdev, &NETDEV),
    (Kind::Core, &CORE),
    (Kind::Fdinfo, &message(&[5], &[])),
    (Kind::Pidns, &message(&[1], &[])),
    (Kind::Utsns, &message(&[1, 2], &[])),
    (Kind::Inventory, &INVENTORY),
    (Kind::Memfd, &message(&[1], &[])),
];

/// Deeper than prost decodes.
const MOST_LEVELS: usize = 100;

/// Checks that no name in the images of `dir` has a NUL in it.
///
/// # Errors
/// An image that cannot be read, or [`ImageError::Nul`].
pub fn check(dir: &Path) -> Result<(), ImageError> {
    for (kind, message) in &IMAGES {
        let paths = match kind.is_numbered() {
            true => list(dir, *kind)?
                .into_iter()
                .map(|(_, path)| path)
                .collect(),
            false => vec![dir.join(kind.file_name())],
        };
        for path in paths {
            if path.symlink_metadata().is_err() {
                continue;
            }
            let image = Image::read(&path, *kind)?;
            let mut entries = image.entries();
            while let Some(entry) = entries.next_bytes()? {
                match has_nul(entry, message, MOST_LEVELS) {
                    Some(false) => {}
                    Some(true) => return Err(ImageError::Nul { path }),
                    None => return Err(image.ambiguous()),
                }
            }
        }
    }
    Ok(())
}

/// `None` when it is no message.
fn has_nul(entry: &[u8], message: &Message, levels: usize) -> Option<bool> {
    let levels = levels.checked_sub(1)?;
    for field in fields(entry)? {
        let value = entry.get(field.value)?;
        let is_cut = match message.socket == Some(field.number) {
            true => is_cut(value),
            false => message.names.contains(&field.number) && value.contains(&0),
        };
        if is_cut {
            return Some(true);
        }
        let mut parts = message.parts.iter();
        if let Some((_, part)) = parts.find(|(number, _)| *number == field.number)
            && has_nul(value, part, levels)?
        {
            return Some(true);
        }
    }
    Some(false)
}

/// Whether the name of a unix socket is one that ends before its end.
fn is_cut(name: &[u8]) -> bool {
    let end = name.iter().position(|byte| *byte == 0);
    end.is_some_and(|end| end != 0 && name[end..].iter().any(|byte| *byte != 0))
}

#[cfg(test)]
mod tests {
    use super::super::{push_bytes, strict};
    use super::*;

    fn wrapped(numbers: &[u64], name: &[u8]) -> Vec<u8> {
        numbers.iter().rev().fold(name.to_vec(), |inner, number| {
            strict::edit_submessage(&[], *number, |_| inner)
        })
    }

    fn check_entry(kind: Kind, entry: &[u8]) -> Result<(), ImageError> {
        let dir = tempfile::tempdir().unwrap();
        let name = match kind.is_numbered() {
            true => format!("{}7.img", kind.prefix()),
            false => kind.file_name(),
        };
        let path = dir.path().join(name);
        let mut body = Vec::new();
        push_bytes(&mut body, entry);
        Image::new(&path, kind, body).replace(&path).unwrap();
        check(dir.path())
    }

    #[test]
    fn no_name_ends_before_its_end() {
        for (kind, numbers) in [
            (Kind::Files, &[3, 6][..]),
            (Kind::Files, &[4, 14, 15]),
            (Kind::Files, &[13, 5, 7, 4]),
            (Kind::Files, &[14, 6, 8, 2]),
            (Kind::Files, &[16, 14]),
            (Kind::Cgroup, &[1, 2, 2]),
            (Kind::Cgroup, &[2, 2, 2, 2, 1]),
            (Kind::Cgroup, &[2, 2, 3, 2]),
            (Kind::Mounts, &[18]),
            (Kind::Netns, &[8]),
            (Kind::Netdev, &[5]),
            (Kind::Core, &[5, 10, 15]),
        ] {
            check_entry(kind, &wrapped(numbers, b"/x/y")).unwrap();
            for name in [&b"/x/..\0"[..], b"\0", b"/x\0y"] {
                let found = check_entry(kind, &wrapped(numbers, name));
                let is_nul = matches!(found, Err(ImageError::Nul { .. }));
                assert!(is_nul, "{kind:?} {numbers:?} {name:?}: {found:?}");
            }
        }
        for (name, is_refused) in [
            (&b"/run/s"[..], false),
            (b"/run/s\0", false),
            (b"/run/s\0\0", false),
            (b"\0abstract\0x", false),
            (b"", false),
            (b"/run/s\0x", true),
            (b"/run/s\0x\0", true),
        ] {
            let found = check_entry(Kind::Files, &wrapped(&[16, 11], name));
            assert_eq!(found.is_err(), is_refused, "{name:?}: {found:?}");
        }
        let mut nested = vec![2; 1];
        nested.extend([2; 200]);
        assert!(check_entry(Kind::Cgroup, &wrapped(&nested, b"")).is_err());
    }
}
