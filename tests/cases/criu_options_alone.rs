//! CRIU's options of containers outside of pods, and of dumps that others take.
//!
//! ```text
//!   needs                                          without it
//!     tcp=established   a connection to the node     not dumped
//!     empty-ns          a vxlan of its own           (arguments of runc, which does it by itself)
//!     manage-cgroups    a cgroup below its own       restored where it was
//!     lsm-*             a security module            (arguments of runc: this kernel has none)
//!     lazy-pages        memory                       restored before it starts
//! ```

use std::time::Duration;

use anyhow::{bail, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Image, Node, Testbed, journey, poll_until,
};

use crate::Case;
use crate::frozen::checkpoint_with_criu;

const IMAGE: &str = "transship.test/holder:1";
const PATIENCE: Duration = Duration::from_secs(30);
const TRIES: u32 = 5;
/// Writes down what runc is called with.
const RECORDER: &str = "#!/bin/sh\necho \"$@\" >>/var/log/runc.args\nexec /usr/sbin/runc \"$@\"\n";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("criu_options_alone", options_of_a_container_alone).chain(
        Case::on_all_trees("criu_options_of_others", options_of_dumps_that_others_take),
    )
}

fn options_of_a_container_alone(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    a_connection_moves_with_its_address(&node)?;
    a_network_is_left_behind(&node)?;
    sockets_are_found_under_their_names(&node)?;
    a_keyring_is_its_own(&node)?;
    a_cgroup_is_restored_or_not(&node)?;
    memory_comes_when_it_is_touched(&node)?;
    a_killed_dump_leaves_no_link(&node)?;
    a_killed_restore_leaves_no_file(&node)?;
    // By iptables, which is what CRIU does unless it is told, and by nftables where it can.
    for more in [[].as_slice(), &["--link-remap"]] {
        a_killed_dump_takes_its_own_locks_away(&node, more)?;
    }
    journey::check_nothing_left(&node)
}

/// The network namespace is made again, with the address that it had; the other end sees nothing.
fn a_connection_moves_with_its_address(node: &Node) -> anyhow::Result<()> {
    let make_network = "
        ip netns add moved; ip link add v0 type veth peer name eth0 netns moved
        ip addr add 10.77.0.1/24 dev v0; ip link set v0 up; ip -n moved link set lo up
        ip -n moved addr add 10.77.0.2/24 dev eth0; ip -n moved link set eth0 up";
    node.shell(make_network).run()?;
    run(node, "teacher", &[], &["lock"])?;
    node.shell(&format!(
        "mkdir -p /data; cp /proc/{}/root/usr/bin/holder /usr/local/bin/holder",
        journey::task_pid(node, "teacher")?
    ))
    .run()?;
    journey::remove_container(node, "teacher")?;
    node.start_daemon("echo", &["holder", "echo=10.77.0.1:7100"])?;

    sandbox_in_network(node)?;
    let network = format!(
        "network:/proc/{}/ns/net",
        journey::task_pid(node, "network")?
    );
    run(
        node,
        "moved",
        &["--with-ns", &network],
        &["peer=10.77.0.1:7100"],
    )?;
    refused(node, "moved", &[], "it has TCP connections")?;
    checkpoint(node, "moved", &["--tcp=established", "--leave-paused"])?;
    // What it says in dying does not get out.
    node.shell("ip -n moved link set eth0 down").run()?;
    for id in ["moved", "network"] {
        journey::remove_container(node, id)?;
    }
    node.shell("ip netns del moved; ip link del v0 2>/dev/null || true")
        .run()?;
    poll_until("the end of the network", PATIENCE, || {
        let gone = node.shell(&format!("! ip link show v0 2>/dev/null;{make_network}"));
        { gone }.run().map_err(|error| error.to_string())
    })?;
    sandbox_in_network(node)?;
    node.shell("transship restore moved --sandbox network; transship rm moved")
        .run()?;
    holds(node, "moved", "peer ok\n")?;
    for id in ["moved", "network"] {
        journey::remove_container(node, id)?;
    }
    node.stop_daemon("echo", "KILL")?;
    node.shell("ip netns del moved").run()?;
    Ok(())
}

/// A container whose network namespace others can name.
fn sandbox_in_network(node: &Node) -> anyhow::Result<()> {
    node.shell(&format!(
        "ctr run --detach --snapshotter transship --runc-binary {} \
         --annotation dev.transship/sandbox=network \
         --with-ns network:/var/run/netns/moved transship.test/pause:1 network",
        journey::FRONT
    ))
    .run()?;
    Ok(())
}

