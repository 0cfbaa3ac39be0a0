//! What another node has to know of this one to tell whether a container can go there.
//!
//! ```text
//!  transship check --node > node-b.json      on node b
//!  transship check web --for node-b.json     on node a: --> compare
//! ```
//!
//! ```json
//! { "format": 1, "transship": "0.1.0", "architecture": "x86_64", "page_size": 4096,
//!   "kernel": "6.18.0", "criu": "4.2.1", "runc": "1.3.6", "crun": null, "containerd": "2.1.9",
//!   "cgroups": 2, "security_modules": ["capability", "apparmor"],
//!   "processor": { "model": "...", "features": ["sse2", "avx2", ...] },
//!   "limits": { "fs.nr_open": 1048576, "kernel.pid_max": 4194304, ... },
//!   "free_memory": BYTES, "free_huge_pages": BYTES, "free_disk": BYTES, "clock": SECONDS }
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::timeout;
pub use transship_checkpoint::manifest::Processor;
use transship_checkpoint::manifest::Source;
use transship_checkpoint::shown_text::printable;
use transship_checkpoint::store::DEFAULT_ROOT;
use transship_containerd::Containerd;

use super::{Version, host};
use crate::error::{Context, Error, Result};
use crate::machine::{free_huge_pages, free_memory};

/// Bytes of them; features of a processor are most of it.
const MOST_BYTES: usize = 64 << 10;
/// How long a program may take to say its version, and containerd.
const PATIENCE: Duration = Duration::from_secs(5);
/// The version of what is printed.
const FORMAT: u32 = 1;
/// Limits that a container may come up against.
pub(super) const NR_OPEN: &str = "fs.nr_open";
pub(super) const PID_MAX: &str = "kernel.pid_max";
pub(super) const MAX_MAP_COUNT: &str = "vm.max_map_count";
pub(super) const INOTIFY_INSTANCES: &str = "fs.inotify.max_user_instances";
const LIMITS: [&str; 4] = [NR_OPEN, PID_MAX, MAX_MAP_COUNT, INOTIFY_INSTANCES];

/// A node, as far as a container that comes to it must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The version of this format.
    pub format: u32,
    /// The version of transship.
    pub transship: String,
    /// The machine's name of its architecture.
    pub architecture: String,
    /// Bytes of a page of memory.
    pub page_size: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The version of CRIU; none where it cannot be run, as with those below.
    pub criu: Option<String>,
    /// The version of runc.
    pub runc: Option<String>,
    /// The version of crun.
    pub crun: Option<String>,
    /// The version of containerd.
    pub containerd: Option<String>,
    /// Which cgroups: 1 or 2.
    pub cgroups: u8,
    /// The Linux security modules that are on.
    pub security_modules: Vec<String>,
    /// Its processors.
    pub processor: Processor,
    /// Limits of the kernel, by their sysctls.
    pub limits: BTreeMap<String, u64>,
    /// Bytes of memory that could be had.
    pub free_memory: u64,
    /// Bytes of huge pages that are free; a node of before did not say.
    #[serde(default)]
    pub free_huge_pages: Option<u64>,
    /// Bytes that are free where checkpoints lie.
    pub free_disk: u64,
    /// Seconds since 1970, when this was printed.
    pub clock: u64,
}

impl NodeFacts {
    /// Those of this node; without `containerd` it is not asked.
    ///
    /// # Errors
    /// The kernel does not tell its name.
    pub async fn of_this(containerd: Option<&Containerd>) -> Result<Self> {
        let uname = nix::sys::utsname::uname().context("cannot ask the kernel for its name")?;
        let of_containerd = async {
            let version = timeout(PATIENCE, containerd?.version()).await;
            version.ok()?.ok()
        };
        let (criu, runc, crun, containerd) = tokio::join!(
            version_of("criu"),
            version_of("runc"),
            version_of("crun"),
            of_containerd
        );
        let limit = |name: &str| {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            let value = fs::read_to_string(path).ok()?.trim().parse().ok()?;
            Some((name.to_owned(), value))
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            format: FORMAT,
            transship: env!("CARGO_PKG_VERSION").to_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            page_size: page_size(),
            kernel: uname.release().to_string_lossy().into_owned(),
            criu,
            runc,
            crun,
            containerd,
            cgroups: if host::has_cgroup2() { 2 } else { 1 },
            security_modules: security_modules(),
            processor: processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            limits: LIMITS.into_iter().filter_map(limit).collect(),
            free_memory: free_memory(),
            free_huge_pages: Some(free_huge_pages()),
            free_disk: free_disk(),
            clock: now.map_or(0, |now| now.as_secs()),
        })
    }

    /// What [`Self::parse`] reads, in one line.
    ///
    /// # Errors
    /// Never, with what this has.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).context("cannot write what this node is like")
    }

    /// Tells in a manifest what was asked of this node.
    pub(crate) fn complete(self, source: &mut Source) {
        source.criu = self.criu;
        source.runc = self.runc;
        source.crun = self.crun;
        source.page_size = Some(self.page_size);
        source.cgroups = Some(self.cgroups);
        source.processor = Some(self.processor);
    }

    /// Reads what `transship check --node` has printed.
    ///
    /// # Errors
    /// It is something else, or of a later version.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let json = { Some(json).filter(|json| json.len() <= MOST_BYTES) }.unwrap_or_default();
        let facts: Self = serde_json::from_slice(json)
            .context("this is not what transship check --node prints")?;
        if facts.format == FORMAT {
            return Ok(facts.shown());
        }
        let format = facts.format;
        let message = format!("transship check --node of another version wrote this ({format})");
        Err(Error::failed(message))
    }
}

