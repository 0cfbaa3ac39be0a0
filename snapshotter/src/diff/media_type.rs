//! Which media types are layers, and how those that we write are compressed.
//!
//! ```text
//! application/vnd.oci.image.layer.v1.tar               [+gzip, +zstd]
//! application/vnd.oci.image.layer.nondistributable.v1.tar   [+gzip, +zstd]   read only
//! application/vnd.docker.image.rootfs.diff.tar         [.gzip, .zstd]
//! application/vnd.docker.image.rootfs.foreign.diff.tar [.gzip, .zstd]        read only
//! ```
//!
//! A layer that is read tells by its first bytes how it is compressed. Any other suffix (`+encrypted`)
//! stands for something that only containerd's own stream processors can undo.

use transship_layer::Compression;

/// A plain layer: what Apply says that it has applied.
pub(super) const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// What containerd's walking differ writes when it is asked for nothing in particular.
const DEFAULT: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

const WRITTEN: [&str; 2] = [PLAIN_LAYER, "application/vnd.docker.image.rootfs.diff.tar"];
const READ: [&str; 2] = [
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// The media type that a Diff has to write, and its compression; `asked` may be empty.
#[must_use]
pub(super) fn written(asked: &str) -> Option<(&str, Compression)> {
    let media_type = if asked.is_empty() { DEFAULT } else { asked };
    Some((media_type, compression(media_type, &WRITTEN)?))
}

/// Whether `media_type` is a layer that can be applied.
#[must_use]
pub(super) fn is_layer(media_type: &str) -> bool {
    compression(media_type, &WRITTEN)
        .or(compression(media_type, &READ))
        .is_some()
}

fn compression(media_type: &str, known: &[&str]) -> Option<Compression> {
    let suffix = known
        .iter()
        .find_map(|base| media_type.strip_prefix(base))?;
    match suffix {
        "" => Some(Compression::None),
        "+gzip" | ".gzip" => Some(Compression::Gzip),
        "+zstd" | ".zstd" => Some(Compression::Zstd),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_known_by_their_names() {
        let oci = "application/vnd.oci.image.layer.v1.tar";
        let docker = "application/vnd.docker.image.rootfs.diff.tar";
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar";
        for (asked, compression, layer) in [
            ("", Some(Compression::Gzip), false),
            (oci, Some(Compression::None), true),
            (&format!("{oci}+gzip"), Some(Compression::Gzip), true),
            (&format!("{oci}+zstd"), Some(Compression::Zstd), true),
            (docker, Some(Compression::None), true),
            (&format!("{docker}.gzip"), Some(Compression::Gzip), true),
            (&format!("{foreign}.gzip"), None, true),
            (&format!("{oci}+gzip+encrypted"), None, false),
            ("application/json", None, false),
        ] {
            assert_eq!(
                written(asked).map(|(_, compression)| compression),
                compression,
                "{asked}"
            );
            assert_eq!(is_layer(asked), layer, "{asked}");
        }
        assert_eq!(written("").unwrap().0, format!("{oci}+gzip"));
    }
}
