//! The images of a restore and the spec of its container: compared before anything is changed, and
//! again on the linked images that CRIU will read, which get what is imposed.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::sysinfo::sysinfo;
use serde_json::Value;
use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::criu_images::mounts::Mount;
use transship_checkpoint::criu_options::CriuOptions;
use transship_checkpoint::manifest::SPEC_FILE;
use transship_checkpoint::spec::Spec;
use transship_sandbox::admission::{
    Admission, AdmissionError, Allowance, Environment, Restored, compare, compare_names,
    resolve_within,
};

use transship_path_error::During as _;

use super::FrontError;
use super::bundle::Bundle;
use super::tmpfs_archive::TmpfsArchives;

/// A container's root, below its bundle.
const ROOTFS: &str = "rootfs";
/// Longest spec that is read, in bytes.
const SPEC_LIMIT: u64 = 16 << 20;
const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// What is to be imposed on the images in `dir`; `old` is the spec of the dump, and `criu` has the options of the restore.
///
/// # Errors
/// They are stronger than the spec, or cannot be read.
pub(super) fn admit(
    dir: &Path,
    old: Option<&Spec>,
    new: &Spec,
    bundle: &Bundle,
    criu: &CriuOptions,
) -> Result<Admission, AdmissionError> {
    let restored = Restored::read(dir)?;
    let rootfs = root(new, bundle);
    let mut allowed = Allowance::of(new, &|path| resolve_within(&rootfs, path));
    allowed.external_sockets = criu.ext_unix_sk;
    let here = Environment::of_node(&allowed, &rootfs);
    let mut admission = compare(&restored, old, &allowed, &here);
    let archives = TmpfsArchives::of(dir, memory_of(new));
    let links_of = |mount: &Mount| archives.links_of(mount.device);
    compare_names(&restored, &allowed, &rootfs, &links_of, &mut admission);
    admission.check()?;
    Ok(admission)
}

/// Bytes of memory that a container may have, and with it its tmpfs: those of the node where the spec has no limit.
fn memory_of(spec: &Spec) -> u64 {
    let limit = spec.get("/linux/resources/memory/limit");
    let limit = limit.and_then(Value::as_u64).unwrap_or(u64::MAX);
    limit.min(sysinfo().map_or(u64::MAX, |node| node.ram_total()))
}

/// Puts this process, and CRIU after it, to the score of the new container: a restored process whose
/// image says 0 keeps that of CRIU, which containerd protects.
pub(super) fn take_oom_score(spec: &Spec) -> Result<(), FrontError> {
    let Some(score) = spec.get("/process/oomScoreAdj") else {
        return Ok(());
    };
    Ok(fs::write(OOM_SCORE_ADJ, score.to_string()).during("write", OOM_SCORE_ADJ)?)
}

/// Reads the spec that the container was dumped with, in its directory of the checkpoint.
pub(super) fn read_spec(dir: &Path) -> Result<Spec, FrontError> {
    let path = dir.join(SPEC_FILE);
    let json = read_regular(dir, Path::new(SPEC_FILE), Links::Refused, SPEC_LIMIT);
    let spec = Spec::parse(&json.during("read", &path)?).map_err(std::io::Error::from);
    Ok(spec.during("read", path)?)
}

/// Where the root file system of a container is.
pub(super) fn root(spec: &Spec, bundle: &Bundle) -> PathBuf {
    let path = spec.get("/root/path").and_then(|path| path.as_str());
    bundle.path(path.unwrap_or(ROOTFS))
}
