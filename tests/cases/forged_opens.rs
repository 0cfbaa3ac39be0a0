//! Checkpoints with files open that are none of the container's, whatever kind of file they are: CRIU opens them as root of
//! the node, in the tree of the node.

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, PodSecurity, Testbed, Tree};

use crate::Case;
use crate::admission::{PLAIN, RESTORE, STORE, checkpoint, forge, keep_honest, prepared, refused};
use crate::crun::node_with_crun;
use crate::forged_names::HELP;
use crate::package_image::{NODE_CONFIG, PUBLIC_KEY};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    // crit is in this tree alone.
    let on_forky = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        on_forky("pod_opens_forged", forged_opens_are_refused),
        on_forky("pod_opens_forged_modes", modes_are_for_users),
        on_forky("pod_opens_forged_crun", devices_of_nobody_are_refused),
        on_forky("pod_opens_forged_shared", nobody_lets_it_go_on),
        on_forky("opens_forged_natively", native_restores_are_looked_at),
    ]
    .into_iter()
}

/// The position of a file that has none.
const OPENS: &str = r"
def opens_no_file(name, flags='0x0', mount='/'):
    file = reg(50, name, flags, mount); file['reg']['pos'] = 2**64 - 1
    add('files.img', 'FILES', [file])
    table_of_files = os.path.basename(glob.glob(im + '/fdinfo-*.img')[0])
    add(table_of_files, 'FDINFO', [{'id': 50, 'flags': 0, 'type': 'REG', 'fd': 77}])
def makes_device(name, major, minor):
    import io, tarfile
    device = one(entries(glob.glob(im + '/mountpoints-*.img')[0])['entries'], '/dev')['root_dev']
    f = im + '/tmpfs-dev-%d.tar.gz.img' % device
    old = tarfile.open(f); members = [(m, old.extractfile(m).read() if m.isreg() else None) for m in old]
    new = tarfile.TarInfo('./' + name); new.type = tarfile.CHRTYPE; new.mode = 0o666; new.devmajor, new.devminor = major, minor
    os.remove(f)
    with tarfile.open(f, 'w:gz', format=tarfile.GNU_FORMAT) as archive:
        for m, data in members + [(new, None)]: archive.addfile(m, io.BytesIO(data) if data is not None else None)
def opens_by_link(target, flags='0x0'):
    link_in_dev('evil', target)
    opens_no_file('/dev/evil', flags)
";

/// What is forged, and what is said of it. 0x200000 is O_PATH.
const FORGERIES: &[(&str, &str)] = &[
    (
        "opens_by_link('/proc/self/fd/121/1/root/run/containerd/containerd.sock', '0x200000')",
        "containerd.sock\" open, which is not in its mounts",
    ),
    (
        "opens_by_link('/proc/self/fd/121/1/root/root/fifo', '0x2')",
        "\"/root/fifo\" open, which is not in its mounts",
    ),
    (
        "opens_by_link('/proc/self/fd/121/1/root/root/disk', '0x200000')",
        "\"/root/disk\" open, which is not in its mounts",
    ),
    (
        "opens_by_link('/proc/self/fd/121/1/root/dev/full', '0x2')",
        "/full\" open, which is not in its mounts",
    ),
    // Through the node's /proc in a volume.
    (
        "opens_no_file('/host/proc/1/environ', mount='/host/proc')",
        "/environ\", whose name leads out of the container",
    ),
    (
        "opens_no_file('/host/proc/1/mem', '0x2', '/host/proc')",
        "/mem\", whose name leads out of the container",
    ),
    (
        "opens_no_file('/host/proc/1/task/1/maps', '0x0', '/host/proc')",
        "/maps\", whose name leads out of the container",
    ),
    (
        "opens_no_file('/host/proc/1/fd', '0x10000', '/host/proc')",
        "/fd\", whose name leads out of the container",
    ),
    (
        "opens_no_file('/host/proc/1/oom_score_adj', '0x1', '/host/proc')",
        "/oom_score_adj\" open, which takes CAP_SYS_PTRACE",
    ),
    ("opens_by_link('/host/proc/1/ns/mnt')", "\"mnt:["),
    // What only open(2) asks for.
    (
        "opens_no_file('/proc/mtrr', '0x2', '/proc')",
        "/mtrr\" open, which takes CAP_SYS_ADMIN",
    ),
];

/// Files that everybody may have open.
const HONEST: &str = "mkfifo /data/fifo; exec 3<>/data/fifo 4</proc/self/maps 5</proc/self/fd 6</dev/zero 7<>/dev/full \
     8</host/proc/1/status 9</proc/self/environ; exec tail -f /dev/null";

