//! What a pod that is migrated here may ask of this node.
//!
//! The configurations of its sandbox and containers come with the stream, and whoever sends it has written them. On a
//! node of Kubernetes the API server decides what a pod may have; here it is what every ordinary pod has, and what
//! the node's operator allows by name, as with containers outside of pods
//! ([`transship_sandbox::admission::foreign_spec`]). The messages are read whole ([`super::go_json`]), so each of
//! their fields has its rule here, or gives nothing that a container would not have anyway.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    ContainerConfig, NamespaceMode, NamespaceOption, PodSandboxConfig, SecurityProfile,
};
use transship_checkpoint::annotations::PREFIX;
use transship_sandbox::admission::foreign_spec::{Allow, CAPABILITIES, MASKED, READ_ONLY, Refusal};

/// Where kubelet keeps the volumes of its pods.
const KUBELET_PODS: &str = "/var/lib/kubelet/pods";
const EMPTY_DIRS: &str = "volumes/kubernetes.io~empty-dir";
/// Where kubelet has the logs of its pods.
const LOGS: &str = "/var/log/pods/";
/// Below which kubelet makes the cgroups of its pods: cgroupfs, and slices of systemd.
const CGROUP_PARENTS: [&str; 2] = ["/kubepods", "kubepods"];
/// What kubelet and the CRI annotate themselves.
const ANNOTATIONS: [&str; 2] = ["io.kubernetes.", "kubernetes.io/config."];
/// Labels that mean something to containerd or its CRI.
const RESERVED_LABELS: [&str; 2] = ["containerd.io/", "io.cri-containerd"];

/// Where kubelet has an emptyDir of the pod; both names are plain.
pub(super) fn place_of_empty_dir(uid: &str, volume: &str) -> PathBuf {
    [KUBELET_PODS, uid, EMPTY_DIRS, volume].iter().collect()
}

/// The emptyDir of the pod that is at this path; `None` for whatever else is there.
pub(super) fn empty_dir<'p>(uid: &str, path: &'p str) -> Option<&'p Path> {
    let path = Path::new(path);
    let dir = Path::new(KUBELET_PODS).join(uid).join(EMPTY_DIRS);
    let volume = path.strip_prefix(dir).ok()?;
    let mut parts = volume.components();
    let plain = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
    plain.then_some(path)
}

/// Takes away what is containerd's own to write.
pub(super) fn drop_reserved(sandbox: &mut PodSandboxConfig, containers: &mut [ContainerConfig]) {
    let own = |key: &str| RESERVED_LABELS.iter().any(|prefix| key.starts_with(prefix));
    sandbox.labels.retain(|key, _| !own(key));
    for container in containers {
        container.labels.retain(|key, _| !own(key));
    }
}

/// What the sandbox asks for and only the operator can give.
pub(super) fn of_sandbox(config: &PodSandboxConfig) -> Vec<Refusal> {
    let mut found = Vec::new();
    annotations(config.annotations.keys(), &mut found);
    let own = own_logs(config);
    if !config.log_directory.is_empty() && own.as_ref() != Some(&config.log_directory) {
        let what = format!("has its logs in {:?}", config.log_directory);
        refuse(&mut found, Allow::HostMounts, what);
    }
    for port in config.port_mappings.iter().filter(|it| it.host_port != 0) {
        let what = format!("wants the port {} of the node", port.host_port);
        refuse(&mut found, Allow::HostNamespaces, what);
    }
    if config.windows.is_some() {
        refuse(&mut found, Allow::OtherFields, "is one of Windows");
    }
    let linux = config.linux.clone().unwrap_or_default();
    let parent = &linux.cgroup_parent;
    let known = |prefix: &str| parent.starts_with(prefix);
    if !parent.is_empty() && (!CGROUP_PARENTS.iter().any(|it| known(it)) || has_dots(parent)) {
        let what = format!("wants its cgroup in {parent:?}");
        refuse(&mut found, Allow::CgroupPath, what);
    }
    let security = linux.security_context.unwrap_or_default();
    if security.privileged {
        let what = "has a sandbox for privileged containers";
        refuse(&mut found, Allow::UnmaskedPaths, what);
    }
    if security.selinux_options.is_some() {
        refuse(&mut found, Allow::OtherFields, "chooses its SELinux label");
    }
    apparmor(security.apparmor.as_ref(), "", &mut found);
    namespaces(security.namespace_options.as_ref(), &mut found);
    found
}