impl NodeFacts {
    /// Its texts, which another node has written, as they can be shown.
    fn shown(mut self) -> Self {
        let texts = [
            &mut self.architecture,
            &mut self.kernel,
            &mut self.processor.model,
        ];
        let versions = [
            &mut self.criu,
            &mut self.runc,
            &mut self.crun,
            &mut self.containerd,
        ];
        for text in texts.into_iter().chain(versions.into_iter().flatten()) {
            *text = printable(text);
        }
        self
    }
}

/// None where the program cannot be run, or does not come to its end.
async fn version_of(program: &str) -> Option<String> {
    let mut command = Command::new(program);
    let said = command.arg("--version").kill_on_drop(true).output();
    let said = timeout(PATIENCE, said).await.ok()?.ok()?;
    let said = said.status.success().then_some(said.stdout)?;
    let Version(major, minor, patch) = Version::find(&String::from_utf8_lossy(&said))?;
    Some(format!("{major}.{minor}.{patch}"))
}

fn page_size() -> u64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let size = size.ok().flatten();
    // Every port of Linux has this call.
    size.and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
}

fn security_modules() -> Vec<String> {
    // Without securityfs nobody can tell, and no module that a container uses is on.
    let list = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    let names = list.trim().split(',').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

fn processor(cpuinfo: &str) -> Processor {
    let value = |keys: [&str; 2]| {
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        let found = fields.find(|(key, _)| keys.contains(&key.trim()));
        found.map_or("", |(_, value)| value.trim())
    };
    let mut features: Vec<String> = value(["flags", "Features"])
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    features.sort_unstable();
    Processor {
        model: value(["model name", "CPU part"]).to_owned(),
        features,
    }
}

fn free_disk() -> u64 {
    // Before the first checkpoint its directory is not there.
    let stat = [DEFAULT_ROOT, "/var/lib"]
        .into_iter()
        .find_map(|dir| statvfs(dir).ok());
    stat.map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn what_is_printed_can_be_read() {
        let facts = NodeFacts::of_this(None).await.unwrap();
        assert!(facts.free_memory > 0 && facts.free_disk > 0 && facts.page_size >= 4096);
        assert!(facts.limits.contains_key(PID_MAX), "{facts:?}");
        let json = serde_json::to_vec(&facts).unwrap();
        assert_eq!(NodeFacts::parse(&json).unwrap(), facts);
        let later = NodeFacts { format: 2, ..facts };
        assert!(NodeFacts::parse(&serde_json::to_vec(&later).unwrap()).is_err());
        assert!(NodeFacts::parse(b"{}").is_err());
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("criu");
        let script = |text: &str| {
            fs::write(&program, text).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        };
        let program = program.to_str().unwrap();
        script("#!/bin/sh\nexec sleep 600\n");
        assert_eq!(version_of(program).await, None);
        script("#!/bin/sh\necho Version: 4.2\n");
        assert_eq!(version_of(program).await.as_deref(), Some("4.2.0"));
    }

    #[test]
    fn proc_is_read_as_it_is_written() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu sse2 avx\n\
                    processor\t: 1\nflags\t\t: other\n";
        let read = processor(text);
        assert_eq!(read.model, "Some CPU @ 2 GHz");
        assert_eq!(read.features, ["avx", "fpu", "sse2"]);
    }
}
