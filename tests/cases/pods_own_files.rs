//! What belongs to the new pod is the new pod's: its address and host name, the files that kubelet
//! mounts (hosts, service-account token, ConfigMap, Secret, labels by the downward API), resolv.conf,
//! cgroup, limits, labels and log. Nothing of it comes along with the process.

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed, journey,
};

use crate::Case;
use crate::pods::{FIRST, reached, send, start_two};

const MB: i64 = 1 << 20;
/// A file in the directory of the pod, and what of it is mounted where.
const MOUNTED: [(&str, &str, &str); 5] = [
    ("etc-hosts", "etc-hosts", "/etc/hosts"),
    (
        "volumes/kubernetes.io~projected/kube-api-access/token",
        "volumes/kubernetes.io~projected/kube-api-access",
        "/var/run/secrets/kubernetes.io/serviceaccount",
    ),
    (
        "volumes/kubernetes.io~configmap/settings/color",
        "volumes/kubernetes.io~configmap/settings",
        "/etc/settings",
    ),
    (
        "volumes/kubernetes.io~secret/keys/key",
        "volumes/kubernetes.io~secret/keys",
        "/etc/keys",
    ),
    (
        "volumes/kubernetes.io~downward-api/podinfo/labels",
        "volumes/kubernetes.io~downward-api/podinfo",
        "/etc/podinfo",
    ),
];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("pod_own_files", what_is_the_new_pods_stays_so)
}

fn what_is_the_new_pods_stays_so(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    for (node, server) in [(&a, "192.0.2.1"), (&b, "192.0.2.2")] {
        // The CRI copies it for pods that have no DNS policy of their own.
        node.shell(&format!("echo nameserver {server} >/etc/resolv.conf"))
            .run()?;
    }
    let cri = a.cri()?;
    let old = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = run_first(&a, &cri, &old, "old", 64 * MB)?;
    let before = reached(&cri, &id)?;
    let all = |word: &str, server: u8| {
        let mut all = vec![format!("{word}\n"); MOUNTED.len()];
        all.push(format!("nameserver 192.0.2.{server}\n"));
        all
    };
    ensure!(seen(&cri, &id)? == all("old", 1), "{:?}", seen(&cri, &id)?);
    a.command("transship")
        .args(["checkpoint", "--pod", "shop/web", "--name", "web"])
        .run()?;
    cri.remove_pod(&old)?;
    send(bed, &a, &b, "web")?;

    let cri = b.cri()?;
    let annotation = [("dev.transship/restore", "web")];
    let pod = cri.run_pod(("shop", "web-2"), &annotation, PodNamespaces::Usual)?;
    let id = run_first(&b, &cri, &pod, "new", 128 * MB)?;
    ensure!(reached(&cri, &id)? >= before, "it was restored");
    ensure!(seen(&cri, &id)? == all("new", 2), "{:?}", seen(&cri, &id)?);
    let name = read(&cri, &id, "/proc/sys/kernel/hostname")?;
    ensure!(name == "web-2\n", "{name}");
    let mounts = read(&cri, &id, "/proc/1/mountinfo")?;
    ensure!(
        !mounts.contains(old.uid()) && !mounts.contains(&old.id) && mounts.contains(pod.uid()),
        "{mounts}"
    );
    // cgroup v1 has no namespace of its own: the whole path.
    let cgroups = read(&cri, &id, "/proc/1/cgroup")?;
    // "4:memory:/kubepods/pod<uid>/<id>"
    ensure!(
        cgroups.lines().any(|line| line.contains(":memory:")
            && line.contains(pod.uid())
            && line.ends_with(&id)),
        "{cgroups}"
    );
    ensure!(!cgroups.contains(old.uid()), "{cgroups}");
    let limit = read(&cri, &id, "/sys/fs/cgroup/memory/memory.limit_in_bytes")?;
    ensure!(limit.trim() == (128 * MB).to_string(), "{limit}");
    let status = cri.status(&id)?;
    let label = status.labels.get("io.kubernetes.pod.name");
    ensure!(label.is_some_and(|name| name == "web-2"), "{status:?}");
    ensure!(status.log_path == pod.log_path(&FIRST), "{status:?}");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&b)
}

/// Runs the container with the files of the pod, each with one word in it, as kubelet mounts them.
fn run_first(node: &Node, cri: &Cri, pod: &Pod, word: &str, limit: i64) -> anyhow::Result<String> {
    let dir = format!("/var/lib/kubelet/pods/{}", pod.uid());
    for (file, ..) in MOUNTED {
        node.write_file(&format!("{dir}/{file}"), format!("{word}\n"))?;
    }
    let sources = MOUNTED.map(|(_, source, _)| format!("{dir}/{source}"));
    let mounts: Vec<(&str, &str)> = sources
        .iter()
        .zip(MOUNTED)
        .map(|(source, (.., target))| (source.as_str(), target))
        .collect();
    Ok(cri.run_container(
        pod,
        &PodContainer {
            mounts: &mounts,
            memory_limit: limit,
            ..FIRST
        },
    )?)
}

/// What the container finds in the files of the pod, and in resolv.conf.
fn seen(cri: &Cri, id: &str) -> anyhow::Result<Vec<String>> {
    let mounted = MOUNTED.map(|(file, source, target)| file.replacen(source, target, 1));
    let paths = mounted.iter().map(String::as_str);
    paths
        .chain(["/etc/resolv.conf"])
        .map(|path| read(cri, id, path))
        .collect()
}

fn read(cri: &Cri, id: &str, path: &str) -> anyhow::Result<String> {
    let answer = cri.exec(id, &["cat", path])?;
    ensure!(answer.exit_code == 0, "{path}: {answer:?}");
    Ok(String::from_utf8(answer.stdout)?)
}
