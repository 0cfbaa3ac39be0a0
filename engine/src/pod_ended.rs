//! The containers of a pod that do not run when it is dumped.
//!
//! ```text
//!  records without a task --CRI status--> Ended {name, exit code}, the last attempt of each name
//!    `--> NotRunning in the manifest; `done`: ended with 0, `failed`: with another code; and what it left for the others
//!         comes along
//! ```
//!
//! An init container that has ended with 0 must not run again beside containers that have its results: a
//! database would be made a second time where there is one. But what it wrote into an emptyDir that the
//! checkpoint leaves behind has to be written again. One that has failed has failed: whether it runs once more is for the
//! restart policy of the pod, which is kubelet's to know.

use std::collections::BTreeMap;

use containerd_client::services::v1::Container as Record;
use k8s_cri::v1::ContainerStatusRequest;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use transship_checkpoint::manifest::{NotRunning, check_name};
use transship_checkpoint::shared_dirs::SharedDir;
use transship_checkpoint::spec::Spec;
use transship_containerd::Containerd;
use transship_sandbox::shared_dirs::shared_mounts;

use crate::cri_record::name_in_pod;
use crate::pod_dirs::SharedDirs;
use crate::source::SourceContainer;

/// A container that does not run.
#[derive(Debug)]
pub struct Ended {
    /// Its name in the pod.
    pub name: String,
    /// With which code it has ended; none where the CRI does not say, or it was never started.
    pub exit_code: Option<i32>,
    /// Its spec, as JSON.
    spec: Vec<u8>,
}

/// Of each name that none of `running` has the last attempt.
pub(crate) async fn find(
    node: &Containerd,
    stopped: &[&Record],
    running: &[SourceContainer],
) -> Vec<Ended> {
    let mut cri = RuntimeServiceClient::new(node.channel());
    let mut last = BTreeMap::new();
    for record in stopped {
        let Some(name) = name_in_pod(record, node.namespace()) else {
            continue;
        };
        // It becomes part of the manifest.
        let plain = check_name("the container's name", name).is_ok();
        if !plain || running.iter().any(|source| source.container.name == name) {
            continue;
        }
        let request = ContainerStatusRequest {
            container_id: record.id.clone(),
            ..ContainerStatusRequest::default()
        };
        // One that the CRI has lost runs again.
        let status = cri.container_status(request).await.ok();
        let status = status.and_then(|answer| answer.into_inner().status);
        let attempt = { status.as_ref() }
            .and_then(|status| status.metadata.as_ref())
            .map_or(0, |metadata| metadata.attempt);
        let ended = Ended {
            name: name.to_owned(),
            exit_code: { status.filter(|it| it.finished_at > 0) }.map(|status| status.exit_code),
            spec: record.spec.clone().unwrap_or_default().value,
        };
        match last.get(name) {
            Some((before, _)) if *before > attempt => {}
            _ => drop(last.insert(name.to_owned(), (attempt, ended))),
        }
    }
    last.into_values().map(|(_, ended)| ended).collect()
}

/// What the manifest says of them.
pub(crate) fn not_running(
    ended: &[Ended],
    running: &[SourceContainer],
    exported: &SharedDirs,
    sandbox: &str,
) -> Vec<NotRunning> {
    let volumes = |spec: &[u8]| -> Vec<SharedDir> {
        let mounts = Spec::parse(spec).map(|spec| shared_mounts(&spec, sandbox));
        let dirs = mounts.into_iter().flatten().map(|mount| mount.dir);
        dirs.filter(|dir| *dir != SharedDir::Shm).collect()
    };
    let used: Vec<SharedDir> = { running.iter() }
        .flat_map(|source| volumes(&source.spec))
        .collect();
    let left_behind = |dir: &SharedDir| used.contains(dir) && !exported.contains(dir);
    let one = |it: &Ended| {
        let runs_again = volumes(&it.spec).iter().any(left_behind);
        let code = it.exit_code.filter(|_| !runs_again);
        NotRunning {
            name: it.name.clone(),
            done: code == Some(0),
            failed: code.and_then(|code| code.try_into().ok().filter(|code| *code != 0)),
        }
    };
    ended.iter().map(one).collect()
}
