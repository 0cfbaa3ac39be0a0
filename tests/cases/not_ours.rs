//! A container without an annotation of ours starts exactly as without us, in whatever state we are; one
//! with an annotation then fails, and says why.
//!
//! ```text
//!  shell ──exec──> runc                        argv, environment, descriptors, signals, limits
//!  shell ──exec──> transship-runc ──exec──> runc     the same
//! ```
//!
//! strace tells what the kernel is given of runc itself; a script in runc's place tells what a process is
//! born with.

use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, ContainerdConfig, Node, Testbed, Tree, journey};

use crate::Case;

const IMAGE: &str = "transship.test/counter:1";
const FRONT: &str = "/usr/local/bin/transship-runc";
const SOCKETS: [&str; 3] = ["node.sock", "snapshotter.sock", "diff.sock"];

/// In runc's place: prints what it was given.
const RECORDER: &str = r#"#!/bin/sh
# Into a file: a pipe would be one of the descriptors.
ls -l /proc/$$/fd >/root/descriptors
printf '<%s>\n' "$@"
tr '\0' '\n' </proc/$$/environ
sed -n 's/.*[0-9] \([0-9]* -> [^[]*\).*/\1/p' /root/descriptors
grep -E '^(SigIgn|Umask|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' /proc/$$/status
cat /proc/$$/limits /proc/$$/oom_score_adj /proc/$$/cgroup
readlink /proc/$$/cwd
cut -d' ' -f19 /proc/$$/stat
case "$*" in *killed*) kill -9 $$ ;; esac
exit 37
"#;

/// Calls of runc, with what a caller may do to its own process before.
const CALLS: &str = r#"
export PATH=/root/recorder:$PATH ODD="$(printf 'a\nb')" EMPTY=
cd /root/b; umask 027; trap '' HUP USR1; ulimit -n 777; echo 300 >/proc/self/oom_score_adj
call() { ("$@") 7</etc/hostname 8>>/root/log 2>&1 || echo "exit $?"; }
call $RUNTIME --root /root/r --log /root/log --log-format json create --bundle /root/b --pid-file /root/p x
call $RUNTIME --root /root/r create --bundle /nowhere killed
call $RUNTIME --root /root/r start x
call $RUNTIME --root=/root/r delete --force x
call $RUNTIME --root /root/r checkpoint --image-path /root/i --leave-running x
call $RUNTIME --root /root/r restore --bundle /root/b --image-path /root/i -d x
call $RUNTIME --systemd-cgroup exec --process /root/p x -- '' 'a b' --bundle
call $RUNTIME --no-such-flag create
call $RUNTIME
"#;

/// A whole life, of which strace sees each runc that is started.
const LIFE: &str = r#"
cd /root/b; rm -rf /root/r
run() { $RUNTIME --root /root/r --log /root/log "$@" 7</etc/hostname || echo "exit $?"; }
run create --bundle /root/b --pid-file /root/p x </dev/null >/dev/null 2>&1
run start x
run kill x KILL
run delete --force x
run start nobody
run --version >/dev/null
"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "not_our_container",
        tree: Tree::Forky,
        run: others_start_as_without_us,
    }]
    .into_iter()
}

/// What has become of us.
struct Trouble {
    what: &'static str,
    begin: &'static str,
    end: &'static str,
    /// What a restore says; it works where this is empty.
    says: &'static str,
}

const TROUBLES: &[Trouble] = &[
    Trouble {
        what: "no daemon runs",
        begin: "true",
        end: "true",
        says: "",
    },
    Trouble {
        what: "/run/transship is missing",
        begin: "rm -rf /run/transship",
        end: "true",
        says: "",
    },
    Trouble {
        what: "/run/transship is read-only",
        begin: "mkdir -p /run/transship; mount -t tmpfs -o ro none /run/transship",
        end: "umount /run/transship",
        says: "Read-only file system",
    },
    Trouble {
        what: "/run/transship is full",
        begin: "mkdir -p /run/transship; mount -t tmpfs -o size=4k,nr_inodes=2 none /run/transship
                touch /run/transship/x",
        end: "umount /run/transship",
        says: "No space left on device",
    },
    Trouble {
        what: "/run/transship is a file",
        begin: "rm -rf /run/transship; touch /run/transship",
        end: "rm /run/transship",
        says: "Not a directory",
    },
    Trouble {
        what: "node.toml is broken",
        begin: "mkdir -p /etc/transship; echo 'strict = maybe' >/etc/transship/node.toml",
        end: "rm /etc/transship/node.toml",
        says: "/etc/transship/node.toml cannot be parsed, so nothing is restored",
    },
    Trouble {
        what: "/var/lib/transship is empty",
        begin: "mount -t tmpfs none /var/lib/transship",
        end: "umount /var/lib/transship",
        says: "there is no checkpoint",
    },
    Trouble {
        what: "the other programs are gone",
        begin: "for p in transship transship-hook; do mount --bind /dev/null /usr/local/bin/$p; done",
        end: "for p in transship transship-hook; do umount /usr/local/bin/$p; done",
        // A sandbox needs the hook, a pod's container the tool; this one neither.
        says: "",
    },
];

