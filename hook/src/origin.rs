//! Whether a checkpoint is what a node restores that asks for signatures (`signed-by` in node.toml).
//!
//! ```text
//!  known (origins: of this node, or signed and compared before) ──> restored
//!  not known ──> `transship check-signature NAME`: signature, digest of every file ──> known, or refused
//! ```

use std::path::Path;
use std::process::{Command, Stdio};

use transship_checkpoint::store::Checkpoint;
use transship_sandbox::SandboxError;
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::origins::{is_known, manifest_of};

/// A checkpoint of which this node does not know who has made it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OriginError {
    /// No key of this node has signed it.
    #[error("{reason}")]
    NotSigned {
        /// What the check has said.
        reason: String,
    },
    /// The record of it.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// Checks that this node may restore the checkpoint; `tool` is the program `transship`.
///
/// # Errors
/// [`OriginError::NotSigned`], or a failed system call.
pub fn require_origin(
    checkpoint: &Checkpoint,
    rules: &NodeConfig,
    origins: &Path,
    mut tool: Command,
) -> Result<(), OriginError> {
    let keys = &rules.checkpoints.signed_by;
    if keys.is_empty() || is_known(origins, &manifest_of(&checkpoint.dir)?.1, keys)? {
        return Ok(());
    }
    let name = checkpoint.dir.file_name().unwrap_or_default();
    tool.arg("check-signature").arg(name);
    let output = tool.stdin(Stdio::null()).output();
    let reason = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let line = said
                .lines()
                .next()
                .unwrap_or("its signature cannot be checked");
            line.trim_start_matches("transship: ").to_owned()
        }
        Err(error) => format!(
            "cannot run {}: {error}",
            Path::new(tool.get_program()).display()
        ),
    };
    Err(OriginError::NotSigned { reason })
}
