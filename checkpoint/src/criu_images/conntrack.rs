//! `netns-ct-<n>.img`, `netns-exp-<n>.img`: connections that are tracked, and those that are expected.
//!
//! ```text
//! repeated, without a head of CRIU's:
//!   u32 length, u16 type, u16 flags, u32 sequence, u32 port      struct nlmsghdr
//!   length - 16 bytes
//! ```
//!
//! CRIU sends each message to the netfilter of the network that a container comes into, also when that is
//! its sandbox's, and looks at neither its length nor its type. So all of them are looked at here: another
//! type of message makes rules, a length below that of the head is one that CRIU reads beyond its memory for.

use std::path::Path;

use super::kernel_messages::{HEAD, are_all};
use super::{ImageError, Kind, list, read_raw};

/// `struct nfgenmsg`, with which each message of netfilter begins.
const NETFILTER_HEAD: usize = 4;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW`.
const NEW_CONNECTION: u16 = 1 << 8;
/// `NFNL_SUBSYS_CTNETLINK_EXP << 8 | IPCTNL_MSG_EXP_NEW`.
const NEW_EXPECTATION: u16 = 2 << 8;

/// Checks that there is nothing else in these images.
///
/// # Errors
/// An image that cannot be read, or [`ImageError::Conntrack`].
pub fn check(dir: &Path) -> Result<(), ImageError> {
    for (kind, wanted) in [
        (Kind::Conntrack, NEW_CONNECTION),
        (Kind::Expectations, NEW_EXPECTATION),
    ] {
        for (_, path) in list(dir, kind)? {
            if !are_messages(&read_raw(&path)?, wanted) {
                return Err(ImageError::Conntrack { path });
            }
        }
    }
    Ok(())
}

fn are_messages(body: &[u8], wanted: u16) -> bool {
    are_all(body, wanted.into(), HEAD + NETFILTER_HEAD, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, kind: u16) -> Vec<u8> {
        let mut message = length.to_le_bytes().to_vec();
        message.extend(kind.to_le_bytes());
        message.resize(24, 0);
        message
    }

    #[test]
    fn only_tracked_connections_are_messages() {
        let whole = message(24, NEW_CONNECTION);
        assert!(are_messages(&[], NEW_CONNECTION));
        assert!(are_messages(
            &[whole.clone(), whole.clone()].concat(),
            NEW_CONNECTION
        ));
        for forged in [
            // NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE; a deletion.
            message(24, 10 << 8),
            message(24, NEW_CONNECTION | 2),
            message(0, NEW_CONNECTION),
            message(15, NEW_CONNECTION),
            message(25, NEW_CONNECTION),
            message(u32::MAX, NEW_CONNECTION),
            whole[..12].to_vec(),
        ] {
            assert!(!are_messages(&forged, NEW_CONNECTION), "{forged:?}");
            assert!(!are_messages(
                &[whole.clone(), forged].concat(),
                NEW_CONNECTION
            ));
        }
    }
}
