//! The images of a network that CRIU makes: `netns-<n>.img`, and those that it hands to `ip ... restore`.
//!
//! ```text
//! netns-<n>.img                        netns_entry  8 ext_key: who starts CRIU says which network it is
//! ifaddr-, route-, route6-, rule-<n>.img   u32 magic of ip, then repeated: struct nlmsghdr and what it has, padded to 4
//! ```
//!
//! `ip` sends each message to the kernel whatever its type is: one of another type moves interfaces, or makes them.

use std::collections::BTreeSet;
use std::path::Path;

use super::kernel_messages::{HEAD, are_all};
use super::strict::is_ambiguous;
use super::{Image, ImageError, Kind, file_names, list, read_raw, u32_at};

/// Kinds of image, the magic of `ip`, and the only type of message.
const OF_IP: [(&str, u32, u32); 4] = [
    ("ifaddr-", 0x4736_1222, RTM_NEWADDR),
    ("route-", ROUTES, RTM_NEWROUTE),
    ("route6-", ROUTES, RTM_NEWROUTE),
    ("rule-", 0x7170_6986, RTM_NEWRULE),
];
const ROUTES: u32 = 0x4531_1224;
const RTM_NEWADDR: u32 = 20;
const RTM_NEWROUTE: u32 = 24;
const RTM_NEWRULE: u32 = 32;

#[derive(Clone, PartialEq, prost::Message)]
struct NetnsEntry {
    #[prost(bytes = "vec", optional, tag = "8")]
    ext_key: Option<Vec<u8>>,
}

const REPEATED: [u64; 9] = [1, 2, 3, 4, 5, 6, 7, 9, 10];

/// The networks, by their numbers, that CRIU does not make.
///
/// # Errors
/// An image that cannot be read, or says a thing twice.
pub fn external(dir: &Path) -> Result<BTreeSet<u32>, ImageError> {
    let mut found = BTreeSet::new();
    for (number, path) in list(dir, Kind::Netns)? {
        let image = Image::read(&path, Kind::Netns)?;
        let Some(message) = image.entries().next_bytes()? else {
            continue;
        };
        if is_ambiguous(message, &REPEATED) {
            return Err(image.ambiguous());
        }
        let key = image.decode::<NetnsEntry>(message)?.ext_key;
        found.extend(key.filter(|key| !key.is_empty()).map(|_| number));
    }
    Ok(found)
}

/// Checks that what is handed to `ip` is what it has saved.
///
/// # Errors
/// An image that cannot be read, or [`ImageError::Routes`].
pub fn check(dir: &Path) -> Result<(), ImageError> {
    for name in file_names::all(dir)? {
        let mut kinds = OF_IP.iter();
        let Some((_, magic, kind)) = kinds.find(|(prefix, ..)| name.starts_with(prefix)) else {
            continue;
        };
        let path = dir.join(&name);
        let saved = read_raw(&path)?;
        // CRIU hands on nothing of an empty one.
        if !saved.is_empty() && !is_saved(&saved, *magic, *kind) {
            return Err(ImageError::Routes { path });
        }
    }
    Ok(())
}

fn is_saved(saved: &[u8], magic: u32, wanted: u32) -> bool {
    u32_at(saved, 0) == Some(magic) && are_all(&saved[4..], wanted, HEAD, 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, kind: u16) -> Vec<u8> {
        let mut message = length.to_le_bytes().to_vec();
        message.extend(kind.to_le_bytes());
        message.resize(28, 0);
        message
    }

    #[test]
    fn only_what_ip_has_saved_is_handed_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str, messages: &[Vec<u8>]| {
            let mut saved = ROUTES.to_le_bytes().to_vec();
            { messages.iter() }.for_each(|message| saved.extend(message));
            std::fs::write(dir.path().join(name), saved).unwrap();
            check(dir.path()).is_ok()
        };
        let route = message(28, 24);
        assert!(check("route-9.img", &[]));
        assert!(check("route-9.img", &[route.clone(), message(26, 24)]));
        for forged in [
            // RTM_NEWLINK; a deletion; what is not whole.
            message(28, 16),
            message(28, 25),
            message(15, 24),
            message(29, 24),
            message(u32::MAX, 24),
            route[..8].to_vec(),
        ] {
            assert!(!check("route-9.img", &[route.clone(), forged]));
        }
        // The magic of routes is not that of rules.
        assert!(check("route-9.img", &[route]));
        assert!(!check("rule-9.img", &[message(28, 32)]));
        std::fs::write(dir.path().join("rule-9.img"), b"").unwrap();
        super::check(dir.path()).unwrap();
    }
}
