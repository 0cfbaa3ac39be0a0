//! cgroup v2: what is restored is in the cgroup of the new container, whatever runc it is and whoever
//! makes the cgroup, and that cgroup does for it all that a cgroup does.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, Pod, PodContainer, PodNamespaces, Testbed,
    Tree, poll_until,
};

use crate::Case;
use crate::journey::a_container_counts_on_in_the_other_node;
use crate::pods::{self, FIRST, a_pod_goes_on_elsewhere, reached};

const PATIENCE: Duration = Duration::from_secs(30);
const MB: u64 = 1 << 20;
const LIMITED: PodContainer<'static> = PodContainer {
    memory_limit: 96 << 20,
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("cgroups", |bed| {
        let node = bed.node("a")?;
        pods::start(bed, &node, true)?;
        restored_pods_have_cgroups_of_their_own(&node, &node.cri()?)
    })
    .chain([Case {
        what: "systemd_cgroups",
        tree: Tree::Trixie,
        run: systemd_makes_the_cgroups,
    }])
    .chain(Case::on_all_trees("migration", |bed| {
        a_container_counts_on_in_the_other_node(bed, 16)
    }))
    .chain(Case::on_all_trees("pod", |bed| {
        a_pod_goes_on_elsewhere(bed, true)
    }))
}

/// With systemd's driver each container is a scope.
fn systemd_makes_the_cgroups(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.machine()?;
    start_services(bed, &node, true)?;
    restored_pods_have_cgroups_of_their_own(&node, &node.cri()?.with_slices())?;
    a_container_of_ctr_comes_back(&node)?;
    let scopes = "systemctl list-units --all --no-legend 'cri-containerd-*' 'transship-test-*'";
    let scopes = { node.shell(scopes) }.read()?;
    ensure!(scopes.is_empty(), "left: {scopes}");
    stop_services(&node)
}

/// Everything under systemd from an empty disk, with the images that the cases need.
pub(crate) fn start_services(
    bed: &Testbed,
    node: &Node,
    systemd_cgroup: bool,
) -> anyhow::Result<()> {
    stop_services(node)?;
    node.configure_containerd(&ContainerdConfig {
        systemd_cgroup,
        ..ContainerdConfig::transship()
    })?;
    node.shell(
        "echo 1 >/proc/sys/net/ipv4/ip_forward
         rm -rf /var/lib/containerd /var/lib/transship
         systemctl start transship-snapshotter
         systemctl start containerd",
    )
    .run()?;
    poll_until("containerd", PATIENCE, || {
        node.ctr(&["version"]).map_err(|error| error.to_string())
    })?;
    for image in [
        Image::pause(bed.settings())?,
        transship_testbed::journey::counter_image(bed)?,
    ] {
        for namespace in ["default", "k8s.io"] {
            node.import_image_into(namespace, &image, "transship")?;
        }
    }
    Ok(())
}

pub(crate) fn stop_services(node: &Node) -> anyhow::Result<()> {
    let stop = "systemctl stop containerd transship-node transship-snapshotter.socket \
                transship-snapshotter";
    Ok({ node.shell(stop) }.run()?)
}

