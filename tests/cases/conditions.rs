//! What keeps a container from being moved: each condition is made in a real container; `check` names
//! it and what to do, `checkpoint` refuses before anything is frozen, and CRIU, asked past us, refuses
//! too, with words that our table knows. A clean program passes the check and then migrates.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use transship_checkpoint::conditions::Condition;
use transship_checkpoint::criu_log;
use transship_testbed::{
    CommandRun as _, Cri, Image, Node, Pod, PodContainer, PodNamespaces, Testbed, Tree, journey,
    poll_until,
};

use crate::Case;

const IMAGE: &str = "transship.test/holder:1";
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "conditions",
            tree: Tree::Forky,
            run: each_condition_is_told_before_a_freeze,
        },
        Case {
            what: "conditions_pod",
            tree: Tree::Forky,
            run: the_conditions_of_a_pod_are_told_at_once,
        },
    ]
    .into_iter()
}

/// A condition, and how a container comes into it.
struct Row {
    name: &'static str,
    /// Arguments of `ctr run`.
    run: &'static [&'static str],
    /// What the holder holds, or another program.
    command: &'static [&'static str],
    /// What is decided otherwise, so that this condition is the only one.
    flags: &'static [&'static str],
    /// Whether CRIU refuses it. Not asked of one that is stopped by its tracer: CRIU would wait for ever for it in the
    /// freezer of cgroup v1.
    asked_of_criu: bool,
}

pub(crate) const HOLDER: &str = "/usr/bin/holder";

/// open_tree of a directory of the node, and move_mount of it in the namespace of a process.
const MOUNT_INTO: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
tree = libc.syscall(428, -100, b"/var/lib/driver", 1)
namespace = os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY)
root = os.open(f"/proc/{sys.argv[1]}/root", os.O_RDONLY)
if tree < 0 or libc.setns(namespace, 0x20000):
    sys.exit(os.strerror(ctypes.get_errno()))
os.fchdir(root)
os.chroot(".")
if libc.syscall(429, tree, b"", -100, b"/driver", 4):
    sys.exit(os.strerror(ctypes.get_errno()))
"#;

