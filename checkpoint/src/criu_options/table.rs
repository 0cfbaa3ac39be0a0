//! CRIU's options, one row each: the flags of the command line, the annotations and the table in
//! docs/design.md are made of these.

use std::fmt::Write as _;

use super::values::{GhostLimit, LsmProfile, MountContext, OptionError, Switch};
use super::{CriuOptions, EmptyNamespace};

/// When an option means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// When the images are written.
    Dump,
    /// When they are read.
    Restore,
    /// Both; a restore uses what the dump used.
    Both,
}

/// Whom an option may be chosen by, besides the operator of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// The author of a pod, who chooses its annotations.
    Pod,
    /// The same, of these values only.
    PodOf(&'static [&'static str]),
    /// Nobody else: it loosens what confines the container, or leaves its cgroup.
    Nobody,
}

/// One option.
#[derive(Debug)]
#[non_exhaustive]
pub struct CriuOption {
    /// Its name: an annotation `dev.transship/<name>`, and a flag `--<name>`.
    pub name: &'static str,
    /// Its values, as `--help` shows them.
    pub values: &'static str,
    /// What it does, in one sentence without its full stop.
    pub help: &'static str,
    /// The flag that switches it off, where it is on by default.
    pub off_flag: Option<&'static str>,
    /// When it means something.
    pub phase: Phase,
    /// How a dump is told.
    pub dump: &'static str,
    /// How a restore is told.
    pub restore: &'static str,
    /// Who may choose it.
    pub author: Author,
    pub(super) set: fn(&mut CriuOptions, &str) -> Result<(), OptionError>,
    pub(super) get: fn(&CriuOptions) -> Option<String>,
}

/// The values of a switch.
pub const SWITCH: &str = "true|false";
/// Names with commas between them.
pub const SEVERAL: &str = "NAME";

const FLAG: &str = "runtime flag";

