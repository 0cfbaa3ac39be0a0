//! Messages to the kernel, netlink(7), that CRIU or `ip` hands on as they are in an image.
//!
//! ```text
//! nlmsghdr  u32 length, of this and what follows  u16 type  u16 flags  u32 seq  u32 pid; native byte order
//! ```

use super::u32_at;

/// `struct nlmsghdr`.
pub(super) const HEAD: usize = 16;

/// Whether there are only whole messages of this type, each of `least` bytes and padded to `padding`.
pub(super) fn are_all(mut messages: &[u8], wanted: u32, least: usize, padding: usize) -> bool {
    while !messages.is_empty() {
        let length = u32_at(messages, 0).and_then(|length| usize::try_from(length).ok());
        let kind = u32_at(messages, 4).map(|word| word & 0xffff);
        let padded = length.and_then(|length| length.checked_next_multiple_of(padding));
        let (Some(length), Some(padded)) = (length, padded) else {
            return false;
        };
        if kind != Some(wanted) || length < least || padded > messages.len() {
            return false;
        }
        messages = &messages[padded..];
    }
    true
}
