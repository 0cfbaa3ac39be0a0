//! The pod on the source: all its containers, stopped at one moment.
//!
//! ```text
//!  selector --> sandbox record that runs --> container records of the sandbox --> those that run
//!               (CRI labels)       (annotation sandbox-id of the spec)
//! ```
//!
//! A pod is what the CRI made it: a sandbox container and the containers that name it. Both are in
//! containerd's namespace `k8s.io`.

use std::collections::BTreeSet;

use containerd_client::services::v1::Container as Record;
use tokio::time::timeout;
use transship_checkpoint::cri_names::annotations::SANDBOX_ID;
use transship_checkpoint::cri_names::labels;
use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::manifest::Pod;
use transship_checkpoint::spec::Spec;

use crate::cri_record::{self, is_sandbox};
use crate::error::{Error, Result};
use crate::pod_dirs;
use crate::pod_ended::{self, Ended};
use crate::reasons::Reasons;
use crate::source::{self, Looked, SourceContainer};
use crate::thaw;
use transship_containerd::Containerd;

/// A pod, with those of its containers that run.
#[derive(Debug)]
pub struct SourcePod {
    /// What kubelet calls it.
    pub pod: Pod,
    /// Id of its sandbox.
    pub sandbox: String,
    /// The containers that run.
    pub containers: Vec<SourceContainer>,
    /// The containers that do not run, which the checkpoint leaves out.
    pub ended: Vec<Ended>,
}

/// Finds the pod by the id of its sandbox (or the beginning of it), or by `namespace/name`. Why its containers cannot be
/// dumped is kept with other reasons.
pub(crate) async fn find(
    node: &Containerd,
    selector: &str,
    criu: &CriuOverrides,
    reasons: &mut Reasons,
) -> Result<SourcePod> {
    let records = node.all_containers().await?;
    let sandbox = find_sandbox(node, &records, selector).await?;
    let mut containers = Vec::new();
    let (mut stopped, mut is_whole) = (Vec::new(), true);
    for record in records
        .iter()
        .filter(|record| sandbox_of(record).as_deref() == Some(&sandbox.id))
    {
        match source::running_task(node, &record.id).await? {
            Ok(task) => {
                let inspected = source::inspect(node, record, &task, criu, reasons).await;
                match reasons.keep(inspected)? {
                    Some(container) => containers.push(container),
                    None => is_whole = false,
                }
            }
            Err(_) => stopped.push(record),
        }
    }
    if !is_whole {
        return std::mem::take(reasons).or(None);
    }
    if containers.is_empty() {
        let message = format!("the pod {selector:?} has no running container");
        return Err(Error::refused(message));
    }
    let ended = pod_ended::find(node, &stopped, &containers).await;
    let account = |source: &SourceContainer| source.pod.as_ref()?.service_account.clone();
    let pod = Pod {
        service_account: containers.iter().find_map(account),
        ..cri_record::pod_of(sandbox, node.namespace()).unwrap_or_default()
    };
    Ok(SourcePod {
        pod,
        sandbox: sandbox.id.clone(),
        containers,
        ended,
    })
}

/// Whether all of the sandbox's containers that run are those that were found: a kubelet may have started one since, which
/// would end with the pod. A containerd that does not answer in time has started none.
///
/// # Errors
/// It has, or the answer of containerd.
pub(crate) async fn check_no_other_runs(
    node: &Containerd,
    sandbox: &str,
    found: &BTreeSet<String>,
) -> Result<()> {
    let look = async {
        let of_pods = (labels::KIND, labels::KIND_CONTAINER);
        for record in node.containers_with(of_pods).await? {
            let is_other = !found.contains(&record.id);
            if is_other
                && sandbox_of(&record).as_deref() == Some(sandbox)
                && source::running_task(node, &record.id).await?.is_ok()
            {
                let name = record.labels.get(labels::CONTAINER_NAME);
                return Err(Error::failed(format!(
                    "the container {:?} of the pod has been started meanwhile",
                    name.unwrap_or(&record.id)
                ))
                .hint("move the pod again"));
            }
        }
        Ok(())
    };
    timeout(thaw::ANSWER, look).await.unwrap_or(Ok(()))
}

/// The sandbox with this id (or the beginning of it), or of `namespace/name` the one that runs.
pub(crate) async fn find_sandbox<'a>(
    node: &Containerd,
    records: &'a [Record],
    selector: &str,
) -> Result<&'a Record> {
    the_running_one(node, find_sandboxes(records, selector)?, selector).await
}

