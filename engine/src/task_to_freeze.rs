//! A task that stands still for a time: what its freeze, its guard and its thaw need to know of it.

use serde::{Deserialize, Serialize};
use transship_cni::Attachment;

use crate::oci_runtime::OciRuntime;

/// A running task that is to be frozen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskToFreeze {
    /// Id of its container.
    pub id: String,
    /// Its first process.
    pub pid: u32,
    /// What runs it.
    pub runtime: OciRuntime,
    /// Whether somebody has paused it before: then it stays paused.
    pub was_paused: bool,
    /// Whether no packet comes to its network or leaves it as long as it is frozen.
    pub network_is_locked: bool,
    /// Networks that it may not be in as long as it is frozen: its copy has the addresses.
    pub given_away: Vec<Attachment>,
    /// Whether its restart policy is hidden as long as it is frozen.
    pub hides_policy: bool,
    /// The uid of its pod, which is marked as moved as long as it is frozen, and was not before.
    pub marked: Option<String>,
}
