//! A Kubernetes of two nodes: the control plane on the first, a kubelet with the node's containerd on each.
//!
//! ```text
//!   node a: etcd ── kube-apiserver :6443 ── controller-manager, scheduler
//!                        ^
//!            kubelet ────┼──── kubelet      node b
//!            containerd ─┘     containerd   (CRI v1alpha2: kubelet 1.20, containerd 1.7)
//!
//!   /etc/kubernetes/config          who one is: the one administrator, on both nodes
//!   /etc/kubernetes/kubelet.yaml    kubelet's configuration
//! ```
//!
//! There is no kube-proxy: what the tests ask, they ask at a pod's address.

use std::process::Command;
use std::time::Duration;

use crate::run::CommandRun as _;
use crate::{
    ContainerdConfig, Image, Link, Node, NodeOptions, Testbed, TestbedError, kubernetes_build,
    poll_until,
};

const PATIENCE: Duration = Duration::from_secs(240);
const CONFIG: &str = "/etc/kubernetes/config";
const TOKEN: &str = "the-only-administrator";

/// Two nodes under one control plane.
#[derive(Debug)]
pub struct Cluster {
    /// Has the control plane, too.
    pub a: Node,
    /// The other one.
    pub b: Node,
    addresses: Link,
}

impl Cluster {
    /// Starts all of it, and waits until both nodes are Ready and pods may be made.
    ///
    /// # Errors
    /// When the programs cannot be built, or something does not come up.
    pub fn start(bed: &Testbed) -> Result<Cluster, TestbedError> {
        let programs = kubernetes_build::programs(bed.settings())?;
        let options = NodeOptions {
            programs,
            ..NodeOptions::default()
        };
        let a = bed.node_with("a", &options)?;
        let b = bed.node_with("b", &options)?;
        let addresses = bed.link(&a, &b)?;
        let cluster = Cluster { a, b, addresses };
        cluster.start_control_plane()?;
        for node in [&cluster.a, &cluster.b] {
            node.start_snapshotter()?;
            node.start_containerd(&ContainerdConfig::transship())?;
            let busybox = bed.tree_dir().join("bin/busybox");
            for image in [
                Image::pause(bed.settings())?,
                Image::counter(bed.settings(), &busybox)?,
            ] {
                node.import_image_into("k8s.io", &image, "transship")?;
            }
            cluster.start_kubelet(node)?;
        }
        for node in ["node-a", "node-b"] {
            cluster.wait_for(
                "node",
                node,
                r#"{.status.conditions[?(@.type=="Ready")].status}"#,
                "True",
            )?;
        }
        // The controller manager makes it; without it no pod is admitted.
        let account = "{.secrets[0].name}";
        poll_until("the default service account", PATIENCE, || {
            match cluster.get("serviceaccount", "default", account) {
                Ok(secret) if !secret.is_empty() => Ok(()),
                Ok(_) => Err("it has no secret".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        })?;
        Ok(cluster)
    }

    /// `kubectl` with these arguments.
    #[must_use]
    pub fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = self.a.command("kubectl");
        command
            .arg(format!("--kubeconfig={CONFIG}"))
            .args(arguments);
        command
    }

    /// Makes or changes what the YAML says.
    ///
    /// # Errors
    /// What kubectl says.
    pub fn apply(&self, yaml: &str) -> Result<(), TestbedError> {
        self.kubectl(&["apply", "--filename=-"])
            .feed(yaml.as_bytes())
            .map(drop)
    }

    /// A field of an object, by kubectl's JSONPath; empty where it is not there.
    ///
    /// # Errors
    /// What kubectl says, for instance that there is no such object.
    pub fn get(&self, kind: &str, name: &str, path: &str) -> Result<String, TestbedError> {
        self.kubectl(&["get", kind, name, &format!("--output=jsonpath={path}")])
            .read()
    }

    /// Waits until a field has this value.
    ///
    /// # Errors
    /// When it has another one for long.
    pub fn wait_for(
        &self,
        kind: &str,
        name: &str,
        path: &str,
        value: &str,
    ) -> Result<(), TestbedError> {
        let what = format!("{path} of the {kind} {name} to be {value}");
        poll_until(&what, PATIENCE, || match self.get(kind, name, path) {
            Ok(found) if found == value => Ok(()),
            Ok(found) => Err(found),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Waits until a pod's containers are ready, as their probes say.
    ///
    /// # Errors
    /// When they are not for long; with the pod's events.
    pub fn wait_until_ready(&self, pod: &str) -> Result<(), TestbedError> {
        let ready = r#"{.status.conditions[?(@.type=="Ready")].status}"#;
        let waited = self.wait_for("pod", pod, ready, "True");
        waited.map_err(|error| TestbedError::Unexpected {
            what: "state of a pod",
            text: format!("{error}\n{}", self.events(pod).unwrap_or_default()),
        })
    }

    /// The events of a pod: reason and message, one a line.
    ///
    /// # Errors
    /// What kubectl says.
    pub fn events(&self, pod: &str) -> Result<String, TestbedError> {
        let of = format!("--field-selector=involvedObject.name={pod}");
        let each = r#"{range .items[*]}{.reason}{": "}{.message}{"\n"}{end}"#;
        self.kubectl(&["get", "events", &of, &format!("--output=jsonpath={each}")])
            .read()
    }

    /// The address of a node that both nodes reach.
    #[must_use]
    pub fn address(&self, node: &Node) -> &str {
        match node.name() == self.a.name() {
            true => &self.addresses.first,
            false => &self.addresses.second,
        }
    }

    /// Starts kubelet, also after [`Node::stop_daemon`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_kubelet(&self, node: &Node) -> Result<(), TestbedError> {
        let address = self.address(node);
        node.write_file("/etc/kubernetes/kubelet.yaml", KUBELET)?;
        self.write_config(node)?;
        node.shell(NOT_OF_THE_MACHINE).run()?;
        node.start_daemon(
            "kubelet",
            &[
                "kubelet",
                "--config=/etc/kubernetes/kubelet.yaml",
                &format!("--kubeconfig={CONFIG}"),
                "--container-runtime=remote",
                "--container-runtime-endpoint=unix:///run/containerd/containerd.sock",
                &format!("--hostname-override=node-{}", node.name()),
                &format!("--node-ip={address}"),
            ],
        )
    }

    fn start_control_plane(&self) -> Result<(), TestbedError> {
        let node = &self.a;
        node.write_file(
            "/etc/kubernetes/tokens",
            format!("{TOKEN},admin,1,\"system:masters\"\n"),
        )?;
        self.write_config(node)?;
        node.shell("ssh-keygen -q -t rsa -m PEM -N '' -f /etc/kubernetes/accounts")
            .run()?;
        node.start_daemon("etcd", &["etcd", "--data-dir=/var/lib/etcd"])?;
        let address = &self.addresses.first;
        node.start_daemon(
            "kube-apiserver",
            &[
                "kube-apiserver",
                &format!("--advertise-address={address}"),
                "--allow-privileged=true",
                "--authorization-mode=AlwaysAllow",
                "--cert-dir=/etc/kubernetes/own",
                "--etcd-servers=http://127.0.0.1:2379",
                "--service-account-issuer=https://transship.test",
                "--service-account-key-file=/etc/kubernetes/accounts",
                "--service-account-signing-key-file=/etc/kubernetes/accounts",
                "--service-cluster-ip-range=10.96.0.0/24",
                "--token-auth-file=/etc/kubernetes/tokens",
            ],
        )?;
        let config = format!("--kubeconfig={CONFIG}");
        poll_until("kube-apiserver", PATIENCE, || {
            if node.daemon_end("kube-apiserver").is_some() {
                return Err(node.log_tail("/var/log/kube-apiserver.log"));
            }
            let mut ask = self.kubectl(&["get", "--raw", "/readyz"]);
            ask.run().map_err(|error| error.to_string())
        })?;
        node.start_daemon(
            "kube-controller-manager",
            &[
                "kube-controller-manager",
                &config,
                "--leader-elect=false",
                "--service-account-private-key-file=/etc/kubernetes/accounts",
            ],
        )?;
        let scheduler = ["kube-scheduler", &config, "--leader-elect=false"];
        node.start_daemon("kube-scheduler", &scheduler)
    }

    fn write_config(&self, node: &Node) -> Result<(), TestbedError> {
        let server = &self.addresses.first;
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://{server}:6443"),
                "insecure-skip-tls-verify": true,
            }}],
            "users": [{ "name": "admin", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "admin" } }],
        });
        node.write_file(CONFIG, config.to_string())
    }
}

/// Nothing is evicted or collected because the machine's disk is full.
const KUBELET: &str = r#"
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: { anonymous: { enabled: true }, webhook: { enabled: false } }
authorization: { mode: AlwaysAllow }
cgroupDriver: cgroupfs
evictionHard: { "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%" }
failSwapOn: false
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
resolvConf: ""
"#;

/// kubelet sets sysctls of the whole machine, and wants the kernel's log: it gets files in their place.
const NOT_OF_THE_MACHINE: &str = "
[ -e /dev/kmsg ] || ln -s /dev/null /dev/kmsg
mkdir -p /run/kubelet-sysctls
for sysctl in kernel/panic kernel/panic_on_oops vm/overcommit_memory vm/panic_on_oom \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    own=/run/kubelet-sysctls/$(basename $sysctl)
    [ ! -e $own ] || continue
    cat /proc/sys/$sysctl >$own
    mount --bind $own /proc/sys/$sysctl
done";
