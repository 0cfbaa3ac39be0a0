//! What the table of conditions says is to be done, typed as it stands there: then the check passes, and so do the
//! checkpoint and its restore.

use anyhow::{Context as _, ensure};
use transship_checkpoint::conditions::Condition;
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::conditions::{
    HOLDER, PATIENCE, check, mount_from_outside, names, prepare, run, session_from_outside,
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "conditions_remedied",
        tree: Tree::Forky,
        run: what_is_to_be_done_does,
    }]
    .into_iter()
}

/// A condition, and the remedy.
struct Row {
    name: &'static str,
    /// Arguments of `ctr run`.
    run: &'static [&'static str],
    command: &'static [&'static str],
    /// What happens to it then.
    then: Then,
    /// Flags that are no remedy.
    flags: &'static [&'static str],
    /// What of the remedy in the table this is about.
    word: &'static str,
    remedy: Remedy,
    /// What a restore asks for besides, on the node that it was on.
    restore: &'static [&'static str],
}

/// Commands are of a shell on the node, with `PID` for the first process and `NAME` for the container.
enum Then {
    Nothing,
    Command(&'static str),
    By(fn(&Node, u32) -> anyhow::Result<()>),
}

enum Remedy {
    Flags(&'static [&'static str]),
    Command(&'static str),
    /// It is run again, with more arguments of `ctr run` and this command.
    Run(&'static [&'static str], &'static [&'static str]),
}

const PLAIN: Row = Row {
    name: "",
    run: &[],
    command: &[],
    then: Then::Nothing,
    flags: &[],
    word: "",
    remedy: Remedy::Flags(&[]),
    restore: &[],
};

/// For each child that it gets.
const WAITS: &[&str] = &[
    "/bin/busybox",
    "sh",
    "-c",
    "while :; do /bin/busybox sleep 1; done",
];

const CHILD_IN_CHROOT: &[&str] = &[
    "/bin/busybox",
    "sh",
    "-c",
    "b=/bin/busybox; $b mkdir -p /jail/bin; $b cp $b /jail/bin
     $b chroot /jail $b sleep 100000 & while :; do $b sleep 1; done",
];

const PAGEMAP: &[&str] = &[
    "/bin/busybox",
    "sh",
    "-c",
    "exec 3</proc/self/pagemap; while :; do /bin/busybox sleep 1; done",
];

/// A tracer that stays.
const TRACE: &str = r#"
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
SEIZE = 0x4206
if libc.ptrace(SEIZE, int(sys.argv[1]), None, None):
    sys.exit("ptrace")
time.sleep(100000)
"#;

