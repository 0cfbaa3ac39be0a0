//! The runtime crun, behind a front called transship-crun: a pod through the plain CRI.

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, NodeOptions, PodContainer, PodNamespaces,
    PodSecurity, Testbed, Tree, journey,
};

use crate::Case;
use crate::admission::checkpoint;
use crate::pods::{FIRST, SECOND, reached};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "pod_crun",
            tree: Tree::Forky,
            run: a_pod_of_crun_comes_back,
        },
        Case {
            what: "pod_crun_cgroups",
            tree: Tree::Forky,
            run: all_processes_are_in_the_cgroup,
        },
    ]
    .into_iter()
}

/// A node whose CRI has crun behind the front.
pub(crate) fn node_with_crun(bed: &Testbed) -> anyhow::Result<Node> {
    let options = NodeOptions {
        without_unified_cgroup: true,
        ..NodeOptions::default()
    };
    let node = bed.node_with("a", &options)?;
    node.shell("ln -s transship-runc /usr/local/bin/transship-crun")
        .run()?;
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        runtime_binary: Some("/usr/local/bin/transship-crun".to_owned()),
        ..ContainerdConfig::transship()
    })?;
    for image in [Image::pause(bed.settings())?, journey::counter_image(bed)?] {
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    Ok(node)
}

fn a_pod_of_crun_comes_back(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_crun(bed)?;
    let check = node.command("transship").arg("check").output()?;
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    ensure!(
        said.lines()
            .any(|line| line.starts_with("ok") && line.contains(" crun ")),
        "{said}"
    );

    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let first = cri.run_container(&pod, &FIRST)?;
    let second = cri.run_container(&pod, &SECOND)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    let before = [reached(&cri, &first)?, reached(&cri, &second)?];
    let checkpoint = "transship checkpoint --pod shop/web --name web --tcp close --ghost-limit 2M";
    node.shell(checkpoint).run()?;
    cri.remove_pod(&pod)?;

    // On a mix of cgroup v1 and v2 CRIU wants to set up a v2 hierarchy that the node does not show.
    let restore = [
        ("dev.transship/restore", "web"),
        ("dev.transship/manage-cgroups-mode", "ignore"),
    ];
    let pod = cri.run_pod(("shop", "web-again"), &restore, PodNamespaces::Usual)?;
    for (container, before) in [FIRST, SECOND].iter().zip(before) {
        // Held between the two calls, as with runc.
        let id = cri.create_container(&pod, container)?;
        cri.start_container(&id)?;
        ensure!(cri.runs(&id)?, "the restored container runs");
        let now = reached(&cri, &id)?;
        ensure!(now >= before, "{now} is not beyond {before}");
    }
    let reply = journey::ask(&node, &cri.pod_ip(&pod)?)?;
    ensure!(
        reply.memory_ok && reply.hostname == "web-again",
        "{reply:?}"
    );
    cri.remove_pod(&pod)?;
    weaker_pods_are_refused(&node, &cri, &restore)?;
    node.shell("transship rm web").run()?;
    journey::check_nothing_left(&node)
}

/// What is compared and imposed is no matter of the runtime.
fn weaker_pods_are_refused(node: &Node, cri: &Cri, restore: &[(&str, &str)]) -> anyhow::Result<()> {
    let weaker = PodContainer {
        security: PodSecurity {
            user: Some(1000),
            ..PodSecurity::NONE
        },
        ..FIRST
    };
    let pod = cri.run_pod(("shop", "thief"), restore, PodNamespaces::Usual)?;
    let Err(error) = cri.run_container(&pod, &weaker) else {
        anyhow::bail!("a user gets the processes of root");
    };
    ensure!(error.to_string().contains("user id 0"), "{error}");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)?;
    let imposed = PodContainer {
        security: PodSecurity {
            no_new_privileges: true,
            default_seccomp: true,
            ..PodSecurity::NONE
        },
        ..FIRST
    };
    let pod = cri.run_pod(("shop", "imposed"), restore, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &imposed)?;
    let status = cri.exec(&id, &["cat", "/proc/1/status"])?;
    let status = String::from_utf8(status.stdout)?;
    ensure!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
        "{status}"
    );
    Ok(cri.remove_pod(&pod)?)
}

/// crun starts CRIU where it is itself, and with this option CRIU moves nothing.
fn all_processes_are_in_the_cgroup(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_crun(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        command: &[
            "/bin/sh",
            "-c",
            "tail -f /dev/null & tail -f /dev/null; true",
        ],
        ..FIRST
    };
    checkpoint(&node, &cri, &container)?;
    let annotations = [
        ("dev.transship/restore", "web"),
        ("dev.transship/manage-cgroups-mode", "ignore"),
    ];
    let pod = cri.run_pod(("shop", "again"), &annotations, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &container)?;
    let cgroups = cri.exec(&id, &["/bin/sh", "-c", "cat /proc/[0-9]*/cgroup"])?;
    let cgroups = String::from_utf8(cgroups.stdout)?;
    let of_devices = { cgroups.lines() }.filter(|line| line.contains("devices"));
    let (own, others): (Vec<_>, Vec<_>) = of_devices.partition(|line| line.ends_with(&*id));
    ensure!(own.len() > 3 && others.is_empty(), "{cgroups}");
    cri.remove_pod(&pod)?;
    node.shell("transship rm web").run()?;
    journey::check_nothing_left(&node)
}
