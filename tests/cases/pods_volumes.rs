//! The volumes of a pod at its restore: kubelet has made new ones, with other files at other paths.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed, Tree, Workload, journey,
    poll_until,
};

use crate::Case;
use crate::admission::{PLAIN, prepared};
use crate::pods::start;

const IMAGE: &str = "transship.test/watcher:1";
const PATIENCE: Duration = Duration::from_secs(60);
const RESTORE: [(&str, &str); 1] = [("dev.transship/restore", "web")];
/// Holds a file of a ConfigMap, one of an emptyDir and the termination log open, and watches the first one.
const HOLD: &[&str] = &[
    "sh",
    "-c",
    "exec 3</etc/settings/key 4>/work/log 5>/dev/termination-log
     echo up >&5; holder watch=/etc/settings/key & while :; do sleep 1; done",
];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "pod_volumes",
            tree: Tree::Forky,
            run: volumes_are_those_of_the_new_pod,
        },
        Case {
            what: "pod_volumes_replaced",
            tree: Tree::Forky,
            run: a_file_that_was_replaced_is_mounted,
        },
    ]
    .into_iter()
}

fn volumes_are_those_of_the_new_pod(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let image = journey::counter_image(bed)?;
    let image = image.with_program(IMAGE, Workload::Holder, bed.settings())?;
    node.import_image_into("k8s.io", &image, "transship")?;
    let cri = node.cri()?;
    let old = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let volumes = Volumes::make(&node, &old, "..2025_01", "old")?;
    let id = cri.run_container(&old, &holder(&volumes.mounts()))?;
    ensure!(cri.runs(&id)?, "it holds its files");

    // The file would not be there when the pod is restored; nothing is paused for finding that out.
    let take = "transship checkpoint --pod shop/web --name web";
    let error = node.shell(take).read_failure()?;
    says(
        &error,
        "\"/work/log\" open, which is in the emptyDir \"work\"",
    )?;
    says(&error, "--volumes emptydir")?;
    let check = "transship check --pod shop/web";
    says(&told(&node, check)?, "problem  left-in-volume")?;
    node.shell(&format!("{check} --volumes emptydir")).run()?;
    a_part_of_a_volume_is_told(&node, &cri)?;
    what_is_bound_or_watched_is_told(&node, &cri)?;
    what_was_updated_is_told(&node, &cri)?;
    // What another container, or somebody on the node, mounts in a volume is neither its content nor emptied with it.
    let mount = |work: &str| {
        let disk = format!("{work}/disk");
        node.shell(&format!(
            "mkdir -p {disk}; mount -t tmpfs disk {disk}; mkdir {disk}/dir; touch {disk}/dir/precious"
        ))
        .run()
    };
    let unmount = "for it in $(grep -o '/[^ ]*/work/disk' /proc/mounts); do
            test -e $it/dir/precious; umount $it; rmdir $it; done";
    mount(&volumes.work)?;
    let with_volumes = format!("{check} --volumes emptydir");
    says(&told(&node, &with_volumes)?, "problem  mounted-volume")?;
    let refused_take = node
        .shell(&format!("{take} --volumes emptydir"))
        .read_failure()?;
    says(&refused_take, "something is mounted in an emptyDir")?;
    node.shell(unmount).run()?;
    node.shell(&format!("{take} --volumes emptydir")).run()?;
    cri.remove_pod(&old)?;

    // The same key, longer, under another date; and a volume more, below another one.
    let pod = cri.run_pod(("shop", "web"), &RESTORE, PodNamespaces::Usual)?;
    let volumes = Volumes::make(&node, &pod, "..2026_02", "new and longer")?;
    let extra = volumes.dir("kubernetes.io~empty-dir/extra");
    node.shell(&format!("mkdir -p {extra}; echo here >{extra}/file"))
        .run()?;
    let mounts = volumes.mounts();
    let container = PodContainer {
        read_only_mounts: &[(&extra, "/new/place"), (&extra, "/work/below")],
        ..holder(&mounts)
    };
    let id = cri.run_container(&pod, &container)?;
    let read = |path: &str| -> anyhow::Result<String> {
        let answer = cri.exec(&id, &["cat", path])?;
        ensure!(answer.exit_code == 0, "{path}: {answer:?}");
        Ok(String::from_utf8(answer.stdout)?)
    };
    ensure!(read("/proc/1/fd/3")? == "new and longer\n", "the open file");
    // The inode of what is watched, in hexadecimal.
    let watched = cri.exec(
        &id,
        &[
            "sh",
            "-c",
            "for it in /proc/[0-9]*/fdinfo/*; do sed -n 's/^inotify.* ino:\\([0-9a-f]*\\).*/\\1/p' $it; done
             printf '%x\n' $(stat -Lc %i /etc/settings/key)",
        ],
    )?;
    let watched = String::from_utf8(watched.stdout)?;
    let watched: Vec<&str> = watched.lines().collect();
    ensure!(
        watched.len() == 2 && watched[0] == watched[1],
        "{watched:?}"
    );
    ensure!(read("/etc/settings/key")? == "new and longer\n", "the key");
    ensure!(read("/new/place/file")? == "here\n", "the new volume");
    ensure!(read("/work/below/file")? == "here\n", "the one below");
    let written = cri.exec(&id, &["touch", "/new/place/file"])?;
    ensure!(written.exit_code != 0, "it is mounted read-only");
    cri.remove_pod(&pod)?;

    let mounted = |pod: &Pod| -> anyhow::Result<Volumes> {
        let volumes = Volumes::make(&node, pod, "..2026_02", "x")?;
        mount(&volumes.work)?;
        Ok(volumes)
    };
    refused(
        &node,
        &cri,
        mounted,
        "is mounted, which is no part of it: nothing in it was changed; unmount that first",
    )?;
    node.shell(unmount).run()?;

    let lacks = |pod: &Pod| -> anyhow::Result<Volumes> {
        let volumes = Volumes::make(&node, pod, "..2026_02", "x")?;
        let settings = volumes.dir("kubernetes.io~configmap/settings");
        node.shell(&format!("rm {settings}/..2026_02/key")).run()?;
        Ok(volumes)
    };
    refused(
        &node,
        &cri,
        lacks,
        "has a file open that the new pod's volume lacks: /etc/settings/..2025_01/key",
    )?;
    let file = |pod: &Pod| -> anyhow::Result<Volumes> {
        let volumes = Volumes::make(&node, pod, "..2026_02", "x")?;
        let settings = volumes.dir("kubernetes.io~configmap/settings");
        node.shell(&format!("rm -r {settings}; touch {settings}"))
            .run()?;
        Ok(volumes)
    };
    refused(
        &node,
        &cri,
        file,
        "has a directory mounted where the new pod has a file",
    )?;
    journey::check_no_pod_left(&node)
}