const fn row(name: &'static str, command: &'static [&'static str]) -> Row {
    Row {
        name,
        run: &[],
        command,
        flags: &[],
        asked_of_criu: true,
    }
}

const ROWS: [Row; 41] = [
    row("mptcp", &[HOLDER, "mptcp"]),
    row("socket-kind", &[HOLDER, "vsock"]),
    row("io-uring", &[HOLDER, "io-uring"]),
    row("open-file-kind", &[HOLDER, "uffd"]),
    row("tcp", &[HOLDER, "tcp=7001"]),
    Row {
        flags: &["--tcp=established"],
        ..row("in-flight", &[HOLDER, "in-flight=7002"])
    },
    row("ghost-limit", &[HOLDER, "ghost=2097152"]),
    row("link-remap", &[HOLDER, "link"]),
    row("link-remap", &[HOLDER, "semaphore"]),
    row("shared-code", &[HOLDER, "shared-code"]),
    row("message-queue", &[HOLDER, "queue=/orders"]),
    row("descriptor-limit", &[HOLDER, "descriptors=1"]),
    row("descriptor-limit", &[HOLDER, "descriptors=3"]),
    row("packet-pipe", &[HOLDER, "packet-pipe"]),
    row("pidfd", &[HOLDER, "thread-pidfd"]),
    row("watch", &[HOLDER, "watch=/proc/self/status"]),
    row("unix-backlog", &[HOLDER, "backlog=/data/socket"]),
    // CRIU dumps these, and does not restore them.
    Row {
        run: &["--rootfs-propagation", "rshared"],
        asked_of_criu: false,
        ..row("node-mount", &[HOLDER, "lock"])
    },
    Row {
        run: &[
            "--rootfs-propagation",
            "rshared",
            "--mount",
            "type=bind,src=/srv,dst=/srv,options=rbind:rshared",
        ],
        asked_of_criu: false,
        ..row("node-mount", &[HOLDER, "lock"])
    },
    Row {
        asked_of_criu: false,
        ..row("thread-file", &[HOLDER, "thread-file"])
    },
    Row {
        asked_of_criu: false,
        ..row("memfd-program", &[HOLDER, "memfd"])
    },
    Row {
        asked_of_criu: false,
        ..row("traced", &[HOLDER, "traced"])
    },
    Row {
        run: &["--cap-add", "CAP_WAKE_ALARM"],
        asked_of_criu: false,
        ..row("alarm-timerfd", &[HOLDER, "alarm-timerfd"])
    },
    Row {
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        ..row("nested-namespace", &[HOLDER, "unshared"])
    },
    // CRIU makes all threads alike, and children where their parent is.
    Row {
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        asked_of_criu: false,
        ..row("nested-namespace", &[HOLDER, "thread-unshared"])
    },
    Row {
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        asked_of_criu: false,
        ..row("nested-namespace", &[HOLDER, "children-unshared"])
    },
    Row {
        run: &["--cap-add", "CAP_SYS_NICE"],
        asked_of_criu: false,
        ..row("scheduling", &[HOLDER, "deadline"])
    },
    Row {
        run: &["--device", "/dev/fuse"],
        ..row("device", &[HOLDER, "device=/dev/fuse"])
    },
    Row {
        run: &[
            "--mount",
            "type=bind,src=/run/outside,dst=/outside,options=rbind:rw",
        ],
        ..row("outside-socket", &[HOLDER, "datagrams=/outside/socket"])
    },
    Row {
        run: &["--user", "1000:1000"],
        ..row("rlimit", &["/bin/busybox", "sleep", "100000"])
    },
    // A mount that somebody makes later: see `mount_from_outside`.
    row("hook-mount", &[HOLDER, "lock"]),
    // A process that somebody brings in: see `session_from_outside`.
    row("outside-session", &[HOLDER, "lock"]),
    Row {
        flags: &["--no-file-locks"],
        ..row("file-locks", &[HOLDER, "lock"])
    },
    row("epoll-target", &[HOLDER, "epoll-target"]),
    row("long-path", &[HOLDER, "long-path"]),
    row("chroot", &[HOLDER, "chroot"]),
    Row {
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        ..row("chroot", &[HOLDER, "chroot-to-mount"])
    },
    Row {
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        ..row("overmounted", &[HOLDER, "covered"])
    },
    Row {
        run: &["--cap-add", "CAP_SYS_ADMIN"],
        ..row("hidden-mount", &[HOLDER, "unmounted"])
    },
    // CRIU alone can tell these.
    row("shared-state", &[HOLDER, "shared-directory"]),
    row("queued-credentials", &[HOLDER, "credentials"]),
];

fn each_condition_is_told_before_a_freeze(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.import_image(&holder, "transship")?;
    prepare(&a)?;
    let mut wrong = Vec::new();
    let mut note = |of: &str, done: anyhow::Result<()>| {
        wrong.extend(done.err().map(|error| format!("{of}: {error:#}")));
    };
    for (at, row) in ROWS.iter().enumerate() {
        note(row.name, condition(&a, &format!("odd{at}"), row));
    }
    note("several", several_are_told_at_once(&a));
    note("exec", what_came_by_exec_is_not_lost_unasked(&a));
    note(
        "changes",
        changes_are_refused_unless_they_may_be(&a, &b, &ssh),
    );
    note("compared", another_node_is_compared(&a, &b));
    note("vforks", between_two_vforks_there_is_a_dump(&a, &b, &ssh));
    note("read-only", a_root_stays_read_only(&a, &b, &ssh));
    note("clean", a_clean_program_passes_and_migrates(&a, &b, &ssh));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The other end of a socket, and a device that containers do not have.
pub(crate) fn prepare(node: &Node) -> anyhow::Result<()> {
    node.shell("mkdir -p /run/outside; test -e /dev/fuse || mknod /dev/fuse c 10 229")
        .run()?;
    run(node, "teacher", &[], &[HOLDER, "lock"])?;
    let pid = journey::task_pid(node, "teacher")?;
    node.shell(&format!(
        "mkdir -p /data; cp /proc/{pid}/root/usr/bin/holder /usr/local/bin/holder"
    ))
    .run()?;
    journey::remove_container(node, "teacher")?;
    node.start_daemon("receiver", &["holder", "receive=/run/outside/socket"])?;
    poll_until("the socket outside", PATIENCE, || {
        let there = node.shell("test -S /run/outside/socket");
        { there }.run().map_err(|error| error.to_string())
    })?;
    Ok(())
}

fn condition(node: &Node, id: &str, row: &Row) -> anyhow::Result<()> {
    if row.name == "rlimit" && has_sys_resource(node)? {
        return Ok(());
    }
    run(node, id, row.run, row.command)?;
    let pid = journey::task_pid(node, id)?;
    if row.name == "hook-mount" {
        mount_from_outside(node, pid)?;
    }
    if row.name == "outside-session" {
        session_from_outside(node, pid)?;
    }
    let known = Condition::named(row.name);
    let found = check(node, id, row.flags)?;
    let before_the_freeze = !known.seen.is_empty();
    if before_the_freeze {
        ensure!(names(&found) == [row.name], "{found}");
        let text = found.to_string();
        ensure!(
            text.contains("\"verdict\":\"problem\"") && text.contains("remedy"),
            "{text}"
        );
    } else {
        ensure!(names(&found).is_empty(), "{found}");
    }

    let mut checkpoint = node.command("transship");
    checkpoint
        .args(["checkpoint", id, "--name", "refused"])
        .args(row.flags);
    let output = checkpoint.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        (output.status.code() == Some(4)) == before_the_freeze && !output.status.success(),
        "{said}"
    );
    ensure!(
        said.contains(known.what) && said.contains(known.remedy),
        "{said}"
    );

    node.shell(&format!("kill -0 {pid}")).run()?;
    if row.asked_of_criu {
        let log = refused_by_criu(node, id, row)?;
        let error = criu_log::first_error(&log).context("CRIU gives no reason")?;
        let explained = known.criu_says.is_empty() || error.contains(known.remedy);
        ensure!(explained, "{error}");
    }
    journey::remove_container(node, id).or_else(|_| {
        node.shell(&format!(
            "kill -9 {pid} || true; ctr tasks rm -f {id}; ctr containers rm {id}"
        ))
        .run()
    })?;
    Ok(())
}

/// As a hook or `nsenter` does it: a part of the node's disk, in the container's mount namespace alone.
pub(crate) fn mount_from_outside(node: &Node, pid: u32) -> anyhow::Result<()> {
    node.write_file("/usr/local/bin/mount-into.py", MOUNT_INTO)?;
    node.shell(&format!(
        "mkdir -p /var/lib/driver /proc/{pid}/root/driver
         python3 /usr/local/bin/mount-into.py {pid}; grep -q ' /driver ' /proc/{pid}/mountinfo"
    ))
    .run()?;
    Ok(())
}

/// As `nsenter` does it: a process of the node's session in the namespaces of the container, whose parent ends.
pub(crate) fn session_from_outside(node: &Node, pid: u32) -> anyhow::Result<()> {
    let asleep = "/bin/busybox sleep 100000 </dev/null >/dev/null 2>&1 &";
    // CRIU seizes none that is not frozen with the others.
    let join = format!(
        "while IFS=: read -r number controllers path; do
             for dir in /sys/fs/cgroup \"/sys/fs/cgroup/${{controllers#name=}}\"; do
                 test ! -w \"$dir$path/cgroup.procs\" || echo $$ >\"$dir$path/cgroup.procs\" || true
             done
         done </proc/{pid}/cgroup"
    );
    node.shell(&format!(
        "{join}
         nsenter -t {pid} -m -u -i -n -p /bin/busybox sh -c '{asleep}'; test -n \"$(cat /proc/{pid}/task/*/children)\""
    ))
    .run()?;
    Ok(())
}

fn has_sys_resource(node: &Node) -> anyhow::Result<bool> {
    let status = String::from_utf8(node.read_file("/proc/1/status")?)?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = u64::from_str_radix(mask.context("no CapEff")?.trim(), 16)?;
    Ok(mask & 1 << 24 != 0)
}

/// CRIU's log of a dump that runc alone asks for, and that fails.
fn refused_by_criu(node: &Node, id: &str, row: &Row) -> anyhow::Result<String> {
    let locks = match row.flags.contains(&"--no-file-locks") {
        true => "",
        false => "--file-locks",
    };
    let established = match row.flags.contains(&"--tcp=established") {
        true => "--tcp-established",
        false => "",
    };
    node.shell(&format!(
        "rm -rf /var/tmp/past; mkdir -p /var/tmp/past/images
         timeout -s KILL 60 runc --root /run/containerd/runc/default checkpoint --leave-running \
              {locks} {established} --image-path /var/tmp/past/images --work-path /var/tmp/past {id}"
    ))
    .read_failure()?;
    let log = node.read_file("/var/tmp/past/dump.log").unwrap_or_default();
    Ok(String::from_utf8_lossy(&log).into_owned())
}

/// A program with three of them hears of all three, and of none that a flag decides.
fn several_are_told_at_once(node: &Node) -> anyhow::Result<()> {
    let needs = [HOLDER, "tcp=7003", "ghost=2097152", "link", "io-uring"];
    run(node, "several", &[], &needs)?;
    let found = check(node, "several", &[])?;
    let all = ["tcp", "io-uring", "ghost-limit", "link-remap"];
    ensure!(names(&found) == all, "{found}");
    let flags = ["--tcp=close", "--ghost-limit=4M", "--link-remap"];
    let found = check(node, "several", &flags)?;
    ensure!(names(&found) == ["io-uring"], "{found}");
    // So does what has come by exec.
    node.shell("ctr tasks exec --exec-id guest --detach several /bin/busybox sleep 100000")
        .run()?;
    let found = check(node, "several", &flags)?;
    ensure!(names(&found) == ["io-uring", "exec"], "{found}");
    let missing = node
        .command("transship")
        .args(["check", "nobody"])
        .output()?;
    ensure!(missing.status.code() == Some(3), "{missing:?}");
    Ok(journey::remove_container(node, "several")?)
}

/// A probe that comes and goes hinders nothing; what stays is no part of a checkpoint, unless somebody says that it may be
/// lost.
fn what_came_by_exec_is_not_lost_unasked(node: &Node) -> anyhow::Result<()> {
    run(node, "visited", &[], &[HOLDER, "lock"])?;
    let checkpoint = |name: &str, more: &[&str]| {
        let mut command = node.command("transship");
        command.args(["checkpoint", "visited", "--name", name]);
        command.args(more);
        command
    };
    let exec = "ctr tasks exec --exec-id probe-$i visited /bin/busybox";
    node.write_file(
        "/usr/local/bin/probes",
        format!("#!/bin/sh\ni=0\nwhile :; do i=$((i+1)); {exec} sleep 0.3; done\n"),
    )?;
    node.shell("chmod 755 /usr/local/bin/probes").run()?;
    node.start_daemon("probes", &["/usr/local/bin/probes"])?;
    for time in 0..3 {
        checkpoint(&format!("probed-{time}"), &[]).run()?;
    }
    node.stop_daemon("probes", "KILL")?;
    node.shell("ctr tasks exec --exec-id guest --detach visited /bin/busybox sleep 100000")
        .run()?;
    let said = checkpoint("visited", &[]).read_failure()?;
    ensure!(
        said.contains("(busybox)") && said.contains("--allow-lost exec"),
        "{said}"
    );
    checkpoint("visited", &["--allow-lost=exec"]).run()?;
    Ok(journey::remove_container(node, "visited")?)
}

/// What CRIU would restore as something else: refused by default, and moved where somebody says so. The processor of
/// the test may have no protection keys or no mitigation that a thread can ask for, the kernel no seals: then these are
/// untested.
fn changes_are_refused_unless_they_may_be(node: &Node, b: &Node, ssh: &str) -> anyhow::Result<()> {
    let mut needs = vec![
        ("personality", "personality"),
        ("exit-signal", "exit-signal"),
        ("thread-directory", "thread-directory"),
        ("thread-descriptors", "thread-files"),
        ("eventfd-semaphore", "semaphore-eventfd"),
        ("locked-on-fault", "locked-on-fault"),
        ("memory-policy", "memory-policy"),
        ("multicast", "multicast"),
        ("socket-mode", "encapsulated"),
        ("keyring", "keyring"),
    ];
    if node.shell("grep -qw ospke /proc/cpuinfo").run().is_ok() {
        needs.insert(5, ("protection-key", "protection-key"));
    }
    if node.shell("grep -qw do_mseal /proc/kallsyms").run().is_ok() {
        needs.insert(needs.len() - 5, ("sealed-memory", "sealed"));
    }
    let mitigated = "grep -q 'Speculation_Store_Bypass:.thread vulnerable' /proc/self/status";
    if node.shell(mitigated).run().is_ok() {
        needs.insert(2, ("speculation", "speculation"));
    }
    let (told, mut command): (Vec<&str>, Vec<&str>) = needs.into_iter().unzip();
    command.insert(0, HOLDER);
    // Nobody can tell beforehand whether something will wait to be read.
    command.push("unread-events");
    run(node, "changed", &[], &command)?;
    let found = check(node, "changed", &[])?;
    ensure!(names(&found) == told, "{found}");
    let mut checkpoint = node.command("transship");
    checkpoint.args(["checkpoint", "changed", "--name", "changed"]);
    let said = checkpoint.read_failure()?;
    for name in &told {
        let whole = said.contains(Condition::named(name).what);
        ensure!(
            whole && said.contains(&format!("--allow-lost {name}")),
            "{said}"
        );
    }
    let (first, others) = told.split_first().context("nothing is told")?;
    let allowed = format!("--allow-lost={first}");
    let found = check(node, "changed", &[&allowed])?;
    ensure!(found[0]["findings"][0]["verdict"] == "note", "{found}");
    let mut migrate = node.command("transship");
    migrate.args(["migrate", "changed", "--to", ssh, "--allow", "host-mounts"]);
    migrate.args([&allowed, "--allow-lost", &others.join(",")]);
    migrate.run()?;
    let log = b.shell("grep 'container=changed ' /var/log/transship/restores.log");
    let log = { log }.read()?;
    ensure!(
        log.contains("events of inotify that process 1 has not read"),
        "{log}"
    );
    Ok(journey::remove_container(b, "changed")?)
}

fn another_node_is_compared(a: &Node, b: &Node) -> anyhow::Result<()> {
    let facts = b.shell("transship check --node").read()?;
    let facts: Value = serde_json::from_str(&facts)?;
    ensure!(
        facts["criu"].is_string() && facts["containerd"].is_string(),
        "{facts}"
    );
    run(a, "compared", &[], &[HOLDER, "lock"])?;
    let mut there = facts.clone();
    a.write_file("/tmp/b.json", there.to_string())?;
    let found = check(a, "compared", &["--for", "/tmp/b.json"])?;
    ensure!(names(&found).is_empty(), "{found}");
    there["limits"]["vm.max_map_count"] = 3.into();
    there["processor"]["features"] = Value::Array(Vec::new());
    there["criu"] = Value::Null;
    a.write_file("/tmp/less.json", there.to_string())?;
    let found = check(a, "compared", &["--for", "/tmp/less.json"])?;
    ensure!(names(&found) == ["CRIU", "processor", "limit"], "{found}");
    Ok(journey::remove_container(a, "compared")?)
}

/// CRIU dumps no process that shares its memory with its parent, as all do until they execute a program.
fn between_two_vforks_there_is_a_dump(a: &Node, b: &Node, ssh: &str) -> anyhow::Result<()> {
    run(a, "vforks", &[], &[HOLDER, "vforks"])?;
    for time in 0..4 {
        let mut checkpoint = a.command("transship");
        checkpoint.args(["checkpoint", "vforks", "--name", &format!("vforks-{time}")]);
        checkpoint.run()?;
    }
    let mut migrate = a.command("transship");
    migrate.args(["migrate", "vforks", "--to", ssh, "--allow", "host-mounts"]);
    migrate.run()?;
    let restored = tick_of(b, "vforks")?;
    poll_until("a tick", PATIENCE, || match tick_of(b, "vforks") {
        Ok(now) if now > restored + 1 => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    Ok(journey::remove_container(b, "vforks")?)
}

/// It watches a directory of the image, which CRIU does not find by itself, and one of its own: the check
/// passes, the watches go on after the migration, and no event comes that was not there.
/// CRIU 4.0 and 4.1 would restore it writable; the trees have later ones.
fn a_root_stays_read_only(a: &Node, b: &Node, ssh: &str) -> anyhow::Result<()> {
    let beats = "while :; do /bin/busybox sleep 1; done";
    let command = ["/bin/busybox", "sh", "-c", beats];
    run(a, "fixed", &["--read-only"], &command)?;
    let mut migrate = a.command("transship");
    migrate.args(["migrate", "fixed", "--to", ssh]).run()?;
    let touch = "ctr tasks exec --exec-id touch fixed /bin/busybox touch /x 2>&1";
    let said = b.shell(&format!("! {touch}")).read()?;
    ensure!(said.contains("Read-only file system"), "{said}");
    Ok(journey::remove_container(b, "fixed")?)
}

fn a_clean_program_passes_and_migrates(a: &Node, b: &Node, ssh: &str) -> anyhow::Result<()> {
    run(
        a,
        "clean",
        &[],
        &[
            HOLDER,
            "watch=/usr/bin",
            "watch=/data",
            "lock",
            "named-deleted",
            "nameless",
            "listener=7004",
            "options",
            "core-filter",
            "udp=7005",
            "thread-timer",
            "byte-names",
        ],
    )?;
    let found = check(a, "clean", &[])?;
    ensure!(names(&found).is_empty(), "{found}");
    a_restore_can_be_tried(a)?;
    let heard = |node: &Node| -> anyhow::Result<u64> {
        let text = journey::read_in_container(node, "clean", "/data/events");
        Ok(text.map_err(anyhow::Error::msg)?.trim().parse()?)
    };
    ensure!(heard(a)? == 0, "events of its own doing");
    let mut migrate = a.command("transship");
    migrate.args(["migrate", "clean", "--to", ssh, "--allow", "host-mounts"]);
    migrate.run()?;
    let events = || -> Result<u64, String> {
        let text = journey::read_in_container(b, "clean", "/data/events")?;
        text.trim().parse().map_err(|_| text)
    };
    let restored = tick_of(b, "clean")?;
    poll_until("a tick", PATIENCE, || match tick_of(b, "clean") {
        Ok(now) if now > restored + 1 => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    ensure!(heard(b)? == 0, "{} bytes of events", heard(b)?);
    let state =
        journey::read_in_container(b, "clean", "/data/state").map_err(anyhow::Error::msg)?;
    for need in [
        "named-deleted",
        "listener",
        "options",
        "core-filter",
        "udp",
        "thread-timer",
        "byte-names",
    ] {
        ensure!(state.contains(&format!("{need} ok\n")), "{state}");
    }
    let before = poll_until("the events so far", PATIENCE, events)?;
    let pid = journey::task_pid(b, "clean")?;
    b.shell(&format!(
        "nsenter -t {pid} --mount --root touch /usr/bin/holder"
    ))
    .run()?;
    poll_until("an event", PATIENCE, || match events()? {
        now if now > before => Ok(()),
        now => Err(format!("{now} bytes")),
    })?;
    Ok(journey::remove_container(b, "clean")?)
}

/// The trial leaves nothing but the checkpoint, consumes nothing, and keeps its hands off what is shared.
fn a_restore_can_be_tried(node: &Node) -> anyhow::Result<()> {
    let try_it = |id: &str| {
        let mut checkpoint = node.command("transship");
        checkpoint.args(["checkpoint", id, "--name", "tried", "--verify-restore"]);
        checkpoint
    };
    let said = try_it("clean").read()?;
    ensure!(
        said.contains("a restore of it was tried, and succeeded"),
        "{said}"
    );
    let left = "ctr containers ls -q; ctr snapshots --snapshotter transship ls; ctr leases ls";
    let left = node.shell(left).read()?;
    ensure!(!left.contains("verify"), "{left}");
    node.shell("transship restore tried --id tried && transship rm tried")
        .run()?;
    journey::remove_container(node, "tried")?;
    let writable = [
        "--mount",
        "type=bind,src=/run/outside,dst=/outside,options=rbind:rw",
    ];
    run(node, "sharing", &writable, &[HOLDER, "lock"])?;
    let said = try_it("sharing").read_failure()?;
    ensure!(
        said.contains("/outside") && said.contains("without --verify-restore"),
        "{said}"
    );
    Ok(journey::remove_container(node, "sharing")?)
}

/// A semaphore is open by a name that it has lost in the process that has made it; another one has opened it by
/// the name that it has.
fn named_semaphores_come_along(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let run = |annotations: &[(&str, &str)]| -> anyhow::Result<Pod> {
        let pod = cri.run_pod(("shop", "semaphore"), annotations, PodNamespaces::Usual)?;
        for (name, needs) in [
            ("maker", [HOLDER, "semaphore"]),
            ("user", [HOLDER, "opened-semaphore"]),
        ] {
            let id = cri.run_container(&pod, &container(name, &needs))?;
            let need = needs[1];
            poll_until("the semaphore", PATIENCE, || {
                let answer = cri.exec(&id, &["cat", "/data/state"]);
                let state = answer.map_err(|error| error.to_string())?.stdout;
                let state = String::from_utf8_lossy(&state).into_owned();
                let good = state.starts_with(&format!("{need} ok\ntick "));
                good.then_some(()).ok_or(state)
            })?;
        }
        Ok(pod)
    };
    let pod = run(&[])?;
    let checkpoint = "transship checkpoint --pod shop/semaphore --name semaphore --link-remap";
    node.shell(checkpoint).run()?;
    cri.remove_pod(&pod)?;
    let pod = run(&[("dev.transship/restore", "semaphore")])?;
    // The names are the pod's own again.
    let shm = "find /run/containerd/io.containerd.grpc.v1.cri -name 'link_remap.*'";
    let left = node.shell(shm).read()?;
    ensure!(left.is_empty(), "{left}");
    cri.remove_pod(&pod)?;
    node.shell("transship rm semaphore").run()?;
    Ok(())
}

/// All containers of a pod are looked at.
fn the_conditions_of_a_pod_are_told_at_once(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    for image in [Image::pause(bed.settings())?, holder] {
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "odd"), &[], PodNamespaces::Usual)?;
    for (name, needs) in [
        ("ring", [HOLDER, "io-uring"]),
        ("named", [HOLDER, "semaphore"]),
    ] {
        let id = cri.run_container(&pod, &container(name, &needs))?;
        ticks(&cri, &id)?;
    }
    for (flags, wanted) in [
        (&[][..], &["io-uring", "link-remap"][..]),
        (&["--link-remap"], &["io-uring"]),
    ] {
        let mut check = node.command("transship");
        check
            .args(["--json", "check", "--pod", "shop/odd"])
            .args(flags);
        let found: Value = serde_json::from_slice(&check.output()?.stdout)?;
        let mut all = names(&found);
        all.sort_unstable();
        ensure!(all == wanted, "{found}");
        let mut checkpoint = node.command("transship");
        checkpoint.args(["checkpoint", "--pod", "shop/odd", "--name", "odd"]);
        let said = checkpoint.args(flags).read_failure()?;
        ensure!(
            said.contains("\"ring\"") && said.contains("io_uring"),
            "{said}"
        );
        let told = said.contains("\"named\"") && said.contains("sem.");
        ensure!(told == flags.is_empty(), "{said}");
    }
    cri.remove_pod(&pod)?;
    named_semaphores_come_along(&node, &cri)?;
    journey::check_no_pod_left(&node)
}

pub(crate) fn tick_of(node: &Node, id: &str) -> anyhow::Result<u64> {
    let state = journey::read_in_container(node, id, "/data/state").map_err(anyhow::Error::msg)?;
    let (_, tick) = state.split_once("tick ").context("no tick")?;
    Ok(tick.trim().parse()?)
}

fn container<'a>(name: &'a str, command: &'a [&'a str]) -> PodContainer<'a> {
    PodContainer {
        name,
        image: IMAGE,
        command,
        ..PodContainer::default()
    }
}

fn ticks(cri: &Cri, id: &str) -> anyhow::Result<()> {
    Ok(poll_until("the holder", PATIENCE, || {
        let answer = cri.exec(id, &["cat", "/data/state"]);
        let answer = answer.map_err(|error| error.to_string())?;
        let state = String::from_utf8_lossy(&answer.stdout).into_owned();
        state.contains("tick ").then_some(()).ok_or(state)
    })?)
}

pub(crate) fn run(node: &Node, id: &str, more: &[&str], command: &[&str]) -> anyhow::Result<()> {
    let mut arguments = vec!["run", "--detach", "--snapshotter", "transship"];
    arguments.extend(["--runc-binary", journey::FRONT]);
    arguments.extend(more);
    arguments.extend([IMAGE, id]);
    arguments.extend(command);
    node.ctr(&arguments)?;
    if command[0] == HOLDER {
        poll_until("the holder's state", PATIENCE, || {
            let state = journey::read_in_container(node, id, "/data/state")?;
            state.contains("tick ").then_some(()).ok_or(state)
        })?;
    }
    Ok(())
}

/// What `check` has found, with the verdicts; it fails where there is a problem.
pub(crate) fn check(node: &Node, id: &str, more: &[&str]) -> anyhow::Result<Value> {
    let mut command = node.command("transship");
    let output = command.args(["--json", "check", id]).args(more).output()?;
    let found: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let problem = found.to_string().contains("\"verdict\":\"problem\"");
    ensure!(
        output.status.code() == Some(i32::from(problem)),
        "{output:?}"
    );
    Ok(found)
}

/// Names of what is not as it should be, of all containers.
pub(crate) fn names(found: &Value) -> Vec<&str> {
    let containers = found.as_array().into_iter().flatten();
    let findings = containers.flat_map(|it| it["findings"].as_array().into_iter().flatten());
    findings
        .filter(|finding| finding["verdict"] != "ok")
        .filter_map(|finding| finding["what"].as_str())
        .collect()
}
