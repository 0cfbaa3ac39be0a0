//! The runtime's log, as the shim reads it: the last entry of level `error` is the reason.
//!
//! ```text
//! {"level":"error","msg":"...","time":"2026-01-02T03:04:05Z"}        --log-format json
//! time="2026-01-02T03:04:05Z" level=error msg="..."                  otherwise
//! ```

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Appends an error. `json` as the caller's `--log-format` says.
///
/// # Errors
/// A system call failed.
pub fn append_error(log: &Path, json: bool, message: &str) -> io::Result<()> {
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
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    rfc3339(since.map_or(0, |time| time.as_secs()))
}

fn entry(json: bool, message: &str, time: &str) -> String {
    if json {
        serde_json::json!({ "level": "error", "msg": message, "time": time }).to_string()
    } else {
        format!("time={time:?} level=error msg={message:?}")
    }
}

/// The civil date of seconds since 1970, in UTC (days to date: Howard Hinnant's algorithm).
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest % 3_600 / 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }

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
