//! The values that options can have, as people write them.

use std::fmt;
use std::str::FromStr;

use super::{CgroupsMode, EmptyNamespace, Tcp};

/// A value that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it can be {allowed}")]
pub struct OptionError {
    /// What it can be.
    pub allowed: &'static str,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Switch(pub(super) bool);

/// Size of the largest unlinked file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GhostLimit(pub(super) u64);

/// `TYPE:NAME` of a security module's profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LsmProfile(pub(super) String);

/// An SELinux context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountContext(pub(super) String);

impl FromStr for Switch {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text {
            "true" => Ok(Self(true)),
            "false" => Ok(Self(false)),
            _ => Err(OptionError {
                allowed: "\"true\" or \"false\"",
            }),
        }
    }
}

impl FromStr for Tcp {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "established" => Ok(Self::Established),
            "close" => Ok(Self::Close),
            _ => Err(OptionError {
                allowed: "\"refuse\", \"established\" or \"close\"",
            }),
        }
    }
}

impl fmt::Display for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refuse => "refuse",
            Self::Established => "established",
            Self::Close => "close",
        })
    }
}

impl FromStr for CgroupsMode {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text {
            "soft" => Ok(Self::Soft),
            "full" => Ok(Self::Full),
            "strict" => Ok(Self::Strict),
            "ignore" => Ok(Self::Ignore),
            _ => Err(OptionError {
                allowed: "\"soft\", \"full\", \"strict\" or \"ignore\"",
            }),
        }
    }
}

impl fmt::Display for CgroupsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Full => "full",
            Self::Strict => "strict",
            Self::Ignore => "ignore",
        })
    }
}

impl FromStr for EmptyNamespace {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text {
            "network" => Ok(Self::Network),
            _ => Err(OptionError {
                allowed: "\"network\"",
            }),
        }
    }
}

impl FromStr for GhostLimit {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
            Some(digits) if text.ends_with('K') => (digits, 10),
            Some(digits) if text.ends_with('M') => (digits, 20),
            Some(digits) => (digits, 30),
            None => (text, 0),
        };
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        let number = digits.parse::<u64>().ok().filter(|_| plain);
        // CRIU keeps it in 32 bits.
        let bytes = number
            .and_then(|number| number.checked_mul(1 << shift))
            .filter(|bytes| u32::try_from(*bytes).is_ok());
        bytes.map(Self).ok_or(OptionError {
            allowed: "a number of bytes below 4G, such as \"16M\"",
        })
    }
}

impl FromStr for MountContext {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match is_one_word(text) {
            true => Ok(Self(text.to_owned())),
            false => Err(OptionError {
                allowed: "an SELinux context without blanks",
            }),
        }
    }
}

fn is_one_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

impl FromStr for LsmProfile {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text.split_once(':') {
            Some(("apparmor" | "selinux", name)) if is_one_word(name) => Ok(Self(text.to_owned())),
            _ => Err(OptionError {
                allowed: "\"apparmor:NAME\" or \"selinux:LABEL\"",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_with_a_suffix() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4095", Some(4095)),
            ("3K", Some(3072)),
            ("1G", Some(1 << 30)),
            ("4G", None),
            ("-1", None),
            ("+1", None),
            ("M", None),
            ("1.5M", None),
            ("", None),
        ] {
            let parsed = text.parse::<GhostLimit>().ok().map(|limit| limit.0);
            assert_eq!(parsed, bytes, "{text:?}");
        }
    }
}
