//! A checkpoint of unknown origin, whose maker writes what he likes into it: nothing of it runs a
//! program of the node, opens a path of it, or gives a privilege, unless the node's operator says so.
//!
//! ```text
//!  checkpoint of an ordinary container --> one thing changed, digests put right --> transship restore
//! ```

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use crate::Case;

const STORE: &str = "/var/lib/transship/checkpoints";
const PROOF: &str = "/run/pwned";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "foreign_checkpoint",
        tree: Tree::Forky,
        run: a_checkpoint_decides_nothing_on_this_node,
    }]
    .into_iter()
}

/// An ordinary checkpoint as its maker could change it.
pub(crate) struct Forgery {
    pub(crate) manifest: Value,
    pub(crate) spec: Value,
}

impl Forgery {
    /// Takes a checkpoint of a counter, which is removed, and reads it.
    pub(crate) fn prepare(node: &Node) -> anyhow::Result<Self> {
        let run = "ctr run --detach --snapshotter transship transship.test/counter:1 web";
        node.shell(run).run()?;
        journey::wait_for_count(node, "web", 2)?;
        node.shell("transship checkpoint web --name good").run()?;
        journey::remove_container(node, "web")?;
        let read = |path: &str| -> anyhow::Result<Value> {
            Ok(serde_json::from_slice(&node.read_file(path)?)?)
        };
        Ok(Self {
            manifest: read(&format!("{STORE}/good/transship.json"))?,
            spec: read(&format!("{STORE}/good/web/spec.dump"))?,
        })
    }

    /// Writes a copy of the checkpoint, called `evil`, with a manifest and a spec that fit each other.
    pub(crate) fn write(&self, node: &Node) -> anyhow::Result<Value> {
        node.shell(&format!(
            "rm -rf {STORE}/evil; cp -a {STORE}/good {STORE}/evil"
        ))
        .run()?;
        let spec = serde_json::to_vec(&self.spec)?;
        node.write_file(&format!("{STORE}/evil/web/spec.dump"), &spec)?;
        let digest = node
            .shell(&format!("sha256sum {STORE}/evil/web/spec.dump"))
            .read()?;
        let mut manifest = self.manifest.clone();
        manifest["name"] = json!("evil");
        let files = manifest["containers"][0]["files"].as_array_mut();
        for file in files.context("no files")? {
            if file["path"] == "spec.dump" {
                file["size"] = json!(spec.len());
                file["sha256"] = json!(digest.split_whitespace().next());
            }
        }
        let path = format!("{STORE}/evil/transship.json");
        node.write_file(&path, serde_json::to_vec(&manifest)?)?;
        node.shell("transship inspect evil --verify").run()?;
        Ok(manifest)
    }
}

/// Files of a checkpoint in whose place something else is.
const SWAPS: &[&str] = &[
    "rm web/spec.dump; mkfifo web/spec.dump",
    "mv web/spec.dump /root/s; ln -s /root/s web/spec.dump",
    "rm web/rootfs-diff.tar; mkfifo web/rootfs-diff.tar",
    "mv web/rootfs-diff.tar /root/t; ln -s /root/t web/rootfs-diff.tar",
    "mv web/checkpoint /root/c; ln -s /root/c web/checkpoint",
    "mv web /root/w; ln -s /root/w web",
];

/// Who looks into the files of a checkpoint.
const READERS: &[&str] = &[
    "restore evil --id r",
    "inspect evil",
    "inspect evil --verify",
    "diff good evil",
];

