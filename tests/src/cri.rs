//! A CRI client that drives containerd as kubelet does: pods, containers, their states.
//!
//! Labels and annotations are kubelet's (`pkg/kubelet/kuberuntime/labels.go`): containerd and others
//! find a pod and its containers by them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use containerd_client::connect;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Status};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    Capability, CheckpointContainerRequest, ContainerConfig, ContainerMetadata, ContainerState,
    ContainerStatsRequest, ContainerStatus, ContainerStatusRequest, CreateContainerRequest,
    ExecSyncRequest, ExecSyncResponse, FilesystemUsage, IdMapping, ImageFsInfoRequest, ImageSpec,
    Int64Value, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListPodSandboxRequest, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
    PodSandboxStatus, PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, SecurityProfile, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest, UpdateContainerResourcesRequest, UserNamespace,
};
use tokio::runtime::Runtime;

use crate::error::TestbedError;
use crate::node::Node;
use crate::poll::poll_until;

/// How long a pod may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to the CRI of a node.
#[derive(Debug)]
pub struct Cri {
    client: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    runtime: Runtime,
    slices: bool,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Id of the sandbox.
    pub id: String,
    config: PodSandboxConfig,
}

/// What the containers of a pod share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodNamespaces {
    /// Network, IPC and host name.
    Usual,
    /// The process ids too (`shareProcessNamespace`).
    WithProcesses,
    /// IPC alone; network and host name are the node's (`hostNetwork`).
    HostNetwork,
    /// The usual ones, and users whose ids begin at 100000 on the node (`hostUsers: false`).
    WithUsers,
}

/// What a container of a pod is made of.
#[derive(Debug, Clone, Default)]
pub struct PodContainer<'a> {
    /// Its name in the pod.
    pub name: &'a str,
    /// Counts the attempts to run it, from 0.
    pub attempt: u32,
    /// Reference of the image.
    pub image: &'a str,
    /// The whole command line.
    pub command: &'a [&'a str],
    /// Directories of the node and where the container sees them.
    pub mounts: &'a [(&'a str, &'a str)],
    /// The same, mounted read-only.
    pub read_only_mounts: &'a [(&'a str, &'a str)],
    /// What its processes may do.
    pub security: PodSecurity<'a>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Limit of memory in bytes; 0 for none.
    pub memory_limit: i64,
}

/// The security context of a container, as far as the tests set it.
#[derive(Debug, Clone, Copy, Default)]
pub struct PodSecurity<'a> {
    /// User id; that of the image without one.
    pub user: Option<i64>,
    /// Group id of its processes and of their files; that of the user without one.
    pub group: Option<i64>,
    /// Capabilities that it has beyond containerd's default ones, without `CAP_`.
    pub added: &'a [&'a str],
    /// Default capabilities that it lacks; `ALL` is known.
    pub dropped: &'a [&'a str],
    /// Whether it cannot gain privileges by executing a file.
    pub no_new_privileges: bool,
    /// Whether containerd's default seccomp profile is in force; else none.
    pub default_seccomp: bool,
    /// Whether it has the masked and read-only paths that kubelet sends; else none.
    pub protected_paths: bool,
}

impl Pod {
    /// What kubelet calls this pod and no other.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |it| &it.uid)
    }

    /// The log file of a container of the pod.
    #[must_use]
    pub fn log_path(&self, container: &PodContainer<'_>) -> String {
        let (dir, attempt) = (&self.config.log_directory, container.attempt);
        format!("{dir}/{}/{attempt}.log", container.name)
    }
}

impl Pod {
    /// A pod that somebody else has run.
    pub fn of(id: String, config: PodSandboxConfig) -> Self {
        Self { id, config }
    }

    /// The same pod on another node, with the sandbox that it has there.
    pub fn under(&self, sandbox: String) -> Self {
        Self::of(sandbox, self.config.clone())
    }

    /// The same pod, with other annotations by now.
    #[must_use]
    pub fn annotated(&self, annotations: &[(&str, &str)]) -> Self {
        let mut config = self.config.clone();
        config.annotations = owned(annotations);
        Self::of(self.id.clone(), config)
    }

    /// Where the logs of its containers are, on the node.
    pub fn log_directory(&self) -> &str {
        &self.config.log_directory
    }
}

impl Node {
    /// Connects to the CRI of the node's containerd.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn cri(&self) -> Result<Cri, TestbedError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.map_err(|source| TestbedError::cri("make a runtime", source))?;
        let socket = self.path_from_outside("/run/containerd/containerd.sock");
        let channel = runtime
            .block_on(connect(socket))
            .map_err(|source| TestbedError::cri("connect", source))?;
        Ok(Cri {
            client: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            runtime,
            slices: false,
        })
    }
}

