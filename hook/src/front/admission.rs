//! The images of a restore and the spec of its container: compared before anything is changed, and
//! again on the linked images that CRIU will read, which get what is imposed.

use std::fs;
use std::path::{Path, PathBuf};

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::SPEC_FILE;
use transship_checkpoint::spec::Spec;
use transship_sandbox::admission::{
    Admission, AdmissionError, Allowance, Environment, Restored, compare, resolve_within,
};

use transship_path_error::During as _;

use super::FrontError;
use super::bundle::Bundle;

/// A container's root, below its bundle.
const ROOTFS: &str = "rootfs";
/// Longest spec that is read, in bytes.
const SPEC_LIMIT: u64 = 16 << 20;
const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// What is to be imposed on the images in `dir`; `old` is the spec of the dump.
///
/// # Errors
/// They are stronger than the spec, or cannot be read.
pub(super) fn admit(
    dir: &Path,
    old: Option<&Spec>,
    new: &Spec,
    bundle: &Bundle,
) -> Result<Admission, AdmissionError> {
    let restored = Restored::read(dir)?;
    let rootfs = root(new, bundle);
    let allowed = Allowance::of(new, &|path| resolve_within(&rootfs, path));
    let here = Environment::of_node(&allowed, &rootfs);
    let admission = compare(&restored, old, &allowed, &here);
    admission.check()?;
    Ok(admission)
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
