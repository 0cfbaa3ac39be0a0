//! What CRIU does not keep, and the copy has all the same; and what it cannot have, which is refused.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_faults::{counts_on, refused, run_alone};

const PATIENCE: Duration = Duration::from_secs(90);
/// How long a holder that ticks is waited for.
const TICKS: Duration = Duration::from_secs(60);
/// How long the source stands still at least, in seconds.
const STANDS_STILL: i64 = 10;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "migration_keeps",
            tree: Tree::Forky,
            run: attributes_of_tasks_come_along,
        },
        Case {
            what: "long_wall_clock",
            tree: Tree::Forky,
            run: timers_fire_at_their_moment,
        },
    ]
    .into_iter()
}

fn attributes_of_tasks_come_along(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    run_alone(&a, "counter")?;
    let migrate = ["migrate", "counter", "--to", ssh.as_str()];

    // Its parent is the shim: it would stay behind, and end there.
    a.shell("ctr tasks exec --detach --exec-id more counter /bin/busybox sleep 1000")
        .run()?;
    refused(&a, &migrate, 4, "--allow-lost exec")?;
    // What the other node has against it is told with that.
    let create = "ctr containers create --snapshotter transship transship.test/pause:1 counter";
    b.shell(create).run()?;
    refused(&a, &migrate, 4, "--allow-lost exec")?;
    refused(
        &a,
        &migrate,
        4,
        "a container \"counter\" exists in the namespace",
    )?;
    b.ctr(&["containers", "delete", "counter"])?;
    refused(
        &a,
        &["migrate", "counter", "--to", "false"],
        4,
        "--allow-lost exec",
    )?;
    a.shell("pkill -KILL -f '[s]leep 1000'").run()?;
    poll_until("the end of the exec", PATIENCE, || {
        let left = a.shell("! pgrep -f '[s]leep 1000'");
        { left }.run().map_err(|error| error.to_string())
    })?;

    let pid = journey::task_pid(&a, "counter")?;
    a.shell(&format!(
        "taskset -pc 0 {pid}; ionice -c 2 -n 7 -p {pid}; echo 123456 >/proc/{pid}/timerslack_ns"
    ))
    .run()?;
    let before = attributes(&a)?;
    ensure!(
        before.contains("123456") && before.contains("best-effort: prio 7"),
        "{before}"
    );
    a.command("transship").args(migrate).run()?;
    counts_on(&b, "counter")?;
    let after = attributes(&b)?;
    ensure!(after == before, "{before} and then {after}");
    journey::remove_container(&b, "counter")?;
    no_signal_is_heard_of(bed, (&a, &b), &ssh)?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

/// A program that counts each SIGCONT, and each SIGCHLD of a child that was stopped or went on, gets none by
/// a migration, a checkpoint, a restore that is tried and a restore.
fn no_signal_is_heard_of(bed: &Testbed, (a, b): (&Node, &Node), ssh: &str) -> anyhow::Result<()> {
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.import_image(&holder, "transship")?;
    a.ctr(&[
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        "transship.test/holder:1",
        "signals",
        "/usr/bin/holder",
        "signals",
    ])?;
    hears_nothing(a)?;
    a.command("transship")
        .args(["migrate", "signals", "--to", ssh])
        .run()?;
    hears_nothing(b)?;
    b.shell("transship checkpoint signals --name signals --verify-restore")
        .run()?;
    hears_nothing(b)?;
    journey::remove_container(b, "signals")?;
    b.shell("transship restore signals && transship rm signals")
        .run()?;
    hears_nothing(b)?;
    Ok(journey::remove_container(b, "signals")?)
}

/// It ticks on, and no signal has come.
fn hears_nothing(node: &Node) -> anyhow::Result<()> {
    ticks_on(node, "signals", "signals ok")
}

/// A holder ticks on, and what it holds is as `held` says.
pub(crate) fn ticks_on(node: &Node, id: &str, held: &str) -> anyhow::Result<()> {
    let ticks = format!("{held}\ntick ");
    let tick = || -> Result<u64, String> {
        let state = journey::read_in_container(node, id, "/data/state")?;
        let tick = state.strip_prefix(&ticks);
        tick.and_then(|tick| tick.trim().parse().ok()).ok_or(state)
    };
    let before = poll_until("the holder", TICKS, tick)?;
    poll_until("a tick", TICKS, || match tick()? {
        now if now > before => Ok(()),
        now => Err(format!("it is at {now}")),
    })?;
    Ok(())
}

fn attributes(node: &Node) -> anyhow::Result<String> {
    let pid = journey::task_pid(node, "counter")?;
    let read = node.shell(&format!(
        "grep Cpus_allowed_list /proc/{pid}/status; ionice -p {pid}; cat /proc/{pid}/timerslack_ns"
    ));
    Ok({ read }.read()?)
}

/// A timer that is set to a moment of the wall clock while the container stands still is not late by that
/// time.
fn timers_fire_at_their_moment(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    for node in [&a, &b] {
        node.shell("mkdir -p /srv/timer").run()?;
    }
    // On x86-64: timerfd_create(CLOCK_REALTIME), timerfd_settime(TFD_TIMER_ABSTIME); in a process of its own
    // timer_create(CLOCK_REALTIME), timer_settime with TIMER_ABSTIME and, of as long a time, without. When they fire, by
    // clock_gettime(CLOCK_REALTIME).
    a.write_file(
        "/srv/timer/program",
        "my $due = time + 30;
         sub fired {
             # time(2) is late by up to a tick of the clock.
             my $now = pack('q2', 0, 0);
             syscall(228, 0, $now) == 0 or die;
             open(my $fired, '>', '/timer/fired-' . shift);
             print $fired ((unpack('q2', $now))[0] - $due);
             close($fired);
         }
         sub timer {
             my ($signal, $flags, $seconds) = @_;
             my ($id, $event) = (pack('l', 0), pack('q l l x48', 0, $signal, 0));
             syscall(222, 0, $event, $id) == 0 or die;
             syscall(223, unpack('l', $id), $flags, pack('q4', 0, 0, $seconds, 0), 0) == 0 or die;
         }
         unless (fork) {
             $SIG{USR1} = sub { fired('moment') };
             $SIG{USR2} = sub { fired('time') };
             timer(10, 1, $due);
             timer(12, 0, 30);
             open(my $set, '>', '/timer/set-timers'); close($set);
             sleep 1000 while 1;
         }
         my $fd = syscall(283, 0, 0);
         syscall(286, $fd, 1, pack('q4', 0, 0, $due, 0), 0) == 0 or die;
         open(my $set, '>', '/timer/set'); close($set);
         open(my $timer, '<&=', $fd);
         sysread($timer, my $ticks, 8);
         fired('descriptor');
         sleep 1000 while 1;",
    )?;
    let mut run = vec!["run", "--detach", "--snapshotter", "transship"];
    let mounts = [
        "/usr:/usr",
        "/usr/lib:/lib",
        "/usr/lib64:/lib64",
        "/srv/timer:/timer",
    ]
    .map(|it| {
        let (from, to) = it.split_once(':').unwrap_or((it, it));
        format!("type=bind,src={from},dst={to},options=bind:rw")
    });
    run.extend(mounts.iter().flat_map(|it| ["--mount", it.as_str()]));
    run.extend([
        "transship.test/counter:1",
        "timer",
        "/usr/bin/perl",
        "/timer/program",
    ]);
    a.ctr(&run)?;
    poll_until("the timer", PATIENCE, || {
        let set = a.shell("test -e /srv/timer/set -a -e /srv/timer/set-timers");
        { set }.run().map_err(|error| error.to_string())
    })?;
    let before_restore =
        format!("sleep {STANDS_STILL}; tar -c -C /srv timer | {ssh} tar -x -C /srv");
    a.command("transship")
        .args(["migrate", "timer", "--to", &ssh, "--allow", "host-mounts"])
        .args(["--before-restore", &before_restore])
        .run()?;
    let early = b.shell("test ! -e /srv/timer/fired-moment").run().is_ok();
    let late = |which: &str| -> anyhow::Result<i64> {
        let late = poll_until("the timer's moment", PATIENCE, || {
            let late = b.shell(&format!("cat /srv/timer/fired-{which}")).read();
            late.map_err(|error| error.to_string())?
                .parse()
                .map_err(|error| format!("{error}"))
        });
        Ok(late?)
    };
    let [descriptor, moment, time] = [late("descriptor")?, late("moment")?, late("time")?];
    // A migration that has taken longer than the timers says nothing.
    let said = format!("late by {descriptor}, {moment}, and {time} s");
    for late in [descriptor, moment] {
        ensure!(late >= 0 && (!early || late < STANDS_STILL), "{said}");
    }
    // A time that a program waits is no moment: it has not passed while nothing ran.
    ensure!(time >= STANDS_STILL, "{said}");
    journey::remove_container(&b, "timer")?;
    Ok(())
}
