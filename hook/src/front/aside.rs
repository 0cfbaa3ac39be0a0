//! What goes on when its call has answered.
//!
//! ```text
//!  <work>/NAME   locked (flock) by who works as long as it lives; its mtime is that of its last progress; removed when all is
//!                done; else it says why not
//! ```

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Of what it says, at most.
const REASON_LIMIT: u64 = 4096;

/// Waits until it is done, also where it is done already or was never begun. `look` is asked meanwhile.
///
/// # Errors
/// It is not done, and why; or what `look` says; or there is no progress for `patience`.
pub(super) fn wait(
    path: &Path,
    killed: &str,
    look: impl Fn() -> io::Result<()>,
    patience: Option<Duration>,
) -> io::Result<()> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let (mut seen, mut since) = (file.metadata()?.modified()?, Instant::now());
    let mut locked = loop {
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(locked) => break locked,
            Err((unlocked, Errno::EWOULDBLOCK)) => file = unlocked,
            Err((_, errno)) => return Err(errno.into()),
        }
        look()?;
        let now = file.metadata()?.modified()?;
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        if let Some(patience) = patience.filter(|patience| since.elapsed() > *patience) {
            let seconds = patience.as_secs();
            let message = format!("nothing more of it has come for {seconds} s");
            return Err(io::Error::other(message));
        }
        thread::sleep(LOOK_AGAIN);
    };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        found => {
            found?;
            let mut reason = String::new();
            let said = (&mut *locked).take(REASON_LIMIT);
            drop({ said }.read_to_string(&mut reason));
            let reason = Some(reason).filter(|it| !it.is_empty());
            Err(io::Error::other(reason.unwrap_or_else(|| killed.into())))
        }
    }
}

/// Whether somebody is still at it.
pub(super) fn goes_on(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| {
        let locked = Flock::lock(file, FlockArg::LockSharedNonblock);
        matches!(locked, Err((_, Errno::EWOULDBLOCK)))
    })
}
