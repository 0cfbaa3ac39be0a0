//! Why a restore failed, in one line.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;
use transship_checkpoint::criu_log;

use crate::lazy_pages;
use crate::restore_log::{RESTORE_LOG, keep_criu_log};

const LAST_ENTRIES: u64 = 64 << 10;

/// The cause: CRIU's first error, else that of the server of a memory that comes late, else what the runtime wrote into
/// its own log from `log_start` on.
/// CRIU's log is kept in `logs` as `name`, because the bundle goes away with the failed container.
pub(super) fn of_restore(
    work: &Path,
    log: Option<&Path>,
    log_start: u64,
    (logs, name): (&Path, &str),
) -> String {
    for (log, who) in [(RESTORE_LOG, "CRIU"), (lazy_pages::LOG, "criu lazy-pages")] {
        let log = work.join(log);
        if let Ok(Some(error)) = criu_log::first_error_of(&log) {
            return match keep_criu_log(logs, name, &log) {
                Ok(kept) => format!("{who}: {error} (all of it in {})", kept.display()),
                Err(_) => format!("{who}: {error}"),
            };
        }
    }
    log.and_then(|log| last_entry(log, log_start))
        .unwrap_or_else(|| "the runtime gives no reason".to_owned())
}

fn last_entry(log: &Path, start: u64) -> Option<String> {
    #[derive(Deserialize)]
    struct Entry {
        level: String,
        msg: String,
    }
    let mut file = File::open(log).ok()?;
    let start = start.max(file.metadata().ok()?.len().saturating_sub(LAST_ENTRIES));
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut text = Vec::new();
    file.read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let mut entries = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Entry>(line).ok());
    entries
        .rfind(|entry| entry.level == "error")
        .map(|entry| entry.msg.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criu_knows_better_than_the_runtime() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let logs = dir.path().join("logs");
        let kept = (logs.as_path(), "restore-web.log");
        assert_eq!(
            of_restore(dir.path(), Some(&log), 0, kept),
            "the runtime gives no reason"
        );
        let old = "{\"level\":\"error\",\"msg\":\"of an earlier call\"}\n";
        std::fs::write(
            &log,
            format!("{old}{{\"level\":\"error\",\"msg\":\"criu failed\"}}\n"),
        )
        .unwrap();
        let start = u64::try_from(old.len()).unwrap();
        assert_eq!(
            of_restore(dir.path(), Some(&log), start, kept),
            "criu failed"
        );
        let pages = "(00.1) Error (criu/uffd.c:1): lazy-pages: cannot send\n";
        std::fs::write(dir.path().join(lazy_pages::LOG), pages).unwrap();
        let reason = of_restore(dir.path(), Some(&log), start, kept);
        assert!(
            reason.starts_with("criu lazy-pages: lazy-pages: cannot send (all of it in /"),
            "{reason}"
        );
        let criu = "(00.1)  3: Error (criu/x.c:1): Can't open file /x\n";
        std::fs::write(dir.path().join("restore.log"), criu).unwrap();
        let reason = of_restore(dir.path(), Some(&log), start, kept);
        assert!(
            reason.starts_with("CRIU: Can't open file /x (all of it in /"),
            "{reason}"
        );
        assert_eq!(
            std::fs::read_to_string(logs.join("restore-web.log")).unwrap(),
            criu
        );
    }
}
