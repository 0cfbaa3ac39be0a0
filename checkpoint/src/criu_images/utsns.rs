//! `utsns-<n>.img`: host name and NIS domain name. CRIU writes them into whatever UTS namespace
//! the restored tasks are in (`prepare_utsns`), so a container that joins its sandbox's namespace
//! would rename the sandbox (checkpoint-restore/criu#727). The image gets the sandbox's names.

use std::path::Path;

use super::{Image, ImageError, Kind, list, push_entry};

/// What a UTS namespace is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UtsNames {
    /// Host name.
    pub node: String,
    /// NIS domain name; Linux has `(none)` until somebody sets it.
    pub domain: String,
}

/// `utsns_entry` of `images/utsns.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct UtsnsEntry {
    #[prost(string, required, tag = "1")]
    nodename: String,
    #[prost(string, required, tag = "2")]
    domainname: String,
}

/// Writes `names` into the UTS images of `dir`.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn set_names(dir: &Path, names: &UtsNames) -> Result<(), ImageError> {
    for (_, path) in list(dir, Kind::Utsns)? {
        let image = Image::read(&path, Kind::Utsns)?;
        let mut body = Vec::new();
        push_entry(
            &mut body,
            &UtsnsEntry {
                nodename: names.node.clone(),
                domainname: names.domain.clone(),
            },
        );
        image.with_body(body).replace(&path)?;
    }
    Ok(())
}

/// The names in the first UTS image of `dir`; `None` when the dump had no such namespace.
///
/// # Errors
/// An image that cannot be read.
pub fn names(dir: &Path) -> Result<Option<UtsNames>, ImageError> {
    let Some((_, path)) = list(dir, Kind::Utsns)?.into_iter().next() else {
        return Ok(None);
    };
    let image = Image::read(&path, Kind::Utsns)?;
    let entry: Option<UtsnsEntry> = image.entries().next()?;
    Ok(entry.map(|entry| UtsNames {
        node: entry.nodename,
        domain: entry.domainname,
    }))
}
