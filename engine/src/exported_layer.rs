//! What the export of an upperdir has given.

use std::time::Duration;

use transship_checkpoint::manifest::Losses;

/// An exported upperdir.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Length of the tar.
    pub bytes: u64,
    /// How long the export took.
    pub took: Duration,
    /// What a layer cannot say.
    pub losses: Losses,
}
