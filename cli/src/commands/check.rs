//! `transship check`

use super::{connect, print};
use crate::args::Global;
use transship_engine::check::{self, Finding, Verdict};
use transship_engine::{Error, Result};

pub(crate) async fn run(global: &Global) -> Result<()> {
    let mut findings = check::host::findings();
    match connect(global).await {
        Ok(node) => findings.extend(check::containerd::findings(&node).await),
        Err(error) => findings.push(Finding::problem(
            "containerd",
            error.one_line(),
            "start containerd, or name its socket with --address",
        )),
    }
    print(global, &findings, || {
        findings.iter().map(Finding::line).collect()
    })?;
    let problems = findings
        .iter()
        .filter(|finding| finding.verdict == Verdict::Problem)
        .count();
    match problems {
        0 => Ok(()),
        1 => Err(Error::failed("there is 1 problem")),
        more => Err(Error::failed(format!("there are {more} problems"))),
    }
}
