//! Choices about CRIU's options that somebody has made: by annotation or by flag. Their names and
//! values are those of the [table](super::table).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::table::{CriuOption, OPTIONS};
use super::{CgroupsMode, CriuOptions, EmptyNamespace, Tcp};

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

/// Choices about the options of one container; what is not chosen is as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CriuOverrides(BTreeMap<&'static str, String>);

impl CriuOverrides {
    /// The names under which the choices are made.
    pub fn names() -> impl Iterator<Item = &'static str> {
        OPTIONS.iter().map(|option| option.name)
    }

    /// Makes the choice `name`.
    ///
    /// # Errors
    /// A value that means nothing, or no such choice.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        let option = CriuOption::named(name).ok_or(OptionError {
            allowed: "one of the options that docs/design.md lists",
        })?;
        (option.set)(&mut CriuOptions::default(), value)?;
        self.0.insert(option.name, value.to_owned());
        Ok(())
    }

    /// The choices that were made: names and values.
    pub fn chosen(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// The options with these choices.
    #[must_use]
    pub fn over(&self, mut options: CriuOptions) -> CriuOptions {
        for (name, value) in &self.0 {
            let option = CriuOption::named(name).expect("it was found by set");
            (option.set)(&mut options, value).expect("it was tried by set");
        }
        options
    }
}

impl CriuOptions {
    /// The (name, value) pairs that differ from the defaults or from the options of a dump; setting
    /// them makes these options again.
    #[must_use]
    pub fn choices(&self, taken_with: &Self) -> Vec<(&'static str, String)> {
        let default = Self::default();
        let chosen = |option: &CriuOption| {
            let get = option.get;
            let value = get(self)?;
            let is_other = |than: &Self| get(than).as_ref() != Some(&value);
            (is_other(&default) || is_other(taken_with)).then_some((option.name, value))
        };
        OPTIONS.iter().filter_map(chosen).collect()
    }
}

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
    fn every_name_can_be_set_and_none_takes_nonsense() {
        let mut all = CriuOverrides::default();
        for option in &OPTIONS {
            let good = match option.values {
                "SIZE" => "16M",
                "TYPE:NAME" => "selinux:x:y",
                "CONTEXT" => "system_u:object_r:x",
                "NAME" => "exec",
                // The other one.
                values if (option.get)(&CriuOptions::default()).as_deref() == Some("true") => {
                    values.rsplit('|').next().unwrap()
                }
                values => values.split('|').next().unwrap(),
            };
            all.set(option.name, good).unwrap();
            let error = all.set(option.name, "may be").unwrap_err().to_string();
            assert!(error.starts_with("it can be "), "{}: {error}", option.name);
        }
        let options = all.over(CriuOptions::default());
        assert_eq!(options.ghost_limit, Some(16 << 20));
        assert!(!options.file_locks && options.skip_in_flight && options.shell_job);
        assert!(options.lazy_pages);
        assert_eq!(options.lsm_profile.as_deref(), Some("selinux:x:y"));
        assert_eq!(CriuOverrides::default().over(options.clone()), options);
        assert!(all.set("tpc", "close").is_err());
    }

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

    #[test]
    fn choices_make_the_options_again() {
        let taken_with = CriuOptions {
            tcp: Tcp::Close,
            ..CriuOptions::default()
        };
        let now = CriuOptions {
            file_locks: false,
            ghost_limit: Some(7),
            manage_cgroups_mode: Some(CgroupsMode::Full),
            ..CriuOptions::default()
        };
        let mut chosen = CriuOverrides::default();
        for (name, value) in now.choices(&taken_with) {
            chosen.set(name, &value).unwrap();
        }
        assert_eq!(chosen.over(taken_with.clone()), now);
        assert!(
            CriuOptions::default()
                .choices(&CriuOptions::default())
                .is_empty()
        );
    }
}