/// What a change of the manifest or the spec leads to.
enum Outcome {
    /// One line that holds this, and how to allow it.
    Refused(&'static str),
    /// A container without what was asked for: this script succeeds.
    Without(&'static str),
}

fn a_checkpoint_decides_nothing_on_this_node(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    let good = Forgery::prepare(&node)?;
    for (what, change, outcome) in forgeries() {
        let mut forged = Forgery {
            manifest: good.manifest.clone(),
            spec: good.spec.clone(),
        };
        change(&mut forged);
        forged.write(&node)?;
        check(&node, outcome).with_context(|| format!("case {what:?}"))?;
    }
    for swap in SWAPS {
        Forgery {
            manifest: good.manifest.clone(),
            spec: good.spec.clone(),
        }
        .write(&node)?;
        node.shell(&format!("cd {STORE}/evil; {swap}")).run()?;
        for read in READERS {
            // 124: it has waited for whoever writes to the FIFO.
            let read = format!(
                "timeout -k 1 60 transship {read} >/dev/null; c=$?; test $c != 0 -a $c != 124"
            );
            let refused = node.shell(&format!("set +e; {read}")).run();
            refused.with_context(|| format!("{swap}, {read}"))?;
        }
        ensure!(
            node.ctr(&["containers", "ls", "-q"])?.is_empty(),
            "{swap}: left"
        );
    }
    // What the operator allows goes through.
    let mut hooked = Forgery { ..good };
    hook(&mut hooked);
    hooked.write(&node)?;
    node.shell("transship restore evil --id r --allow hooks")
        .run()?;
    node.shell(&format!("test -s {PROOF} && rm {PROOF}"))
        .run()?;
    journey::remove_container(&node, "r")?;
    node.write_file(
        "/etc/transship/node.toml",
        "[restore]\nallow = [\"hooks\"]\n",
    )?;
    node.shell("transship restore evil --id r").run()?;
    journey::remove_container(&node, "r")?;
    node.shell("rm /etc/transship/node.toml; transship rm evil good")
        .run()?;
    journey::check_nothing_left(&node)
}

fn check(node: &Node, outcome: Outcome) -> anyhow::Result<()> {
    let output = node
        .command("transship")
        .args(["restore", "evil", "--id", "r"])
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let ran = node
        .shell(&format!("sleep 1; test -e {PROOF}"))
        .run()
        .is_ok();
    ensure!(!ran, "a program of the node was run");
    match outcome {
        Outcome::Refused(said) => {
            ensure!(
                output.status.code() == Some(4),
                "{}: {error}",
                output.status
            );
            ensure!(error.contains(said), "{error:?} does not say {said:?}");
            ensure!(error.contains(" (--"), "{error:?} does not say how");
            let text = error.trim_end_matches('\n');
            ensure!(!text.contains('\n'), "more than a line: {text:?}");
            ensure!(node.ctr(&["containers", "ls", "-q"])?.is_empty(), "left");
        }
        Outcome::Without(script) => {
            ensure!(output.status.success(), "{error}");
            node.shell(script).run()?;
            journey::remove_container(node, "r")?;
        }
    }
    Ok(())
}

fn hook(forged: &mut Forgery) {
    let command = format!("id >{PROOF}");
    forged.spec["hooks"] =
        json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", command]}]});
}

fn mount(forged: &mut Forgery, mount: Value) {
    if let Some(mounts) = forged.spec["mounts"].as_array_mut() {
        mounts.push(mount);
    }
}

type Change = fn(&mut Forgery);

fn forgeries() -> Vec<(&'static str, Change, Outcome)> {
    use Outcome::{Refused, Without};
    vec![
        (
            "log uri",
            |it| {
                let uri = format!("binary:///bin/sh?-c=id%20>{PROOF}");
                it.manifest["containers"][0]["stdio"]["stdout"] = json!(uri);
            },
            Without("true"),
        ),
        (
            "reserved labels",
            |it| {
                it.manifest["containers"][0]["labels"] = json!({
                    "containerd.io/restart.loguri": "binary:///bin/sh",
                    "containerd.io/restart.status": "running",
                    "io.cri-containerd.kind": "container",
                    "io.kubernetes.pod.namespace": "shop",
                    "mine": "kept",
                });
            },
            Without(
                "ctr containers info r | grep -q '\"mine\": \"kept\"'
                 ! ctr containers info r | grep -qE '\"(containerd.io|io.cri|io.kubernetes)[^\"]*\": '",
            ),
        ),
        (
            "runtime",
            |it| it.manifest["containers"][0]["runtime"] = json!("/bin/sh"),
            Without("ctr containers info r | grep -q '\"Name\": \"io.containerd.runc.v2\"'"),
        ),
        ("hooks", hook, Refused("hooks")),
        (
            "CRIU's configuration",
            |it| it.spec["annotations"] = json!({"org.criu.config": "/tmp/x.conf"}),
            Refused("org.criu.config"),
        ),
        (
            "an annotation that a plugin may act on",
            |it| it.spec["annotations"] = json!({"cdi.k8s.io/x": "vendor.example/gpu=all"}),
            Refused("cdi.k8s.io/x"),
        ),
        (
            "a process of the node in its cgroup",
            |it| {
                let files = json!({"cgroup.procs": "1"});
                it.spec["linux"]["resources"]["unified"] = files;
            },
            Refused("cgroup.procs"),
        ),
        (
            "CRIU's options",
            |it| {
                it.manifest["containers"][0]["criu"]["lsm_profile"] = json!("apparmor:unconfined");
            },
            Refused("lsm-profile"),
        ),
        (
            "device",
            |it| {
                it.spec["linux"]["devices"] =
                    json!([{"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}]);
            },
            Refused("/dev/vda"),
        ),
        (
            "device rule",
            |it| {
                it.spec["linux"]["resources"]["devices"] =
                    json!([{"allow": true, "access": "rwm"}]);
            },
            Refused("devices"),
        ),
        (
            "host path",
            |it| {
                mount(
                    it,
                    json!({"destination": "/host", "type": "none", "source": "/etc",
                           "options": ["rbind", "rw"]}),
                );
            },
            Refused("/etc on /host"),
        ),
        // The runtimes of Go take a field in capitals for the same field, and "ſ" for "s".
        (
            "host path in capitals",
            |it| {
                mount(
                    it,
                    json!({"destination": "/data/made", "type": "tmpfs", "Source": "/root",
                           "Options": ["rbind", "rw"]}),
                );
            },
            Refused("Options"),
        ),
        (
            "namespace by path in capitals",
            |it| {
                let kinds = ["mount", "pid", "ipc", "network"].map(|kind| json!({"type": kind}));
                let uts = json!({"type": "uts", "Path": "/proc/1/ns/uts"});
                it.spec["linux"]["namespaces"] = json!([&kinds[..], &[uts]].concat());
            },
            Refused("Path"),
        ),
        (
            "device rule in other letters",
            |it| {
                it.spec["linux"]["resources"]["devices"] =
                    json!([{"allow": true, "access": "m", "acceſſ": "rwm"}]);
            },
            Refused("acceſſ"),
        ),
        (
            "disk",
            |it| {
                mount(
                    it,
                    json!({"destination": "/host", "type": "ext4", "source": "/dev/vda"}),
                );
            },
            Refused("/dev/vda"),
        ),
        (
            "second /proc",
            |it| {
                mount(
                    it,
                    json!({"destination": "/p", "type": "proc", "source": "proc"}),
                );
            },
            Refused("/p"),
        ),
        (
            "root",
            |it| it.spec["root"]["path"] = json!("/"),
            Refused("root"),
        ),
        (
            "capabilities",
            |it| {
                it.spec["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_SYS_ADMIN"]);
            },
            Refused("CAP_SYS_ADMIN"),
        ),
        (
            "namespace by path",
            |it| {
                it.spec["linux"]["namespaces"] =
                    json!([{"type": "mount"}, {"type": "pid", "path": "/proc/1/ns/pid"}]);
            },
            Refused("pid"),
        ),
        (
            "namespace of the host",
            |it| {
                let namespaces = it.spec["linux"]["namespaces"].as_array_mut();
                namespaces.into_iter().for_each(|all| all.retain(|it| it["type"] != "network"));
            },
            Refused("network"),
        ),
        (
            "cgroup",
            |it| it.spec["linux"]["cgroupsPath"] = json!("/system.slice/sshd.service"),
            Refused("/system.slice/sshd.service"),
        ),
        (
            "readable kernel settings",
            |it| it.spec["linux"]["readonlyPaths"] = json!([]),
            Refused("/proc/sys"),
        ),
        (
            "unknown field",
            |it| it.spec["vm"] = json!({"kernel": {"path": "/boot/vmlinuz"}}),
            Refused("vm"),
        ),
    ]
}
