//! Versions as programs print them.

use std::process::Command;

/// Major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

/// From here on CRIU before [`TCP_CRIU`] cannot dump TCP sockets (checkpoint-restore/criu#2705).
const TCP_KERNEL: Version = Version(6, 16, 0);
const TCP_CRIU: Version = Version(4, 2, 0);

/// Whether this CRIU cannot dump a TCP socket on this kernel, not even a listening one.
pub(crate) fn cannot_dump_tcp(criu: Version, kernel: Version) -> bool {
    criu < TCP_CRIU && kernel >= TCP_KERNEL
}

impl Version {
    /// The first number with a dot in a text: "runc version 1.1.15+ds1", "Version: 4.2.1", "6.18.0-1".
    pub fn find(text: &str) -> Option<Self> {
        text.split(|c: char| !c.is_ascii_digit() && c != '.')
            .find_map(|word| {
                let mut parts = word.split('.').map(str::parse::<u32>);
                let (major, minor) = (parts.next()?.ok()?, parts.next()?.ok()?);
                let patch = parts.next().and_then(Result::ok).unwrap_or(0);
                Some(Self(major, minor, patch))
            })
    }

    /// That of the kernel.
    pub(crate) fn of_kernel() -> Option<Self> {
        let name = nix::sys::utsname::uname().ok()?;
        Self::find(&name.release().to_string_lossy())
    }

    /// That of the CRIU which the runtimes find; none without one.
    pub fn of_criu() -> Option<Self> {
        let said = Command::new("criu").arg("--version").output().ok()?;
        Self::find(&String::from_utf8_lossy(&said.stdout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_real_programs() {
        for (text, version) in [
            ("runc version 1.1.15+ds1\ncommit: 1.1.15", Version(1, 1, 15)),
            ("Version: 4.2.1", Version(4, 2, 1)),
            ("crun version 1.28\ncommit: 54f16ff", Version(1, 28, 0)),
            ("v2.1.9-rc.1", Version(2, 1, 9)),
            ("1.6.20~ds1", Version(1, 6, 20)),
            ("6.18.0-custom", Version(6, 18, 0)),
        ] {
            assert_eq!(Version::find(text), Some(version), "{text}");
        }
        assert_eq!(Version::find("unknown"), None);
        assert!(Version(1, 10, 0) > Version(1, 9, 9));
        let (old, new) = (Version(4, 1, 1), Version(4, 2, 0));
        assert!(cannot_dump_tcp(old, Version(6, 16, 0)));
        assert!(!cannot_dump_tcp(old, Version(6, 15, 9)));
        assert!(!cannot_dump_tcp(new, Version(7, 0, 0)));
        assert!(Version::of_kernel().is_some());
    }
}
