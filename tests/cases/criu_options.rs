//! CRIU's options: for each a process that cannot be dumped, or loses something, without it.
//!
//! ```text
//!   pod a                       needs                 without it
//!     lock     a flock          file-locks (default)  the lock is gone
//!     ghost    2 MB, no name    ghost-limit           not dumped
//!     link     another name     link-remap            not dumped
//!     tcp      to itself        tcp                   not dumped
//!     flight   not accepted     skip-in-flight (default in a pod), tcp   not dumped
//!     listener a socket
//!     sender   to the listener  ext-unix-sk           not dumped
//! ```
//!
//! The checkpoint is then restored by an annotation that names nothing but the checkpoint.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, Pod, PodContainer, PodNamespaces, Testbed,
    journey, poll_until,
};

use crate::Case;

const IMAGE: &str = "transship.test/holder:1";
const PATIENCE: Duration = Duration::from_secs(20);
/// What all containers see of the node.
const SHARED: &[(&str, &str)] = &[("/var/lib/shared", "/shared")];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("criu_options", options_reach_dump_and_restore)
}

fn container<'a>(name: &'a str, command: &'a [&'a str]) -> PodContainer<'a> {
    PodContainer {
        name,
        image: IMAGE,
        command,
        mounts: SHARED,
        ..PodContainer::default()
    }
}

const HOLDERS: [(&str, &[&str]); 7] = [
    // CRIU looks for the other end in the network namespace, where it must be: in the same pod.
    ("listener", &["/usr/bin/holder", "receive=/shared/socket"]),
    ("lock", &["/usr/bin/holder", "lock"]),
    ("ghost", &["/usr/bin/holder", "ghost=2097152"]),
    ("link", &["/usr/bin/holder", "link"]),
    ("tcp", &["/usr/bin/holder", "tcp=7001"]),
    ("flight", &["/usr/bin/holder", "in-flight=7002"]),
    ("sender", &["/usr/bin/holder", "datagrams=/shared/socket"]),
];

fn options_reach_dump_and_restore(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "holders"), &[], PodNamespaces::Usual)?;
    let ids = run_holders(&cri, &pod)?;
    // Each option that is missing is missed by one container, which the refusal names, before anything
    // is frozen.
    let mut flags = vec!["--ghost-limit=4M", "--link-remap", "--tcp=close"];
    // The fourth is on in a pod, unless it is switched off.
    flags.extend(["--skip-in-flight", "--ext-unix-sk"]);
    for (missing, name) in ["ghost", "link", "tcp", "flight", "sender"]
        .iter()
        .enumerate()
    {
        let some = flags.iter().enumerate().filter(|(at, _)| *at != missing);
        let off = (*name == "flight").then_some("--no-skip-in-flight");
        let some: Vec<&str> = some.map(|(_, flag)| *flag).chain(off).collect();
        let error = checkpoint(&node, &some)?;
        let id = &ids[missing + 2];
        let told = format!("the container {:?} of the pod", HOLDERS[missing + 2].0);
        let flag = flags[missing].split('=').next().unwrap_or_default();
        ensure!(
            error.contains(&told) && error.contains(flag),
            "without {flag} {name} is not told of: {error}"
        );
        ensure!(cri.runs(id)?, "{name} goes on");
    }
    a_terminal_of_another_session(&node, &cri, &ids[1], &flags)?;
    flags.retain(|flag| *flag != "--skip-in-flight");
    let error = checkpoint(&node, &flags)?;
    ensure!(error.is_empty(), "{error}");
    let manifest = node.read_file("/var/lib/transship/checkpoints/holders/transship.json")?;
    let manifest = String::from_utf8(manifest)?;
    for line in [
        "\"tcp\": \"close\"",
        "\"skip_in_flight\": true",
        "\"ghost_limit\": 4194304",
    ] {
        ensure!(manifest.contains(line), "{manifest}");
    }
    cri.remove_pod(&pod)?;

    let pod = cri.run_pod(
        ("shop", "holders-again"),
        &[("dev.transship/restore", "holders")],
        PodNamespaces::Usual,
    )?;
    let ids = run_holders(&cri, &pod)?;
    for (id, (name, _)) in ids.iter().zip(HOLDERS) {
        let state = state_after(&cri, id, 0)?;
        let good = match name {
            "tcp" => state.contains("os error") && !state.contains("tcp ok"),
            _ => !state.contains("os error") && state.contains(" ok\n"),
        };
        ensure!(good, "{name} after the restore: {state}");
    }
    let locked = node.shell(&format!(
        "pid=$(ctr -n k8s.io tasks ls | awk '$1 == \"{}\" {{print $2}}')
         ! flock --nonblock /proc/$pid/root/data/lock true",
        ids[1]
    ));
    { locked }.run()?;
    let received = || {
        let text = node.read_file("/var/lib/shared/socket.received");
        let text = text.map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&text).into_owned();
        text.parse::<u64>().map_err(|error| error.to_string())
    };
    let before = poll_until("the datagrams so far", PATIENCE, received)?;
    poll_until("more datagrams", PATIENCE, || match received()? {
        now if now > before => Ok(()),
        now => Err(format!("{now} bytes")),
    })?;
    cri.remove_pod(&pod)?;
    nonsense_is_refused_before_anything_happens(&node, &cri)?;
    overrides_win_at_the_restore(&node, &cri)?;
    node.shell("transship rm holders").run()?;
    journey::check_nothing_left(&node)
}