/// As kubelet does with the file of a `subPath` when its ConfigMap changes: the old one is removed while it is mounted.
fn a_file_that_was_replaced_is_mounted(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    node.shell("echo old >/var/lib/part").run()?;
    let container = PodContainer {
        mounts: &[("/var/lib/part", "/etc/part")],
        ..PLAIN
    };
    let old = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&old, &container)?;
    node.shell("rm /var/lib/part; echo new >/var/lib/part")
        .run()?;
    let mounted = cri.exec(&id, &["grep", "/etc/part", "/proc/self/mountinfo"])?;
    let mounted = String::from_utf8(mounted.stdout)?;
    ensure!(mounted.contains("//deleted"), "{mounted}");
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    cri.remove_pod(&old)?;

    let pod = cri.run_pod(("shop", "web"), &RESTORE, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &container)?;
    let answer = cri.exec(&id, &["cat", "/etc/part"])?;
    ensure!(answer.stdout == b"new\n", "{answer:?}");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)
}

/// What `transship check` finds.
fn told(node: &Node, check: &str) -> anyhow::Result<String> {
    let output = node.shell(check).output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// kubelet mounts it at a place of its own.
fn a_part_of_a_volume_is_told(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let pod = cri.run_pod(("shop", "part"), &[], PodNamespaces::Usual)?;
    let volumes = Volumes::make(node, &pod, "..2025_01", "old")?;
    let part = volumes.dir("../volume-subpaths/work/holder/0");
    let part = part.replace("volumes/../", "");
    node.shell(&format!("mkdir -p {part}")).run()?;
    let mounts = [(&*volumes.settings, "/etc/settings"), (&*part, "/work")];
    cri.run_container(&pod, &holder(&mounts))?;
    let of = "--pod shop/part --volumes emptydir";
    says(
        &told(node, &format!("transship check {of}"))?,
        "problem  sub-path",
    )?;
    let mut checkpoint = node.shell(&format!("transship checkpoint {of} --name part"));
    says(
        &checkpoint.read_failure()?,
        "a part of an emptyDir (subPath)",
    )?;
    Ok(cri.remove_pod(&pod)?)
}

/// Neither is an open file.
fn what_is_bound_or_watched_is_told(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    for (need, told_path) in [
        ("receive=/work/run/socket", "/work/run/socket"),
        ("watch=/work/run", "/work/run"),
    ] {
        let pod = cri.run_pod(("shop", "below"), &[], PodNamespaces::Usual)?;
        let volumes = Volumes::make(node, &pod, "..2025_01", "old")?;
        node.shell(&format!("mkdir {}/run", volumes.work)).run()?;
        let mounts = volumes.mounts();
        let container = PodContainer {
            command: &["holder", need],
            ..holder(&mounts)
        };
        cri.run_container(&pod, &container)?;
        let found = poll_until("what it has in the volume", PATIENCE, || {
            told(node, "transship check --pod shop/below").map_err(|error| format!("{error:#}"))
        })?;
        says(&found, "problem  left-in-volume")?;
        says(&found, told_path)?;
        node.shell("transship check --pod shop/below --volumes emptydir")
            .run()?;
        cri.remove_pod(&pod)?;
    }
    Ok(())
}

/// kubelet removes the directory of the old date; the file that is open has no name any more.
fn what_was_updated_is_told(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let pod = cri.run_pod(("shop", "updated"), &[], PodNamespaces::Usual)?;
    let volumes = Volumes::make(node, &pod, "..2025_01", "old")?;
    let container = PodContainer {
        command: &[
            "sh",
            "-c",
            "exec 3</etc/settings/key; while :; do sleep 1; done",
        ],
        read_only_mounts: &[(&volumes.settings, "/etc/settings")],
        ..holder(&[])
    };
    let id = cri.run_container(&pod, &container)?;
    cri.exec(&id, &["cat", "/proc/1/fd/3"])?;
    node.shell("transship check --pod shop/updated").run()?;
    node.shell(&format!("rm -r {}/..2025_01", volumes.settings))
        .run()?;
    let found = told(node, "transship check --pod shop/updated")?;
    says(&found, "problem  deleted-read-only")?;
    Ok(cri.remove_pod(&pod)?)
}

fn refused(
    node: &Node,
    cri: &Cri,
    volumes: impl FnOnce(&Pod) -> anyhow::Result<Volumes>,
    said: &str,
) -> anyhow::Result<()> {
    let pod = cri.run_pod(("shop", "refused"), &RESTORE, PodNamespaces::Usual)?;
    let volumes = volumes(&pod)?;
    let Err(error) = cri.run_container(&pod, &holder(&volumes.mounts())) else {
        anyhow::bail!("restored although it {said}");
    };
    says(&error.to_string(), said)?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)
}

