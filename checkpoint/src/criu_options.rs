//! CRIU's options of one container: given at the dump, kept in the manifest, given again at the
//! restore. containerd hands none of them to a restore, whatever the dump was given
//! (`createCheckpointedState` in its shim), and CRIU then loses file locks in silence.
//!
//! ```text
//!  default <- annotations of the container <- flags of `transship checkpoint`   at the dump
//!      `--> manifest <- annotations of the new container                        at the restore
//! ```
//!
//! They travel as flags of the OCI runtime where it has them (runc 1.1.5 to 1.5.1, crun 1.21 to
//! 1.28), else as lines of a CRIU configuration file. At a restore runc and crun read that from the
//! path in the annotation `org.criu.config`, and it overrides what they send over RPC; at a dump
//! the environment names it, and what they send over RPC overrides it.

mod config_line;
mod losses;
mod overrides;
mod table;
mod values;

use serde::{Deserialize, Serialize};

pub use config_line::{ConfigLine, ConfigLineError};
pub use losses::{Losses, NETWORK};
pub use overrides::CriuOverrides;
pub use table::{Author, CriuOption, OPTIONS, Phase, SEVERAL, SWITCH, documentation};
pub use values::OptionError;

/// How a dump treats established TCP connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tcp {
    /// A container with an established connection is not dumped.
    #[default]
    Refuse,
    /// Kept, with sequence numbers: the address must come along.
    Established,
    /// Closed on restore: the process sees a reset.
    Close,
}

/// How much of the cgroups of a container CRIU restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CgroupsMode {
    /// Properties of those cgroups that it makes (the runtime's default).
    Soft,
    /// All properties.
    Full,
    /// All properties, and none of the cgroups may exist.
    Strict,
    /// Nothing.
    Ignore,
}

/// A namespace that comes back without its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmptyNamespace {
    /// The only one that the runtimes know.
    Network,
}

/// A flag of an OCI runtime, without its dashes, and its value if it takes one.
pub type RuntimeFlag = (&'static str, Option<String>);

/// CRIU's options of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriuOptions {
    /// Established TCP connections.
    pub tcp: Tcp,
    /// Connections that nobody has accepted yet are left out; their other end sees a reset.
    #[serde(skip_serializing_if = "is_off")]
    pub skip_in_flight: bool,
    /// POSIX and flock locks come along.
    pub file_locks: bool,
    /// Unix sockets whose peer is outside of the container.
    pub ext_unix_sk: bool,
    /// A process whose session leader or terminal is outside of the container.
    pub shell_job: bool,
    /// Open files that have lost their name but not their last link.
    pub link_remap: bool,
    /// Largest unlinked file kept inside of the images, in bytes (CRIU's default: 1 MiB).
    pub ghost_limit: Option<u64>,
    /// Memory comes when it is touched: from the images, which lie where the restore is.
    #[serde(skip_serializing_if = "is_off")]
    pub lazy_pages: bool,
    /// A namespace that comes back without its contents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub empty_ns: Option<EmptyNamespace>,
    /// How much of the cgroups is restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manage_cgroups_mode: Option<CgroupsMode>,
    /// What it may lose.
    #[serde(skip_serializing_if = "Losses::is_empty")]
    pub allow_lost: Losses,
    /// The profile that the restored processes get, as `TYPE:NAME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lsm_profile: Option<String>,
    /// The SELinux context of the mounts that CRIU makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lsm_mount_context: Option<String>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_off(switch: &bool) -> bool {
    !switch
}

impl Default for CriuOptions {
    fn default() -> Self {
        Self {
            tcp: Tcp::Refuse,
            skip_in_flight: false,
            file_locks: true,
            ext_unix_sk: false,
            shell_job: false,
            link_remap: false,
            ghost_limit: None,
            lazy_pages: false,
            empty_ns: None,
            manage_cgroups_mode: None,
            allow_lost: Losses::default(),
            lsm_profile: None,
            lsm_mount_context: None,
        }
    }
}

impl CriuOptions {
    /// The options of a container that nobody has chosen any for. While a pod is frozen kubelet's probes
    /// knock at it: to its peer a connection that nobody has accepted is one more try.
    #[must_use]
    pub fn of_kind(in_pod: bool) -> Self {
        Self {
            skip_in_flight: in_pod,
            ..Self::default()
        }
    }

