//! Pods that kubelet runs: checkpointed on one node, restored on the other by an annotation, under a control
//! plane of their own (`make test-kubernetes`; Kubernetes 1.20, containerd 1.7).
//!
//! `kubectl` says what a user sees; that a program goes on is seen in the values that it has written.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    Cluster, CommandRun as _, DebianImage, Node, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::pods::send;
use crate::pods_migrated::begin;

const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Trixie,
        run,
    };
    [
        case(
            "long_kubernetes_journey",
            a_pod_moves as fn(&Testbed) -> anyhow::Result<()>,
        ),
        case("long_kubernetes_migration", a_pod_moves_while_it_runs),
        case("long_kubernetes_refusals", refusals_are_events),
        case("long_kubernetes_restarts", restarts_end_no_restored_pod),
        case("long_kubernetes_adoption", a_replica_moves_by_adoption),
        case("long_kubernetes_webhook", a_replica_moves_by_a_webhook),
    ]
    .into_iter()
}

/// Two counters, probes of each kind, and the usual volumes.
fn web(name: &str, node: &str, annotations: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {{ name: web }}
data: {{ colour: blue }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, annotations: {{ {annotations} }} }}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 3
  volumes:
  - {{ name: cache, emptyDir: {{}} }}
  - {{ name: config, configMap: {{ name: web }} }}
  containers:
  - name: front
    image: transship.test/counter:1
    imagePullPolicy: Never
    command: [/usr/bin/counter, --memory-mb, "16"]
    volumeMounts: [{{ name: cache, mountPath: /cache }}, {{ name: config, mountPath: /etc/config }}]
    livenessProbe: {{ tcpSocket: {{ port: 7000 }}, periodSeconds: 2, failureThreshold: 30 }}
    readinessProbe: {{ tcpSocket: {{ port: 7000 }}, periodSeconds: 1 }}
    startupProbe: {{ tcpSocket: {{ port: 7000 }}, periodSeconds: 1, failureThreshold: 60 }}
  - name: side
    image: transship.test/counter:1
    imagePullPolicy: Never
    command: [/usr/bin/counter, --memory-mb, "8", --port, "7001"]
    volumeMounts: [{{ name: cache, mountPath: /cache }}]
    livenessProbe: {{ exec: {{ command: [cat, /data/counts] }}, periodSeconds: 2, failureThreshold: 30, timeoutSeconds: 10 }}
"#
    )
}

const RESTORE: &str = "dev.transship/restore: web";
/// What comes before the containers.
const INIT: &str = "  initContainers:
  - name: init
    image: transship.test/counter:1
    imagePullPolicy: Never
    command: [sh, -c, echo one >>/cache/runs]
    volumeMounts: [{ name: cache, mountPath: /cache }]
  containers:
";

fn a_pod_moves(bed: &Testbed) -> anyhow::Result<()> {
    let cluster = Cluster::start(bed)?;
    let (a, b) = (&cluster.a, &cluster.b);
    cluster.apply(&web("web", "node-a", ""))?;
    cluster.wait_until_ready("web")?;
    exec(
        &cluster,
        "web",
        "front",
        &["sh", "-c", "echo kept >/cache/kept"],
    )?;
    let before = checkpoint(a, "web")?;
    ensure!(!before.is_empty(), "the checkpoint says nothing");
    let counted = [
        reached_by(&cluster, a, "front")?,
        reached_by(&cluster, a, "side")?,
    ];
    send(bed, a, b, "web")?;
    delete_pod(&cluster, "web")?;
    journey::check_no_pod_left(a)?;

    cluster.apply(&web("web", "node-b", RESTORE))?;
    cluster.wait_until_ready("web")?;
    for (container, counted) in ["front", "side"].into_iter().zip(counted) {
        let now = reached(&cluster, "web", container)?;
        ensure!(now >= counted, "{container} is at {now} after {counted}");
    }
    let kept = exec(&cluster, "web", "side", &["cat", "/cache/kept"])?;
    ensure!(kept == "kept\n", "{kept:?}");
    let config = exec(&cluster, "web", "front", &["cat", "/etc/config/colour"])?;
    ensure!(config == "blue", "{config:?}");
    let restarts = cluster.get("pod", "web", "{.status.containerStatuses[*].restartCount}")?;
    ensure!(restarts == "0 0", "restarted: {restarts}");
    cluster
        .kubectl(&["logs", "web", "--container=front"])
        .run()?;
    a_crash_starts_cold(&cluster, b)?;
    delete_pod(&cluster, "web")?;
    journey::check_no_pod_left(b)
}

