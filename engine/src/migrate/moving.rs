//! What moves: a container, or all containers of a pod that run.

use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::manifest::{NotRunning, Pod};
use transship_containerd::Containerd;

use super::record::PendingPod;
use super::{Request, network};
use crate::checkpoint::check_options;
use crate::cri_pods::{CriPods, MadeOf};
use crate::error::Result;
use crate::kubelet;
use crate::moved_mark::check_front;
use crate::pod::{self, SourcePod};
use crate::pod_dirs::{self, SharedDirs};
use crate::pod_ended;
use crate::reasons::Reasons;
use crate::source::{self, SourceContainer};

/// What moves.
#[derive(Debug)]
pub(super) struct Moving {
    /// The container, or those of the pod, at least one.
    pub(super) containers: Vec<SourceContainer>,
    pub(super) pod: Option<MovingPod>,
}

/// What a pod has beside its containers.
#[derive(Debug)]
pub(super) struct MovingPod {
    pub(super) pod: Pod,
    /// Id of its sandbox.
    pub(super) sandbox: String,
    /// What the containers share.
    pub(super) dirs: SharedDirs,
    pub(super) not_running: Vec<NotRunning>,
    /// What its sandbox was made of.
    pub(super) made_of: MadeOf,
    /// What its containers were made of, in their order.
    pub(super) containers_made_of: Vec<String>,
}

impl Moving {
    /// Finds it, and checks that it can move; why not is kept, to be told with what the other node has against it.
    ///
    /// # Errors
    /// [`crate::Kind::NotFound`], or it is not known how to offer it.
    pub(super) async fn find(
        node: &Containerd,
        request: &Request,
        reasons: &mut Reasons,
    ) -> Result<Self> {
        match request.pod {
            Some(pod) => find_pod(node, request, pod.empty_dirs, reasons).await,
            None => Ok(Self {
                containers: vec![find_container(node, request, reasons).await?],
                pod: None,
            }),
        }
    }

    /// Id of the container, or of the pod's sandbox.
    pub(super) fn id(&self) -> &str {
        match &self.pod {
            Some(pod) => &pod.sandbox,
            None => self.containers.first().map_or("", |it| it.id()),
        }
    }

    /// What people call it.
    pub(super) fn called(&self) -> String {
        match &self.pod {
            Some(MovingPod { pod, .. }) => format!("the pod \"{}/{}\"", pod.namespace, pod.name),
            None => format!("{:?}", self.id()),
        }
    }

    /// The pod, for the record.
    pub(super) fn pending_pod(&self) -> Option<PendingPod> {
        let MovingPod { pod, .. } = self.pod.as_ref()?;
        Some(PendingPod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            containers: self
                .containers
                .iter()
                .map(|it| it.id().to_owned())
                .collect(),
        })
    }

    /// Bytes that will be sent, roughly.
    ///
    /// # Errors
    /// The answer of containerd, or an upperdir cannot be read.
    pub(super) async fn estimate(&self, node: &Containerd) -> Result<u64> {
        let mut bytes = 0;
        for container in &self.containers {
            bytes += container.estimate(node).await?;
        }
        if let Some(pod) = &self.pod {
            bytes += pod.dirs.estimate();
        }
        Ok(bytes)
    }
}

async fn find_container(
    node: &Containerd,
    request: &Request,
    reasons: &mut Reasons,
) -> Result<SourceContainer> {
    let (id, criu) = (&request.container, &request.target.criu);
    let mut container = source::find(node, id, criu, reasons).await?;
    reasons.keep(network::check(&mut container, request))?;
    // Without a file there, it would come along for nothing.
    let wanted = !request.leave_logs && request.target.log_uri.is_some();
    container.log = container.log.filter(|_| wanted);
    Ok(container)
}

async fn find_pod(
    node: &Containerd,
    request: &Request,
    empty_dirs: bool,
    reasons: &mut Reasons,
) -> Result<Moving> {
    let node = node.in_namespace(CRI_NAMESPACE)?;
    let found = pod::find(&node, &request.container, &request.target.criu, reasons).await?;
    let SourcePod {
        pod,
        sandbox,
        mut containers,
        ended,
    } = found;
    reasons.keep(check_options(&containers))?;
    if request.leave_logs {
        containers.iter_mut().for_each(|source| source.log = None);
    }
    if kubelet::seen().is_some() {
        reasons.keep(check_front(&pod, &containers))?;
    }
    let dirs = pod_dirs::find(&containers, &sandbox, empty_dirs)?;
    reasons.keep(pod_dirs::check_left_behind(&node, &containers, &sandbox, &dirs).await)?;
    let mut cri = CriPods::of(&node);
    let made_of = cri.made_of(&sandbox).await?;
    let mut containers_made_of = Vec::new();
    for source in &containers {
        let name = &source.container.name;
        containers_made_of.push(cri.container_made_of(name, source.id()).await?);
    }
    let not_running = pod_ended::not_running(&ended, &containers, &dirs, &sandbox);
    Ok(Moving {
        containers,
        pod: Some(MovingPod {
            pod,
            sandbox,
            dirs,
            not_running,
            made_of,
            containers_made_of,
        }),
    })
}