    /// Whether the dump needs options that containerd's `Tasks.Checkpoint` cannot carry: then the
    /// OCI runtime has to be called past it. (`cgroups_mode` is in its message, and no shim
    /// forwards it.)
    #[must_use]
    pub fn exceed_containerd(&self) -> bool {
        self.skip_in_flight
            || self.link_remap
            || self.ghost_limit.is_some()
            || self.manage_cgroups_mode.is_some()
    }

    /// Whether [`Self::dump_arguments`] are other ones with another runtime.
    #[must_use]
    pub fn depend_on_runtime(&self) -> bool {
        self.exceed_containerd() || self.empty_ns.is_some()
    }

    /// The flags of `checkpoint` in every runc and crun.
    #[must_use]
    pub fn dump_flags(&self) -> Vec<RuntimeFlag> {
        let mut flags = self.common_flags();
        if self.tcp == Tcp::Close {
            // Connections that are closed at the restore must be dumped all the same.
            flags.push(("tcp-established", None));
        }
        flags
    }

    /// What else the dump needs: the flag of runc 1.3.0 and later, which then overrides the line,
    /// and the line of a CRIU configuration file for all others.
    fn dump_extras(&self) -> Vec<(Option<&'static str>, ConfigLine)> {
        let mut extras = Vec::new();
        if self.skip_in_flight {
            let line = ConfigLine::switch("skip-in-flight");
            extras.push((Some("tcp-skip-in-flight"), line));
        }
        if self.link_remap {
            extras.push((Some("link-remap"), ConfigLine::switch("link-remap")));
        }
        if let Some(limit) = self.ghost_limit {
            let line = ConfigLine::with("ghost-limit", &limit.to_string());
            extras.push((None, line.expect("digits")));
        }
        extras
    }

    /// What a dump by a runtime gets whose `checkpoint --help` says `help`: flags, and lines of the
    /// CRIU configuration file that the environment names.
    #[must_use]
    pub fn dump_arguments(&self, help: &str) -> (Vec<RuntimeFlag>, Vec<ConfigLine>) {
        let mut flags = self.dump_flags();
        let mut lines = Vec::new();
        if self.manage_cgroups_mode == Some(CgroupsMode::Ignore) && !help.contains("ignore") {
            // runc before 1.2.0: what it dumps of them is left alone by the restore.
            flags.retain(|(name, _)| *name != "manage-cgroups-mode");
        }
        if self.empty_ns.is_some() {
            match help.contains("--empty-ns ") {
                true => flags.push(("empty-ns", Some("network".to_owned()))),
                false => lines.push(empty_network()),
            }
        }
        for (flag, line) in self.dump_extras() {
            match flag.filter(|flag| help.contains(&format!("--{flag} "))) {
                Some(flag) => flags.push((flag, None)),
                None => lines.push(line),
            }
        }
        (flags, lines)
    }

    /// The flags of `restore`. crun has no `empty-ns`; see [`Self::restore_lines`].
    #[must_use]
    pub fn restore_flags(&self) -> Vec<RuntimeFlag> {
        let mut flags = self.common_flags();
        if self.empty_ns.is_some() {
            flags.push(("empty-ns", Some("network".to_owned())));
        }
        if self.lazy_pages {
            flags.push(("lazy-pages", None));
        }
        for (name, value) in [
            ("lsm-profile", &self.lsm_profile),
            ("lsm-mount-context", &self.lsm_mount_context),
        ] {
            if let Some(value) = value {
                flags.push((name, Some(value.clone())));
            }
        }
        flags
    }

    /// What a restore needs that is no flag of every runtime, as lines of a CRIU configuration
    /// file.
    #[must_use]
    pub fn restore_lines(&self) -> Vec<ConfigLine> {
        let mut lines = Vec::new();
        if self.tcp == Tcp::Close {
            lines.push(ConfigLine::switch("tcp-close"));
        }
        if self.empty_ns.is_some() {
            lines.push(empty_network());
        }
        if let Some(mode) = self.manage_cgroups_mode {
            // crun 1.28 has the flag, and CRIU does not hear of it. The value is an optional one, so
            // it needs the equals sign.
            let line = ConfigLine::with_optional("manage-cgroups", &mode.to_string());
            lines.push(line.expect("a word"));
        }
        lines
    }

    /// The CRIU configuration of a restore: `own` lines first, then those of the options.
    #[must_use]
    pub fn restore_config(&self, own: &str) -> String {
        let own = own.lines().map(|line| format!("{line}\n"));
        own.collect::<String>() + &ConfigLine::to_text(&self.restore_lines())
    }