/// In one migration, into a pod that the other kubelet makes: with an init container, which has run once.
fn a_pod_moves_while_it_runs(bed: &Testbed) -> anyhow::Result<()> {
    let cluster = Cluster::start(bed)?;
    let (a, b) = (&cluster.a, &cluster.b);
    let with_init = |pod: String| pod.replace("  containers:\n", INIT);
    cluster.apply(&with_init(web("web", "node-a", "")))?;
    cluster.wait_until_ready("web")?;
    let counted = ["front", "side"].map(|name| reached(&cluster, "web", name));
    let what = "--pod default/web --volumes emptydir --tcp close --skip-in-flight";
    let migration = begin(a, &bed.ssh(a, b)?, what)?;
    let receive = format!("dev.transship/receive: {migration}");
    cluster.apply(&with_init(web("moved", "node-b", &receive)))?;
    a.wait_for_daemon_end("waits")?;
    let said = a.shell("cat /var/log/waits.log").read()?;
    ensure!(said.contains("runs on the other node"), "{said}");
    cluster.wait_until_ready("moved").with_context(|| said)?;
    for (container, counted) in ["front", "side"].into_iter().zip(counted) {
        let (now, counted) = (reached(&cluster, "moved", container)?, counted?);
        ensure!(now >= counted, "{container} is at {now} after {counted}");
    }
    let runs = exec(&cluster, "moved", "side", &["cat", "/cache/runs"])?;
    ensure!(runs == "one\n", "of the init container: {runs:?}");
    let restarts = cluster.get(
        "pod",
        "moved",
        "{.status.containerStatuses[*].restartCount}",
    )?;
    ensure!(restarts == "0 0", "restarted: {restarts}");
    delete_pod(&cluster, "web")?;
    journey::check_no_pod_left(a)?;
    delete_pod(&cluster, "moved")?;
    journey::check_no_pod_left(b)
}

/// The next attempt of a restored container starts from the image.
fn a_crash_starts_cold(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    exec(
        cluster,
        "web",
        "front",
        &["touch", "/data/of-the-restored-one"],
    )?;
    let id = container_id(cluster, "web", "front")?;
    node.ctr(&["-n", "k8s.io", "tasks", "kill", "--signal", "KILL", &id])?;
    let restarts = r#"{.status.containerStatuses[?(@.name=="front")].restartCount}"#;
    cluster.wait_for("pod", "web", restarts, "1")?;
    cluster.wait_until_ready("web")?;
    let made = exec(cluster, "web", "front", &["ls", "/data"])?;
    ensure!(!made.contains("of-the-restored-one"), "not cold: {made}");
    let side = r#"{.status.containerStatuses[?(@.name=="side")].restartCount}"#;
    ensure!(
        cluster.get("pod", "web", side)? == "0",
        "the other one goes on"
    );
    Ok(())
}

/// What fails is said where a user looks, and is gone with the pod.
fn refusals_are_events(bed: &Testbed) -> anyhow::Result<()> {
    let cluster = Cluster::start(bed)?;
    let b = &cluster.b;
    cluster.apply(&web("source", "node-b", ""))?;
    cluster.wait_until_ready("source")?;
    { b.command("transship") }
        .args(["checkpoint", "--pod", "default/source", "--name", "web"])
        .args([
            "--volumes",
            "emptydir",
            "--tcp",
            "close",
            "--skip-in-flight",
        ])
        .run()?;
    delete_pod(&cluster, "source")?;
    cluster.kubectl(&["create", "namespace", "other"]).run()?;
    for (annotation, says) in [
        (
            "dev.transship/restore: nowhere",
            "there is no checkpoint \"nowhere\"",
        ),
        (
            "dev.transship/restor: web",
            "dev.transship/restor means nothing",
        ),
        (
            "dev.transship/tcp: sometimes, dev.transship/restore: web",
            "sometimes",
        ),
    ] {
        cluster.apply(&web("refused", "node-b", annotation))?;
        wait_for_event(&cluster, "refused", says)?;
        delete_pod(&cluster, "refused")?;
    }
    // The checkpoint is as good as before.
    cluster.apply(&web("web", "node-b", RESTORE))?;
    cluster.wait_until_ready("web")?;
    reached(&cluster, "web", "front")?;
    delete_pod(&cluster, "web")?;
    journey::check_no_pod_left(b)
}

