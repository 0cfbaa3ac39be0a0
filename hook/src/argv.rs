//! The command line of an OCI runtime, as far as the front has to understand it.
//!
//! ```text
//! runc [GLOBAL]... COMMAND [FLAG | ID]...
//! FLAG = -x | --x | -x V | --x V | -x=V | --x=V        one dash or two, as Go's flag package has it
//! ```
//!
//! Sources: `runc --help` of 1.1.5, 1.1.15, 1.3.6; crun 1.21 to 1.28; the calls of go-runc 1.0 and
//! 1.1. Whatever is not understood here is [`Command::Other`]: the runtime gets it as it came, and
//! says what it thinks of it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use transship_checkpoint::criu_options::RuntimeFlag;
use transship_sandbox::RELEASE_COMMAND;

/// Globals that take a value in the next argument.
const GLOBAL_VALUES: &[&str] = &[
    "root",
    "log",
    "log-format",
    "log-level",
    "criu",
    "rootless",
    "cgroup-manager",
];
/// Globals that stand alone.
const GLOBAL_SWITCHES: &[&str] = &["debug", "systemd-cgroup"];
/// Flags of `create`, `run`, `restore` and `checkpoint` that take a value in the next argument.
const COMMAND_VALUES: &[&str] = &[
    "b",
    "bundle",
    "config",
    "console-socket",
    "empty-ns",
    "image-path",
    "lsm-mount-context",
    "lsm-profile",
    "manage-cgroups-mode",
    "page-server",
    "parent-path",
    "pid-file",
    "pidfd-socket",
    "preserve-fds",
    "status-fd",
    "work-path",
];
/// The same of crun's `create` and `run`: `--config` in short. Of `delete` it is a switch.
const CONFIG_VALUE: &str = "f";

/// One call of the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// All arguments as they came, without the program's name.
    pub args: Vec<OsString>,
    /// Those before the command.
    pub globals: Globals,
    /// The command.
    pub command: Command,
}

/// The globals.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Globals {
    /// As they came.
    pub args: Vec<OsString>,
    /// `--root`: directory of the states of containers.
    pub root: Option<PathBuf>,
    /// `--log`.
    pub log: Option<PathBuf>,
    /// `--log-format json`.
    pub json: bool,
    /// `--systemd-cgroup`: systemd makes the cgroups.
    pub systemd_cgroup: bool,
}

/// What the runtime is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Makes a container that does not run yet.
    Create(Arguments),
    /// Makes and starts one, in one go.
    Run(Arguments),
    /// Restores one from an image directory.
    Restore(Arguments),
    /// Dumps one.
    Checkpoint(Arguments),
    /// Starts a made one.
    Start {
        /// The container.
        id: String,
    },
    /// Deletes one.
    Delete {
        /// The container.
        id: String,
        /// Whether it may be running.
        force: bool,
    },
    /// Sends a signal to one.
    Kill {
        /// The container.
        id: String,
        /// The signal's name or number.
        signal: String,
    },
    /// [`RELEASE_COMMAND`]: lets a started one go that awaits its migration.
    Release {
        /// The container.
        id: String,
    },
    /// Something that the front leaves alone.
    Other,
}

/// Flags and id of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// The container.
    pub id: String,
    flags: Vec<Flag>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Flag {
    name: String,
    value: Option<OsString>,
    /// The value is an argument of its own, as which the runtime has to know the flag.
    is_apart: bool,
}

impl Flag {
    fn new(name: &str, value: Option<OsString>) -> Self {
        Self {
            name: name.to_owned(),
            is_apart: value.is_some() && COMMAND_VALUES.contains(&name),
            value,
        }
    }
}

impl Arguments {
    /// The last value of a flag.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&OsStr> {
        self.flags
            .iter()
            .rev()
            .find(|flag| flag.name == name)
            .and_then(|flag| flag.value.as_deref())
    }

    /// Whether a switch is on.
    #[must_use]
    pub fn switch(&self, name: &str) -> bool {
        let flag = self.flags.iter().rev().find(|flag| flag.name == name);
        flag.is_some_and(|flag| flag.value.as_deref() != Some(OsStr::new("false")))
    }

    /// `--bundle`, by both of its names.
    #[must_use]
    pub fn bundle(&self) -> Option<PathBuf> {
        self.value("bundle")
            .or_else(|| self.value("b"))
            .map(PathBuf::from)
    }

    /// The file that has the spec, where it is not the bundle's.
    #[must_use]
    pub fn config(&self) -> Option<PathBuf> {
        self.value("config")
            .or_else(|| self.value(CONFIG_VALUE))
            .map(PathBuf::from)
    }

    /// The arguments with another value for a flag.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.flags.retain(|flag| flag.name != name);
        self.flags.push(Flag::new(name, Some(value.into())));
        self
    }

    /// The arguments, with the values of these flags replaced.
    #[must_use]
    pub fn with_flags(mut self, flags: Vec<RuntimeFlag>) -> Self {
        for (name, value) in flags {
            self.flags.retain(|flag| flag.name != name);
            self.flags.push(Flag::new(name, value.map(OsString::from)));
        }
        self
    }

    /// The arguments without some flags.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.flags
            .retain(|flag| !names.contains(&flag.name.as_str()));
        self
    }

    /// The arguments of `restore` that do what these of `create` say. `--no-new-keyring` and
    /// `--preserve-fds` have no meaning for a restored process: its keyring and files come from
    /// the images.
    #[must_use]
    pub fn to_restore(&self, images: &Path, work: &Path) -> Self {
        let switch = |name: &str| Flag::new(name, None);
        let mut flags = vec![switch("detach"), switch("no-subreaper")];
        let kept = ["pid-file", "console-socket", "no-pivot", "bundle", "b"];
        let kept = self
            .flags
            .iter()
            .filter(|flag| kept.contains(&flag.name.as_str()));
        flags.extend(kept.cloned());
        let restore = Self {
            id: self.id.clone(),
            flags,
        };
        restore.with("image-path", images).with("work-path", work)
    }

    /// As arguments of the runtime.
    #[must_use]
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        for flag in &self.flags {
            let dashes = if flag.name.len() == 1 { "-" } else { "--" };
            let mut arg = OsString::from(format!("{dashes}{}", flag.name));
            match &flag.value {
                Some(value) if flag.is_apart => {
                    args.push(arg);
                    args.push(value.clone());
                }
                Some(value) => {
                    arg.push("=");
                    arg.push(value);
                    args.push(arg);
                }
                None => args.push(arg),
            }
        }
        if self.id.starts_with('-') {
            // runc takes such an id; without this it would be a flag.
            args.push("--".into());
        }
        args.push(OsString::from(&self.id));
        args
    }
}

