//! Whether the layers of images reach our differ, and whether the snapshots lie where containerd believes.
//!
//! ```text
//! kubelet, ctr pull --local (1.7)   ──> diff service       default = ["transship-diff", "walking"]
//! kubelet, ctr pull, import (2.x)   ──> transfer service   unpack_config: snapshotter, differ
//! ```
//!
//! containerd's API does not tell how its services are configured. So its own program is asked what the
//! configuration says that the running daemon was started with (`containerd --config ... config dump`).

use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_client::types::Mount;
use toml::{Table, Value};
use transship_containerd::{Containerd, ContainerdError};

use super::Finding;

const SNAPSHOTTER: &str = "transship";
const DIFFER: &str = "transship-diff";
const DIFF_SERVICE: &str = "io.containerd.service.v1.diff-service";
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// All of it; nothing where our plugins are not there, which is told elsewhere.
pub(super) async fn findings(node: &Containerd) -> Vec<Finding> {
    let mut findings = Vec::new();
    let differs = node.differs().await.unwrap_or_default();
    if differs.iter().any(|differ| differ == DIFFER) {
        let process = node.server_process().await.ok().flatten();
        match process.and_then(|process| dump(Path::new("/proc"), process)) {
            Some(config) => findings.extend(judge(&config)),
            None => findings.push(Finding::note(
                "layers",
                "containerd does not tell how it is configured",
                "compare it with config/containerd-*.toml",
            )),
        }
    }
    let root = node.snapshotter_root(SNAPSHOTTER).await.ok().flatten();
    if let Some(configured) = root
        && let Ok(Some(found)) = snapshots_root(node).await
    {
        findings.extend(compare_roots(&configured, &found));
    }
    findings
}

/// The configuration of a running containerd, with all defaults.
fn dump(proc: &Path, process: u64) -> Option<Table> {
    let process = proc.join(process.to_string());
    let line = std::fs::read(process.join("cmdline")).ok()?;
    let line = String::from_utf8(line).ok()?;
    let mut dump = Command::new(process.join("exe"));
    if let Some(file) = config_file(&line.split('\0').collect::<Vec<_>>()) {
        dump.args(["--config", file]);
    }
    // A relative name is one of the daemon's directory.
    dump.args(["config", "dump"])
        .current_dir(process.join("cwd"));
    let output = dump
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()?.parse().ok()
}

/// The file that the command line of a containerd names.
fn config_file<'a>(line: &[&'a str]) -> Option<&'a str> {
    let flags = ["--config", "-config", "--c", "-c"];
    let mut arguments = line.iter().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.split_once('=') {
            Some((flag, file)) if flags.contains(&flag) => return Some(file),
            None if flags.contains(argument) => return arguments.next().copied(),
            _ => {}
        }
    }
    None
}

fn judge(config: &Table) -> Vec<Finding> {
    let plugin = |name: &str| config.get("plugins").and_then(|plugins| plugins.get(name));
    let services = [
        judge_diff_service(plugin(DIFF_SERVICE)),
        judge_transfer(plugin(TRANSFER)),
    ];
    services.into_iter().chain(judge_rebase(config)).collect()
}

/// With the capability `rebase` containerd (2.2 and later, where `max_concurrent_unpacks` is above 1) prepares layers on
/// nothing and names their parents at their Commits, which transship-snapshotter refuses (docs/layers.md).
fn judge_rebase(config: &Table) -> Option<Finding> {
    let plugins = config.get("proxy_plugins")?;
    let announced = plugins.get(SNAPSHOTTER)?.get("capabilities")?.as_array()?;
    let has_it = announced.iter().any(|it| it.as_str() == Some("rebase"));
    has_it.then(|| {
        Finding::problem(
            "rebase",
            "containerd would unpack layers side by side for transship: such pulls fail",
            "take \"rebase\" out of capabilities in [proxy_plugins.transship]",
        )
    })
}

fn judge_diff_service(config: Option<&Value>) -> Finding {
    let order = config.and_then(|config| config.get("default"));
    let order = order
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let differs: Vec<_> = order.iter().filter_map(Value::as_str).collect();
    match (differs.first(), differs.contains(&"walking")) {
        (Some(&DIFFER), true) => Finding::ok("diff service", differs.join(", ")),
        (Some(&DIFFER), false) => Finding::note(
            "diff service",
            format!("only {DIFFER} is asked: what it leaves to other differs fails"),
            "default = [\"transship-diff\", \"walking\"] in its section",
        ),
        _ => Finding::note(
            "diff service",
            format!(
                "{} is asked first: layers do not reach {DIFFER}",
                differs.first().unwrap_or(&"nobody")
            ),
            "default = [\"transship-diff\", \"walking\"] in its section",
        ),
    }
}