/// Whatever of the node is started again, a restored pod goes on; a pod whose sandbox is gone starts cold.
fn restarts_end_no_restored_pod(bed: &Testbed) -> anyhow::Result<()> {
    let cluster = Cluster::start(bed)?;
    let b = &cluster.b;
    cluster.apply(&web("source", "node-b", ""))?;
    cluster.wait_until_ready("source")?;
    checkpoint(b, "source")?;
    delete_pod(&cluster, "source")?;
    cluster.apply(&web("web", "node-b", RESTORE))?;
    cluster.wait_until_ready("web")?;
    let id = container_id(&cluster, "web", "front")?;

    for (daemon, signal) in [
        ("kubelet", "TERM"),
        ("containerd", "TERM"),
        ("containerd", "KILL"),
        ("snapshotter", "KILL"),
    ] {
        let before = reached(&cluster, "web", "front")?;
        b.stop_daemon(daemon, signal)?;
        match daemon {
            "kubelet" => cluster.start_kubelet(b)?,
            "containerd" => {
                b.start_daemon("containerd", &["containerd"])?;
                b.wait_for_daemon("containerd", &["ctr", "version"])?;
            }
            _ => b.start_snapshotter()?,
        }
        goes_on(&cluster, before).with_context(|| format!("{daemon} after SIG{signal}"))?;
        cluster.wait_until_ready("web")?;
        let now = container_id(&cluster, "web", "front")?;
        ensure!(now == id, "{daemon} after SIG{signal}: another container");
    }

    // kubelet makes another sandbox and starts all containers in it.
    let sandbox =
        { b.shell("ctr -n k8s.io containers ls 'labels.\"io.cri-containerd.kind\"==sandbox' -q") }
            .read()?;
    for sandbox in sandbox.lines() {
        b.ctr(&["-n", "k8s.io", "tasks", "kill", "--signal", "KILL", sandbox])?;
    }
    let restarts = "{.status.containerStatuses[*].restartCount}";
    cluster.wait_for("pod", "web", restarts, "1 1")?;
    cluster.wait_until_ready("web")?;
    reached(&cluster, "web", "front")?;
    delete_pod(&cluster, "web")?;
    journey::check_no_pod_left(b)
}

/// The recipe of docs/kubernetes.md for a Deployment, as 1.20 knows it: the paused replica is not Ready,
/// so that it is the one that the ReplicaSet deletes when it adopts the copy.
fn a_replica_moves_by_adoption(bed: &Testbed) -> anyhow::Result<()> {
    let cluster = Cluster::start(bed)?;
    let (a, b) = (&cluster.a, &cluster.b);
    let container = r#"
      containers:
      - name: front
        image: transship.test/counter:1
        imagePullPolicy: Never
        command: [/usr/bin/counter, --memory-mb, "16"]
        readinessProbe: { tcpSocket: { port: 7000 }, periodSeconds: 1 }"#;
    cluster.kubectl(&["cordon", "node-b"]).run()?;
    cluster.apply(&format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: shop }}
spec:
  replicas: 1
  selector: {{ matchLabels: {{ app: shop }} }}
  template:
    metadata: {{ labels: {{ app: shop }} }}
    spec:
      terminationGracePeriodSeconds: 1{container}
"#
    ))?;
    cluster.wait_for("deployment", "shop", "{.status.readyReplicas}", "1")?;
    let old = cluster
        .kubectl(&[
            "get",
            "pods",
            "--selector=app=shop",
            "--output=jsonpath={.items[0].metadata.name}",
        ])
        .read()?;
    let hash = cluster.get("pod", &old, "{.metadata.labels.pod-template-hash}")?;
    let counted = reached(&cluster, &old, "front")?;
    checkpoint(a, &old)?;
    send(bed, a, b, "web")?;
    cluster.wait_for(
        "pod",
        &old,
        r#"{.status.conditions[?(@.type=="Ready")].status}"#,
        "False",
    )?;
    let container = container.replace("\n    ", "\n");
    cluster.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: shop-moved, annotations: {{ {RESTORE} }} }}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 1{container}
