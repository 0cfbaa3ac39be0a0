//! The word by which a held copy may be let go.

use std::time::Duration;

use transship_checkpoint::wire::{Message, unexpected};

use crate::conversation::Conversation;
use crate::error::Result;

/// How long a copy is held: its source looks at what it has frozen, and writes its record.
const COMMIT_PATIENCE: Duration = Duration::from_secs(600);

/// Waits for it. A source that only says that it is alive does not have the copy held for ever.
pub(super) async fn wait_for_commit(conversation: &mut Conversation) -> Result<()> {
    let commitment = "the commitment";
    let word = conversation.receive_within(commitment, COMMIT_PATIENCE, Duration::ZERO);
    match word.await? {
        Message::Commit => Ok(()),
        other => Err(unexpected(commitment, &other).into()),
    }
}