fn restored_pods_have_cgroups_of_their_own(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let old = cri.run_pod(("shop", "old"), &[], PodNamespaces::Usual)?;
    let first = cri.run_container(&old, &FIRST)?;
    let seen_inside = cgroup_inside(cri, &first)?;
    Cgroup::of(node, &first)?.check_processes(node)?;
    node.command("transship")
        .args(["checkpoint", "--pod", "shop/old", "--name", "kept"])
        .run()?;

    // Beside the old one, whose cgroup is there for the new processes to fall into.
    let annotation = [("dev.transship/restore", "kept")];
    let beside = cri.run_pod(("shop", "beside"), &annotation, PodNamespaces::Usual)?;
    let second = cri.run_container(&beside, &LIMITED)?;
    let count = reached(cri, &first)?;
    check_cgroup(node, cri, &second, &seen_inside)?;
    Cgroup::of(node, &first)?.check_processes(node)?;
    the_freezer_holds_it(node, &second)?;
    cri.remove_pod(&old)?;
    poll_until("the counter to count on", PATIENCE, || {
        match reached(cri, &second) {
            Ok(now) if now > count => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    its_limit_is_its_own(node, cri, &second)?;
    cri.remove_pod(&beside)?;

    // And when the old cgroup is gone.
    let after = cri.run_pod(("shop", "after"), &annotation, PodNamespaces::Usual)?;
    let third = cri.run_container(&after, &LIMITED)?;
    check_cgroup(node, cri, &third, &seen_inside)?;
    cri.remove_pod(&after)?;
    let pods = [&old, &beside, &after].map(|pod: &Pod| pod.id.clone());
    for id in pods.iter().chain([&first, &second, &third]) {
        let find = format!("find /sys/fs/cgroup -depth -name '*{id}*'");
        let left = { node.shell(&find) }.read()?;
        ensure!(left.is_empty(), "left of {id}: {left}");
    }
    Ok(())
}

/// Where a container must be, by its spec, and its first process.
struct Cgroup {
    path: String,
    pid: String,
}

impl Cgroup {
    fn of(node: &Node, id: &str) -> anyhow::Result<Cgroup> {
        let task = format!("ctr -n k8s.io tasks ls | awk '$1 == \"{id}\" {{print $2}}'");
        let pid = { node.shell(&task) }.read()?.trim().to_owned();
        let spec = format!("ctr -n k8s.io containers info {id} | jq -r .Spec.linux.cgroupsPath");
        let path = { node.shell(&spec) }.read()?.trim().to_owned();
        let path = match *path.split(':').collect::<Vec<_>>() {
            [slice, prefix, name] => {
                let (parent, _) = slice.split_once('-').context("a slice of kubepods")?;
                format!("/{parent}.slice/{slice}/{prefix}-{name}.scope")
            }
            _ => path,
        };
        ensure!(path.contains(id), "{path} names {id}");
        Ok(Cgroup { path, pid })
    }

    fn read(&self, node: &Node, file: &str) -> anyhow::Result<String> {
        let text = node.read_file(&format!("/sys/fs/cgroup{}/{file}", self.path))?;
        Ok(String::from_utf8(text)?.trim().to_owned())
    }

    fn number(&self, node: &Node, file: &str) -> anyhow::Result<u64> {
        let text = self.read(node, file)?;
        text.parse().with_context(|| format!("{file}: {text}"))
    }

    /// The container's process is in it, and nothing else.
    fn check_processes(&self, node: &Node) -> anyhow::Result<()> {
        let own = node.read_file(&format!("/proc/{}/cgroup", self.pid))?;
        let own = String::from_utf8(own)?;
        ensure!(
            own.trim() == format!("0::{}", self.path),
            "{own:?} and not {:?}",
            self.path
        );
        let processes = self.read(node, "cgroup.procs")?;
        ensure!(
            processes == self.pid,
            "{processes:?} and not {:?}",
            self.pid
        );
        Ok(())
    }
}

/// What the container itself sees of its cgroup: its namespace begins there.
fn cgroup_inside(cri: &Cri, id: &str) -> anyhow::Result<String> {
    let seen = cri.exec(id, &["cat", "/proc/1/cgroup", "/proc/self/cgroup"])?;
    Ok(String::from_utf8(seen.stdout)?)
}

fn check_cgroup(node: &Node, cri: &Cri, id: &str, seen_inside: &str) -> anyhow::Result<()> {
    let cgroup = Cgroup::of(node, id)?;
    cgroup.check_processes(node)?;
    let seen = cgroup_inside(cri, id)?;
    ensure!(seen == seen_inside, "{seen:?}, and before {seen_inside:?}");
    let limit = cgroup.number(node, "memory.max")?;
    ensure!(limit == 96 * MB, "its limit is {limit}");
    let by_itself = cri.exec(id, &["cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(
        by_itself.stdout == format!("{limit}\n").into_bytes(),
        "by itself: {by_itself:?}"
    );
    // What the process holds was charged here when it was restored.
    let used = cgroup.number(node, "memory.current")?;
    ensure!((32 * MB..96 * MB).contains(&used), "{used} bytes");
    let by_stats = cri.memory_usage(id)?;
    ensure!(
        (32 * MB..96 * MB).contains(&by_stats),
        "{by_stats} bytes by its stats"
    );
    let metrics = node.ctr(&["-n", "k8s.io", "tasks", "metrics", id])?;
    let metric = |name: &str| {
        let mut rows = metrics.lines().map(str::split_whitespace);
        rows.find_map(|mut row| (row.next() == Some(name)).then(|| row.next()?.parse().ok())?)
            .with_context(|| format!("no {name} in {metrics}"))
    };
    let (pids, usage, usage_limit): (u64, u64, u64) = (
        metric("pids.current")?,
        metric("memory.usage")?,
        metric("memory.usage_limit")?,
    );
    ensure!(
        pids == cgroup.number(node, "pids.current")? && usage > 32 * MB && usage_limit == 96 * MB,
        "{metrics}"
    );
    Ok(())
}

fn the_freezer_holds_it(node: &Node, id: &str) -> anyhow::Result<()> {
    let cgroup = Cgroup::of(node, id)?;
    let frozen = |wanted: &str| {
        let events = cgroup.read(node, "cgroup.events")?;
        ensure!(events.contains(wanted), "{events}");
        Ok(())
    };
    node.ctr(&["-n", "k8s.io", "tasks", "pause", id])?;
    frozen("frozen 1")?;
    node.ctr(&["-n", "k8s.io", "tasks", "resume", id])?;
    frozen("frozen 0")
}

fn its_limit_is_its_own(node: &Node, cri: &Cri, id: &str) -> anyhow::Result<()> {
    // Less than it holds, and there is no swap. With systemd the scope may be gone before runc has
    // written all of its files.
    let updated = cri.limit_memory(id, 8 << 20);
    let code = poll_until("the end of the container", PATIENCE, || {
        match cri.status(id) {
            Ok(status) if status.finished_at > 0 => Ok(status.exit_code),
            other => Err(format!("{other:?}")),
        }
    })?;
    // The shim, which makes the reason `OOMKilled` of it, misses the event of a cgroup that is gone before it looks.
    let said = node.shell("dmesg | grep oom-kill: || true").read()?;
    let is_killed = said.lines().any(|line| {
        let cgroup = line.split_once("oom_memcg=");
        cgroup.is_some_and(|(_, cgroup)| cgroup.split(',').next().is_some_and(|it| it.contains(id)))
    });
    ensure!(code == 137 && is_killed, "{code} {updated:?} {said}");
    Ok(())
}

/// `transship restore` writes the cgroup's name into the spec itself.
fn a_container_of_ctr_comes_back(node: &Node) -> anyhow::Result<()> {
    use transship_testbed::journey;
    let cgroup = [
        "--runc-systemd-cgroup",
        "--cgroup",
        "system.slice:transship-test:plain",
    ];
    let run = [
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        "--runc-binary",
        journey::FRONT,
    ];
    let rest = [
        "transship.test/counter:1",
        "plain",
        "/usr/bin/counter",
        "--memory-mb",
        "8",
    ];
    node.ctr(&[&run[..], &cgroup, &rest].concat())?;
    journey::wait_for_count(node, "plain", 3)?;
    node.command("transship")
        .args(["checkpoint", "plain", "--name", "plain"])
        .run()?;
    node.command("transship")
        .args(["restore", "plain", "--id", "copy", "--new-namespaces"])
        .run()?;
    for id in ["plain", "copy"] {
        let pid = journey::task_pid(node, id)?;
        let own = node.read_file(&format!("/proc/{pid}/cgroup"))?;
        let own = String::from_utf8(own)?;
        let wanted = format!("0::/system.slice/transship-test-{id}.scope");
        ensure!(own.trim() == wanted, "{own:?} and not {wanted:?}");
        let reached = journey::read_counts(node, id).map_err(anyhow::Error::msg)?;
        journey::wait_for_count(node, id, reached)?;
        journey::remove_container(node, id)?;
    }
    node.command("transship").args(["rm", "plain"]).run()?;
    Ok(())
}
