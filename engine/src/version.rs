//! Versions as programs print them.

use std::process::Command;

/// Major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

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
    }
}