impl Cri {
    /// Its pods have slices of systemd for cgroup parents, as with kubelet's systemd driver.
    #[must_use]
    pub fn with_slices(mut self) -> Self {
        self.slices = true;
        self
    }

    /// What images take on disk, as kubelet asks before it collects garbage. containerd counts every
    /// ten seconds.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn image_usage(&self) -> Result<Vec<FilesystemUsage>, TestbedError> {
        let mut images = self.images.clone();
        let answer = self
            .runtime
            .block_on(images.image_fs_info(ImageFsInfoRequest {}))
            .map_err(|source| TestbedError::cri("ask for the usage of images", source))?;
        Ok(answer.into_inner().image_filesystems)
    }

    /// Runs a sandbox for the pod `namespace`/`name`.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_pod(
        &self,
        (namespace, name): (&str, &str),
        annotations: &[(&str, &str)],
        namespaces: PodNamespaces,
    ) -> Result<Pod, TestbedError> {
        self.run_pod_with_sysctls((namespace, name), annotations, namespaces, &[])
    }

    /// The same, with sysctls that the pod asks for.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_pod_with_sysctls(
        &self,
        (namespace, name): (&str, &str),
        annotations: &[(&str, &str)],
        namespaces: PodNamespaces,
        sysctls: &[(&str, &str)],
    ) -> Result<Pod, TestbedError> {
        let config = self.pod_config((namespace, name), annotations, namespaces, sysctls);
        self.run_sandbox(config)
    }

    /// The same as [`Self::run_pod`], after `prepare`, which makes what is on the node before the sandbox.
    ///
    /// # Errors
    /// What containerd answers, or `prepare`.
    pub fn run_pod_after(
        &self,
        prepare: impl FnOnce(&Pod) -> Result<(), TestbedError>,
        (namespace, name): (&str, &str),
        annotations: &[(&str, &str)],
        namespaces: PodNamespaces,
    ) -> Result<Pod, TestbedError> {
        let config = self.pod_config((namespace, name), annotations, namespaces, &[]);
        let planned = Pod {
            id: String::new(),
            config,
        };
        prepare(&planned)?;
        self.run_sandbox(planned.config)
    }

    fn pod_config(
        &self,
        (namespace, name): (&str, &str),
        annotations: &[(&str, &str)],
        namespaces: PodNamespaces,
        sysctls: &[(&str, &str)],
    ) -> PodSandboxConfig {
        // One pod after the other may have the same name.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let uid = format!("uid-{name}-{}-{count}", std::process::id());
        let cgroup_parent = if self.slices {
            // A dash in a slice's name goes one level down.
            format!("kubepods-pod{}.slice", uid.replace('-', "_"))
        } else {
            format!("/kubepods/pod{uid}")
        };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: namespace.to_owned(),
                attempt: 0,
            }),
            // kubelet leaves it to the runtime when it is the node's.
            hostname: match namespaces {
                PodNamespaces::HostNetwork => String::new(),
                _ => name.to_owned(),
            },
            log_directory: format!("/var/log/pods/{namespace}_{name}_{uid}"),
            labels: kubelet_labels(namespace, name, &uid),
            annotations: owned(annotations),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent,
                sysctls: owned(sysctls),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces.options()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs the next sandbox of a pod whose sandbox has ended, as kubelet does it: the same pod,
    /// one attempt more.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_pod_again(&self, pod: &Pod) -> Result<Pod, TestbedError> {
        let mut config = pod.config.clone();
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt += 1;
        }
        self.run_sandbox(config)
    }

    fn run_sandbox(&self, config: PodSandboxConfig) -> Result<Pod, TestbedError> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            ..Default::default()
        };
        let id = self.call("run the sandbox", |mut client| async move {
            client.run_pod_sandbox(request).await
        })?;
        Ok(Pod {
            id: id.pod_sandbox_id,
            config,
        })
    }

    /// The pod's address.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pod_ip(&self, pod: &Pod) -> Result<String, TestbedError> {
        Ok(self.pod_status(pod)?.network.unwrap_or_default().ip)
    }

    /// Creates a container of the pod and gives its id.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn create_container(
        &self,
        pod: &Pod,
        container: &PodContainer<'_>,
    ) -> Result<String, TestbedError> {
        let mut labels = pod.config.labels.clone();
        labels.insert(
            "io.kubernetes.container.name".to_owned(),
            container.name.to_owned(),
        );
        let mount = |readonly: bool| {
            move |(host, inside): &(&str, &str)| Mount {
                host_path: (*host).to_owned(),
                container_path: (*inside).to_owned(),
                readonly,
                ..Default::default()
            }
        };
        let writable = container.mounts.iter().map(mount(false));
        let read_only = container.read_only_mounts.iter().map(mount(true));
        let sandbox = pod
            .config
            .linux
            .clone()
            .unwrap_or_default()
            .security_context;
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: container.name.to_owned(),
                attempt: container.attempt,
            }),
            image: Some(ImageSpec {
                image: container.image.to_owned(),
                ..Default::default()
            }),
            command: container
                .command
                .iter()
                .map(|word| (*word).to_owned())
                .collect(),
            mounts: writable.chain(read_only).collect(),
            tty: container.tty,
            stdin: container.tty,
            annotations: owned(&[
                ("io.kubernetes.container.hash", "c0ffee"),
                (
                    "io.kubernetes.container.restartCount",
                    &container.attempt.to_string(),
                ),
            ]),
            labels,
            log_path: format!("{}/{}.log", container.name, container.attempt),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: sandbox.and_then(|context| context.namespace_options),
                    ..container.security.context()
                }),
                resources: (container.memory_limit > 0).then(|| LinuxContainerResources {
                    memory_limit_in_bytes: container.memory_limit,
                    memory_swap_limit_in_bytes: container.memory_limit,
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self.call("create the container", |mut client| async move {
            client.create_container(request).await
        })?;
        Ok(answer.container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn start_container(&self, id: &str) -> Result<(), TestbedError> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.call("start the container", |mut client| async move {
            client.start_container(request).await
        })
        .map(drop)
    }

    /// Starts a created container, unless that takes longer than `deadline`: then the call is
    /// cancelled, as kubelet does it.
    ///
    /// # Errors
    /// What containerd answers, or that the deadline has passed.
    pub fn start_container_within(&self, id: &str, deadline: Duration) -> Result<(), TestbedError> {
        let mut request = Request::new(StartContainerRequest {
            container_id: id.to_owned(),
        });
        request.set_timeout(deadline);
        self.call("start the container", |mut client| async move {
            client.start_container(request).await
        })
        .map(drop)
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_container(
        &self,
        pod: &Pod,
        container: &PodContainer<'_>,
    ) -> Result<String, TestbedError> {
        let id = self.create_container(pod, container)?;
        self.start_container(&id)?;
        Ok(id)
    }

    /// Has containerd write a checkpoint of a container into the file `location` of the node, as kubelet does.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn checkpoint_container(&self, id: &str, location: &str) -> Result<(), TestbedError> {
        let request = CheckpointContainerRequest {
            container_id: id.to_owned(),
            location: location.to_owned(),
            timeout: 0,
        };
        self.call("checkpoint the container", |mut client| async move {
            client.checkpoint_container(request).await
        })
        .map(drop)
    }

    /// Stops a container: SIGTERM, and SIGKILL after `grace` seconds.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stop_container(&self, id: &str, grace: i64) -> Result<(), TestbedError> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: grace,
        };
        self.call("stop the container", |mut client| async move {
            client.stop_container(request).await
        })
        .map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove_container(&self, id: &str) -> Result<(), TestbedError> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.call("remove the container", |mut client| async move {
            client.remove_container(request).await
        })
        .map(drop)
    }

    /// What containerd says of a container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn status(&self, id: &str) -> Result<ContainerStatus, TestbedError> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.call("read the container", |mut client| async move {
            client.container_status(request).await
        })?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Whether a container runs.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn runs(&self, id: &str) -> Result<bool, TestbedError> {
        Ok(self.status(id)?.state() == ContainerState::ContainerRunning)
    }

    /// Bytes of memory that the container uses, by its stats.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn memory_usage(&self, id: &str) -> Result<u64, TestbedError> {
        let request = ContainerStatsRequest {
            container_id: id.to_owned(),
        };
        let answer = self.call("read the stats", |mut client| async move {
            client.container_stats(request).await
        })?;
        let memory = answer.stats.and_then(|stats| stats.memory);
        Ok(memory
            .and_then(|memory| memory.usage_bytes.or(memory.working_set_bytes))
            .map_or(0, |bytes| bytes.value))
    }

    /// Changes the memory limit of a running container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn limit_memory(&self, id: &str, bytes: i64) -> Result<(), TestbedError> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(LinuxContainerResources {
                memory_limit_in_bytes: bytes,
                memory_swap_limit_in_bytes: bytes,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.call("update the container", |mut client| async move {
            client.update_container_resources(request).await
        })
        .map(drop)
    }

    /// Whether the sandbox runs.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pod_runs(&self, pod: &Pod) -> Result<bool, TestbedError> {
        Ok(self.pod_status(pod)?.state() == PodSandboxState::SandboxReady)
    }

    fn pod_status(&self, pod: &Pod) -> Result<PodSandboxStatus, TestbedError> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        let answer = self.call("read the sandbox", |mut client| async move {
            client.pod_sandbox_status(request).await
        })?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Runs a command in a container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<ExecSyncResponse, TestbedError> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 20,
        };
        self.call("exec in the container", |mut client| async move {
            client.exec_sync(request).await
        })
    }

    /// Stops a pod: its containers and its sandbox end.
    ///
    /// # Errors
    /// What containerd answers at last.
    pub fn stop_pod(&self, pod: &Pod) -> Result<(), TestbedError> {
        poll_until("the end of the pod", PATIENCE, || {
            let request = StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            // As kubelet does: a shim that ends in the middle of the call is an error of it (containerd 2.1).
            self.call("stop the sandbox", |mut client| async move {
                client.stop_pod_sandbox(request).await
            })
            .map_err(|error| error.to_string())
        })
        .map(drop)
    }

    /// Removes all pods of the node, whoever has made them.
    ///
    /// # Errors
    /// The answer of containerd.
    pub fn remove_all_pods(&self) -> Result<(), TestbedError> {
        let all = self.call("list the sandboxes", |mut client| async move {
            let request = ListPodSandboxRequest::default();
            client.list_pod_sandbox(request).await
        })?;
        for sandbox in all.items {
            self.remove_pod(&Pod::of(sandbox.id, PodSandboxConfig::default()))?;
        }
        Ok(())
    }

    /// Stops and removes a pod with all its containers.
    ///
    /// # Errors
    /// What containerd answers at last.
    pub fn remove_pod(&self, pod: &Pod) -> Result<(), TestbedError> {
        self.stop_pod(pod)?;
        poll_until("the removal of the pod", PATIENCE, || {
            let remove = RemovePodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            self.call("remove the sandbox", |mut client| async move {
                client.remove_pod_sandbox(remove).await
            })
            .map_err(|error| error.to_string())
        })
        .map(drop)
    }

    pub(crate) fn call<T, F>(
        &self,
        act: &'static str,
        call: impl FnOnce(RuntimeServiceClient<Channel>) -> F,
    ) -> Result<T, TestbedError>
    where
        F: Future<Output = Result<containerd_client::tonic::Response<T>, Status>>,
    {
        self.runtime
            .block_on(call(self.client.clone()))
            .map(containerd_client::tonic::Response::into_inner)
            .map_err(|status| TestbedError::cri(act, status))
    }
}