/// Looks at all containers of the pod that run; with `empty_dirs` the content of emptyDirs would come along.
pub async fn look(
    node: &Containerd,
    selector: &str,
    criu: &CriuOverrides,
    empty_dirs: bool,
) -> Result<Vec<Looked>> {
    let records = node.all_containers().await?;
    let sandbox = find_sandbox(node, &records, selector).await?;
    let mut looked = Vec::new();
    for record in records
        .iter()
        .filter(|record| sandbox_of(record).as_deref() == Some(&sandbox.id))
    {
        if let Ok(task) = source::running_task(node, &record.id).await? {
            let mut container = source::look(node, record, &task, criu).await?;
            if let Some(source) = &container.source {
                let of_volumes =
                    pod_dirs::conditions(node, source, &sandbox.id, empty_dirs).await?;
                container.found.extend(of_volumes);
            }
            looked.push(container);
        }
    }
    if looked.is_empty() {
        let message = format!("the pod {selector:?} has no running container");
        return Err(Error::refused(message));
    }
    Ok(looked)
}

/// Of the sandboxes of one pod the one that runs: kubelet keeps those that have ended for a while, and a pod
/// that is made again under its name has one more.
async fn the_running_one<'a>(
    node: &Containerd,
    found: Vec<&'a Record>,
    selector: &str,
) -> Result<&'a Record> {
    if let [one] = found.as_slice() {
        return Ok(one);
    }
    let mut running = Vec::new();
    for record in &found {
        if source::running_task(node, &record.id).await?.is_ok() {
            running.push(*record);
        }
    }
    match running.as_slice() {
        [one] => Ok(one),
        [] => Err(Error::refused(format!(
            "the pod {selector:?} has no running sandbox"
        ))),
        several => {
            let ids: Vec<&str> = several.iter().map(|record| record.id.as_str()).collect();
            let ids = ids.join(", ");
            let message = format!("{selector:?} means several pods that run: {ids}");
            Err(Error::refused(message).hint("name the pod by the id of its sandbox"))
        }
    }
}

fn find_sandboxes<'a>(records: &'a [Record], selector: &str) -> Result<Vec<&'a Record>> {
    let named = |record: &&Record| {
        let label = |name: &str| record.labels.get(name).map_or("", String::as_str);
        selector.split_once('/').is_some_and(|(namespace, name)| {
            label(labels::POD_NAMESPACE) == namespace && label(labels::POD_NAME) == name
        })
    };
    let found: Vec<&Record> = records
        .iter()
        .filter(|record| is_sandbox(record))
        .filter(|record| named(record) || (selector.len() >= 6 && record.id.starts_with(selector)))
        .collect();
    if found.is_empty() {
        return Err(Error::not_found(format!("there is no pod {selector:?}"))
            .hint("crictl pods; a pod is named by its id or as namespace/name"));
    }
    Ok(found)
}

/// The sandbox that a container belongs to; none for a sandbox itself.
pub(crate) fn sandbox_of(record: &Record) -> Option<String> {
    if is_sandbox(record) {
        return None;
    }
    let spec = Spec::parse(&record.spec.as_ref()?.value).ok()?;
    spec.annotations().remove(SANDBOX_ID)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(id: &str, name: &str) -> Record {
        let labels = [
            (labels::KIND, labels::KIND_SANDBOX),
            (labels::POD_NAMESPACE, "shop"),
            (labels::POD_NAME, name),
        ];
        let mut record = Record {
            id: id.into(),
            labels: labels
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Record::default()
        };
        let own = "io.cri-containerd.sandbox.metadata".to_owned();
        record.extensions.entry(own).or_default();
        record
    }

    #[test]
    fn a_pod_is_found_by_id_or_name() {
        let records = [
            sandbox("abcdef012345", "web"),
            sandbox("abcdef999999", "db"),
        ];
        for (selector, expected) in [
            ("abcdef0", vec![0]),
            ("shop/db", vec![1]),
            ("shop/none", vec![]),
            ("abcdef", vec![0, 1]),
        ] {
            let found = find_sandboxes(&records, selector).unwrap_or_default();
            let expected: Vec<_> = { expected.into_iter() }
                .map(|index: usize| &records[index])
                .collect();
            assert_eq!(found, expected, "{selector}");
        }
    }
}
