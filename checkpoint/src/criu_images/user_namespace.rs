//! `userns-<n>.img`: the id mappings of a user namespace.

use std::path::Path;

use super::strict::is_ambiguous;
use super::{Image, ImageError, Kind, list};

#[derive(Clone, PartialEq, prost::Message)]
struct UsernsEntry {
    #[prost(message, repeated, tag = "1")]
    uid_map: Vec<UidGidExtent>,
    #[prost(message, repeated, tag = "2")]
    gid_map: Vec<UidGidExtent>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct UidGidExtent {
    #[prost(uint32, required, tag = "1")]
    first: u32,
    #[prost(uint32, required, tag = "2")]
    lower_first: u32,
    #[prost(uint32, required, tag = "3")]
    count: u32,
}

/// First id inside, first id outside, and how many.
pub type IdRange = (u32, u32, u32);

/// Mappings of users and of groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMappings {
    /// Users.
    pub uids: Vec<IdRange>,
    /// Groups.
    pub gids: Vec<IdRange>,
}

/// The mappings of every user namespace of the dump.
///
/// # Errors
/// An image that cannot be read.
pub fn mappings(dir: &Path) -> Result<Vec<IdMappings>, ImageError> {
    let mut all = Vec::new();
    for (_, path) in list(dir, Kind::UserNamespace)? {
        let image = Image::read(&path, Kind::UserNamespace)?;
        let mut entries = image.entries();
        let message = entries.next_bytes()?.ok_or_else(|| entries.cut_off())?;
        if is_ambiguous(message, &[1, 2]) {
            return Err(image.ambiguous());
        }
        let entry: UsernsEntry = image.decode(message)?;
        let ranges = |map: &[UidGidExtent]| {
            map.iter()
                .map(|it| (it.first, it.lower_first, it.count))
                .collect()
        };
        all.push(IdMappings {
            uids: ranges(&entry.uid_map),
            gids: ranges(&entry.gid_map),
        });
    }
    Ok(all)
}