fn forged_opens_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        command: &["/bin/sh", "-c", HONEST],
        mounts: &[("/proc", "/host/proc")],
        security: PodSecurity {
            dropped: &["ALL"],
            ..PodSecurity::NONE
        },
        ..PLAIN
    };
    node.shell("mkfifo /root/fifo; mknod /root/disk b 7 0")
        .run()?;
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    let mut let_in = Vec::new();
    for (forgery, said) in FORGERIES {
        let forged = forge(&node, &format!("{HELP}{OPENS}{forgery}"));
        forged.with_context(|| (*forgery).to_owned())?;
        if let Err(error) = refused(&node, &cri, &container, said) {
            let_in.push(format!("{forgery}: {error:#}"));
        }
    }
    ensure!(let_in.is_empty(), "{}", let_in.join("\n"));
    // The same without a forgery.
    forge(&node, "")?;
    let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &container)?;
    ensure!(cri.runs(&id)?, "it runs");
    let open = cri.exec(&id, &["ls", "/proc/1/fd"])?;
    let open = String::from_utf8(open.stdout)?;
    cri.remove_pod(&pod)?;
    let wanted = (3..10).all(|number| open.lines().any(|it| it == number.to_string()));
    ensure!(wanted, "{open}");
    Ok(())
}

/// Of a process of somebody else than root: a dump of one takes CAP_SYS_RESOURCE, which not every machine gives.
const OF_OTHER_USER: &str = r"
for e in edit('core-*.img'):
    c = e['thread_core']['creds']
    for id in ('uid', 'euid', 'suid', 'fsuid'): c[id] = 1000
";

/// What is for root is for nobody else who has no capabilities.
fn modes_are_for_users(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        command: &[
            "/bin/sh",
            "-c",
            "exec 3</proc/meminfo; exec tail -f /dev/null",
        ],
        mounts: &[],
        security: PodSecurity {
            dropped: &["ALL"],
            ..PodSecurity::NONE
        },
        ..PLAIN
    };
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    let container = PodContainer {
        security: PodSecurity {
            user: Some(1000),
            ..container.security
        },
        ..container
    };
    for name in ["slabinfo", "timer_list"] {
        let opens = format!("opens_no_file('/proc/{name}', mount='/proc')");
        forge(&node, &format!("{HELP}{OPENS}{OF_OTHER_USER}{opens}"))?;
        let said = format!("/{name}\" open, which takes CAP_DAC_OVERRIDE");
        refused(&node, &cri, &container, &said).context(name)?;
    }
    // Without the file.
    forge(&node, OF_OTHER_USER)?;
    let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &container)?;
    ensure!(cri.runs(&id)?, "it runs");
    Ok(cri.remove_pod(&pod)?)
}

