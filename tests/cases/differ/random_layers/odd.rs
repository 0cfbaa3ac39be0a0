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
