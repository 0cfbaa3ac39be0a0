//! CRIU's options of one container: given at the dump, kept in the manifest, given again at the
//! restore. containerd hands none of them to a restore, whatever the dump was given
//! (`createCheckpointedState` in its shim), and CRIU then loses file locks in silence.
//!
//! They travel as lines of a CRIU configuration file, which runc and crun read from the path in
//! the annotation `org.criu.config` (and which overrides what they send over RPC).

use serde::{Deserialize, Serialize};

/// What becomes of established TCP connections.
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

/// CRIU's options of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriuOptions {
    /// Established TCP connections.
    pub tcp: Tcp,
    /// POSIX and flock locks come along.
    pub file_locks: bool,
    /// Unix sockets whose peer is outside of the container.
    pub ext_unix_sk: bool,
    /// A process whose session leader or terminal is outside of the container.
    pub shell_job: bool,
    /// Open files that have been unlinked, beyond those that CRIU keeps as ghost files.
    pub link_remap: bool,
    /// Largest unlinked file kept inside of the images, in bytes (CRIU's default: 1 MiB).
    pub ghost_limit: Option<u64>,
}

impl Default for CriuOptions {
    fn default() -> Self {
        Self {
            tcp: Tcp::Refuse,
            file_locks: true,
            ext_unix_sk: false,
            shell_job: false,
            link_remap: false,
            ghost_limit: None,
        }
    }
}

impl CriuOptions {
    /// The lines of a CRIU configuration file for a dump.
    #[must_use]
    pub fn dump_lines(&self) -> Vec<String> {
        let mut lines = self.common_lines();
        if self.link_remap {
            lines.push("link-remap".to_owned());
        }
        if let Some(limit) = self.ghost_limit {
            lines.push(format!("ghost-limit {limit}"));
        }
        lines
    }

    /// The lines of a CRIU configuration file for a restore.
    #[must_use]
    pub fn restore_lines(&self) -> Vec<String> {
        self.common_lines()
    }

    /// Those of [`Self::restore_lines`] that are flags of `restore` in runc and crun, too.
    #[must_use]
    pub fn restore_flags(&self) -> Vec<String> {
        let known = ["tcp-established", "file-locks", "ext-unix-sk", "shell-job"];
        self.restore_lines()
            .into_iter()
            .filter(|line| known.contains(&line.as_str()))
            .collect()
    }

    /// The CRIU configuration of a restore that is held: `own` lines first, those of the dump, and
    /// that no task may run before it is let go.
    #[must_use]
    pub fn held_restore_config(&self, own: &str) -> String {
        let own = own.lines().map(ToOwned::to_owned);
        let lines = own
            .chain(self.restore_lines())
            .chain(["leave-stopped".to_owned()]);
        lines.map(|line| line + "\n").collect()
    }

    fn common_lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        match self.tcp {
            Tcp::Refuse => {}
            Tcp::Established => lines.push("tcp-established".to_owned()),
            Tcp::Close => lines.push("tcp-close".to_owned()),
        }
        for (on, name) in [
            (self.file_locks, "file-locks"),
            (self.ext_unix_sk, "ext-unix-sk"),
            (self.shell_job, "shell-job"),
        ] {
            if on {
                lines.push(name.to_owned());
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_kept_unless_switched_off() {
        assert_eq!(CriuOptions::default().restore_lines(), ["file-locks"]);
        let none = CriuOptions {
            file_locks: false,
            ..CriuOptions::default()
        };
        assert!(none.dump_lines().is_empty());
    }

    #[test]
    fn a_held_restore_keeps_what_the_container_has() {
        assert_eq!(
            CriuOptions::default().held_restore_config("# mine\ntcp-established"),
            "# mine\ntcp-established\nfile-locks\nleave-stopped\n"
        );
    }

    #[test]
    fn a_restore_gets_what_the_dump_had() {
        let options = CriuOptions {
            tcp: Tcp::Close,
            ext_unix_sk: true,
            link_remap: true,
            ghost_limit: Some(8 << 20),
            ..CriuOptions::default()
        };
        assert_eq!(
            options.restore_lines(),
            ["tcp-close", "file-locks", "ext-unix-sk"]
        );
        assert_eq!(options.restore_flags(), ["file-locks", "ext-unix-sk"]);
        assert_eq!(
            options.dump_lines(),
            [
                "tcp-close",
                "file-locks",
                "ext-unix-sk",
                "link-remap",
                "ghost-limit 8388608"
            ]
        );
    }
}
