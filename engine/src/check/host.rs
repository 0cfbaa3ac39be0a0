//! The host: kernel, cgroups, CRIU, OCI runtimes, our own programs.

use std::path::Path;
use std::process::Command;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};

use super::{Finding, Version};
use crate::conditions::way_to_lock;
use crate::version::cannot_dump_tcp;

/// The oldest CRIU that the tests run with.
const OLDEST_CRIU: Version = Version(4, 0, 0);
/// `runc exec` joins the time namespace of a restored container (1.2.7, 1.3.0; runc commit b68cbdff3).
const RUNC_TIME: Version = Version(1, 2, 7);
/// crun hands CRIU the file of `org.criu.config` (with libcriu 4.2).
const CRUN_CONFIG: Version = Version(1, 24, 0);

/// All of it.
pub fn findings() -> Vec<Finding> {
    let cgroup2 = has_cgroup2();
    let kernel = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut findings = vec![
        Finding::ok("kernel", kernel.clone()),
        Finding::ok("cgroups", if cgroup2 { "v2" } else { "v1" }),
    ];
    findings.extend(criu(Version::find(&kernel)));
    findings.extend(runc());
    findings.extend(crun(cgroup2));
    findings.push(network_lock());
    findings.extend(own_programs());
    findings.push(rules(Path::new(NODE_CONFIG)));
    findings
}

/// Whether containers here are in cgroups of v2 alone.
pub(super) fn has_cgroup2() -> bool {
    statfs("/sys/fs/cgroup").is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// stdout of a program that ends well; else why not.
pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("cannot be run: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => {
            let said = text(&output.stderr);
            let first = said.lines().find(|line| line.contains("rror"));
            Err(first
                .or(said.lines().last())
                .unwrap_or("no reason")
                .to_owned())
        }
    }
}

fn criu(kernel: Option<Version>) -> Vec<Finding> {
    let install = "install CRIU 4.2 or later";
    let version = match run("criu", &["--version"]) {
        Ok(text) => Version::find(&text),
        Err(why) => return vec![Finding::problem("CRIU", why, install)],
    };
    let mut findings = vec![match version {
        Some(version) if version < OLDEST_CRIU => Finding::problem("CRIU", shown(version), install),
        Some(version) if kernel.is_some_and(|kernel| cannot_dump_tcp(version, kernel)) => {
            let found = format!(
                "{} on this kernel cannot dump a TCP socket, not even a listening one",
                shown(version)
            );
            Finding::problem("CRIU", found, install)
        }
        Some(version) => Finding::ok("CRIU", shown(version)),
        None => Finding::problem("CRIU", "its version is not known", install),
    }];
    findings.push(match run("criu", &["check"]) {
        Ok(_) => Finding::ok("criu check", "passes"),
        Err(why) => Finding::problem("criu check", why, "run `criu check --all` and see its log"),
    });
    findings
}

fn shown(Version(major, minor, patch): Version) -> String {
    format!("{major}.{minor}.{patch}")
}

fn runc() -> Vec<Finding> {
    let version = match run("runc", &["--version"]) {
        Ok(text) => Version::find(&text),
        Err(why) => {
            let remedy = "needed unless crun is the only runtime";
            return vec![Finding::note("runc", why, remedy)];
        }
    };
    version.map_or_else(Vec::new, judge_runc)
}

fn judge_runc(version: Version) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("runc", shown(version))];
    if version < RUNC_TIME {
        findings.push(Finding::note(
            "runc exec",
            format!(
                "runc {} runs an exec in a restored container outside of its time namespace: the \
                 container cannot be dumped again while such a process lives",
                shown(version)
            ),
            "runc 1.2.7 or later does not",
        ));
    }
    findings
}

fn crun(cgroup2: bool) -> Vec<Finding> {
    let Ok(text) = run("crun", &["--version"]) else {
        // One runtime is enough.
        return Vec::new();
    };
    let Some(version) = Version::find(&text) else {
        return Vec::new();
    };
    if !text.contains("+CRIU") {
        let remedy = "use a crun that is, or runc";
        return vec![Finding::note("crun", "is built without CRIU", remedy)];
    }
    let libraries = run("ldconfig", &["-p"]).unwrap_or_default();
    if !libraries.contains("libcriu.so.2") {
        let found = format!(
            "{} finds no libcriu.so.2, so it cannot restore",
            shown(version)
        );
        return vec![Finding::note("crun", found, "install libcriu2 to use crun")];
    }
    if !cgroup2 && Path::new("/sys/fs/cgroup/unified").is_dir() {
        let found = format!("{} refuses a mix of cgroup v1 and v2", shown(version));
        return vec![Finding::note("crun", found, "use runc here")];
    }
    if version < CRUN_CONFIG {
        let found = format!(
            "{} does not hand CRIU the file in org.criu.config: what holds a restore until it is \
             started goes by the environment",
            shown(version)
        );
        return vec![Finding::note(
            "crun",
            found,
            "crun 1.24 with libcriu 4.2 does",
        )];
    }
    vec![Finding::ok("crun", shown(version))]
}

/// CRIU locks the network of a dump and of a restore with one of the two.
fn network_lock() -> Finding {
    // With the program of nftables a migration locks what CRIU does not.
    let nft = run("nft", &["--version"]).is_ok().then_some("nft");
    match way_to_lock() {
        Some(way) => {
            let found: Vec<&str> = [way].into_iter().chain(nft).collect();
            Finding::ok("network lock", found.join(", "))
        }
        None => Finding::problem(
            "network lock",
            "CRIU cannot use nftables, and iptables-restore does not work",
            "install iptables",
        ),
    }
}

fn own_programs() -> Vec<Finding> {
    let beside = std::env::current_exe().unwrap_or_default();
    let missing: Vec<&str> = ["transship-runc", "transship-hook"]
        .into_iter()
        .filter(|name| !beside.with_file_name(name).is_file())
        .collect();
    vec![match missing.as_slice() {
        [] => Finding::ok("transship", env!("CARGO_PKG_VERSION")),
        some => Finding::problem(
            "transship",
            format!("{} is not beside this program", some.join(", ")),
            "make install puts all of them into one directory",
        ),
    }]
}

fn rules(path: &Path) -> Finding {
    match NodeConfig::read(path) {
        Ok(rules) if rules.strict => Finding::ok("node.toml", "strict"),
        Ok(_) => Finding::ok(
            "node.toml",
            "checkpoints stay in their Kubernetes namespace",
        ),
        Err(error) => {
            let remedy = "config/node.toml lists the keys";
            Finding::problem("node.toml", crate::error::one_line(&error), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn the_traps_of_runc_are_told() {
        let verdicts = |version| {
            let findings = judge_runc(version);
            findings.iter().map(|it| it.verdict).collect::<Vec<_>>()
        };
        assert_eq!(verdicts(Version(1, 3, 6)), [Verdict::Ok]);
        assert_eq!(verdicts(Version(1, 1, 15)), [Verdict::Ok, Verdict::Note]);
    }
}