const ROWS: &[Row] = &[
    Row {
        name: "tcp",
        command: &[HOLDER, "tcp=7001"],
        word: "--tcp established",
        remedy: Remedy::Flags(&["--tcp", "established"]),
        ..PLAIN
    },
    Row {
        name: "tcp",
        command: &[HOLDER, "tcp=7001"],
        word: "--tcp close",
        remedy: Remedy::Flags(&["--tcp", "close"]),
        ..PLAIN
    },
    Row {
        name: "in-flight",
        command: &[HOLDER, "in-flight=7002"],
        flags: &["--tcp", "established"],
        word: "--skip-in-flight",
        remedy: Remedy::Flags(&["--skip-in-flight"]),
        ..PLAIN
    },
    Row {
        name: "ghost-limit",
        command: &[HOLDER, "ghost=2097152"],
        word: "--ghost-limit",
        remedy: Remedy::Flags(&["--ghost-limit", "4M"]),
        ..PLAIN
    },
    Row {
        name: "link-remap",
        command: &[HOLDER, "semaphore"],
        word: "--link-remap",
        remedy: Remedy::Flags(&["--link-remap"]),
        ..PLAIN
    },
    Row {
        name: "file-locks",
        command: &[HOLDER, "lock"],
        flags: &["--no-file-locks"],
        word: "--file-locks",
        remedy: Remedy::Flags(&["--file-locks"]),
        ..PLAIN
    },
    Row {
        name: "outside-socket",
        run: &[
            "--net-host",
            "--mount",
            "type=bind,src=/run/outside,dst=/outside,options=rbind:rw",
        ],
        command: &[HOLDER, "datagrams=/outside/socket"],
        word: "--ext-unix-sk",
        remedy: Remedy::Flags(&["--ext-unix-sk"]),
        restore: &[
            "--allow",
            "host-mounts",
            "--allow",
            "host-namespaces",
            "--allow",
            "criu-options",
        ],
        ..PLAIN
    },
    Row {
        name: "descriptor-limit",
        command: &[HOLDER, "descriptors=1"],
        word: "prlimit --pid PID --nofile=N",
        remedy: Remedy::Command("prlimit --pid PID --nofile=512"),
        ..PLAIN
    },
    Row {
        name: "scheduling",
        run: &["--cap-add", "CAP_SYS_NICE"],
        command: &[HOLDER, "deadline"],
        word: "chrt --pid",
        remedy: Remedy::Command(
            "for tid in $(ls /proc/PID/task); do chrt --other --pid 0 $tid; done",
        ),
        restore: &["--allow", "capabilities"],
        ..PLAIN
    },
    Row {
        name: "mptcp",
        command: &[HOLDER, "mptcp"],
        word: "net.mptcp.enabled=0 in its network namespace",
        remedy: Remedy::Run(
            &["--with-ns", "network:/run/netns/plain"],
            &[HOLDER, "mptcp"],
        ),
        restore: &["--new-namespaces"],
        ..PLAIN
    },
    Row {
        name: "io-uring",
        command: &[HOLDER, "io-uring"],
        word: "ctr run --seccomp",
        remedy: Remedy::Run(&["--seccomp"], &[HOLDER, "io-uring"]),
        ..PLAIN
    },
    Row {
        name: "node-mount",
        run: &[
            "--rootfs-propagation",
            "rshared",
            "--mount",
            "type=bind,src=/srv,dst=/srv,options=rbind:rshared",
        ],
        command: &[HOLDER, "lock"],
        word: "--rootfs-propagation shared",
        // Of two the last one counts.
        remedy: Remedy::Run(&["--rootfs-propagation", "rslave"], &[HOLDER, "lock"]),
        restore: &["--allow", "host-mounts"],
        ..PLAIN
    },
    Row {
        name: "hook-mount",
        command: &[HOLDER, "lock"],
        then: Then::By(mount_from_outside),
        word: "unmount it",
        remedy: Remedy::Command("nsenter -t PID -m /bin/busybox umount /driver"),
        ..PLAIN
    },
    Row {
        name: "hook-mount",
        command: &[HOLDER, "lock"],
        then: Then::By(mount_from_outside),
        word: "ctr run --mount",
        remedy: Remedy::Run(
            &[
                "--mount",
                "type=bind,src=/var/lib/driver,dst=/driver,options=rbind:ro",
            ],
            &[HOLDER, "lock"],
        ),
        restore: &["--allow", "host-mounts"],
        ..PLAIN
    },
    Row {
        name: "outside-session",
        command: WAITS,
        then: Then::By(session_from_outside),
        word: "end what an exec with a terminal, or nsenter, has left behind",
        remedy: Remedy::Command(
            "left=$(pgrep -P PID -f 'sleep 100000'); kill -KILL $left; timeout 60 tail --pid=$left -f /dev/null",
        ),
        ..PLAIN
    },
    Row {
        name: "message-queue",
        command: &[HOLDER, "lock"],
        then: Then::Command("touch /proc/PID/root/dev/mqueue/orders"),
        word: "rm in /dev/mqueue",
        remedy: Remedy::Command("nsenter -t PID -m /bin/busybox rm /dev/mqueue/orders"),
        ..PLAIN
    },
    Row {
        name: "nested-namespace",
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        command: &[HOLDER, "unshared"],
        word: "end them",
        remedy: Remedy::Command("kill -KILL $(cat /proc/PID/task/*/children)"),
        restore: &["--allow", "capabilities"],
        ..PLAIN
    },
    Row {
        name: "overmounted",
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        command: &[HOLDER, "covered"],
        word: "unmount what covers them",
        remedy: Remedy::Command("nsenter -t PID -m /bin/busybox umount /data/covered"),
        restore: &["--allow", "capabilities"],
        ..PLAIN
    },
    Row {
        name: "traced",
        command: &[HOLDER, "lock"],
        then: Then::By(trace),
        word: "detach the tracer",
        remedy: Remedy::Command("pkill -f bin/[t]race.py"),
        ..PLAIN
    },
    Row {
        name: "exec",
        command: &[HOLDER, "lock"],
        then: Then::Command(
            "ctr tasks exec --exec-id guest --detach NAME /bin/busybox sleep 100000",
        ),
        word: "end them",
        remedy: Remedy::Command("ctr tasks kill --exec-id guest --signal SIGKILL NAME"),
        ..PLAIN
    },
    Row {
        name: "memory-policy",
        command: &[HOLDER, "memory-policy"],
        word: "ctr run --cpuset-mems",
        remedy: Remedy::Run(&["--cpuset-mems", "0"], &[HOLDER, "lock"]),
        ..PLAIN
    },
    Row {
        name: "privileged-file",
        command: PAGEMAP,
        word: "run it with the capability",
        remedy: Remedy::Run(&["--cap-add", "CAP_SYS_ADMIN"], PAGEMAP),
        restore: &["--allow", "capabilities"],
        ..PLAIN
    },
    Row {
        name: "chroot",
        command: &[HOLDER, "chroot"],
        word: "a chroot of its other processes is no hindrance",
        remedy: Remedy::Run(&[], CHILD_IN_CHROOT),
        ..PLAIN
    },
];

