//! The process that puts memory into a held container of a pod when `create` has answered.
//!
//! ```text
//!  shim ── front of `create` of a ── runc ── CRIU ── tasks, held
//!    │              └── fill ─────────────────────────^ memory
//!    ├─ front of `create` of b ...     begins now: a shim of a pod takes one Create after the other
//!    └─ front of `start` of a          waits for the fill
//!
//!  <work>/memory-fill    as in `aside`
//!  stdin of the fill     JSON: Filling
//! ```
//!
//! The memory of one container is so written while the next one is restored, which leaves processors idle.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::setpriority_process;
use serde::{Deserialize, Serialize};
use transship_checkpoint::criu_images::memory_apart::{HandedOver, MemoryApart};
use transship_path_error::{During as _, PathError};

use super::apart_memory::put_in;
use super::aside;
use crate::one_line;
use crate::start_time::check_same;

/// First argument of the front as fill.
pub const ROLE: &str = "transship-memory-fill";
const FILE: &str = "memory-fill";
/// One container after the other is restored, and that takes the time: who restores gets three times of what the fill gets
/// of a processor.
const NICENESS: i32 = 5;

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
struct Filling {
    /// The first process of the container, and when it started, in clock ticks since boot.
    root: (i32, u64),
    memory: HandedOver,
    /// [`FILE`].
    file: PathBuf,
}

/// Starts it for the container that is held below `root`; it outlives this process.
///
/// # Errors
/// It cannot be started.
pub(super) fn begin(
    own: &Path,
    work: &Path,
    root: (i32, u64),
    memory: &MemoryApart,
) -> Result<(), PathError> {
    let file = std::path::absolute(work.join(FILE)).during("find", work)?;
    let made = File::create_new(&file).during("make", &file)?;
    // The lock is that of the open file, which the fill has when this process has ended. `Flock` would unlock it.
    made.lock().during("lock", &file)?;
    let memory = memory.hand_over().during("hand over the memory of", work)?;
    let filling = Filling { root, memory, file };
    let json = serde_json::to_vec(&filling).expect("numbers and paths are JSON");
    let mut command = Command::new(own);
    command.arg(ROLE).stdin(Stdio::piped()).stdout(made);
    // That of the call is the container's, and this outlives it.
    command.stderr(Stdio::null()).current_dir("/");
    // What is sent to the group of the front is not for it.
    let mut fill = command.process_group(0).spawn().during("run", own)?;
    let told = fill.stdin.take().map(|mut stdin| stdin.write_all(&json));
    told.unwrap_or(Ok(())).during("write to", own)
}

/// The fill; nobody hears of an error but who waits for it.
///
/// # Errors
/// It was not told what to do.
pub fn serve() -> io::Result<()> {
    let _ = setpriority_process(None, NICENESS);
    let mut json = Vec::new();
    io::stdin().read_to_end(&mut json)?;
    let filling: Filling = serde_json::from_slice(&json)?;
    let file = filling.file.clone();
    match fill(filling) {
        Ok(()) => fs::remove_file(file),
        Err(error) => io::stdout().write_all(one_line(&error).as_bytes()),
    }
}

fn fill(filling: Filling) -> io::Result<()> {
    let (pid, began) = filling.root;
    check_same(pid, began)?;
    let file = File::options().write(true).open(&filling.file)?;
    let memory = MemoryApart::take_over(filling.memory)?;
    put_in(pid, &memory, || {
        // Who waits goes on waiting then.
        drop(file.set_modified(SystemTime::now()));
    })?;
    check_same(pid, began)
}

/// Whether memory of the container that was restored in this work directory is still put in, or could not be.
pub(super) fn is_begun(work: &Path) -> bool {
    work.join(FILE).symlink_metadata().is_ok()
}

/// Waits until the memory of the container that was restored in this work directory, whose first process is `root`, is put
/// in; not at all where none is.
///
/// # Errors
/// It is not, and why; or the container has ended; or nothing more of it comes for `patience`.
pub(super) fn wait(work: &Path, root: (i32, u64), patience: Duration) -> io::Result<()> {
    let killed = "who puts it in was killed";
    let look = || check_same(root.0, root.1);
    aside::wait(&work.join(FILE), killed, look, Some(patience))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::fcntl::{Flock, FlockArg};

    use super::*;
    use crate::start_time::start_time;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_start_waits_for_the_fill_and_hears_how_it_ended() {
        let work = tempfile::tempdir().unwrap();
        let own = std::process::id().cast_signed();
        let root = (own, start_time(own).unwrap());
        wait(work.path(), root, SHORT).unwrap();
        let path = work.path().join(FILE);
        let file = File::create(&path).unwrap();
        let fill = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        let late = wait(work.path(), root, SHORT).unwrap_err().to_string();
        assert!(late.contains("for 0 s"), "{late}");
        let ended = wait(work.path(), (own, root.1 + 1), SHORT).unwrap_err();
        assert!(ended.to_string().contains("ended"), "{ended}");
        let waiting = {
            let work = work.path().to_owned();
            thread::spawn(move || wait(&work, root, Duration::from_secs(60)))
        };
        fs::remove_file(&path).unwrap();
        drop(fill);
        waiting.join().unwrap().unwrap();

        fs::write(&path, "").unwrap();
        let killed = wait(work.path(), root, SHORT).unwrap_err().to_string();
        assert!(killed.contains("was killed"), "{killed}");
        fs::write(&path, "its memory cannot be written").unwrap();
        let failed = wait(work.path(), root, SHORT).unwrap_err().to_string();
        assert_eq!(failed, "its memory cannot be written");
    }
}