/// Whether a container of the pod with this uid has files that a kubelet makes for it beside emptyDirs: its hosts, the token of
/// its service account, what it says at its end.
pub(super) fn has_files_of_kubelet(config: &ContainerConfig, uid: &str) -> bool {
    let own = Path::new(KUBELET_PODS).join(uid);
    let mut paths = config.mounts.iter().map(|mount| &mount.host_path);
    paths.any(|path| Path::new(path).starts_with(&own) && empty_dir(uid, path).is_none())
}

/// Where kubelet has the logs of this pod; `None` where its names make no single name of a directory.
fn own_logs(config: &PodSandboxConfig) -> Option<String> {
    let it = config.metadata.as_ref()?;
    let name = format!("{}_{}_{}", it.namespace, it.name, it.uid);
    (!name.contains('/')).then(|| format!("{LOGS}{name}"))
}

/// What a container of the pod with this uid asks for and only the operator can give.
pub(super) fn of_container(config: &ContainerConfig, uid: &str) -> Vec<Refusal> {
    let mut found = Vec::new();
    annotations(config.annotations.keys(), &mut found);
    log_place(&config.log_path, &mut found);
    for mount in &config.mounts {
        if mount.image.is_some() {
            let what = format!("mounts an image on {}", mount.container_path);
            refuse(&mut found, Allow::OtherFields, what);
        } else if empty_dir(uid, &mount.host_path).is_none() {
            let what = format!("mounts {} on {}", mount.host_path, mount.container_path);
            refuse(&mut found, Allow::HostMounts, what);
        }
    }
    let devices = config.devices.iter().map(|device| &device.host_path);
    for device in devices.chain(config.cdi_devices.iter().map(|device| &device.name)) {
        let what = format!("has the device {device}");
        refuse(&mut found, Allow::Devices, what);
    }
    if config.windows.is_some() {
        refuse(&mut found, Allow::OtherFields, "is one of Windows");
    }
    let linux = config.linux.clone().unwrap_or_default();
    let resources = linux.resources.unwrap_or_default();
    if resources.oom_score_adj < 0 {
        let what = "wants to be spared when memory is short";
        refuse(&mut found, Allow::OtherFields, what);
    }
    // Kubelet sets it on cgroup v2 since 1.28: which of the container's own processes are killed with another one.
    let files = resources.unified.keys();
    if { files }.any(|file| file != "memory.oom.group") {
        refuse(&mut found, Allow::OtherFields, "sets files of its cgroup");
    }
    let security = linux.security_context.unwrap_or_default();
    if security.privileged {
        for allow in [Allow::Capabilities, Allow::Devices, Allow::UnmaskedPaths] {
            refuse(&mut found, allow, "is privileged");
        }
    } else {
        for (what, required, there) in [
            ("hidden", &MASKED, &security.masked_paths),
            ("read-only", &READ_ONLY, &security.readonly_paths),
        ] {
            let there: BTreeSet<&str> = there.iter().map(String::as_str).collect();
            let missing: Vec<_> = { required.iter().copied() }
                .filter(|path| !there.contains(path))
                .collect();
            if !missing.is_empty() {
                let what = format!("wants {} not to be {what}", missing.join(", "));
                refuse(&mut found, Allow::UnmaskedPaths, what);
            }
        }
    }
    let capabilities = security.capabilities.unwrap_or_default();
    let added =
        { capabilities.add_capabilities.iter() }.chain(&capabilities.add_ambient_capabilities);
    let more: Vec<&str> = added
        .map(String::as_str)
        .filter(|name| !is_ordinary(name))
        .collect();
    if !more.is_empty() {
        let what = format!("has {}", more.join(", "));
        refuse(&mut found, Allow::Capabilities, what);
    }
    if security.selinux_options.is_some() {
        refuse(&mut found, Allow::OtherFields, "chooses its SELinux label");
    }
    #[expect(deprecated, reason = "containerd still obeys it")]
    let by_name = security.apparmor_profile.as_str();
    apparmor(security.apparmor.as_ref(), by_name, &mut found);
    namespaces(security.namespace_options.as_ref(), &mut found);
    found
}