impl Invocation {
    /// Reads the arguments, without the program's name.
    #[must_use]
    pub fn read(args: Vec<OsString>) -> Self {
        let mut globals = Globals::default();
        let mut rest = args.as_slice();
        let command = loop {
            let Some((first, after)) = rest.split_first() else {
                break Command::Other;
            };
            let Some(flag) = split_flag(first) else {
                break read_command(first, after);
            };
            let (name, mut value) = flag;
            rest = after;
            if GLOBAL_VALUES.contains(&name) && value.is_none() {
                let Some((next, after)) = rest.split_first() else {
                    break Command::Other;
                };
                value = Some(next.clone());
                rest = after;
            } else if !GLOBAL_VALUES.contains(&name) && !GLOBAL_SWITCHES.contains(&name) {
                break Command::Other;
            }
            match (name, value) {
                ("root", Some(value)) => globals.root = Some(value.into()),
                ("log", Some(value)) => globals.log = Some(value.into()),
                ("log-format", Some(value)) => globals.json = value == "json",
                ("systemd-cgroup", value) => {
                    globals.systemd_cgroup = value.is_none_or(|value| value != "false");
                }
                _ => {}
            }
            globals.args = args[..args.len() - rest.len()].to_vec();
        };
        Self {
            args,
            globals,
            command,
        }
    }
}

fn read_command(command: &OsStr, args: &[OsString]) -> Command {
    if command == "kill" {
        return read_kill(args).unwrap_or(Command::Other);
    }
    let has_config = command == "create" || command == "run";
    let takes_value = |name: &str| match name == CONFIG_VALUE {
        true => has_config,
        false => COMMAND_VALUES.contains(&name),
    };
    let Some(arguments) = read_arguments(args, takes_value) else {
        return Command::Other;
    };
    let force = arguments.switch("force") || arguments.switch("f");
    match command.to_str() {
        Some("create") => Command::Create(arguments),
        Some("run") => Command::Run(arguments),
        Some("restore") => Command::Restore(arguments),
        Some("checkpoint") => Command::Checkpoint(arguments),
        Some("start") => Command::Start { id: arguments.id },
        Some(RELEASE_COMMAND) => Command::Release { id: arguments.id },
        Some("delete") => Command::Delete {
            id: arguments.id,
            force,
        },
        _ => Command::Other,
    }
}

/// `kill [--all] ID [SIGNAL]`
fn read_kill(args: &[OsString]) -> Option<Command> {
    let mut words = args.iter().filter(|arg| split_flag(arg).is_none());
    let id = words.next()?.to_str()?.to_owned();
    let signal = words
        .next()
        .map_or(Some("TERM"), |signal| signal.to_str())?;
    Some(Command::Kill {
        id,
        signal: signal.to_owned(),
    })
}

/// `None` without an id, or with more than one: then it is not for the front to judge.
fn read_arguments(args: &[OsString], takes_value: impl Fn(&str) -> bool) -> Option<Arguments> {
    let mut flags = Vec::new();
    let mut ids = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            ids.extend(args.by_ref());
        } else if let Some((name, value)) = split_flag(arg) {
            let (value, is_apart) = match value {
                None if takes_value(name) => (Some(args.next()?.clone()), true),
                value => (value, false),
            };
            flags.push(Flag {
                name: name.to_owned(),
                value,
                is_apart,
            });
        } else {
            ids.push(arg);
        }
    }
    let [id] = ids.as_slice() else { return None };
    Some(Arguments {
        id: id.to_str()?.to_owned(),
        flags,
    })
}

/// Name and value of a flag; `None` for what is no flag, or not in UTF-8.
fn split_flag(arg: &OsStr) -> Option<(&str, Option<OsString>)> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = arg.as_bytes();
    let name = bytes
        .strip_prefix(b"--")
        .or_else(|| bytes.strip_prefix(b"-"))?;
    if name.is_empty() || name.starts_with(b"-") {
        return None;
    }
    let end = name
        .iter()
        .position(|byte| *byte == b'=')
        .unwrap_or(name.len());
    let value = name
        .get(end + 1..)
        .map(|value| OsString::from_vec(value.to_vec()));
    Some((std::str::from_utf8(&name[..end]).ok()?, value))
}

#[cfg(test)]
mod tests;
