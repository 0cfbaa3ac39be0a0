//! What is kept of restores, in `/var/log/transship` (0700, the files 0600): a log of failed
//! restores, and CRIU's logs of them.
//!
//! ```text
//! restores.log          a line each; from 1 MiB on it becomes restores.log.1
//!   2026-01-02T03:04:05Z container=ID outcome=failed|started-cold|incomplete REASON
//! restore-<namespace>_<pod>_<container>.log      the last failed restore of that container of a pod
//! restore-<id>.log                               the same outside of the CRI
//! ```
//!
//! A failure is told by the call that fails, too; a container that starts cold instead has no such
//! call, and the runtime's log goes away with its bundle. kubelet tries again every few minutes with
//! a new container id, and replaces ids by names in what it shows: so a log has the names, and the
//! next attempt overwrites it. Of logs with other names the newest are kept.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use transship_checkpoint::annotations::Annotations;
use transship_checkpoint::manifest::check_name;
use transship_checkpoint::shown_text::printable;

use crate::runtime_log::now;

/// Where logs of restores are kept.
pub const LOG_DIR: &str = "/var/log/transship";
/// CRIU's own log, in the work directory of a restore.
pub(crate) const RESTORE_LOG: &str = "restore.log";
pub(crate) const LOG_FILE: &str = "restores.log";
/// What it has at most, in bytes; there are two of them.
const LOG_LIMIT: u64 = 1 << 20;
/// What is kept of the end of one of CRIU's logs, in bytes.
const CRIU_LOG_LIMIT: u64 = 1 << 20;
/// How many of CRIU's logs are kept.
const CRIU_LOGS: usize = 100;
const CRIU_LOG_PREFIX: &str = "restore-";

/// What a failed restore leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The container, or the pod, does not start.
    Failed,
    /// It starts its own command on its own files.
    StartedCold,
    /// It is restored, but for what the line says.
    Incomplete,
}

/// Adds a line.
///
/// # Errors
/// A system call failed.
pub fn append(dir: &Path, id: &str, outcome: Outcome, reason: &str) -> io::Result<()> {
    make_dir(dir)?;
    let outcome = match outcome {
        Outcome::Failed => "failed",
        Outcome::StartedCold => "started-cold",
        Outcome::Incomplete => "incomplete",
    };
    let path = dir.join(LOG_FILE);
    if fs::metadata(&path).is_ok_and(|meta| meta.len() >= LOG_LIMIT) {
        fs::rename(&path, dir.join(format!("{LOG_FILE}.1")))?;
    }
    // A reason may have names in it that others have chosen.
    let reason = printable(&reason.replace(|c: char| c.is_control(), " "));
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?
        .write_all(format!("{} container={id} outcome={outcome} {reason}\n", now()).as_bytes())
}

/// What the kept log of a container is called.
#[must_use]
pub fn criu_log_name(id: &str, annotations: &Annotations) -> String {
    let names = [
        &annotations.kubernetes_namespace,
        &annotations.pod_name,
        &annotations.pod_container,
    ];
    let names: Option<Vec<&str>> = names.into_iter().map(Option::as_deref).collect();
    let name = names.map(|names| names.join("_"));
    let name = name.filter(|name| name.len() < 200 && check_name("", name).is_ok());
    format!("{CRIU_LOG_PREFIX}{}.log", name.as_deref().unwrap_or(id))
}

/// Keeps the end of CRIU's log under this name.
///
/// # Errors
/// A system call failed.
pub fn keep_criu_log(dir: &Path, name: &str, log: &Path) -> io::Result<PathBuf> {
    make_dir(dir)?;
    let mut from = File::open(log)?;
    let skipped = from.metadata()?.len().saturating_sub(CRIU_LOG_LIMIT);
    from.seek(SeekFrom::Start(skipped))?;
    let kept = dir.join(name);
    match fs::remove_file(&kept) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut to = OpenOptions::new();
    let mut to = to.write(true).create_new(true).mode(0o600).open(&kept)?;
    io::copy(&mut from.take(CRIU_LOG_LIMIT), &mut to)?;
    // What is too much stays until the next time.
    drop(remove_oldest(dir));
    Ok(kept)
}

fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // One that was made before this rule: names of pods are nobody else's business.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

fn remove_oldest(dir: &Path) -> io::Result<()> {
    let mut logs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(CRIU_LOG_PREFIX) {
            logs.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    logs.sort_unstable();
    let surplus = logs.len().saturating_sub(CRIU_LOGS);
    logs[..surplus]
        .iter()
        .try_for_each(|(_, path)| fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_line_each_and_no_more_than_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs");
        append(&logs, "c1", Outcome::Failed, "no such\ncheck\u{1b}point").unwrap();
        append(&logs, "c2", Outcome::StartedCold, "CRIU: x").unwrap();
        let file = logs.join(LOG_FILE);
        let text = fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].ends_with("Z container=c1 outcome=failed no such check point"),
            "{text}"
        );
        assert!(
            lines[1].ends_with(" container=c2 outcome=started-cold CRIU: x"),
            "{text}"
        );
        assert_eq!((mode(&logs), mode(&file)), (0o700, 0o600));

        for _ in 0..2 {
            let full = OpenOptions::new().write(true).open(&file).unwrap();
            full.set_len(LOG_LIMIT).unwrap();
            append(&logs, "c3", Outcome::Failed, "again").unwrap();
        }
        assert!(fs::read_to_string(&file).unwrap().lines().count() == 1);
        assert_eq!(fs::read_dir(&logs).unwrap().count(), 2);
    }

    #[test]
    fn logs_of_criu_are_bounded_in_size_and_number() {
        let dir = tempfile::tempdir().unwrap();
        let (logs, log) = (dir.path().join("logs"), dir.path().join("restore.log"));
        fs::write(&log, vec![b'x'; 3 << 20]).unwrap();
        for n in 0..CRIU_LOGS + 3 {
            keep_criu_log(&logs, &format!("restore-c{n}.log"), &log).unwrap();
        }
        let last = keep_criu_log(&logs, "restore-c102.log", &log).unwrap();
        assert_eq!(fs::metadata(&last).unwrap().len(), CRIU_LOG_LIMIT);
        assert_eq!(mode(&last), 0o600);
        assert_eq!(fs::read_dir(&logs).unwrap().count(), CRIU_LOGS);
    }

    #[test]
    fn a_log_has_the_names_that_kubelet_shows() {
        let name = |pairs: &[(&str, &str)]| {
            let all: HashMap<_, _> = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect();
            criu_log_name("c1", &Annotations::read("c1", Some(&all)).unwrap())
        };
        let pod = |name: &'static str| {
            [
                ("io.kubernetes.cri.container-type", "container"),
                ("io.kubernetes.cri.sandbox-id", "s"),
                ("io.kubernetes.cri.sandbox-namespace", "shop"),
                ("io.kubernetes.cri.sandbox-name", name),
                ("io.kubernetes.cri.container-name", "front"),
            ]
        };
        assert_eq!(name(&pod("web-0")), "restore-shop_web-0_front.log");
        assert_eq!(name(&pod("../web")), "restore-c1.log");
        assert_eq!(name(&[]), "restore-c1.log");
    }
}