fn holder<'a>(mounts: &'a [(&'a str, &'a str)]) -> PodContainer<'a> {
    PodContainer {
        name: "holder",
        image: IMAGE,
        command: HOLD,
        mounts,
        ..PodContainer::default()
    }
}

/// The volumes of a pod, as kubelet makes them: `settings`, a ConfigMap, and `work`, an emptyDir.
struct Volumes {
    root: String,
    settings: String,
    work: String,
    log: String,
}

impl Volumes {
    fn make(node: &Node, pod: &Pod, date: &str, value: &str) -> anyhow::Result<Self> {
        let root = format!("/var/lib/kubelet/pods/{}/volumes", pod.uid());
        let settings = format!("{root}/kubernetes.io~configmap/settings");
        let work = format!("{root}/kubernetes.io~empty-dir/work");
        node.shell(&format!(
            "mkdir -p {settings}/{date} {work}
             echo {value} >{settings}/{date}/key
             ln -s {date} {settings}/..data
             ln -s ..data/key {settings}/key
             mkdir -p {root}/../containers/holder; touch {root}/../containers/holder/{date}"
        ))
        .run()?;
        Ok(Self {
            log: format!(
                "/var/lib/kubelet/pods/{}/containers/holder/{date}",
                pod.uid()
            ),
            root,
            settings,
            work,
        })
    }

    fn dir(&self, volume: &str) -> String {
        format!("{}/{volume}", self.root)
    }

    fn mounts(&self) -> [(&str, &str); 3] {
        [
            (&self.settings, "/etc/settings"),
            (&self.work, "/work"),
            (&self.log, "/dev/termination-log"),
        ]
    }
}

fn says(text: &str, said: &str) -> anyhow::Result<()> {
    ensure!(
        text.replace('\\', "").contains(said),
        "{text:?} does not say {said:?}"
    );
    Ok(())
}