"#
    ))?;
    cluster.wait_until_ready("shop-moved")?;
    let labels = ["app=shop", &format!("pod-template-hash={hash}")];
    { cluster.kubectl(&["label", "pod", "shop-moved"]) }
        .args(labels)
        .run()?;
    wait_until_gone(&cluster, &old)?;
    cluster.wait_for("deployment", "shop", "{.status.readyReplicas}", "1")?;
    let owner = cluster.get("pod", "shop-moved", "{.metadata.ownerReferences[0].kind}")?;
    ensure!(owner == "ReplicaSet", "owned by {owner:?}");
    let now = reached(&cluster, "shop-moved", "front")?;
    ensure!(now >= counted, "{now} after {counted}");
    journey::check_no_pod_left(a)?;
    cluster.kubectl(&["delete", "deployment", "shop"]).run()?;
    wait_until_gone(&cluster, "shop-moved")?;
    journey::check_no_pod_left(b)
}

/// The recipe for a StatefulSet: the pod that its controller makes next is told what to restore, and where,
/// as it is made. What a policy of the API server does from 1.36 on, a webhook does here.
fn a_replica_moves_by_a_webhook(bed: &Testbed) -> anyhow::Result<()> {
    let cluster = Cluster::start(bed)?;
    let (a, b) = (&cluster.a, &cluster.b);
    cluster.kubectl(&["cordon", "node-b"]).run()?;
    cluster.apply(STATEFUL_SET)?;
    cluster.wait_until_ready("shop-0")?;
    let counted = reached(&cluster, "shop-0", "front")?;
    checkpoint(a, "shop-0")?;
    send(bed, a, b, "web")?;

    let servers = DebianImage::SERVERS.image(bed.settings())?;
    a.import_image(&servers, "transship")?;
    let address = cluster.address(a);
    a.shell(&format!(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=webhook \
             -addext subjectAltName=IP:{address} \
             -keyout /etc/kubernetes/webhook.key -out /etc/kubernetes/webhook.crt"
    ))
    .run()?;
    a.ctr(&[
        "run",
        "--detach",
        "--snapshotter=transship",
        "--net-host",
        "--mount=type=bind,src=/etc/kubernetes,dst=/etc/kubernetes,options=rbind:ro",
        servers.reference(),
        "webhook",
        "python3",
        "-c",
        WEBHOOK,
    ])?;
    let authority = { a.shell("base64 --wrap=0 /etc/kubernetes/webhook.crt") }.read()?;
    cluster.apply(&format!(
        r#"
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {{ name: move }}
webhooks:
- name: move.transship.test
  clientConfig: {{ url: "https://{address}:8443/", caBundle: "{authority}" }}
  rules: [{{ apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods] }}]
  admissionReviewVersions: [v1]
  sideEffects: None
"#
    ))?;
    let uid = cluster.get("pod", "shop-0", "{.metadata.uid}")?;
    cluster
        .kubectl(&[
            "delete",
            "pod",
            "shop-0",
            "--grace-period=1",
            "--wait=false",
        ])
        .run()?;
    poll_until("the next pod of that name", PATIENCE, || {
        match cluster.get("pod", "shop-0", "{.metadata.uid}") {
            Ok(now) if now != uid => Ok(()),
            Ok(_) => Err("the old one is there".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    })?;
    cluster.wait_until_ready("shop-0")?;
    let node = cluster.get("pod", "shop-0", "{.spec.nodeName}")?;
    ensure!(node == "node-b", "it is on {node}");
    let now = reached(&cluster, "shop-0", "front")?;
    ensure!(now >= counted, "{now} after {counted}");
    journey::check_no_pod_left(a)
}

const STATEFUL_SET: &str = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: shop }
spec:
  replicas: 1
  serviceName: shop
  selector: { matchLabels: { app: shop } }
  template:
    metadata: { labels: { app: shop } }
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: front
        image: transship.test/counter:1
        imagePullPolicy: Never
        command: [/usr/bin/counter, --memory-mb, "16"]
        readinessProbe: { tcpSocket: { port: 7000 }, periodSeconds: 1 }
"#;

/// Sends every new pod to node-b, with the annotation.
const WEBHOOK: &str = r#"
import base64, http.server, json, ssl
PATCH = [
    {"op": "add", "path": "/metadata/annotations", "value": {"dev.transship/restore": "web"}},
    {"op": "add", "path": "/spec/nodeName", "value": "node-b"},
]
class Webhook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        patch = base64.b64encode(json.dumps(PATCH).encode()).decode()
        review["response"] = {
            "uid": review["request"]["uid"], "allowed": True, "patchType": "JSONPatch", "patch": patch,
        }
        answer = json.dumps(review).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
