//! [`attach`] on machines other than x86-64: a task's registers and its system call instruction
//! are not known here, so shared memory that another restore has made cannot be attached.

use std::io;

use transship_checkpoint::criu_images::shm_mappings::Attachment;

/// # Errors
/// Whenever there is something to attach.
pub(super) fn attach(_root: i32, attachments: &[Attachment]) -> io::Result<()> {
    if attachments.is_empty() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "System V shared memory that several containers of a pod have attached can be \
             restored on x86_64 only, and this is {}",
            std::env::consts::ARCH
        ),
    ))
}
