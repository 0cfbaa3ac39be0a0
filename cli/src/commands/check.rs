//! `transship check`

use std::path::Path;

use transship_engine::check::container::{self, Checked};
use transship_engine::check::node_facts::NodeFacts;
use transship_engine::check::{self, Finding, Verdict};
use transship_engine::checkpoint::Selection;
use transship_engine::{Context as _, Error, Result};

use super::{connect, print};
use crate::args::{CheckArgs, Global, VolumesArg};

pub(crate) async fn run(global: &Global, args: CheckArgs) -> Result<()> {
    if args.node {
        let facts = NodeFacts::of_this(connect(global).await.ok().as_ref()).await?;
        return super::print_line(&super::json(&facts)?);
    }
    let there = args.other.as_deref().map(read_facts).transpose()?;
    let of = match (args.container, args.pod) {
        (Some(id), _) => Some(Selection::Container(id)),
        (None, pod) => pod.map(Selection::Pod),
    };
    if let Some(of) = of {
        let node = connect(global).await?;
        let (criu, there) = (args.criu.overrides(), there.as_ref());
        let empty_dirs = args.volumes.contains(&VolumesArg::EmptyDir);
        let checked = container::check(&node, &of, &criu, empty_dirs, there).await?;
        print(global, &checked, || {
            checked.iter().map(Checked::text).collect()
        })?;
        return verdict(checked.iter().map(Checked::problems).sum());
    }
    let findings = match there {
        Some(there) => {
            container::compare_nodes(connect(global).await.ok().as_ref(), &there).await?
        }
        None => of_this_node(global).await,
    };
    print(global, &findings, || {
        findings.iter().map(Finding::line).collect()
    })?;
    let problem = |finding: &&Finding| finding.verdict == Verdict::Problem;
    verdict(findings.iter().filter(problem).count())
}

async fn of_this_node(global: &Global) -> Vec<Finding> {
    let mut findings = check::host::findings();
    match connect(global).await {
        Ok(node) => findings.extend(check::containerd::findings(&node).await),
        Err(error) => findings.push(Finding::problem(
            "containerd",
            error.one_line(),
            "start containerd, or name its socket with --address",
        )),
    }
    findings
}

fn read_facts(file: &Path) -> Result<NodeFacts> {
    let failed = || format!("cannot read {}", file.display());
    let json = std::fs::read(file).with_context(failed)?;
    NodeFacts::parse(&json).with_context(failed)
}

fn verdict(problems: usize) -> Result<()> {
    match problems {
        0 => Ok(()),
        1 => Err(Error::failed("there is 1 problem")),
        more => Err(Error::failed(format!("there are {more} problems"))),
    }
}
