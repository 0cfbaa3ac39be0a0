//! Which devices the processes of a container may open. The kernel asks the cgroup's rules when a file is opened, and of
//! nobody who has it: what CRIU opens outside of that cgroup (crun starts it where it is itself) is judged by this.
//!
//! ```text
//! linux.resources.devices   [{"allow": false, "access": "rwm"},
//!                            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}, ...]
//!                           in order, the last one that fits counts; what is not named is any
//! after them                the devices that runc and crun give to every container
//! ```

use serde_json::Value;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};
use transship_checkpoint::spec::Spec;

/// Character devices of every container: null, zero, full, random, urandom, tty, console, ptmx, all of devpts, and tun
/// (crun, and runc before 1.2.0; containerd 1.6).
pub(crate) const OF_EVERYBODY: [(i64, Option<i64>); 10] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (10, Some(200)),
    (136, None),
];
const RULES: &str = "/linux/resources/devices";

/// The rules of a container.
#[derive(Debug, Clone)]
pub struct DeviceRules(Vec<Rule>);

#[derive(Debug, Clone)]
struct Rule {
    allows: bool,
    /// `c` or `b`; none for both.
    kind: Option<char>,
    major: Option<i64>,
    minor: Option<i64>,
    access: String,
}

impl Rule {
    fn of(rule: &Value) -> Self {
        // -1 is any for the runtimes.
        let number = |field: &str| rule[field].as_i64().filter(|number| *number >= 0);
        let kind = rule["type"].as_str().and_then(|kind| kind.chars().next());
        Self {
            allows: rule["allow"] == true,
            kind: kind.filter(|kind| *kind != 'a'),
            major: number("major"),
            minor: number("minor"),
            access: rule["access"].as_str().unwrap_or_default().to_owned(),
        }
    }

    fn fits(&self, kind: char, (major, minor): (i64, i64), access: char) -> bool {
        self.access.contains(access)
            && self.kind.is_none_or(|own| own == kind)
            && self.major.is_none_or(|own| own == major)
            && self.minor.is_none_or(|own| own == minor)
    }
}

impl DeviceRules {
    /// Those of a spec, and what the runtimes add.
    #[must_use]
    pub fn of(spec: &Spec) -> Self {
        let rules = spec.get(RULES).and_then(Value::as_array);
        let of_everybody = OF_EVERYBODY.iter().map(|(major, minor)| Rule {
            allows: true,
            kind: Some('c'),
            major: Some(*major),
            minor: *minor,
            access: "rwm".to_owned(),
        });
        let rules = rules.into_iter().flatten().map(Rule::of);
        Self(rules.chain(of_everybody).collect())
    }

    /// Whether they let a file be opened like this. What is no device they say nothing of, nor of what is not opened
    /// (`O_PATH`).
    #[must_use]
    pub fn allow(&self, file: &Metadata, flags: OFlag) -> bool {
        let kind = match file.file_type() {
            kind if kind.is_char_device() => 'c',
            kind if kind.is_block_device() => 'b',
            _ => return true,
        };
        if flags.contains(OFlag::O_PATH) {
            return true;
        }
        let device = (major(file.rdev()), minor(file.rdev()));
        let device = (device.0.cast_signed(), device.1.cast_signed());
        let accesses = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => "r",
            OFlag::O_WRONLY => "w",
            _ => "rw",
        };
        accesses.chars().all(|access| {
            let mut rules = self.0.iter().rev();
            rules
                .find(|rule| rule.fits(kind, device, access))
                .is_some_and(|rule| rule.allows)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rule_that_fits_counts() {
        let rules = |json: &str| {
            let spec = format!(r#"{{"linux":{{"resources":{{"devices":{json}}}}}}}"#);
            DeviceRules::of(&Spec::parse(spec.as_bytes()).unwrap())
        };
        let allows = |rules: &DeviceRules, kind, device, accesses: &str| {
            accesses.chars().all(|access| {
                let mut rules = rules.0.iter().rev();
                let rule = rules.find(|rule| rule.fits(kind, device, access));
                rule.is_some_and(|rule| rule.allows)
            })
        };
        let closed = r#"{"allow":false,"access":"rwm"}"#;
        let fuse = r#"{"allow":true,"type":"c","major":10,"minor":229,"access":"r"}"#;
        let usual = rules(&format!("[{closed},{fuse}]"));
        for (device, accesses, allowed) in [
            ((1, 3), "rw", true),
            ((136, 7), "rw", true),
            ((10, 229), "r", true),
            ((10, 229), "rw", false),
            ((10, 237), "r", false),
            ((1, 1), "r", false),
        ] {
            assert_eq!(
                allows(&usual, 'c', device, accesses),
                allowed,
                "{device:?} {accesses}"
            );
        }
        assert!(!allows(&usual, 'b', (7, 0), "r") && !allows(&rules("[]"), 'b', (1, 3), "r"));
        let any = r#"{"allow":true,"type":"a","major":-1,"access":"rwm"}"#;
        assert!(allows(
            &rules(&format!("[{closed},{any}]")),
            'b',
            (7, 0),
            "rw"
        ));
        assert!(!allows(
            &rules(&format!("[{any},{closed}]")),
            'b',
            (7, 0),
            "r"
        ));
        let disks = r#"{"allow":true,"type":"b","major":8,"access":"rw"}"#;
        let disks = rules(&format!("[{closed},{disks}]"));
        assert!(allows(&disks, 'b', (8, 5), "rw") && !allows(&disks, 'c', (8, 5), "r"));
        // A file, and a device that is one of everybody.
        let null = std::fs::metadata("/dev/null").unwrap();
        let file = std::fs::metadata("/proc/self/exe").unwrap();
        assert!(usual.allow(&null, OFlag::O_RDWR) && usual.allow(&file, OFlag::O_RDWR));
    }
}
