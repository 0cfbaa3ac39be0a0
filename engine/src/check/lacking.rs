//! What another node lacks for what is about to go there, and what of that somebody accepts.
//!
//! ```text
//!  Needs of each container ─> of_all ─┐
//!  NodeFacts here, there ─────────────┴─> compare ─> without what the other node asks itself ─> refusal, or notes
//! ```

use std::collections::BTreeSet;
use std::str::FromStr;

use super::node_facts::NodeFacts;
use super::{Finding, Verdict, compare};
use crate::conditions::Needs;
use crate::error::{Error, Result};

/// What another node may be found to lack.
const NAMES: [&str; 6] = [
    "criu-version",
    "huge-pages",
    "limit",
    "memory",
    "processor",
    "security-module",
];
/// What the other node looks at itself, when it plans the copy: the programs that make it, and the room for its files
/// where they will be.
const ASKED_THERE: [&str; 4] = ["CRIU", "runtime", "containerd", "disk"];

/// What of a comparison may be lacking.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MayLack(BTreeSet<String>);

/// A name that no comparison has.
#[derive(Debug, thiserror::Error)]
#[error("what another node may lack is one of {}", NAMES.join(", "))]
pub struct UnknownLack;

impl FromStr for MayLack {
    type Err = UnknownLack;

    fn from_str(text: &str) -> std::result::Result<Self, UnknownLack> {
        let names: BTreeSet<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        match names.iter().all(|name| NAMES.contains(&name.as_str())) {
            true => Ok(Self(names)),
            false => Err(UnknownLack),
        }
    }
}

impl MayLack {
    fn contains(&self, finding: &Finding) -> bool {
        self.0.contains(&name(finding))
    }
}

fn name(finding: &Finding) -> String {
    finding.what.to_lowercase().replace(' ', "-")
}

/// Compares, before anything is frozen, and gives what is only worth a note.
///
/// # Errors
/// [`crate::Kind::Refused`] with all that is lacking and may not be.
pub(crate) fn check(
    called: &str,
    needs: &[&Needs],
    (here, there): (&NodeFacts, &NodeFacts),
    may: &MayLack,
) -> Result<Vec<Finding>> {
    let found = compare::findings(&of_all(needs), here, there);
    let found = { found.into_iter() }.filter(|finding| !ASKED_THERE.contains(&finding.what));
    let (lacking, notes): (Vec<_>, Vec<_>) =
        found.partition(|it| it.verdict == Verdict::Problem && !may.contains(it));
    if lacking.is_empty() {
        return Ok(notes);
    }
    let lines = lacking
        .iter()
        .map(|it| format!("{}: {}", it.what, it.text()));
    let lines = lines.collect::<Vec<_>>().join("; ");
    let error = Error::refused(format!("the other node lacks what {called} needs: {lines}"));
    let names: Vec<String> = { lacking.iter().map(name) }
        .filter(|name| NAMES.contains(&name.as_str()))
        .collect();
    Err(match names.is_empty() {
        true => error,
        false => error.hint(format!(
            "--may-lack {} moves it all the same",
            names.join(",")
        )),
    })
}

/// What containers that come together need of one node.
fn of_all(needs: &[&Needs]) -> Needs {
    let mut all = Needs::default();
    for one in needs {
        all.mappings = all.mappings.max(one.mappings);
        all.open_files = all.open_files.max(one.open_files);
        all.process_id = all.process_id.max(one.process_id);
        all.inotify_instances += one.inotify_instances;
        all.memory += one.memory;
        all.huge_pages += one.huge_pages;
        all.apparmor = all.apparmor.or_else(|| one.apparmor.clone());
        all.selinux = all.selinux.or_else(|| one.selinux.clone());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn needs(memory: u64, mappings: u64) -> Needs {
        Needs {
            memory,
            mappings,
            ..Needs::default()
        }
    }

    #[tokio::test]
    async fn what_is_lacking_is_refused_together_unless_it_may_be() {
        let here = NodeFacts::of_this(None).await.unwrap();
        let mut there = here.clone();
        there.free_memory = 1000;
        there.free_disk = 0;
        there.criu = None;
        there.processor.features.clear();
        let (one, two) = (needs(600, 5), needs(600, 7));
        let check = |may: &str, needs: &[&Needs]| {
            let may = may.parse().unwrap_or_default();
            super::check("web", needs, (&here, &there), &may)
        };
        let error = check("", &[&one, &two]).unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        let text = format!("{error:?}");
        assert!(text.contains("memory: it needs 1200 bytes"), "{text}");
        assert!(text.contains("processor,memory"), "{text}");
        assert!(!text.contains("CRIU") && !text.contains("disk"), "{text}");
        assert!(check("processor", &[&one, &two]).is_err());
        check("processor", &[&one]).unwrap();
        check("processor,memory", &[&one, &two]).unwrap();
    }

    #[tokio::test]
    async fn an_older_criu_is_refused_unless_it_may_be() {
        let here = NodeFacts {
            criu: Some("4.2.1".into()),
            ..NodeFacts::of_this(None).await.unwrap()
        };
        let there = NodeFacts {
            criu: Some("4.1".into()),
            ..here.clone()
        };
        let check = |may: &str| {
            let may = may.parse().unwrap_or_default();
            super::check("web", &[&needs(0, 0)], (&here, &there), &may)
        };
        let error = format!("{:?}", check("memory").unwrap_err());
        assert!(
            error.contains("4.1 there is older than 4.2.1 here"),
            "{error}"
        );
        assert!(error.contains("--may-lack criu-version"), "{error}");
        assert!(check("criu-version").is_ok());
    }

    #[tokio::test]
    async fn a_limit_above_the_other_nodes_is_refused() {
        let here = NodeFacts::of_this(None).await.unwrap();
        let mut there = here.clone();
        there.limits.insert("fs.nr_open".into(), 1024);
        there.limits.insert("vm.max_map_count".into(), 10);
        // As they come.
        let there = NodeFacts::parse(there.json().unwrap().as_bytes()).unwrap();
        let check = |may: &str, needs: &Needs| {
            let may = may.parse().unwrap_or_default();
            super::check("web", &[needs], (&here, &there), &may)
        };
        let files = Needs {
            open_files: 1025,
            ..Needs::default()
        };
        let error = format!("{:?}", check("memory", &files).unwrap_err());
        assert!(error.contains("fs.nr_open is 1024 there"), "{error}");
        let error = format!("{:?}", check("", &needs(0, 11)).unwrap_err());
        assert!(error.contains("vm.max_map_count is 10 there"), "{error}");
        check("limit", &needs(0, 11)).unwrap();
        check("", &needs(0, 10)).unwrap();
    }

    #[test]
    fn only_what_is_compared_may_be_lacking() {
        for nonsense in ["", "architecture", "processor,", "CRIU"] {
            assert!(nonsense.parse::<MayLack>().is_err(), "{nonsense:?}");
        }
    }
}