fn what_is_to_be_done_does(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _) = journey::start_nodes(bed)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image(&holder, "transship")?;
    prepare(&node)?;
    node.write_file("/usr/local/bin/trace.py", TRACE)?;
    node.shell("ip netns add plain; ip netns exec plain sysctl -qw net.mptcp.enabled=0")
        .run()?;
    let mut wrong = Vec::new();
    for (at, row) in ROWS.iter().enumerate() {
        let done = remedied(&node, &format!("ill{at}"), row);
        wrong.extend(done.err().map(|it| format!("{}: {it:#}", row.word)));
    }
    let stopped = stopped_goes_on(&node);
    wrong.extend(stopped.err().map(|it| format!("kill -CONT: {it:#}")));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn remedied(node: &Node, id: &str, row: &Row) -> anyhow::Result<()> {
    let known = Condition::named(row.name);
    ensure!(known.remedy.contains(row.word), "{}", known.remedy);
    run(node, id, row.run, row.command)?;
    let on_node = |command: &str| -> anyhow::Result<()> {
        let pid = journey::task_pid(node, id)?.to_string();
        let command = command.replace("PID", &pid).replace("NAME", id);
        node.shell(&command).run()?;
        Ok(())
    };
    match row.then {
        Then::Nothing => {}
        Then::Command(command) => on_node(command)?,
        Then::By(act) => act(node, journey::task_pid(node, id)?)?,
    }
    let found = check(node, id, row.flags)?;
    ensure!(names(&found) == [row.name], "{found}");
    let mut flags = row.flags.to_vec();
    let again = |more: &[&str], command| -> anyhow::Result<()> {
        journey::remove_container(node, id)?;
        run(node, id, &[row.run, more].concat(), command)
    };
    match row.remedy {
        Remedy::Flags(more) => {
            flags.retain(|flag| !flag.starts_with("--no-"));
            flags.extend(more);
        }
        Remedy::Command(command) => on_node(command)?,
        Remedy::Run(more, command) => again(more, command)?,
    }
    passes(node, id, &flags, row.restore)
}

fn trace(node: &Node, pid: u32) -> anyhow::Result<()> {
    node.start_daemon(
        "tracer",
        &["python3", "/usr/local/bin/trace.py", &pid.to_string()],
    )?;
    poll_until("the tracer", PATIENCE, || {
        let traced = format!("! grep -q 'TracerPid:.0$' /proc/{pid}/status");
        node.shell(&traced).run().map_err(|error| error.to_string())
    })?;
    Ok(())
}

/// A job in the background of a terminal, and the like.
fn stopped_goes_on(node: &Node) -> anyhow::Result<()> {
    let word = "kill -CONT";
    ensure!(Condition::named("stopped").remedy.contains(word));
    run(node, "halted", &[], &[HOLDER, "lock"])?;
    let pid = journey::task_pid(node, "halted")?;
    node.shell(&format!("kill -STOP {pid}")).run()?;
    let found = check(node, "halted", &[])?;
    ensure!(names(&found) == ["stopped"], "{found}");
    node.shell(&format!("{word} {pid}")).run()?;
    passes(node, "halted", &[], &[])
}

fn passes(node: &Node, id: &str, flags: &[&str], asked: &[&str]) -> anyhow::Result<()> {
    let found = check(node, id, flags)?;
    ensure!(names(&found).is_empty(), "{found}");
    let mut checkpoint = node.command("transship");
    checkpoint
        .args(["checkpoint", id, "--name", id])
        .args(flags);
    checkpoint.run().context("the checkpoint")?;
    journey::remove_container(node, id)?;
    let mut restore = node.command("transship");
    restore.args(["restore", id, "--id", id]).args(asked);
    restore.run().context("the restore")?;
    node.shell(&format!("transship rm {id}")).run()?;
    Ok(journey::remove_container(node, id)?)
}