/// runc leaves the devices of a network behind whatever it is told (`setEmptyNsMask`), among them
/// those of kinds that CRIU cannot dump; crun does when it is told.
fn a_network_is_left_behind(node: &Node) -> anyhow::Result<()> {
    run(node, "netted", &[], &["lock"])?;
    let inside = |id: &str, script: &str| -> anyhow::Result<String> {
        let pid = journey::task_pid(node, id)?;
        Ok(node
            .shell(&format!("nsenter -t {pid} -n {script}"))
            .read()?)
    };
    inside(
        "netted",
        "ip link add vx0 type vxlan id 5 dstport 4789 dev lo",
    )?;
    record_runc(node)?;
    checkpoint(node, "netted", &["--empty-ns=network"])?;
    journey::remove_container(node, "netted")?;
    node.shell("transship restore netted; transship rm netted")
        .run()?;
    holds(node, "netted", "lock ok\n")?;
    let links = inside("netted", "ip -o link")?;
    ensure!(!links.contains("vx0") && links.contains("lo"), "{links}");
    for command in ["checkpoint", "restore"] {
        was_asked(node, command, "--empty-ns network")?;
    }
    journey::remove_container(node, "netted")?;
    Ok(())
}

/// That of a child: the first process always comes into the cgroup of the new container.
fn a_cgroup_is_restored_or_not(node: &Node) -> anyhow::Result<()> {
    let shell = "/usr/bin/holder lock; true";
    node.shell(&format!(
        "ctr run --detach --snapshotter transship --runc-binary {} {IMAGE} grouped /bin/sh -c '{shell}'",
        journey::FRONT
    ))
    .run()?;
    holds(node, "grouped", "lock ok\n")?;
    let group = |script: &str| -> anyhow::Result<String> {
        let pid = journey::task_pid(node, "grouped")?;
        let script = format!(
            "read pid _ </proc/{pid}/task/{pid}/children || true; group=$(sed -n 's/.*:pids://p' /proc/$pid/cgroup); {script}"
        );
        Ok(node.shell(&script).read()?)
    };
    let below = "sub=/sys/fs/cgroup/pids$group/sub; mkdir $sub; echo $pid >$sub/cgroup.procs";
    group(below)?;
    checkpoint(node, "grouped", &[])?;
    journey::remove_container(node, "grouped")?;
    for (flags, there) in [("", true), ("--manage-cgroups-mode ignore", false)] {
        node.shell(&format!("transship restore grouped {flags}"))
            .run()?;
        holds(node, "grouped", "lock ok\n")?;
        let found = group("echo $group")?;
        ensure!(
            found.trim().ends_with("/sub") == there,
            "{flags:?}: {found}"
        );
        // A copy is as good as the first one: it can be dumped again.
        node.shell("transship checkpoint grouped --name again; transship rm again")
            .run()?;
        journey::remove_container(node, "grouped")?;
    }
    // CRIU replaces a context that a mount has: without SELinux none has one. So what can be seen
    // here is that it is asked to.
    let context = "system_u:object_r:container_file_t:s0";
    node.shell(&format!(
        "transship restore grouped --lsm-mount-context {context}"
    ))
    .run()?;
    holds(node, "grouped", "lock ok\n")?;
    was_asked(node, "restore", "--manage-cgroups-mode ignore")?;
    was_asked(node, "restore", &format!("--lsm-mount-context {context}"))?;
    journey::remove_container(node, "grouped")?;
    node.shell("rm /usr/local/sbin/runc; transship rm grouped")
        .run()?;
    Ok(())
}

/// Also those that were bound under another one.
fn sockets_are_found_under_their_names(node: &Node) -> anyhow::Result<()> {
    // In the upperdir, and in a mount.
    let needs = ["renamed", "linked", "moved", "moved", "forgotten"];
    let paths = ["/data/a", "/data/b", "/data/c", "/dev/shm/d", "/data/e"];
    let needs: Vec<_> = { needs.iter().zip(paths) }
        .map(|(need, path)| format!("{need}={path}"))
        .collect();
    run(
        node,
        "named",
        &[],
        &needs.iter().map(String::as_str).collect::<Vec<_>>(),
    )?;
    let all = "renamed ok\nlinked ok\nmoved ok\nmoved ok\nforgotten ok\n";
    holds(node, "named", all)?;
    checkpoint(node, "named", &[])?;
    journey::remove_container(node, "named")?;
    node.shell("transship restore named; transship rm named")
        .run()?;
    holds(node, "named", all)?;
    Ok(journey::remove_container(node, "named")?)
}

