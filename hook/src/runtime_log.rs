//! The runtime's log, as the shim reads it: the last entry of level `error` is the reason.
//!
//! ```text
//! {"level":"error","msg":"...","time":"2026-01-02T03:04:05Z"}        --log-format json
//! time="2026-01-02T03:04:05Z" level=error msg="..."                  otherwise
//! ```

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::SystemTime;

/// Appends an error. `json` as the caller's `--log-format` says.
///
/// # Errors
/// A system call failed.
pub(crate) fn append_error(log: &Path, json: bool, message: &str) -> io::Result<()> {
    let mut line = entry(json, message, &now());
    line.push('\n');
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(log)?
        .write_all(line.as_bytes())
}

/// The time, as logs have it.
pub(crate) fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

fn entry(json: bool, message: &str, time: &str) -> String {
    if json {
        serde_json::json!({ "level": "error", "msg": message, "time": time }).to_string()
    } else {
        format!("time={time:?} level=error msg={message:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_appended() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        append_error(&log, true, "a \"b\"").unwrap();
        append_error(&log, false, "c").unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let first: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        assert_eq!(
            (first["level"].as_str(), first["msg"].as_str()),
            (Some("error"), Some("a \"b\""))
        );
        assert!(lines[1].starts_with("time=\"") && lines[1].ends_with("level=error msg=\"c\""));
    }
}