/// crun starts CRIU where it is itself, where all devices may be opened.
fn devices_of_nobody_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_crun(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        command: &["/bin/sh", "-c", "exec tail -f /dev/null"],
        mounts: &[],
        ..PLAIN
    };
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    let annotations = [RESTORE, ("dev.transship/manage-cgroups-mode", "ignore")];
    // The control of loop devices, which exists in every kernel of the tests, and a device that everybody may have.
    for (minor, said) in [
        (237, Some("which its device rules do not allow")),
        (0, None),
    ] {
        let (major, minor) = if minor == 0 { (1, 7) } else { (10, minor) };
        let made =
            format!("makes_device('evil', {major}, {minor}); opens_no_file('/dev/evil', '0x2')");
        forge(&node, &format!("{HELP}{OPENS}{made}"))?;
        let pod = cri.run_pod(("shop", "thief"), &annotations, PodNamespaces::Usual)?;
        let answer = cri.run_container(&pod, &container);
        cri.remove_pod(&pod)?;
        match (answer, said) {
            (Ok(_), None) => {}
            (Err(error), Some(said)) => {
                let error = error.to_string();
                ensure!(error.contains(said), "{error:?} does not say {said:?}");
            }
            (Ok(_), Some(said)) => anyhow::bail!("restored, and it should say {said:?}"),
            (Err(error), None) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Others in the pid namespace of the pod wake what is stopped: what is restored with a file of the node open has not read
/// it before it is refused.
fn nobody_lets_it_go_on(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        command: &[
            "/bin/sh",
            "-c",
            "while :; do read -r line <&77 && echo $line >/cache/stolen; done 2>/dev/null",
        ],
        ..PLAIN
    };
    let shared = PodNamespaces::WithProcesses;
    node.shell("echo secret >/root/secret").run()?;
    let pod = cri.run_pod(("shop", "web"), &[], shared)?;
    let id = cri.run_container(&pod, &container)?;
    cri.exec(&id, &["true"])?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    cri.remove_pod(&pod)?;
    keep_honest(&node)?;
    let opens = "opens_by_link('/proc/self/fd/121/1/root/root/secret')";
    forge(&node, &format!("{HELP}{OPENS}{opens}"))?;
    let pod = cri.run_pod(("shop", "thief"), &[RESTORE], shared)?;
    // CRIU itself fails when its tasks are woken, so who does that waits until it has gone.
    let waker = node
        .shell(
            "touch /root/wakes
             while test -e /root/wakes; do
                 for it in /proc/[0-9]*; do
                     read -r stat 2>/dev/null <$it/stat || continue
                     case $stat in *'(sh) T '*) kill -CONT ${it#/proc/} || true ;; esac
                 done
             done",
        )
        .spawn()?;
    node.shell("until test -e /root/wakes; do :; done").run()?;
    let answer = cri.run_container(&pod, &container);
    let stolen = node.shell("rm /root/wakes; cat /var/lib/cache/stolen 2>/dev/null || true");
    let stolen = { stolen }.read()?;
    ensure!({ waker }.wait()?.success(), "somebody wakes it");
    cri.remove_pod(&pod)?;
    ensure!(stolen.is_empty(), "it has read {stolen:?}: {answer:?}");
    let Err(error) = answer else {
        anyhow::bail!("it was restored");
    };
    let error = error.to_string();
    ensure!(error.contains("which is not in its mounts"), "{error}");
    Ok(())
}

/// As containerd restores by itself (`ctr containers restore --live`): without anything to impose.
fn native_restores_are_looked_at(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    node.shell(&format!(
        r#"echo secret >/root/secret; mkdir -p /root/b/rootfs/bin /root/w {STORE}/honest/first; cd /root/b
           cp /bin/busybox rootfs/bin/; runc spec
           sed -i 's/"terminal": true/"terminal": false/; s/"readonly": true/"readonly": false/; s/"sh"/"\/bin\/busybox", "tail", "-f", "\/dev\/null"/' config.json
           runc run --detach web </dev/null >/dev/null 2>&1
           runc checkpoint --work-path /root/w --image-path {STORE}/honest/first/checkpoint web
           echo '{{"containers":[{{"files":[]}}]}}' >{STORE}/honest/transship.json"#
    ))
    .run()?;
    let restore = format!(
        "cd /root; transship-runc --log /root/said restore --detach --pid-file /root/pid \
         --image-path {STORE}/web/first/checkpoint --work-path /root/w --bundle /root/b web \
         </dev/null >/dev/null 2>&1"
    );
    let opens = "opens_by_link('/proc/self/fd/121/1/root/root/secret')";
    forge(&node, &format!("{HELP}{OPENS}{opens}"))?;
    let answer = node.shell(&restore).output()?;
    let said = node.shell("cat /root/said").read()?;
    ensure!(
        !answer.status.success() && said.contains("open, which is not in its mounts"),
        "{said}"
    );
    // The same without a forgery, on a node that asks for signatures.
    forge(&node, "")?;
    let rules = format!("[checkpoints]\nsigned-by = [\"{PUBLIC_KEY}\"]\n");
    node.write_file(NODE_CONFIG, &rules)?;
    let answer = node.shell(&format!("rm /root/said; {restore}")).output()?;
    let said = node.shell("cat /root/said").read()?;
    ensure!(
        !answer.status.success() && said.contains("by allow-native = true there"),
        "{said}"
    );
    node.write_file(NODE_CONFIG, format!("{rules}allow-native = true\n"))?;
    // A text that Go reads and that is none: of what has no spec nothing can be said.
    let odd = format!(
        r#"cd /root/b; cp config.json read.json; rm /root/said
           sed -i '1s/{{/{{"annotations":{{"x":"\\ud800"}},/' config.json; {restore}"#
    );
    let answer = node.shell(&odd).output()?;
    let said = node
        .shell("cat /root/said; mv /root/b/read.json /root/b/config.json")
        .read()?;
    ensure!(
        !answer.status.success()
            && said.contains("which the checkpoint has brought, cannot be read"),
        "{said}"
    );
    let state =
        format!("{restore}; sed 's/.*) //; s/ .*//' /proc/$(cat /root/pid)/stat; runc state web");
    let state = node.shell(&state).read()?;
    ensure!(
        state.starts_with("S\n") && state.contains(r#""status": "running""#),
        "{state}"
    );
    node.shell("transship-runc delete --force web").run()?;
    Ok(())
}
