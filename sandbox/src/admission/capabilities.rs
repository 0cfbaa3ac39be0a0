//! Names of capabilities, in the order of their numbers (`linux/capability.h`, Linux 6.x).

const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities, a bit each.
#[derive(Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Capabilities(pub u64);

pub(super) const DAC_OVERRIDE: Capabilities = Capabilities(1 << 1);
pub(super) const FOWNER: Capabilities = Capabilities(1 << 3);
pub(super) const SETGID: Capabilities = Capabilities(1 << 6);
pub(super) const SETUID: Capabilities = Capabilities(1 << 7);
pub(super) const SETPCAP: Capabilities = Capabilities(1 << 8);
pub(super) const NET_BIND_SERVICE: Capabilities = Capabilities(1 << 10);
pub(super) const NET_ADMIN: Capabilities = Capabilities(1 << 12);
pub(super) const NET_RAW: Capabilities = Capabilities(1 << 13);
pub(super) const IPC_LOCK: Capabilities = Capabilities(1 << 14);
pub(super) const SYS_RAWIO: Capabilities = Capabilities(1 << 17);
pub(super) const SYS_PTRACE: Capabilities = Capabilities(1 << 19);
pub(super) const SYS_ADMIN: Capabilities = Capabilities(1 << 21);
pub(super) const SYS_NICE: Capabilities = Capabilities(1 << 23);
pub(super) const SYS_RESOURCE: Capabilities = Capabilities(1 << 24);
pub(super) const WAKE_ALARM: Capabilities = Capabilities(1 << 35);
pub(super) const BLOCK_SUSPEND: Capabilities = Capabilities(1 << 36);
pub(super) const AUDIT_READ: Capabilities = Capabilities(1 << 37);
pub(super) const BPF: Capabilities = Capabilities(1 << 39);

impl Capabilities {
    /// The one that an OCI spec calls so (`CAP_KILL`); `None` for a name that this program does not
    /// know, which gives nothing then.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let name = name.strip_prefix("CAP_")?;
        let number = NAMES.iter().position(|known| *known == name)?;
        Some(Self(1 << number))
    }

    /// Those that `other` lacks.
    #[must_use]
    pub fn beyond(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Those that both have.
    #[must_use]
    pub fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those that one of the two has.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` are in it.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        other.beyond(self).is_empty()
    }
}

impl std::fmt::Display for Capabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut comma = "";
        for number in (0..64).filter(|number| self.0 >> number & 1 == 1) {
            match NAMES.get(number) {
                Some(name) => write!(f, "{comma}CAP_{name}")?,
                None => write!(f, "{comma}capability {number}")?,
            }
            comma = ", ";
        }
        Ok(())
    }
}

impl std::fmt::Debug for Capabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{{{self}}}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_their_numbers() {
        for (name, set) in [
            ("CAP_SETUID", SETUID),
            ("CAP_SYS_ADMIN", SYS_ADMIN),
            ("CAP_SYS_RESOURCE", SYS_RESOURCE),
            ("CAP_BLOCK_SUSPEND", BLOCK_SUSPEND),
            ("CAP_BPF", BPF),
            ("CAP_NET_RAW", NET_RAW),
        ] {
            assert_eq!(Capabilities::named(name), Some(set));
            assert_eq!(set.to_string(), name);
        }
        assert_eq!(Capabilities::named("CAP_ALL"), None);
        assert_eq!(Capabilities(1 << 63).to_string(), "capability 63");
    }
}
