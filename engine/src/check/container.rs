//! Whether a container, or those of a pod, can be moved: the conditions, and what another node lacks.

use serde::Serialize;
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::criu_options::CriuOverrides;
use transship_containerd::Containerd;

use super::compare;
use super::node_facts::NodeFacts;
use super::{Finding, Verdict};
use crate::conditions::{Found, Needs};
use crate::error::Result;
use crate::pod;
use crate::selection::Selection;
use crate::source;

/// One container that was looked at.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// What people call it.
    pub container: String,
    /// What was found; one line that all is well when nothing was.
    pub findings: Vec<Finding>,
}

/// Looks at a container or at all that run of a pod, whose emptyDirs come along or not; `there` is the node that it would
/// go to.
///
/// # Errors
/// [`crate::Kind::NotFound`], or it does not run.
pub async fn check(
    node: &Containerd,
    of: &Selection,
    criu: &CriuOverrides,
    empty_dirs: bool,
    there: Option<&NodeFacts>,
) -> Result<Vec<Checked>> {
    let looked = match of {
        Selection::Container(id) => vec![source::look_for(node, id, criu).await?],
        // The CRI's containers are in no other namespace.
        Selection::Pod(selector) => {
            pod::look(
                &node.in_namespace(CRI_NAMESPACE)?,
                selector,
                criu,
                empty_dirs,
            )
            .await?
        }
    };
    let here = match there {
        Some(_) => Some(NodeFacts::of_this(Some(node)).await?),
        None => None,
    };
    let mut checked = Vec::new();
    for looked in looked {
        let mut findings: Vec<Finding> = looked.found.iter().map(finding).collect();
        if let (Some(here), Some(there)) = (&here, there) {
            findings.extend(compare::findings(&looked.needs, here, there));
        }
        if findings.is_empty() {
            let all_is_well = "nothing is seen that keeps it from being moved";
            findings.push(Finding::ok("container", all_is_well));
        }
        checked.push(Checked {
            container: looked.called,
            findings,
        });
    }
    Ok(checked)
}

/// What any container of this node would come up against on the other one.
///
/// # Errors
/// The kernel does not tell about this node.
pub async fn compare_nodes(node: Option<&Containerd>, there: &NodeFacts) -> Result<Vec<Finding>> {
    let here = NodeFacts::of_this(node).await?;
    let mut findings = compare::findings(&Needs::default(), &here, there);
    if findings.is_empty() {
        findings.push(Finding::ok("node", "it has what this one has"));
    }
    Ok(findings)
}

fn finding(found: &Found) -> Finding {
    let condition = found.condition;
    match found.hinders() {
        true => Finding::problem(condition.name, found.text(), found.remedy()),
        false => Finding::note(condition.name, found.text(), found.remedy()),
    }
}

impl Checked {
    /// How many problems there are.
    pub fn problems(&self) -> usize {
        let problem = |finding: &&Finding| finding.verdict == Verdict::Problem;
        self.findings.iter().filter(problem).count()
    }

    /// For people.
    pub fn text(&self) -> String {
        let lines: String = self.findings.iter().map(Finding::line).collect();
        format!("{}\n{lines}", self.container)
    }
}
