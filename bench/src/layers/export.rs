//! The export alone, without containerd: beside `tar` of the upperdir and `cat` of the large file.
//!
//! All of them write into a pipe whose reader throws everything away.

use std::fs::File;
use std::io::{self, Read as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use transship_layer::{ExportOptions, OverlayStack, export_upperdir};

use super::Bench;
use super::changes::{Changed, FEW, Snapshot};
use crate::daemon::Process;
use crate::report::{Better, Goal, Row};
use crate::statistics::{median_millis, megabytes, spaced};

/// Of each side. Single turns differ by half on a machine that others use, too.
const TURNS: usize = 9;
const BESIDE_TAR: Goal = Goal::RatioAtLeast(0.9);
const BESIDE_CAT: Goal = Goal::RatioAtLeast(0.9);
const PEAK_MB: Goal = Goal::AtMost(64.0);

pub(super) fn measure(bench: &mut Bench<'_>, changed: &Changed) -> Result<Vec<Row>> {
    let itself = Process::itself();
    itself.reset_peak()?;
    let few = take_turns(&changed.few, || tar_of(&changed.few))?;
    let many = take_turns(&changed.many, || tar_of(&changed.many))?;
    let large = take_turns(&changed.large, || {
        let mut cat = Command::new("cat");
        cat.arg(changed.large.upperdir.join("large"));
        cat
    })?;
    let peak = megabytes(itself.peak_bytes()?);
    let many_files = spaced(bench.sizes.many_changes as usize);
    let large_file = bench.sizes.large_file_bytes >> 20;
    Ok(vec![
        compared(format!("export, {FEW} changed files"), "tar", &few),
        compared(format!("export, {many_files} changed files"), "tar", &many).goal(BESIDE_TAR),
        compared(
            format!("export, one file of {large_file} MiB"),
            "cat",
            &large,
        )
        .goal(BESIDE_CAT),
        Row::new("most memory of a program that exports", "MB", peak)
            .goal(PEAK_MB)
            .note("this program, which exports with the library"),
    ])
}

/// Times of ours and of the peer.
type Turns = (Vec<Duration>, Vec<Duration>);

fn take_turns(snapshot: &Snapshot, peer: impl Fn() -> Command) -> Result<Turns> {
    let mut turns = Turns::default();
    // What both read is in memory after the first pair, which is not counted. They take turns in going
    // first: who follows the other finds the processors' caches as that one left them.
    for turn in 0..=TURNS {
        let (mut own, mut other) = (None, None);
        for side in [turn % 2 == 0, turn % 2 != 0] {
            if side {
                own = Some(into_nothing(|pipe| {
                    let stack = OverlayStack::new(&snapshot.upperdir, &snapshot.lowerdirs[..]);
                    export_upperdir(&stack, pipe, &ExportOptions::default())
                        .map(drop)
                        .context("cannot export")
                })?);
            } else {
                other = Some(into_nothing(|pipe| {
                    let mut command = peer();
                    let status = command.stdout(Stdio::from(pipe)).status();
                    let status = status.with_context(|| format!("cannot run {command:?}"))?;
                    ensure!(status.success(), "{command:?} ended with {status}");
                    Ok(())
                })?);
            }
        }
        if turn > 0 {
            turns.0.extend(own);
            turns.1.extend(other);
        }
    }
    Ok(turns)
}

fn tar_of(snapshot: &Snapshot) -> Command {
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--numeric-owner", "-cf", "-", "-C"]);
    tar.arg(&snapshot.upperdir).arg(".");
    tar
}

/// Time until everything that `act` writes has been read.
fn into_nothing(act: impl FnOnce(File) -> Result<()>) -> Result<Duration> {
    let (mut reader, writer) = io::pipe().context("cannot make a pipe")?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let drain = scope.spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while reader.read(&mut buffer)? > 0 {}
            io::Result::Ok(())
        });
        let acted = act(File::from(std::os::fd::OwnedFd::from(writer)));
        let drained = drain.join().expect("reading a pipe does not panic");
        acted?;
        drained.context("cannot read the pipe")?;
        Ok(start.elapsed())
    })
}

fn compared(name: String, peer: &str, (own, other): &Turns) -> Row {
    Row::new(name, "ms", median_millis(own)).beside(peer, median_millis(other), Better::Less)
}