/// A restored container has a session keyring, and not the one of the node or of others.
fn a_keyring_is_its_own(node: &Node) -> anyhow::Result<()> {
    let is_there = || node.shell("grep -q '_ses.ringed:' /proc/keys");
    run(node, "ringed", &[], &["lock"])?;
    is_there().run()?;
    checkpoint(node, "ringed", &[])?;
    journey::remove_container(node, "ringed")?;
    poll_until("the end of the keyring", PATIENCE, || {
        match is_there().run() {
            Ok(()) => Err("it is there".to_owned()),
            Err(_) => Ok(()),
        }
    })?;
    node.shell("transship restore ringed; transship rm ringed")
        .run()?;
    is_there().run()?;
    Ok(journey::remove_container(node, "ringed")?)
}

/// Lets a program before runc on the path write down its arguments.
fn record_runc(node: &Node) -> anyhow::Result<()> {
    node.write_file("/usr/local/sbin/runc", RECORDER)?;
    node.shell("chmod +x /usr/local/sbin/runc").run()?;
    Ok(())
}

fn was_asked(node: &Node, command: &str, flag: &str) -> anyhow::Result<()> {
    let arguments = String::from_utf8(node.read_file("/var/log/runc.args")?)?;
    let command = format!(" {command} ");
    let found = arguments
        .lines()
        .any(|line| line.contains(&command) && line.contains(flag));
    ensure!(found, "{flag} is not in {arguments}");
    Ok(())
}

/// All of it comes; and if it cannot come any more, the container ends rather than to go on with
/// pages of zeros.
fn memory_comes_when_it_is_touched(node: &Node) -> anyhow::Result<()> {
    let serving = "pgrep -f '[c]riu lazy-pages'";
    run_counter(node, "lazy")?;
    checkpoint(node, "lazy", &[])?;
    journey::remove_container(node, "lazy")?;
    node.shell("transship restore lazy --lazy-pages").run()?;
    let log = "/run/containerd/io.containerd.runtime.v2.task/default/lazy/work/lazy-pages.log";
    node.shell(&format!("test -e {log}")).run()?;
    memory_is_whole(node)?;
    poll_until("the end of the server", PATIENCE, || {
        let served = node.shell(&format!("! {serving}"));
        { served }.run().map_err(|error| error.to_string())
    })?;
    memory_is_whole(node)?;
    journey::remove_container(node, "lazy")?;

    let mut ended = 0;
    // Killed before the container runs, and as soon as it does.
    for moment in [serving, "ctr tasks ls | grep -q 'lazy .*RUNNING'"] {
        node.start_daemon(
            "restoring",
            &["transship", "restore", "lazy", "--lazy-pages"],
        )?;
        poll_until("the moment of the kill", PATIENCE, || {
            let seen = node.shell(moment).run();
            seen.map_err(|error| error.to_string())
        })?;
        node.shell("pkill -KILL -f '[c]riu lazy-pages' || true")
            .run()?;
        node.wait_for_daemon_end("restoring")?;
        let said = String::from_utf8(node.read_file("/var/log/restoring.log")?)?;
        let alive = poll_until("an end, or whole memory", PATIENCE, || {
            let tasks = node
                .ctr(&["tasks", "ls"])
                .map_err(|error| error.to_string())?;
            match tasks.lines().find(|line| line.starts_with("lazy ")) {
                None => Ok(false),
                Some(line) if line.contains("STOPPED") => Ok(false),
                Some(_) => memory_is_whole(node)
                    .map(|()| true)
                    .map_err(|error| format!("{error:#}: {tasks}")),
            }
        });
        match alive {
            Ok(true) => journey::remove_container(node, "lazy")?,
            Ok(false) => {
                ended += 1;
                node.shell("ctr tasks rm -f lazy >/dev/null 2>&1 || true; ctr containers rm lazy 2>/dev/null || true")
                    .run()?;
            }
            Err(error) => anyhow::bail!("{error}: {said}"),
        }
    }
    ensure!(ended > 0, "no server was killed before it had served all");
    node.shell("transship rm lazy").run()?;
    Ok(())
}

fn memory_is_whole(node: &Node) -> anyhow::Result<()> {
    let pid = journey::task_pid(node, "lazy")?;
    // Nobody has raised the loopback interface of its own network.
    let ask = "ip link set lo up; busybox nc -w 10 127.0.0.1 7000";
    let ask = format!("nsenter -t {pid} -n sh -c '{ask}'");
    let reply = node.shell(&ask).read()?;
    ensure!(reply.contains("\"memory_ok\":true"), "{reply:?}");
    Ok(())
}