    fn common_flags(&self) -> Vec<RuntimeFlag> {
        let switches = [
            (self.tcp == Tcp::Established, "tcp-established"),
            (self.file_locks, "file-locks"),
            (self.ext_unix_sk, "ext-unix-sk"),
            (self.shell_job, "shell-job"),
        ];
        let on = switches.into_iter().filter(|(on, _)| *on);
        let mut flags: Vec<RuntimeFlag> = on.map(|(_, name)| (name, None)).collect();
        if let Some(mode) = self.manage_cgroups_mode {
            flags.push(("manage-cgroups-mode", Some(mode.to_string())));
        }
        flags
    }
}

fn empty_network() -> ConfigLine {
    ConfigLine::with("empty-ns", "net").expect("a word")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_kept_unless_switched_off() {
        let locks = [("file-locks", None)];
        assert_eq!(CriuOptions::default().restore_flags(), locks);
        assert_eq!(CriuOptions::default().dump_flags(), locks);
        let none = CriuOptions {
            file_locks: false,
            ..CriuOptions::default()
        };
        assert!(none.dump_flags().is_empty() && none.restore_flags().is_empty());
        assert!(!none.exceed_containerd());
    }

    #[test]
    fn a_restore_keeps_what_the_container_has() {
        let options = CriuOptions {
            tcp: Tcp::Close,
            ..CriuOptions::default()
        };
        assert_eq!(
            options.restore_config("# mine\nno-file-locks"),
            "# mine\nno-file-locks\ntcp-close\n"
        );
        assert_eq!(options.restore_config(""), "tcp-close\n");
    }

    #[test]
    fn a_restore_gets_what_the_dump_had() {
        let options = CriuOptions {
            tcp: Tcp::Close,
            skip_in_flight: true,
            ext_unix_sk: true,
            link_remap: true,
            ghost_limit: Some(8 << 20),
            empty_ns: Some(EmptyNamespace::Network),
            manage_cgroups_mode: Some(CgroupsMode::Ignore),
            lsm_profile: Some("apparmor:web".into()),
            ..CriuOptions::default()
        };
        let common = [
            ("file-locks", None),
            ("ext-unix-sk", None),
            ("manage-cgroups-mode", Some("ignore".to_owned())),
        ];
        let mut restore = common.to_vec();
        restore.push(("empty-ns", Some("network".to_owned())));
        restore.push(("lsm-profile", Some("apparmor:web".to_owned())));
        assert_eq!(options.restore_flags(), restore);
        assert_eq!(
            ConfigLine::to_text(&options.restore_lines()),
            "tcp-close\nempty-ns net\nmanage-cgroups=ignore\n"
        );
        let mut dump = common.to_vec();
        dump.push(("tcp-established", None));
        assert_eq!(options.dump_flags(), dump);
        let extras: Vec<_> = options.dump_extras().into_iter().map(|it| it.1).collect();
        assert_eq!(
            ConfigLine::to_text(&extras),
            "skip-in-flight\nlink-remap\nghost-limit 8388608\n"
        );
    }

    #[test]
    fn a_runtime_gets_the_flags_that_it_has() {
        let options = CriuOptions {
            skip_in_flight: true,
            ghost_limit: Some(4096),
            manage_cgroups_mode: Some(CgroupsMode::Ignore),
            ..CriuOptions::default()
        };
        let locks = ("file-locks", None);
        assert_eq!(
            options.dump_arguments("   --tcp-skip-in-flight   skip; cgroups: 'soft', 'ignore'"),
            (
                vec![
                    locks.clone(),
                    ("manage-cgroups-mode", Some("ignore".to_owned())),
                    ("tcp-skip-in-flight", None)
                ],
                vec![ConfigLine::with("ghost-limit", "4096").unwrap()]
            )
        );
        assert_eq!(
            options.dump_arguments("   --tcp-established"),
            (
                vec![locks],
                vec![
                    ConfigLine::switch("skip-in-flight"),
                    ConfigLine::with("ghost-limit", "4096").unwrap()
                ]
            )
        );
    }

    #[test]
    fn what_was_written_before_these_options_is_read() {
        let old = r#"{"tcp":"close","file_locks":true,"ext_unix_sk":false,"shell_job":false,
                      "link_remap":false,"ghost_limit":null}"#;
        let options: CriuOptions = serde_json::from_str(old).unwrap();
        assert_eq!(options.tcp, Tcp::Close);
        let written = serde_json::to_string(&options).unwrap();
        assert!(
            !written.contains("lsm") && !written.contains("skip"),
            "{written}"
        );
    }
}
