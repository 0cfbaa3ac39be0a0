//! CRIU's options on the command line, as `dev.transship/*` annotations have them.

use clap::Args;
use transship_checkpoint::criu_options::{
    CgroupsMode, CriuOverrides, EmptyNamespace, GhostLimit, LsmProfile, Switch, Tcp,
};

/// What CRIU is told; it wins over the container's annotations.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "CRIU (each also as an annotation dev.transship/<option>)")]
pub(crate) struct CriuArgs {
    /// Established TCP connections: refuse the dump, keep them (established: the address must come
    /// along), or close them at the restore
    #[arg(long, value_name = "refuse|established|close")]
    tcp: Option<Tcp>,
    /// Leave out TCP connections that have not been accepted yet
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    skip_in_flight: Option<Switch>,
    /// Keep file locks [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    file_locks: Option<Switch>,
    /// Do not keep file locks
    #[arg(long, conflicts_with = "file_locks")]
    no_file_locks: bool,
    /// Dump unix datagram sockets that are connected to a process outside
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ext_unix_sk: Option<Switch>,
    /// Dump a process whose session leader or terminal is outside
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    shell_job: Option<Switch>,
    /// Dump open files that have lost their name but not their last link
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    link_remap: Option<Switch>,
    /// Largest unlinked open file that is kept, such as 16M [default: 1M]
    #[arg(long, value_name = "SIZE")]
    ghost_limit: Option<GhostLimit>,
    /// Let a namespace come back without its contents
    #[arg(long, value_name = "network")]
    empty_ns: Option<EmptyNamespace>,
    /// How much of the cgroups CRIU restores
    #[arg(long, value_name = "soft|full|strict|ignore")]
    manage_cgroups_mode: Option<CgroupsMode>,
    /// Security profile of the restored processes: apparmor:NAME or selinux:LABEL
    #[arg(long, value_name = "TYPE:NAME")]
    lsm_profile: Option<LsmProfile>,
    /// SELinux context of the mounts that CRIU makes
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    /// Start the restored processes before their memory is there; it comes from the checkpoint on
    /// their own node when it is touched (runc)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    lazy_pages: Option<Switch>,
}

impl CriuArgs {
    /// The choices that the flags make.
    pub(crate) fn overrides(&self) -> CriuOverrides {
        let switch = |switch: Option<Switch>| switch.map(|switch| switch.0);
        CriuOverrides {
            tcp: self.tcp,
            skip_in_flight: switch(self.skip_in_flight),
            file_locks: self
                .no_file_locks
                .then_some(false)
                .or(switch(self.file_locks)),
            ext_unix_sk: switch(self.ext_unix_sk),
            shell_job: switch(self.shell_job),
            link_remap: switch(self.link_remap),
            ghost_limit: self.ghost_limit.map(|limit| limit.0),
            lazy_pages: switch(self.lazy_pages),
            empty_ns: self.empty_ns,
            manage_cgroups_mode: self.manage_cgroups_mode,
            lsm_profile: self.lsm_profile.clone().map(|profile| profile.0),
            lsm_mount_context: self.lsm_mount_context.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        criu: CriuArgs,
    }

    fn parse(line: &str) -> Result<CriuOverrides, String> {
        let words = std::iter::once("x").chain(line.split_whitespace());
        let parsed = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        Ok(parsed.criu.overrides())
    }

    #[test]
    fn flags_choose_and_nonsense_is_refused() {
        assert_eq!(parse("").unwrap(), CriuOverrides::default());
        let chosen = parse("--tcp close --no-file-locks --shell-job --link-remap=false").unwrap();
        assert_eq!(chosen.tcp, Some(Tcp::Close));
        assert_eq!(chosen.file_locks, Some(false));
        assert_eq!(
            (chosen.shell_job, chosen.link_remap),
            (Some(true), Some(false))
        );
        for (line, said) in [
            ("--tcp maybe", "\"established\""),
            ("--ghost-limit x", "16M"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }
}
