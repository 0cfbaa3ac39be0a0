//! Single layers that no generator makes, all of which containerd takes.

use std::io::Write as _;

use anyhow::{Context as _, ensure};

use super::{Blob, Differs};
use crate::differ::PLAIN;

/// A file, `path`, with records before it.
fn file(path: &str, records: &[(&str, &[u8])]) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_pax_extensions(records.iter().copied())?;
    let mut header = tar::Header::new_ustar();
    header.set_size(4);
    header.set_mode(0o644);
    tar.append_data(&mut header, path, &b"data"[..])?;
    Ok(tar.into_inner()?)
}

const CAPABILITY: &str = "SCHILY.xattr.security.capability";

/// `struct vfs_cap_data` of a revision, with `CAP_NET_BIND_SERVICE`, effective; `root` is the user whose root has them.
fn capability(revision: u8, root: &[u8]) -> Vec<u8> {
    let magic = [1, 0, 0, revision];
    let permitted = [0, 0x04, 0, 0];
    [&magic[..], &permitted, &[0; 12], root].concat()
}

fn root_alone() -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    header.set_mode(0o700);
    header.set_uid(1000);
    tar.append_data(&mut header, "./", std::io::empty())?;
    Ok(tar.into_inner()?)
}

fn blob(suffix: &str, bytes: Vec<u8>) -> Blob {
    Blob {
        media_type: format!("{PLAIN}{suffix}"),
        bytes,
        tar: Vec::new(),
    }
}

/// The flags that RFC 1952 keeps back are set, which Go does not look at.
fn gzip_with_reserved_flags(tar: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(tar)?;
    let mut bytes = encoder.finish()?;
    *bytes.get_mut(3).context("it has no flags")? |= 0xe0;
    Ok(bytes)
}

pub(super) fn compare(differs: &mut Differs<'_>, _: usize) -> anyhow::Result<()> {
    let plain = file("plain", &[])?;
    let long_attribute = format!("SCHILY.xattr.user.{}", "x".repeat(250));
    let layers = [
        (
            "the first second of all",
            blob("", file("a", &[("mtime", b"-9223372036854775808.5")])?),
        ),
        (
            "a record of a checkpoint that says nothing in an image",
            blob("", file("a", &[("TRANSSHIP.content", b"none")])?),
        ),
        (
            "a name of aufs' in a directory that has no entry",
            blob("", file("made/.wh..wh.old", &[])?),
        ),
        (
            "ten digits behind the point",
            blob("", file("a", &[("mtime", b"1.0123456789")])?),
        ),
        (
            "a name as long as one may be",
            blob("", file(&"n".repeat(255), &[])?),
        ),
        (
            "a path nearly as long as one may be",
            blob("", file(&vec!["d".repeat(249); 15].join("/"), &[])?),
        ),
        (
            "an attribute whose name is as long as one may be",
            blob("", file("a", &[(long_attribute.as_str(), b"1")])?),
        ),
        (
            "an attribute of nobody",
            blob("", file("a", &[("SCHILY.xattr.nobody.a", b"1")])?),
        ),
        (
            "capabilities for all users",
            blob("", file("a", &[(CAPABILITY, &capability(2, &[]))])?),
        ),
        (
            "capabilities for the users of a root",
            blob(
                "",
                file(
                    "a",
                    &[(CAPABILITY, &capability(3, &1000_u32.to_le_bytes()))],
                )?,
            ),
        ),
        ("the root alone", blob("", root_alone()?)),
        ("nothing", blob("", vec![0; 1024])),
        (
            "flags of gzip that mean nothing",
            blob("+gzip", gzip_with_reserved_flags(&plain)?),
        ),
    ];
    differs.api.renew_lease(differs.what)?;
    let mut failed = String::new();
    for (what, layer) in layers {
        match differs.compare_blobs(&[layer]) {
            Ok(true) => {}
            Ok(false) => failed += &format!("{what}: containerd does not take it\n"),
            Err(error) => failed += &format!("{what}: {error:#}\n"),
        }
    }
    ensure!(failed.is_empty(), "{failed}");
    Ok(())
}