/// Seccomp has no such rule: kubelet gives most pods no filter, and another profile is never less than that.
fn apparmor(profile: Option<&SecurityProfile>, by_name: &str, found: &mut Vec<Refusal>) {
    let of_node = profile.is_none_or(|it| it.profile_type() == ProfileType::RuntimeDefault);
    if !of_node || !matches!(by_name, "" | "runtime/default") {
        refuse(found, Allow::OtherFields, "chooses its AppArmor profile");
    }
}

fn is_ordinary(capability: &str) -> bool {
    let name = capability.to_uppercase();
    let plain = name.trim_start_matches("CAP_");
    CAPABILITIES
        .iter()
        .any(|it| it.trim_start_matches("CAP_") == plain)
}

fn annotations<'k>(keys: impl Iterator<Item = &'k String>, found: &mut Vec<Refusal>) {
    let ours =
        |key: &str| key.starts_with(PREFIX) || ANNOTATIONS.iter().any(|it| key.starts_with(it));
    let mut others: Vec<&String> = keys.filter(|key| !ours(key)).collect();
    others.sort();
    for key in others {
        let what = format!("has the annotation {key:?}, which a part of this node may act on");
        refuse(found, Allow::OtherFields, what);
    }
}

/// containerd writes a log at whatever path it is told.
fn log_place(path: &str, found: &mut Vec<Refusal>) {
    if path.starts_with('/') || has_dots(path) {
        refuse(
            found,
            Allow::HostMounts,
            format!("has its logs in {path:?}"),
        );
    }
}

fn has_dots(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    parts.any(|part| part == Component::ParentDir)
}

fn namespaces(options: Option<&NamespaceOption>, found: &mut Vec<Refusal>) {
    let Some(options) = options else { return };
    for (kind, mode) in [
        ("network", options.network()),
        ("pid", options.pid()),
        ("ipc", options.ipc()),
    ] {
        match mode {
            NamespaceMode::Pod | NamespaceMode::Container => {}
            NamespaceMode::Node => {
                let what = format!("wants the {kind} namespace of the node");
                refuse(found, Allow::HostNamespaces, what);
            }
            NamespaceMode::Target => {
                let what = format!("wants the {kind} namespace of another container");
                refuse(found, Allow::OtherFields, what);
            }
        }
    }
}

fn refuse(found: &mut Vec<Refusal>, allow: Allow, what: impl Into<String>) {
    found.push(Refusal {
        what: what.into(),
        allow,
    });
}

#[cfg(test)]
mod tests {
    use super::super::go_json;
    use super::*;

    const UID: &str = "uid-1";

    fn of_json(json: &str) -> Vec<Allow> {
        let refusals = of_container(&go_json::read(json).unwrap(), UID);
        refusals.into_iter().map(|refusal| refusal.allow).collect()
    }