fn run_counter(node: &Node, id: &str) -> anyhow::Result<()> {
    node.shell(&format!(
        "ctr run --detach --snapshotter transship --runc-binary {} transship.test/counter:1 {id} \
         /usr/bin/counter --memory-mb 192",
        journey::FRONT
    ))
    .run()?;
    journey::wait_for_count(node, id, 5)?;
    Ok(())
}

/// `ctr` dumps, containerd restores: what the annotations say holds for both.
fn options_of_dumps_that_others_take(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    let image = "transship.test/dumped:1";
    let needs = ["lock", "ghost=2097152", "tcp=7001"];
    run(&node, "plain", &[], &needs)?;
    let dump = |id: &str| {
        let mut command = node.command("ctr");
        command.args(["containers", "checkpoint", "--rw", "--task", id, image]);
        command
    };
    dump("plain").read_failure()?;
    journey::remove_container(&node, "plain")?;

    let mut annotations = Vec::new();
    for annotation in [
        "dev.transship/file-locks=true",
        "dev.transship/ghost-limit=4M",
        "dev.transship/tcp=close",
    ] {
        annotations.extend(["--annotation", annotation]);
    }
    run(&node, "told", &annotations, &needs)?;
    dump("told").run()?;
    holds(&node, "told", "tcp ok\n")?;
    // What is said on the command line wins over the annotations.
    refused(&node, "told", &["--ghost-limit=1M"], "--ghost-limit SIZE")?;
    refused(&node, "told", &["--no-file-locks"], "it holds file locks (")?;
    journey::remove_container(&node, "told")?;
    node.ctr(&["containers", "restore", "--live", "--rw", "told", image])?;
    let state = holds(&node, "told", "ghost ok\n")?;
    ensure!(
        state.contains("os error") && state.contains("lock ok"),
        "{state}"
    );
    let pid = journey::task_pid(&node, "told")?;
    node.shell(&format!(
        "! flock --nonblock /proc/{pid}/root/data/lock true"
    ))
    .run()?;
    journey::remove_container(&node, "told")?;
    Ok(())
}

fn start(bed: &Testbed) -> anyhow::Result<Node> {
    let node = bed.node("a")?;
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    for image in [
        Image::pause(bed.settings())?,
        holder,
        journey::counter_image(bed)?,
    ] {
        node.import_image(&image, "transship")?;
    }
    Ok(node)
}

/// CRIU gives the file a name for the time of a dump; one that is left would make all later dumps fail. So would CRIU's
/// code in a process: it is killed when it has taken that back.
fn a_killed_dump_leaves_no_link(node: &Node) -> anyhow::Result<()> {
    let links = |pid: u32| format!("ls -d /proc/{pid}/root/data/link_remap.* 2>/dev/null");
    let image = "/var/lib/transship/checkpoints/.new-*/linked/checkpoint/inventory.img";
    let dumped = |pid| format!("{} >/dev/null && ls {image} 2>/dev/null", links(pid));
    let pid = dump_killed_when(node, "linked", (&[], "link"), &["--link-remap"], dumped)?;
    let left = node.shell(&format!("{} || true", links(pid))).read()?;
    ensure!(left.is_empty(), "{left}");
    holds(node, "linked", "link ok\n")?;
    checkpoint(node, "linked", &["--link-remap"])?;
    node.shell("transship rm linked").run()?;
    Ok(journey::remove_container(node, "linked")?)
}

/// A file without a name is made again in a volume that stays, and mounts in a directory of the node.
fn a_killed_restore_leaves_no_file(node: &Node) -> anyhow::Result<()> {
    node.shell("mkdir -p /srv/volume").run()?;
    let volume = [
        "--mount",
        "type=bind,src=/srv/volume,dst=/data,options=rbind:rw",
    ];
    run(node, "ghostly", &volume, &["ghost=1000000"])?;
    checkpoint(node, "ghostly", &[])?;
    journey::remove_container(node, "ghostly")?;
    let left = "ls -d /srv/volume/*.ghost /tmp/.criu.mntns.* 2>/dev/null || true";
    let kill = "while ! [ -e /srv/volume/ghost.cr.1.ghost ]; do :; done; pkill -KILL -x criu";
    for _ in 0..TRIES {
        let killed = node.shell(&format!(
            "({kill}) & transship restore ghostly --allow host-mounts 2>&1 && echo CAME BACK; kill $! 2>/dev/null || true"
        ));
        let said = { killed }.read()?;
        let found = node.shell(left).read()?;
        ensure!(found.is_empty(), "left: {found} {said}");
        if !said.contains("CAME BACK") {
            node.shell("transship restore ghostly --allow host-mounts")
                .run()?;
            holds(node, "ghostly", "ghost ok\n")?;
            journey::remove_container(node, "ghostly")?;
            return Ok(node
                .shell("transship rm ghostly; rm -r /srv/volume")
                .run()?);
        }
        journey::remove_container(node, "ghostly")?;
    }
    bail!("no restore was killed while the file was made")
}

