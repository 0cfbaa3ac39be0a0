//! Nothing is left of a testbed, however it ends: processes, namespaces, mounts, interfaces, cgroups, directories.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use transship_testbed::{ContainerdConfig, Footprint, Image, Testbed, Traces, Tree, poll_until};

use crate::Case;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let run: [(_, fn(&Testbed) -> _); 4] = [
        ("nothing_left_after_success", nothing_left_after_success),
        ("nothing_left_after_panic", nothing_left_after_panic),
        ("nothing_left_after_signals", nothing_left_after_signals),
        ("nothing_left_after_sigkill", nothing_left_after_sigkill),
    ];
    run.into_iter().map(|(what, run)| Case {
        what,
        tree: Tree::Trixie,
        run,
    })
}

/// A testbed with all that can outlive it: two linked nodes, containerd, a paused container on a CNI
/// network, an sshd, a process that ignores signals.
fn fill(bed: &Testbed) -> anyhow::Result<Footprint> {
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    bed.link(&a, &b)?;
    bed.ssh(&a, &b)?;
    let image = Image::counter(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.start_containerd(&ContainerdConfig::default())?;
    a.import_image(&image, "overlayfs")?;
    a.ctr(&[
        "run",
        "--detach",
        "--cni",
        image.reference(),
        "web",
        "/usr/bin/counter",
        "--memory-mb",
        "1",
    ])?;
    a.ctr(&["tasks", "pause", "web"])?;
    a.start_daemon(
        "stubborn",
        &[
            "sh",
            "-c",
            "trap '' TERM INT HUP; while :; do sleep 1; done",
        ],
    )?;
    let footprint = Footprint::follow(Traces::of(bed))?;
    let remains = footprint.remains()?.join("\n");
    // What is looked for afterwards must be there to be found.
    for sign in [
        "/ns/net of node a",
        "/ns/mnt of node b",
        "/sys/fs/cgroup",
        "run-",
    ] {
        ensure!(
            remains.contains(sign),
            "{sign:?} is not in the living testbed's {remains}"
        );
    }
    Ok(footprint)
}

fn ensure_nothing_remains(footprint: &Footprint) -> anyhow::Result<()> {
    let remains = footprint.remains()?;
    ensure!(remains.is_empty(), "left behind:\n{}", remains.join("\n"));
    Ok(())
}

fn nothing_left_after_success(bed: &Testbed) -> anyhow::Result<()> {
    let own = Testbed::new(bed.tree(), bed.settings())?;
    let footprint = fill(&own)?;
    own.stop()?;
    ensure_nothing_remains(&footprint)
}

fn nothing_left_after_panic(bed: &Testbed) -> anyhow::Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let (tree, settings) = (bed.tree(), bed.settings().clone());
    let thread = std::thread::spawn(move || {
        let own = Testbed::new(tree, &settings).expect("a testbed was just made in the same way");
        sender.send(fill(&own)).expect("the receiver waits");
        panic!("a test that fails by panic");
    });
    let footprint = receiver.recv()??;
    ensure!(thread.join().is_err());
    ensure_nothing_remains(&footprint)
}

fn nothing_left_after_signals(bed: &Testbed) -> anyhow::Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let (mut holder, footprint) = hold(bed)?;
        kill(Pid::from_raw(holder.id().try_into()?), signal)?;
        let status = holder.wait()?;
        ensure!(std::os::unix::process::ExitStatusExt::signal(&status) == Some(signal as i32));
        ensure_nothing_remains(&footprint)?;
    }
    Ok(())
}

fn nothing_left_after_sigkill(bed: &Testbed) -> anyhow::Result<()> {
    let (mut holder, footprint) = hold(bed)?;
    holder.kill()?;
    holder.wait()?;
    // Processes and mounts go at once and by themselves; nobody was there for the files.
    let end = "end of the killed testbed's processes";
    poll_until(end, Duration::from_secs(20), || {
        let alive = footprint.processes().map_err(|error| error.to_string())?;
        if alive.is_empty() {
            Ok(())
        } else {
            Err(alive.join(", "))
        }
    })?;
    let next = Testbed::new(bed.tree(), bed.settings())?;
    ensure_nothing_remains(&footprint)?;
    next.stop()?;
    Ok(())
}

/// Starts another process that holds a testbed, and takes over its footprint.
fn hold(bed: &Testbed) -> anyhow::Result<(Child, Footprint)> {
    let mut holder = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .arg(bed.tree().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(holder.stdout.take().context("no stdout")?).read_line(&mut line)?;
    let traces: Traces = serde_json::from_str(&line).with_context(|| format!("{line:?}"))?;
    let footprint = Footprint::follow(traces)?;
    ensure!(!footprint.remains()?.is_empty());
    Ok((holder, footprint))
}