fn judge_transfer(config: Option<&Value>) -> Finding {
    let remedy = "snapshotter = \"transship\", differ = \"transship-diff\" in an unpack_config of \
                  io.containerd.transfer.v1.local";
    let unpack = config.and_then(|config| config.get("unpack_config"));
    let unpack = unpack
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let text = |entry: &Value, key: &str| -> String {
        let value = entry.get(key).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let ours = unpack
        .iter()
        .find(|entry| text(entry, "snapshotter") == SNAPSHOTTER);
    match ours.map(|entry| text(entry, "differ")).as_deref() {
        Some(DIFFER) => Finding::ok("transfer", format!("{SNAPSHOTTER} by {DIFFER}")),
        Some("") => Finding::note(
            "transfer",
            "no differ is named: the layers that it pulls do not reach transship-diff",
            remedy,
        ),
        Some(other) => Finding::note(
            "transfer",
            format!("the layers that it pulls go to {other}, not to transship-diff"),
            remedy,
        ),
        None => Finding::note(
            "transfer",
            "it does not unpack for the snapshotter transship",
            remedy,
        ),
    }
}

/// Where the snapshots lie, as far as one that can be mounted tells.
async fn snapshots_root(node: &Containerd) -> Result<Option<PathBuf>, ContainerdError> {
    for namespace in node.namespaces().await? {
        let snapshots = node.in_namespace(&namespace)?.snapshotter(SNAPSHOTTER);
        let mut pages = snapshots
            .list_pages(&["kind==active", "kind==view"])
            .await?;
        while let Some(page) = pages.next().await? {
            for snapshot in page {
                // It may be gone by now.
                let mounts = snapshots.mounts(&snapshot.name).await.unwrap_or_default();
                if let Some(root) = mounts.iter().find_map(root_of) {
                    return Ok(Some(root));
                }
            }
        }
    }
    Ok(None)
}

/// `<root>` of `<root>/snapshots/<id>/fs`.
fn root_of(mount: &Mount) -> Option<PathBuf> {
    let option = |prefix: &str| {
        let mut options = mount.options.iter();
        options.find_map(|option| option.strip_prefix(prefix))
    };
    let lower = || option("lowerdir=").map(|dirs| dirs.split(':').next().unwrap_or(dirs));
    let dir = option("upperdir=").or_else(lower).unwrap_or(&mount.source);
    let snapshots = Path::new(dir).ancestors().nth(2)?;
    (snapshots.file_name()? == "snapshots").then(|| snapshots.parent().map(Path::to_owned))?
}

fn compare_roots(configured: &Path, found: &Path) -> Vec<Finding> {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if real(configured) == real(found) {
        return Vec::new();
    }
    let says = format!(
        "snapshots lie in {}, and containerd believes in {}: the disk use of images is told wrongly",
        found.display(),
        configured.display()
    );
    let remedy = "exports.root in [proxy_plugins.transship] is the root of transship-snapshotter";
    vec![Finding::note("root", says, remedy)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_reach_our_differ_where_both_services_name_it() {
        let with = |default: &str, unpack: &str| {
            let text = format!(
                "[plugins.\"{DIFF_SERVICE}\"]\ndefault = {default}\n[plugins.\"{TRANSFER}\"]\nunpack_config = {unpack}\n"
            );
            let config: Table = text.parse().unwrap();
            let lines = judge(&config).into_iter().map(|finding| finding.line());
            lines
                .map(|line| line.trim_end().to_owned())
                .collect::<Vec<_>>()
        };
        let other = "{snapshotter = \"overlayfs\", differ = \"walking\"}";
        let good = with(
            "[\"transship-diff\", \"walking\"]",
            &format!("[{other}, {{snapshotter = \"transship\", differ = \"transship-diff\"}}]"),
        );
        assert!(good.iter().all(|line| line.starts_with("ok")), "{good:?}");
        for (default, unpack, said) in [
            (
                "[\"walking\"]",
                "[]",
                ["walking is asked first", "does not unpack for"],
            ),
            (
                "[\"transship-diff\"]",
                "[{snapshotter = \"transship\"}]",
                ["only transship-diff is asked", "no differ is named"],
            ),
            (
                "[]",
                "[{snapshotter = \"transship\", differ = \"walking\"}]",
                ["nobody is asked first", "go to walking"],
            ),
        ] {
            for (line, said) in with(default, unpack).iter().zip(said) {
                assert!(line.starts_with("note") && line.contains(said), "{line}");
            }
        }
    }

    #[test]
    fn what_cannot_be_kept_is_not_announced() {
        for sample in [
            include_str!("../../../config/containerd-1.6.toml"),
            include_str!("../../../config/containerd-1.7.toml"),
            include_str!("../../../config/containerd-2.toml"),
        ] {
            assert_eq!(judge_rebase(&sample.parse().unwrap()), None);
        }
        let announced = "[proxy_plugins.transship]\ncapabilities = [\"remap-ids\", \"rebase\"]\n";
        let found = judge_rebase(&announced.parse().unwrap()).unwrap().line();
        assert!(found.starts_with("problem  rebase"), "{found}");
    }

    #[test]
    fn the_file_is_the_one_of_the_command_line() {
        for (line, file) in [
            (&["containerd"][..], None),
            (&["containerd", "--log-level", "debug"], None),
            (&["containerd", "-c", "/a"], Some("/a")),
            (&["containerd", "--address=/x", "--config=/b"], Some("/b")),
        ] {
            assert_eq!(config_file(line), file, "{line:?}");
        }
    }

    #[test]
    fn the_root_is_found_from_any_mount() {
        let mount = |source: &str, options: &[&str]| Mount {
            source: source.to_owned(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Mount::default()
        };
        for (mount, root) in [
            (mount("/r/snapshots/7/fs", &["ro", "rbind"]), Some("/r")),
            (
                mount(
                    "overlay",
                    &[
                        "index=off",
                        "upperdir=/r/x/snapshots/9/fs",
                        "lowerdir=/r/x/snapshots/1/fs",
                    ],
                ),
                Some("/r/x"),
            ),
            (
                mount("overlay", &["lowerdir=/r/snapshots/2/fs:/r/snapshots/1/fs"]),
                Some("/r"),
            ),
            (mount("/elsewhere", &[]), None),
        ] {
            assert_eq!(root_of(&mount).as_deref(), root.map(Path::new), "{mount:?}");
        }
        assert!(compare_roots(Path::new("/"), Path::new("/")).is_empty());
        assert_eq!(compare_roots(Path::new("/a"), Path::new("/b")).len(), 1);
    }
}