/// All options.
pub static OPTIONS: [CriuOption; 13] = [
    CriuOption {
        name: "tcp",
        values: "refuse|established|close",
        help: "Established TCP connections: refuse the dump, keep them (established: the address \
               must come along), or close them at the restore",
        off_flag: None,
        phase: Phase::Both,
        dump: FLAG,
        restore: "runtime flag; `close`: configuration file",
        author: Author::Pod,
        set: |options, value| value.parse().map(|value| options.tcp = value),
        get: |options| Some(options.tcp.to_string()),
    },
    CriuOption {
        name: "skip-in-flight",
        values: SWITCH,
        help: "Leave out TCP connections that have not been accepted yet [default: true in a pod]",
        off_flag: Some("no-skip-in-flight"),
        phase: Phase::Dump,
        dump: "flag of runc 1.3, else file",
        restore: "",
        author: Author::Pod,
        set: |options, value| switch(value, &mut options.skip_in_flight),
        get: |options| Some(options.skip_in_flight.to_string()),
    },
    CriuOption {
        name: "file-locks",
        values: SWITCH,
        help: "Keep file locks [default: true]",
        off_flag: Some("no-file-locks"),
        phase: Phase::Both,
        dump: FLAG,
        restore: FLAG,
        author: Author::Pod,
        set: |options, value| switch(value, &mut options.file_locks),
        get: |options| Some(options.file_locks.to_string()),
    },
    CriuOption {
        name: "ext-unix-sk",
        values: SWITCH,
        help: "Dump unix datagram sockets that are connected to a process outside",
        off_flag: None,
        phase: Phase::Both,
        dump: FLAG,
        restore: FLAG,
        author: Author::Nobody,
        set: |options, value| switch(value, &mut options.ext_unix_sk),
        get: |options| Some(options.ext_unix_sk.to_string()),
    },
    CriuOption {
        name: "shell-job",
        values: SWITCH,
        help: "Dump a process whose session leader or terminal is outside",
        off_flag: None,
        phase: Phase::Both,
        dump: FLAG,
        restore: FLAG,
        author: Author::Nobody,
        set: |options, value| switch(value, &mut options.shell_job),
        get: |options| Some(options.shell_job.to_string()),
    },
    CriuOption {
        name: "link-remap",
        values: SWITCH,
        help: "Dump open files that have lost their name but not their last link",
        off_flag: None,
        phase: Phase::Dump,
        dump: "flag of runc 1.3, else file",
        restore: "",
        author: Author::Pod,
        set: |options, value| switch(value, &mut options.link_remap),
        get: |options| Some(options.link_remap.to_string()),
    },
    CriuOption {
        name: "ghost-limit",
        values: "SIZE",
        help: "Largest unlinked open file that is kept, such as 16M [default: 1M]",
        off_flag: None,
        phase: Phase::Dump,
        dump: "file",
        restore: "",
        author: Author::Pod,
        set: |options, value| {
            let limit: GhostLimit = value.parse()?;
            options.ghost_limit = Some(limit.0);
            Ok(())
        },
        get: |options| options.ghost_limit.map(|limit| limit.to_string()),
    },
    CriuOption {
        name: "empty-ns",
        values: "network",
        help: "Let a namespace come back without its contents",
        off_flag: None,
        phase: Phase::Both,
        dump: "runtime flag, file for crun",
        restore: "runtime flag, and file for crun",
        author: Author::Pod,
        set: |options, value| {
            let namespace: EmptyNamespace = value.parse()?;
            options.empty_ns = Some(namespace);
            Ok(())
        },
        get: |options| options.empty_ns.map(|_| "network".to_owned()),
    },
    CriuOption {
        name: "manage-cgroups-mode",
        values: "soft|full|strict|ignore",
        help: "How much of the cgroups CRIU restores",
        off_flag: None,
        phase: Phase::Both,
        dump: FLAG,
        restore: "runtime flag, and file for crun",
        author: Author::PodOf(&["soft", "ignore"]),
        set: |options, value| {
            options.manage_cgroups_mode = Some(value.parse()?);
            Ok(())
        },
        get: |options| options.manage_cgroups_mode.map(|mode| mode.to_string()),
    },
    CriuOption {
        name: "lsm-profile",
        values: "TYPE:NAME",
        help: "Security profile of the restored processes: apparmor:NAME or selinux:LABEL",
        off_flag: None,
        phase: Phase::Restore,
        dump: "",
        restore: FLAG,
        author: Author::Nobody,
        set: |options, value| {
            let profile: LsmProfile = value.parse()?;
            options.lsm_profile = Some(profile.0);
            Ok(())
        },
        get: |options| options.lsm_profile.clone(),
    },
    CriuOption {
        name: "lsm-mount-context",
        values: "CONTEXT",
        help: "SELinux context of the mounts that CRIU makes",
        off_flag: None,
        phase: Phase::Restore,
        dump: "",
        restore: FLAG,
        author: Author::Nobody,
        set: |options, value| {
            let context: MountContext = value.parse()?;
            options.lsm_mount_context = Some(context.0);
            Ok(())
        },
        get: |options| options.lsm_mount_context.clone(),
    },
    CriuOption {
        name: "lazy-pages",
        values: SWITCH,
        help: "Start the restored processes before their memory is there; it comes from the \
               checkpoint on their own node when it is touched (runc)",
        off_flag: None,
        phase: Phase::Restore,
        dump: "",
        restore: "runtime flag (runc), and `criu lazy-pages`",
        author: Author::Nobody,
        set: |options, value| switch(value, &mut options.lazy_pages),
        get: |options| Some(options.lazy_pages.to_string()),
    },
    CriuOption {
        name: "allow-lost",
        values: SEVERAL,
        help: "Let it lose what CRIU does not restore and nothing else gives back: names of docs/conditions.md with \
               the effect lost or changed, and network (interfaces of its own that CNI has not made); several \
               with commas between them, or by several flags",
        off_flag: None,
        phase: Phase::Dump,
        dump: "not at all",
        restore: "",
        author: Author::Pod,
        set: |options, value| {
            options.allow_lost = value.parse()?;
            Ok(())
        },
        get: |options| (!options.allow_lost.is_empty()).then(|| options.allow_lost.to_string()),
    },
];

fn switch(value: &str, to: &mut bool) -> Result<(), OptionError> {
    let switch: Switch = value.parse()?;
    *to = switch.0;
    Ok(())
}