fn others_start_as_without_us(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    node.start_containerd(&ContainerdConfig::default())?;
    node.import_image(&journey::counter_image(bed)?, "overlayfs")?;
    prepare(&node)?;
    for trouble in TROUBLES {
        node.shell(trouble.begin).run()?;
        let tried = in_trouble(bed, &node, trouble.says);
        node.shell(trouble.end).run()?;
        tried.context(trouble.what)?;
    }
    {
        // Whoever connects waits for ever.
        node.shell("mkdir -p /run/transship").run()?;
        let dir = node.path_from_outside("/run/transship");
        let listen = |name: &str| UnixListener::bind(dir.join(name));
        let _silent = SOCKETS
            .map(listen)
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        in_trouble(bed, &node, "").context("the daemons hang")?;
    }
    replaced_while_it_runs(&node)?;
    node.shell("transship rm good").run()?;
    Ok(())
}

/// A checkpoint, a bundle, the script in runc's place.
fn prepare(node: &Node) -> anyhow::Result<()> {
    let run = format!("ctr run --detach {IMAGE} web /usr/bin/counter --memory-mb 1");
    node.shell(&run).run()?;
    journey::wait_for_count(node, "web", 2)?;
    node.shell("transship checkpoint web --name good").run()?;
    journey::remove_container(node, "web")?;
    node.write_file("/root/recorder/runc", RECORDER)?;
    node.shell(
        r#"chmod 755 /root/recorder/runc; mkdir -p /root/b/rootfs/bin; cd /root/b
           cp /bin/busybox rootfs/bin/; runc spec
           sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"\/bin\/busybox", "sleep", "600"/' config.json"#,
    )
    .run()?;
    Ok(())
}

fn in_trouble(bed: &Testbed, node: &Node, says: &str) -> anyhow::Result<()> {
    same("born", |runtime| calls(node, runtime))?;
    same("strace", |runtime| traced(bed, node, runtime))?;
    let run = format!("ctr run --rm --runc-binary {FRONT} {IMAGE} other sh -c 'exit 37'; echo $?");
    let code = node.shell(&format!("set +e; {run}")).read()?;
    ensure!(code == "37\n", "a container of others ends with {code:?}");
    let run = format!(
        "ctr run --detach --runc-binary {FRONT} --annotation dev.transship/restore=good \
         --annotation dev.transship/restore-container=web {IMAGE} r"
    );
    let ran = node.shell(&run).output()?;
    let error = String::from_utf8_lossy(&ran.stderr);
    if says.is_empty() {
        ensure!(ran.status.success(), "a restore: {error}");
        journey::remove_container(node, "r")?;
    } else {
        ensure!(
            !ran.status.success() && error.contains(says),
            "{error:?} does not say {says:?}"
        );
        node.ctr(&["containers", "rm", "r"])?;
    }
    Ok(())
}

fn same(what: &str, run: impl Fn(&str) -> anyhow::Result<String>) -> anyhow::Result<()> {
    let (plain, ours) = (run("runc")?, run("transship-runc")?);
    let differ = plain
        .lines()
        .zip(ours.lines())
        .find(|(one, other)| one != other);
    ensure!(plain == ours, "{what}: {differ:?} of\n{plain}\nand\n{ours}");
    ensure!(!plain.is_empty(), "{what}: nothing was started");
    Ok(())
}

fn calls(node: &Node, runtime: &str) -> anyhow::Result<String> {
    let recorded = node.shell(&format!("RUNTIME={runtime}\n{CALLS}")).read()?;
    ensure!(
        recorded.contains("exit 37") && recorded.contains("exit 137"),
        "{recorded}"
    );
    Ok(recorded)
}

/// What execve(2) is given of each runc.
fn traced(bed: &Testbed, node: &Node, runtime: &str) -> anyhow::Result<String> {
    let inside = node.shell(&format!("RUNTIME={runtime}\n{LIFE}"));
    let log = bed.dir().join("strace");
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-v",
        "-s",
        "65536",
        "-e",
        "trace=execve",
        "-e",
        "signal=none",
        "-o",
    ]);
    strace
        .arg(&log)
        .arg(inside.get_program())
        .args(inside.get_args());
    strace.env_clear();
    strace.envs(
        inside
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let codes = strace.read()?;
    let text = std::fs::read_to_string(&log)?;
    let of_runc = |line: &str| -> Option<String> {
        let (_pid, call) = line.split_once(" execve(")?;
        let path = call.split('"').nth(1)?;
        // What follows is `) = 0`, or `<unfinished ...>` where another process was heard of before that.
        let (given, _) = call.rsplit_once(']')?;
        path.ends_with("/runc").then(|| given.to_owned())
    };
    let found: Vec<_> = text.lines().filter_map(of_runc).collect();
    ensure!(
        found.len() >= 6,
        "runc was started {} times: {text}",
        found.len()
    );
    Ok(format!("{codes}{}", found.join("\n")))
}

/// A package manager has put another file in the place of the front, and it runs still: under its own
/// name, and under runc's.
fn replaced_while_it_runs(node: &Node) -> anyhow::Result<()> {
    let script = |name: &str, first: &str| {
        format!(
            "mkdir -p /root/front; cp {FRONT} /root/front/old; exec 9</root/front/old; rm /root/front/old
             cp {FRONT} /root/front/runc; export PATH={first}/root/recorder:$PATH
             (exec -a {name} /proc/self/fd/9 --root /root/r create --bundle /root/b x) || echo \"exit $?\""
        )
    };
    for (name, first) in [("transship-runc", ""), ("runc", "/root/front:")] {
        let said = node
            .command("bash")
            .args(["-euc", &script(name, first)])
            .read()?;
        let is_given =
            said.starts_with("<--root>\n</root/r>\n<create>\n<--bundle>\n</root/b>\n<x>\n");
        ensure!(
            is_given && said.ends_with("exit 37\n"),
            "called {name}: {said}"
        );
    }
    Ok(())
}