    fn container(more: &str) -> String {
        let paths = |paths: [&str; 5]| format!("{paths:?}");
        format!(
            r#"{{"log_path":"web/0.log","annotations":{{"io.kubernetes.container.hash":"1"}},
            "mounts":[{{"host_path":"/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~empty-dir/work",
            "container_path":"/work"}}],"linux":{{"security_context":{{"masked_paths":{},
            "readonly_paths":{},"capabilities":{{"add_capabilities":["CHOWN"]}}{more}}}}}}}"#,
            paths(MASKED),
            paths(READ_ONLY)
        )
    }

    #[test]
    fn what_every_container_has_is_nobodys_to_allow() {
        assert_eq!(of_json(&container("")), []);
        for (more, allow) in [
            (r#","namespace_options":{"pid":2}"#, Allow::HostNamespaces),
            (r#","selinux_options":{"type":"spc_t"}"#, Allow::OtherFields),
            (r#","apparmor":{"profile_type":1}"#, Allow::OtherFields),
            (
                r#","apparmor":{"profile_type":2,"localhost_ref":"x"}"#,
                Allow::OtherFields,
            ),
            (r#","apparmor_profile":"unconfined""#, Allow::OtherFields),
        ] {
            assert_eq!(of_json(&container(more)), [allow], "{more}");
        }
        for (from, to, allow) in [
            ("web/0.log", "../../../etc/cron.d/x", Allow::HostMounts),
            ("web/0.log", "/etc/cron.d/x", Allow::HostMounts),
            ("CHOWN", "SYS_ADMIN", Allow::Capabilities),
            ("CHOWN", "ALL", Allow::Capabilities),
            (
                "empty-dir/work",
                "empty-dir/../../../../../etc",
                Allow::HostMounts,
            ),
            ("empty-dir/work", "empty-dir/work/below", Allow::HostMounts),
            ("uid-1", "uid-2", Allow::HostMounts),
            (
                "io.kubernetes.container.hash",
                "cdi.k8s.io/x",
                Allow::OtherFields,
            ),
            ("/proc/kcore", "/proc/nothing", Allow::UnmaskedPaths),
        ] {
            assert_eq!(of_json(&container("").replace(from, to)), [allow], "{to}");
        }
    }

    #[test]
    fn what_kubelet_gives_to_all_is_known() {
        let linux = |resources: &str| {
            let of_it = format!(r#""linux":{{"resources":{{{resources}}},"#);
            container("").replace(r#""linux":{"#, &of_it)
        };
        assert_eq!(of_json(&linux(r#""unified":{"memory.oom.group":"1"}"#)), []);
        assert_eq!(
            of_json(&linux(
                r#""unified":{"memory.oom.group":"1","memory.min":"1"}"#
            )),
            [Allow::OtherFields]
        );
        let has_files = |json: &str| has_files_of_kubelet(&go_json::read(json).unwrap(), UID);
        assert!(!has_files(&container("")));
        let hosts = "etc-hosts";
        let volume = "volumes/kubernetes.io~empty-dir/work";
        assert!(has_files(&container("").replace(volume, hosts)));
    }

    #[test]
    fn a_sandbox_is_nobody_elses() {
        let of_json = |json: &str| -> Vec<Allow> {
            let refusals = of_sandbox(&go_json::read(json).unwrap());
            refusals.into_iter().map(|refusal| refusal.allow).collect()
        };
        let plain = r#"{"metadata":{"name":"web","namespace":"shop","uid":"u"},"log_directory":"/var/log/pods/shop_web_u","linux":{"cgroup_parent":
            "/kubepods/podu","sysctls":{"net.ipv4.ip_forward":"1"}},"port_mappings":[{"container_port":1}]}"#;
        assert_eq!(of_json(plain), []);
        for (from, to, allow) in [
            ("/var/log/pods/", "/etc/", Allow::HostMounts),
            ("shop_web_u", "shop_other_u", Allow::HostMounts),
            ("shop_web_u", "shop_web_u/below", Allow::HostMounts),
            ("/kubepods/", "/system.slice/", Allow::CgroupPath),
            ("/kubepods/", "/kubepods/../", Allow::CgroupPath),
            ("container_port", "host_port", Allow::HostNamespaces),
        ] {
            assert_eq!(of_json(&plain.replace(from, to)), [allow], "{to}");
        }
        let network = r#"{"linux":{"security_context":{"namespace_options":{"network":2}}}}"#;
        assert_eq!(of_json(network), [Allow::HostNamespaces]);
        let apparmor = r#"{"linux":{"security_context":{"apparmor":{"profile_type":1}}}}"#;
        assert_eq!(of_json(apparmor), [Allow::OtherFields]);
    }
}