/// A process that somebody has left in the container holds the terminal of a session whose leader
/// is no child of the container's.
fn a_terminal_of_another_session(
    node: &Node,
    cri: &Cri,
    id: &str,
    flags: &[&str],
) -> anyhow::Result<()> {
    let mut shell = cri.exec_tty(node, id, &["/bin/sh"])?;
    shell.send(0, "(tail -f /data/lock & echo le\"\"ft)\n")?;
    shell.wait_for(1, "left")?;
    let error = checkpoint(node, flags)?;
    ensure!(
        error.contains("leader is outside, or holds the terminal") && error.contains("--shell-job"),
        "{error}"
    );
    ensure!(cri.runs(id)?, "it goes on");
    let error = checkpoint(
        node,
        &[flags, &["--shell-job", "--allow-lost=exec"]].concat(),
    )?;
    ensure!(error.is_empty(), "{error}");
    // No shim gives a restore a terminal to take the other one's place.
    let restore = [("dev.transship/restore", "holders")];
    let pod = cri.run_pod(("shop", "shell-job"), &restore, PodNamespaces::Usual)?;
    let (name, command) = HOLDERS[1];
    let Err(error) = cri.run_container(&pod, &container(name, command)) else {
        anyhow::bail!("restored, with whose terminal?");
    };
    ensure!(error.to_string().contains("cannot restore"), "{error}");
    cri.remove_pod(&pod)?;
    cri.exec(
        id,
        &["sh", "-c", "kill -9 $(ps | grep '[t]ail -f' | cut -c1-6)"],
    )?;
    // containerd 1.6 leaves it there when its client goes.
    shell.send(0, "exit\n")?;
    node.shell("transship rm holders").run()?;
    Ok(())
}

fn nonsense_is_refused_before_anything_happens(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    for (key, value, said) in [
        (
            "dev.transship/tcp",
            "maybe",
            "\\\"refuse\\\", \\\"established\\\" or \\\"close\\\"",
        ),
        (
            "dev.transship/tpc",
            "close",
            "dev.transship/tpc means nothing",
        ),
    ] {
        let Err(error) = cri.run_pod(("shop", "nonsense"), &[(key, value)], PodNamespaces::Usual)
        else {
            anyhow::bail!("{key}={value} is taken");
        };
        let (error, said) = (error.to_string(), said.replace("\\\"", "\""));
        ensure!(error.replace('\\', "").contains(&said), "{key}: {error}");
    }
    let output = node
        .command("transship")
        .args(["checkpoint", "x", "--manage-cgroups-mode", "maybe"])
        .output()?;
    ensure!(output.status.code() == Some(2), "{}", output.status);
    Ok(())
}

/// A security profile on a kernel without security modules: CRIU says so, hence it was asked. And
/// the annotation wins over what was dumped with.
fn overrides_win_at_the_restore(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let has_lsm = node
        .shell("grep -qE 'apparmor|selinux' /sys/kernel/security/lsm")
        .run();
    if has_lsm.is_ok() {
        return Ok(());
    }
    let annotations = [
        ("dev.transship/restore", "holders"),
        ("dev.transship/lsm-profile", "apparmor:web"),
    ];
    let pod = cri.run_pod(("shop", "profiled"), &annotations, PodNamespaces::Usual)?;
    let (name, command) = HOLDERS[1];
    let Err(error) = cri.run_container(&pod, &container(name, command)) else {
        anyhow::bail!("the profile never reached CRIU");
    };
    let error = error.to_string();
    ensure!(error.to_lowercase().contains("apparmor"), "{error}");
    cri.remove_pod(&pod)?;
    Ok(())
}

fn checkpoint(node: &Node, flags: &[&str]) -> anyhow::Result<String> {
    let mut command = node.command("transship");
    command.args(["checkpoint", "--pod", "shop/holders", "--name", "holders"]);
    let output = command.args(flags).output()?;
    Ok(match output.status.success() {
        true => String::new(),
        false => String::from_utf8(output.stderr)?,
    })
}

fn run_holders(cri: &Cri, pod: &Pod) -> anyhow::Result<Vec<String>> {
    let mut ids = Vec::new();
    for (name, command) in HOLDERS {
        let id = cri.run_container(pod, &container(name, command))?;
        state_after(cri, &id, 0)?;
        ids.push(id);
    }
    Ok(ids)
}

/// What a holder says, after two more ticks at least.
fn state_after(cri: &Cri, id: &str, ticks: u64) -> anyhow::Result<String> {
    let mut first = None;
    Ok(poll_until("the holder's state", PATIENCE, || {
        let answer = cri
            .exec(id, &["cat", "/data/state"])
            .map_err(|error| error.to_string())?;
        let state = String::from_utf8_lossy(&answer.stdout).into_owned();
        let tick = state
            .rsplit_once("tick ")
            .and_then(|(_, tick)| tick.trim().parse::<u64>().ok());
        let tick = tick.ok_or_else(|| state.clone())?;
        let first = *first.get_or_insert(tick);
        if tick >= first + 2 && tick >= ticks {
            Ok(state)
        } else {
            Err(state)
        }
    })?)
}

fn start(bed: &Testbed, node: &Node) -> anyhow::Result<()> {
    node.shell("mkdir -p /var/lib/shared").run()?;
    // Each of them loosens something, so a pod restores it only where its operator allows it.
    node.write_file(
        "/etc/transship/node.toml",
        "[pods]\nallow-options = [\"ext-unix-sk\", \"shell-job\", \"lsm-profile\"]\n",
    )?;
    node.start_snapshotter()?;
    let config = ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    };
    node.start_containerd(&config)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    for image in [Image::pause(bed.settings())?, holder] {
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    Ok(())
}