impl PodSecurity<'_> {
    /// What containerd gives a container whose pod says nothing.
    pub const NONE: PodSecurity<'static> = PodSecurity {
        user: None,
        group: None,
        added: &[],
        dropped: &[],
        no_new_privileges: false,
        default_seccomp: false,
        protected_paths: false,
    };

    fn context(&self) -> LinuxContainerSecurityContext {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let profile = |kind: ProfileType| SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: String::new(),
        };
        LinuxContainerSecurityContext {
            run_as_user: self.user.map(|value| Int64Value { value }),
            run_as_group: self.group.map(|value| Int64Value { value }),
            supplemental_groups: self.group.into_iter().collect(),
            capabilities: Some(Capability {
                add_capabilities: owned(self.added),
                drop_capabilities: owned(self.dropped),
                ..Default::default()
            }),
            no_new_privs: self.no_new_privileges,
            masked_paths: match self.protected_paths {
                true => owned(&["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"]),
                false => Vec::new(),
            },
            readonly_paths: match self.protected_paths {
                true => owned(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]),
                false => Vec::new(),
            },
            seccomp: self
                .default_seccomp
                .then(|| profile(ProfileType::RuntimeDefault)),
            ..Default::default()
        }
    }
}

impl PodNamespaces {
    fn options(self) -> NamespaceOption {
        let pid = match self {
            PodNamespaces::WithProcesses => NamespaceMode::Pod,
            _ => NamespaceMode::Container,
        };
        let network = match self {
            PodNamespaces::HostNetwork => NamespaceMode::Node,
            _ => NamespaceMode::Pod,
        };
        let ids = || IdMapping {
            host_id: 100_000,
            container_id: 0,
            length: 65_536,
        };
        NamespaceOption {
            userns_options: (self == PodNamespaces::WithUsers).then(|| UserNamespace {
                mode: NamespaceMode::Pod.into(),
                uids: vec![ids()],
                gids: vec![ids()],
            }),
            network: network.into(),
            ipc: NamespaceMode::Pod.into(),
            pid: pid.into(),
            ..Default::default()
        }
    }
}

fn kubelet_labels(namespace: &str, name: &str, uid: &str) -> HashMap<String, String> {
    owned(&[
        ("io.kubernetes.pod.name", name),
        ("io.kubernetes.pod.namespace", namespace),
        ("io.kubernetes.pod.uid", uid),
    ])
}

fn owned(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