server = http.server.HTTPServer(("0.0.0.0", 8443), Webhook)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/etc/kubernetes/webhook.crt", "/etc/kubernetes/webhook.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"#;

/// Checkpoints a pod as "web", and leaves it paused; gives what was said.
fn checkpoint(node: &Node, pod: &str) -> anyhow::Result<String> {
    let pod = format!("default/{pod}");
    let mut command = node.command("transship");
    command.args(["checkpoint", "--pod", &pod, "--name", "web"]);
    command.args(["--volumes", "emptydir", "--tcp", "close"]);
    Ok(command
        .args(["--skip-in-flight", "--leave-paused"])
        .read()?)
}

fn exec(cluster: &Cluster, pod: &str, container: &str, command: &[&str]) -> anyhow::Result<String> {
    let container = format!("--container={container}");
    let mut exec = cluster.kubectl(&["exec", pod, &container, "--"]);
    Ok(exec.args(command).read()?)
}

/// How far a counter has counted; every value once.
fn reached(cluster: &Cluster, pod: &str, container: &str) -> anyhow::Result<u64> {
    last_of(&exec(cluster, pod, container, &["cat", "/data/counts"])?)
}

/// The same of a paused container of the pod "web", which nobody can enter.
fn reached_by(cluster: &Cluster, node: &Node, container: &str) -> anyhow::Result<u64> {
    let id = container_id(cluster, "web", container)?;
    let tasks = node.ctr(&["-n", "k8s.io", "tasks", "ls"])?;
    let mut rows = tasks.lines().map(str::split_whitespace);
    let pid = rows.find_map(|mut row| (row.next() == Some(&id)).then(|| row.next())?);
    let pid = pid.with_context(|| format!("no task {id} in {tasks}"))?;
    let counts = node.read_file(&format!("/proc/{pid}/root/data/counts"))?;
    last_of(&String::from_utf8(counts)?)
}

fn last_of(counts: &str) -> anyhow::Result<u64> {
    let mut last = 0;
    for line in counts.lines() {
        let value: u64 = line.parse()?;
        ensure!(value == last + 1, "{value} follows {last}");
        last = value;
    }
    Ok(last)
}

fn goes_on(cluster: &Cluster, before: u64) -> anyhow::Result<()> {
    Ok(poll_until(
        "the counter to go on",
        PATIENCE,
        || match reached(cluster, "web", "front") {
            Ok(now) if now > before => Ok(()),
            Ok(now) => Err(format!("{now} after {before}")),
            Err(error) => Err(format!("{error:#}")),
        },
    )?)
}

fn container_id(cluster: &Cluster, pod: &str, container: &str) -> anyhow::Result<String> {
    let path = format!("{{.status.containerStatuses[?(@.name==\"{container}\")].containerID}}");
    let id = cluster.get("pod", pod, &path)?;
    let id = id
        .strip_prefix("containerd://")
        .with_context(|| format!("{id:?}"))?;
    Ok(id.to_owned())
}

fn delete_pod(cluster: &Cluster, pod: &str) -> anyhow::Result<()> {
    cluster
        .kubectl(&["delete", "pod", pod, "--grace-period=1"])
        .run()?;
    wait_until_gone(cluster, pod)
}

fn wait_until_gone(cluster: &Cluster, pod: &str) -> anyhow::Result<()> {
    let what = format!("the end of the pod {pod}");
    Ok(poll_until(&what, PATIENCE, || {
        let mut get = cluster.kubectl(&["get", "pod", pod, "--ignore-not-found"]);
        match get.read() {
            Ok(found) if found.is_empty() => Ok(()),
            Ok(found) => Err(found),
            Err(error) => Err(error.to_string()),
        }
    })?)
}

fn wait_for_event(cluster: &Cluster, pod: &str, says: &str) -> anyhow::Result<()> {
    let what = format!("an event that says {says:?}");
    Ok(poll_until(&what, PATIENCE, || match cluster.events(pod) {
        Ok(events) if events.contains(says) => Ok(()),
        Ok(events) => Err(events),
        Err(error) => Err(error.to_string()),
    })?)
}