impl Phase {
    /// Whether an option of this phase means something in `other`.
    #[must_use]
    pub fn meets(self, other: Self) -> bool {
        self == other || self == Self::Both || other == Self::Both
    }
}

impl CriuOption {
    /// The option of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        OPTIONS.iter().find(|option| option.name == name)
    }

    /// Its value in `options` if the author of a pod may not have chosen it: neither the default nor
    /// one that is open to him.
    #[must_use]
    pub fn closed_value(&self, options: &CriuOptions) -> Option<String> {
        let value = (self.get)(options)?;
        let open = match self.author {
            Author::Pod => true,
            Author::PodOf(values) => values.contains(&value.as_str()),
            Author::Nobody => false,
        };
        (!open && Some(&value) != (self.get)(&CriuOptions::default()).as_ref()).then_some(value)
    }
}

/// The table of docs/design.md.
#[must_use]
pub fn documentation() -> String {
    let mut text =
        String::from("| option | values | dump | restore | in a pod |\n|---|---|---|---|---|\n");
    for option in &OPTIONS {
        let values = match option.values {
            "SIZE" => "bytes, `16M`".to_owned(),
            "TYPE:NAME" => "`apparmor:NAME`, `selinux:LABEL`".to_owned(),
            "CONTEXT" => "a context".to_owned(),
            SEVERAL => "names of [conditions](conditions.md)".to_owned(),
            values => values
                .split('|')
                .map(|value| format!("`{value}`"))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let value = |in_pod| (option.get)(&CriuOptions::of_kind(in_pod));
        let on = |in_pod| option.off_flag.is_some() && value(in_pod).as_deref() == Some("true");
        let default = match (on(false), on(true)) {
            (true, true) => " (default: `true`)",
            (false, true) => " (default: `true` in a pod)",
            _ => "",
        };
        let author = match option.author {
            Author::Pod => "yes".to_owned(),
            Author::PodOf(values) => format!("`{}`", values.join("`, `")),
            Author::Nobody => "if node.toml allows it".to_owned(),
        };
        let cell = |text: &str| {
            if text.is_empty() {
                String::new()
            } else {
                format!("{text} ")
            }
        };
        writeln!(
            text,
            "| `{}` | {values}{default} | {}| {}| {author} |",
            option.name,
            cell(option.dump),
            cell(option.restore),
        )
        .expect("a string takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE=1 cargo test -p transship-checkpoint` writes it.
    #[test]
    fn the_documentation_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/design.md");
        let text = std::fs::read_to_string(path).unwrap();
        let begin = text.find("| option | values |").unwrap();
        let end = begin + text[begin..].find("\n\n").unwrap() + 1;
        if std::env::var_os("UPDATE").is_some() {
            let new = format!("{}{}{}", &text[..begin], documentation(), &text[end..]);
            std::fs::write(path, new).unwrap();
            return;
        }
        assert_eq!(text[begin..end], documentation());
    }

    #[test]
    fn what_loosens_is_closed_to_the_authors_of_pods() {
        let closed = |name: &str, value: &str| {
            let option = CriuOption::named(name).unwrap();
            let mut options = CriuOptions::default();
            (option.set)(&mut options, value).unwrap();
            OPTIONS
                .iter()
                .filter_map(|it| it.closed_value(&options))
                .collect::<Vec<_>>()
        };
        for (name, value) in [
            ("lsm-profile", "apparmor:unconfined"),
            ("lsm-mount-context", "system_u:object_r:x:s0"),
            ("manage-cgroups-mode", "full"),
            ("manage-cgroups-mode", "strict"),
            ("shell-job", "true"),
            ("ext-unix-sk", "true"),
            ("lazy-pages", "true"),
        ] {
            assert_eq!(closed(name, value), [value], "{name}");
        }
        for (name, value) in [
            ("manage-cgroups-mode", "soft"),
            ("manage-cgroups-mode", "ignore"),
            ("shell-job", "false"),
            ("tcp", "close"),
            ("file-locks", "false"),
            ("ghost-limit", "16M"),
        ] {
            assert!(closed(name, value).is_empty(), "{name}");
        }
    }
}
