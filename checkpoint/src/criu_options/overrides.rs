//! Choices about CRIU's options that somebody has made: by annotation or by flag.
//!
//! | name | values |
//! |---|---|
//! | `tcp` | `refuse`, `established`, `close` |
//! | `skip-in-flight`, `file-locks`, `ext-unix-sk`, `shell-job`, `link-remap`, `lazy-pages` | `true`, `false` |
//! | `ghost-limit` | bytes, with `K`, `M` or `G` |
//! | `empty-ns` | `network` |
//! | `manage-cgroups-mode` | `soft`, `full`, `strict`, `ignore` |
//! | `lsm-profile` | `apparmor:NAME`, `selinux:LABEL` |
//! | `lsm-mount-context` | an SELinux context |

use std::fmt;
use std::str::FromStr;

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
pub struct Switch(pub bool);

/// Size of the largest unlinked file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GhostLimit(pub u64);

/// `TYPE:NAME` of a security module's profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LsmProfile(pub String);

/// Choices about the options of one container; `None`: as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CriuOverrides {
    /// See [`CriuOptions::tcp`].
    pub tcp: Option<Tcp>,
    /// See [`CriuOptions::skip_in_flight`].
    pub skip_in_flight: Option<bool>,
    /// See [`CriuOptions::file_locks`].
    pub file_locks: Option<bool>,
    /// See [`CriuOptions::ext_unix_sk`].
    pub ext_unix_sk: Option<bool>,
    /// See [`CriuOptions::shell_job`].
    pub shell_job: Option<bool>,
    /// See [`CriuOptions::link_remap`].
    pub link_remap: Option<bool>,
    /// See [`CriuOptions::ghost_limit`].
    pub ghost_limit: Option<u64>,
    /// See [`CriuOptions::lazy_pages`].
    pub lazy_pages: Option<bool>,
    /// See [`CriuOptions::empty_ns`].
    pub empty_ns: Option<EmptyNamespace>,
    /// See [`CriuOptions::manage_cgroups_mode`].
    pub manage_cgroups_mode: Option<CgroupsMode>,
    /// See [`CriuOptions::lsm_profile`].
    pub lsm_profile: Option<String>,
    /// See [`CriuOptions::lsm_mount_context`].
    pub lsm_mount_context: Option<String>,
}

impl CriuOverrides {
    /// The names under which the choices are made.
    pub const NAMES: [&'static str; 12] = [
        "tcp",
        "skip-in-flight",
        "file-locks",
        "ext-unix-sk",
        "shell-job",
        "link-remap",
        "ghost-limit",
        "empty-ns",
        "manage-cgroups-mode",
        "lsm-profile",
        "lsm-mount-context",
        "lazy-pages",
    ];

    /// Makes the choice `name`.
    ///
    /// # Errors
    /// A value that means nothing, or no such choice.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        let switch = || value.parse::<Switch>().map(|switch| Some(switch.0));
        match name {
            "tcp" => self.tcp = Some(value.parse()?),
            "skip-in-flight" => self.skip_in_flight = switch()?,
            "file-locks" => self.file_locks = switch()?,
            "ext-unix-sk" => self.ext_unix_sk = switch()?,
            "shell-job" => self.shell_job = switch()?,
            "link-remap" => self.link_remap = switch()?,
            "ghost-limit" => self.ghost_limit = Some(value.parse::<GhostLimit>()?.0),
            "empty-ns" => self.empty_ns = Some(value.parse()?),
            "manage-cgroups-mode" => self.manage_cgroups_mode = Some(value.parse()?),
            "lsm-profile" => self.lsm_profile = Some(value.parse::<LsmProfile>()?.0),
            "lsm-mount-context" => self.lsm_mount_context = Some(value.to_owned()),
            "lazy-pages" => self.lazy_pages = switch()?,
            _ => {
                return Err(OptionError {
                    allowed: "one of the options that docs/design.md lists",
                });
            }
        }
        Ok(())
    }

    /// The options with these choices.
    #[must_use]
    pub fn over(&self, options: CriuOptions) -> CriuOptions {
        CriuOptions {
            tcp: self.tcp.unwrap_or(options.tcp),
            skip_in_flight: self.skip_in_flight.unwrap_or(options.skip_in_flight),
            file_locks: self.file_locks.unwrap_or(options.file_locks),
            ext_unix_sk: self.ext_unix_sk.unwrap_or(options.ext_unix_sk),
            shell_job: self.shell_job.unwrap_or(options.shell_job),
            link_remap: self.link_remap.unwrap_or(options.link_remap),
            ghost_limit: self.ghost_limit.or(options.ghost_limit),
            lazy_pages: self.lazy_pages.unwrap_or(options.lazy_pages),
            empty_ns: self.empty_ns.or(options.empty_ns),
            manage_cgroups_mode: self.manage_cgroups_mode.or(options.manage_cgroups_mode),
            lsm_profile: self.lsm_profile.clone().or(options.lsm_profile),
            lsm_mount_context: self.lsm_mount_context.clone().or(options.lsm_mount_context),
        }
    }
}

impl CriuOptions {
    /// Name and value of every choice that makes these options of the default ones and of those
    /// that a checkpoint was taken with.
    #[must_use]
    pub fn choices(&self, taken_with: &Self) -> Vec<(&'static str, String)> {
        let default = Self::default();
        let mut choices = Vec::new();
        if self.tcp != default.tcp || self.tcp != taken_with.tcp {
            choices.push(("tcp", self.tcp.to_string()));
        }
        for (name, switch) in [
            (
                "skip-in-flight",
                (|it| it.skip_in_flight) as fn(&Self) -> bool,
            ),
            ("file-locks", |it| it.file_locks),
            ("ext-unix-sk", |it| it.ext_unix_sk),
            ("shell-job", |it| it.shell_job),
            ("link-remap", |it| it.link_remap),
            ("lazy-pages", |it| it.lazy_pages),
        ] {
            if switch(self) != switch(&default) || switch(self) != switch(taken_with) {
                choices.push((name, switch(self).to_string()));
            }
        }
        let values = [
            (
                "ghost-limit",
                self.ghost_limit.map(|limit| limit.to_string()),
            ),
            ("empty-ns", self.empty_ns.map(|_| "network".to_owned())),
            (
                "manage-cgroups-mode",
                self.manage_cgroups_mode.map(|mode| mode.to_string()),
            ),
            ("lsm-profile", self.lsm_profile.clone()),
            ("lsm-mount-context", self.lsm_mount_context.clone()),
        ];
        choices.extend(
            values
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        choices
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

impl FromStr for LsmProfile {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text.split_once(':') {
            Some(("apparmor" | "selinux", name)) if !name.is_empty() => Ok(Self(text.to_owned())),
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
        let good = [
            "close",
            "true",
            "false",
            "true",
            "true",
            "true",
            "16M",
            "network",
            "strict",
            "selinux:x:y",
            "system_u:object_r:x",
            "true",
        ];
        let mut all = CriuOverrides::default();
        for (name, value) in CriuOverrides::NAMES.into_iter().zip(good) {
            all.set(name, value).unwrap();
            if name != "lsm-mount-context" {
                let error = CriuOverrides::default().set(name, "maybe").unwrap_err();
                assert!(
                    error.to_string().starts_with("it can be "),
                    "{name}: {error}"
                );
            }
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