/// Each connection of a container in the node's network is locked by itself, beside those of other dumps; what
/// containerd cannot be told is `more`.
fn a_killed_dump_takes_its_own_locks_away(node: &Node, more: &[&str]) -> anyhow::Result<()> {
    let rule =
        "INPUT -p tcp -m mark ! --mark 0xC114 -s 10.9.9.1 --sport 1 -d 10.9.9.2 --dport 2 -j DROP";
    let table = "inet CRIU-00000000-0000-4000-8000-000000000001";
    node.shell(&format!("nft add table {table}; iptables -w -I {rule}"))
        .run()?;
    let all = "{ nft list tables; iptables-save; } 2>/dev/null | grep -e CRIU- -e 0xc114";
    let own = format!("{all} | grep -v -e '{table}' -e 10.9.9.1");
    let holder = (["--net-host"].as_slice(), "tcp=7009");
    let flags = [&["--tcp=established"], more].concat();
    let locked = |_| own.clone();
    dump_killed_when(node, "hosted", holder, &flags, locked)?;
    let left = node.shell(&format!("{own} || true")).read()?;
    ensure!(left.is_empty(), "{left}");
    let others = node.shell(all).read()?;
    ensure!(others.lines().count() == 2, "{others}");
    holds(node, "hosted", "tcp ok\n")?;
    node.shell(&format!("nft delete table {table}; iptables -w -D {rule}"))
        .run()?;
    Ok(journey::remove_container(node, "hosted")?)
}

/// Kills the CRIU of a dump as soon as the command of `there` succeeds, and gives the first process of a container that
/// runs on. One that is killed while it changes the registers of a process takes that with it: then it is tried again.
fn dump_killed_when(
    node: &Node,
    id: &str,
    (more, need): (&[&str], &str),
    flags: &[&str],
    there: impl Fn(u32) -> String,
) -> anyhow::Result<u32> {
    for _ in 0..TRIES {
        run(node, id, more, &[need])?;
        let pid = journey::task_pid(node, id)?;
        checkpoint_with_criu(node, "KILL", &there(pid), &[&[id], flags].concat())?;
        if !node.ctr(&["tasks", "ls"])?.contains("STOPPED") {
            return Ok(pid);
        }
        journey::delete_ended_task(node, id)?;
        node.ctr(&["containers", "delete", id])?;
    }
    bail!("the process has ended {TRIES} times");
}

fn run(node: &Node, id: &str, more: &[&str], needs: &[&str]) -> anyhow::Result<()> {
    let mut command = vec!["run", "--detach", "--snapshotter", "transship"];
    command.extend(["--runc-binary", journey::FRONT]);
    command.extend(more);
    command.extend([IMAGE, id, "/usr/bin/holder"]);
    command.extend(needs);
    node.ctr(&command)?;
    holds(node, id, "tick ")?;
    Ok(())
}

/// What the holder says, two ticks from now.
fn holds(node: &Node, id: &str, said: &str) -> anyhow::Result<String> {
    let mut first = None;
    Ok(poll_until("the holder's state", PATIENCE, || {
        let state = journey::read_in_container(node, id, "/data/state")?;
        let tick = state.rsplit_once("tick ");
        let tick = tick.and_then(|(_, tick)| tick.trim().parse::<u64>().ok());
        let tick = tick.ok_or_else(|| state.clone())?;
        match tick >= *first.get_or_insert(tick) + 2 && state.contains(said) {
            true => Ok(state),
            false => Err(state),
        }
    })?)
}

fn checkpoint(node: &Node, id: &str, flags: &[&str]) -> anyhow::Result<()> {
    let mut command = node.command("transship");
    command.args(["checkpoint", id, "--name", id]).args(flags);
    Ok(command.run()?)
}

fn refused(node: &Node, id: &str, flags: &[&str], said: &str) -> anyhow::Result<()> {
    let mut command = node.command("transship");
    command.args(["checkpoint", id, "--name", id]).args(flags);
    let error = command.read_failure()?;
    ensure!(error.contains(said), "{error}");
    holds(node, id, " ok\n")?;
    Ok(())
}
