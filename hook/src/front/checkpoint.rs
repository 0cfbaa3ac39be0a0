//! `checkpoint`: a dump that somebody else takes (kubelet through the CRI, `ctr`) gets the options
//! that the container's annotations ask for; containerd can carry few of them, and the CRI none.
//!
//! ```text
//!  flags of the caller  <- flags of the annotations    what the annotations name wins
//!  CRIU_CONFIG_FILE = <bundle>/transship-dump.conf     what is no flag of this runtime
//! ```
//!
//! A pod whose annotations name a configuration of CRIU is not dumped: the runtime would hand it to
//! CRIU, which executes as root what it says. The front takes that annotation out of the specs that it
//! creates containers of, so this is for pods that had no annotation of ours.
//!
//! `transship checkpoint` has looked at the annotations itself and names a configuration file of
//! its own: its calls pass as they are.

use std::fs;

use transship_checkpoint::criu_options::{ConfigLine, CriuOptions};
use transship_sandbox::admission::node_config::NodeConfig;

use transship_path_error::During as _;

use super::{FitError, Front, FrontError, Outcome};
use crate::argv::Arguments;

/// In the bundle.
const CONFIG_FILE: &str = "transship-dump.conf";

impl Front<'_> {
    pub(super) fn checkpoint(&self, dump: &Arguments) -> Result<Option<Outcome>, FrontError> {
        let Some(bundle) = self.bundle_of(&dump.id) else {
            return Ok(None);
        };
        let Some(config) = bundle.any_config(&dump.id)? else {
            return Ok(None);
        };
        // The runtime has kept it since the create, and would give it to CRIU.
        if let Some(path) = config.criu_config.filter(|path| !path.is_empty()) {
            return Err(FrontError::from(FitError::ForeignCriuConfig { path }));
        }
        if self.env.criu_config_named || !config.annotations.ours {
            return Ok(None);
        }
        let mut criu = config
            .annotations
            .criu
            .over(CriuOptions::of_kind(config.cri));
        if config.cri {
            NodeConfig::read(&self.env.node_config)?.check_options(&criu)?;
        }
        if dump.switch("leave-running") {
            // CRIU takes its links away again before the caller copies the files: a dump that
            // could never be restored. Without the option CRIU says what stands in the way.
            criu.link_remap = false;
        }
        // The runtime is asked only where its version matters.
        let help = match criu.depend_on_runtime() {
            true => self.env.runtime.checkpoint_help()?,
            false => String::new(),
        };
        let (flags, lines) = criu.dump_arguments(&help);
        let args = dump.clone().with_flags(flags).to_args();
        let args = self.with_globals("checkpoint", args);
        if lines.is_empty() {
            return Ok(Some(Outcome::Exec(args)));
        }
        let path = bundle.path(CONFIG_FILE);
        let path = std::path::absolute(&path).during("find", &path)?;
        fs::write(&path, ConfigLine::to_text(&lines)).during("write", &path)?;
        Ok(Some(Outcome::ExecWithCriuConfig(args, path)))
    }
}
