//! `transship check`

use anyhow::{Result, bail};

use super::{connect, print};
use crate::args::Global;
use transship_engine::check::{self, Finding, Verdict};

pub(crate) async fn run(global: &Global) -> Result<()> {
    let mut findings = check::host::findings();
    match connect(global).await {
        Ok(node) => findings.extend(check::containerd::findings(&node).await),
        Err(error) => findings.push(Finding::problem(
            "containerd",
            format!("{error:#}"),
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
        1 => bail!("there is 1 problem"),
        more => bail!("there are {more} problems"),
    }
}
