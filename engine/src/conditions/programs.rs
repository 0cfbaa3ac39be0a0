//! What a program has set for itself that CRIU does not restore, and a program that has no file.
//!
//! ```text
//!  /proc/PID/exe                    /memfd:x (deleted)    CRIU dumps no memfd as a program's file
//!  /proc/PID/task/TID/personality   00040000              setarch -R; CRIU writes it down, and does no more
//! ```

use std::fs;

use super::Hit;
use super::processes::{Processes, Seen, THREADS};

/// Of memory that only a descriptor knows.
const MEMFD: &str = "/memfd:";

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let mut hits = Vec::new();
    for seen in &processes.tree {
        // A zombie has none.
        if let Ok(program) = fs::read_link(format!("/proc/{}/exe", seen.pid))
            && program.to_string_lossy().starts_with(MEMFD)
        {
            hits.push(("memfd-program", seen.called()));
        }
        let other = threads(seen).find_map(|thread| {
            let text = fs::read_to_string(format!("{thread}/personality")).ok()?;
            is_other(&text).then(|| text.trim().to_owned())
        });
        hits.extend(other.map(|it| ("personality", format!("{it} of {}", seen.called()))));
    }
    hits
}

/// The directories of the threads of a process.
pub(super) fn threads(seen: &Seen) -> impl Iterator<Item = String> {
    let threads = fs::read_dir(format!("/proc/{}/task", seen.pid));
    let threads = threads.into_iter().flatten().flatten().take(THREADS);
    threads.map(|thread| thread.path().display().to_string())
}

fn is_other(personality: &str) -> bool {
    personality.trim().bytes().any(|byte| byte != b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_personality_is_told_unless_it_is_that_of_linux() {
        assert!(is_other("00040000\n") && is_other("00000008\n"));
        assert!(!is_other("00000000\n") && !is_other(""));
        let own = std::process::id();
        let processes = Processes::read(own, &[own]);
        assert!(threads(&processes.tree[0]).count() >= 1);
        assert_eq!(hits(&processes), Vec::new());
    }
}
