//! Nobody knows which copy runs, and what is asked or found then is odd: a target that has no disk left, has been down,
//! or is another node; a source that somebody has let go or made again; records that nobody can read.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_cut::{begin_of, go_on, nobody_is_left, paced_nodes, wait_for_end};
use crate::migration_faults::{counts_on, refused, run_alone};
use crate::migration_lazy::IS_LOST;

const PATIENCE: Duration = Duration::from_secs(90);
const ARRIVALS: &str = "/var/lib/transship/arrivals";
const RECORDS: &str = "/var/lib/transship/migrations";
/// Where the networks of a node are.
const NETWORKS: &str = "/etc/cni/net.d";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("migration_undecided_lazy", a_full_disk_is_waited_for),
        case(
            "migration_undecided_full",
            a_full_disk_keeps_no_source_waiting,
        ),
        case(
            "migration_undecided_asked",
            a_person_decides_while_the_target_is_asked,
        ),
        case("migration_undecided_boot", a_target_that_was_down_is_lost),
        case("migration_undecided_node", another_node_knows_nothing_of_it),
        case("migration_undecided_new", what_has_its_id_now_is_left_alone),
        case(
            "migration_undecided_unread",
            what_cannot_be_read_keeps_nobody_waiting,
        ),
        case("migration_undecided_silent", a_silent_shim_has_not_ended),
        case(
            "migration_undecided_network",
            it_goes_on_without_its_network,
        ),
        case(
            "migration_undecided_resumed",
            what_was_let_go_by_hand_has_its_network_again,
        ),
        case(
            "migration_killed_asked",
            a_killed_command_has_a_guard_that_asks,
        ),
        case("migration_resumed", what_somebody_lets_go_is_not_moved),
        case("migration_killed_policy", a_policy_outlives_the_command),
    ]
    .into_iter()
}

/// The target cannot write down that the copy has all of its memory, and does not end it.
fn a_full_disk_is_waited_for(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "late")?;
    let lazily = [
        "late",
        "--lazy",
        "--accept-loss",
        "--max-precopy-rounds",
        "0",
    ];
    begin_of(&a, &b, "running", &lazily)?;
    b.shell(&format!(
        "mount --bind {ARRIVALS} {ARRIVALS}; mount -o remount,bind,ro {ARRIVALS}"
    ))
    .run()?;
    go_on(&a, &b)?;
    counts_on(&b, "late")?;
    b.shell(&format!("sleep 5; umount -l {ARRIVALS}")).run()?;
    let code = wait_for_end(&a)?;
    ensure!(code == "0", "exit code {code}");
    counts_on(&b, "late")?;
    journey::remove_container(&b, "late")?;
    nothing_is_left(&a, &b)
}

/// The target can write down neither that its source has committed itself, nor that it has taken the copy back.
fn a_full_disk_keeps_no_source_waiting(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "web")?;
    begin_of(&a, &b, "frozen", &["web"])?;
    b.shell(&format!(
        "mount --bind {ARRIVALS} {ARRIVALS}; mount -o remount,bind,ro {ARRIVALS}"
    ))
    .run()?;
    go_on(&a, &b)?;
    let code = wait_for_end(&a)?;
    ensure!(code != "0", "exit code {code}");
    // On a busy machine it has asked before the copy was gone.
    poll_until("what the target says", PATIENCE, || {
        let said = recover(&a).map_err(|error| error.to_string())?;
        let left = a.shell(&format!("ls {RECORDS}")).read();
        match left.map_err(|error| error.to_string())?.is_empty() {
            true => Ok(()),
            false => Err(said),
        }
    })?;
    counts_on(&a, "web")?;
    b.shell(&format!("umount -l {ARRIVALS}")).run()?;
    poll_until("the end of all that moved it", PATIENCE, || {
        nobody_is_left(&a, &b)
    })?;
    journey::remove_container(&a, "web")?;
    nothing_is_left(&a, &b)
}

/// Somebody asks a target that never answers, as the service of the node does.
fn a_person_decides_while_the_target_is_asked(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided(&a, &b, &["web"])?;
    a.shell("touch /run/mute").run()?;
    a.start_daemon("asks", &["transship", "recover"])?;
    poll_until("the question", PATIENCE, || {
        let asks = a.shell("pgrep -xf 'sleep 300'").run();
        asks.map_err(|error| error.to_string())
    })?;
    the_source_goes_on(&a, &b, "web")?;
    // It does not go on asking.
    poll_until("the end of who asks", PATIENCE, || {
        let asks = a.shell("! pgrep -x transship").run();
        asks.map_err(|error| error.to_string())
    })?;
    Ok(a.shell("rm /run/mute").run()?)
}

/// What was written there since is on no disk.
fn a_target_that_was_down_is_lost(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided(&a, &b, &["web"])?;
    b.shell(&format!(
        "sed -i 's/\"boot\":\"[^\"]*\"/\"boot\":\"another\"/' {ARRIVALS}/*"
    ))
    .run()?;
    is_lost(&a)?;
    b.shell(&format!(
        "sed -i 's/\"state\":\"committed\"/\"state\":\"runs\"/' {ARRIVALS}/*"
    ))
    .run()?;
    is_lost(&a)?;
    the_source_goes_on(&a, &b, "web")
}

/// The command leads to a node that has never heard of it.
fn another_node_knows_nothing_of_it(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided(&a, &b, &["web"])?;
    b.shell("cd /var/lib/transship; mkdir away; mv arrivals away; mv node-id away || true")
        .run()?;
    let asked = recover(&a)?;
    ensure!(asked.contains("not decided; paused here"), "{asked}");
    stands_still(&a)?;
    b.shell("cd /var/lib/transship; rm -rf arrivals node-id; mv away/* .")
        .run()?;
    let asked = recover(&a)?;
    ensure!(asked.contains("runs on the other node"), "{asked}");
    counts_on(&b, "web")?;
    journey::remove_container(&b, "web")?;
    nothing_is_left(&a, &b)
}

/// Somebody has removed the source, and made another one.
fn what_has_its_id_now_is_left_alone(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided(&a, &b, &["web"])?;
    // As if the target had been heard to say that it runs.
    a.shell(&format!(
        "sed -i 's/\"since\"/\"copy_runs\":true,\"since\"/' {RECORDS}/*
         ctr tasks kill -s KILL web; ctr tasks resume web || true"
    ))
    .run()?;
    journey::delete_ended_task(&a, "web")?;
    a.shell("ctr containers delete web").run()?;
    run_alone(&a, "web")?;
    let asked = recover(&a)?;
    counts_on(&a, "web").with_context(|| asked.clone())?;
    let left = a.shell(&format!("ls {RECORDS}")).read()?;
    ensure!(left.is_empty(), "{asked}: {left}");
    journey::remove_container(&a, "web")?;
    counts_on(&b, "web")?;
    journey::remove_container(&b, "web")?;
    nothing_is_left(&a, &b)
}

fn what_cannot_be_read_keeps_nobody_waiting(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided(&a, &b, &["web"])?;
    let arrival = "0123456789abcdef0123456789abcdef";
    a.shell(&format!(
        "mkdir -p {ARRIVALS}; echo '{{' >{ARRIVALS}/{arrival}; echo '{{' >{RECORDS}/default:other"
    ))
    .run()?;
    let asked = recover(&a)?;
    for said in [arrival, "default:other", "runs on the other node"] {
        ensure!(asked.contains(said), "{said:?} is not in {asked}");
    }
    counts_on(&b, "web")?;
    a.shell(&format!(
        "transship ls; rm {ARRIVALS}/{arrival} {RECORDS}/default:other"
    ))
    .run()?;
    journey::remove_container(&b, "web")?;
    nothing_is_left(&a, &b)
}

/// containerd gives out neither a state nor a process of a task while its shim is slow. What is frozen has not ended then:
/// it neither goes on beside the copy, nor is it forgotten.
fn a_silent_shim_has_not_ended(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided(&a, &b, &["web"])?;
    let pid = a.shell("ctr tasks ls | awk '$1 == \"web\" { print $2 }'");
    let pid = { pid }.read()?.trim().to_owned();
    let shim = |signal: &str| {
        a.shell(&format!(
            "pkill -{signal} -f '[c]ontainerd-shim-runc-v2 .*-id web '"
        ))
        .run()
    };
    shim("STOP")?;
    let asked = recover(&a)?;
    let ran = a.shell(&format!(
        "used() {{ cut -d' ' -f14,15,22 /proc/{pid}/stat 2>/dev/null || true; }}
         before=$(used); sleep 2; [ \"$before\" = \"$(used)\" ] || echo it runs"
    ));
    let ran = { ran }.read()?;
    shim("CONT")?;
    ensure!(ran.is_empty(), "{ran}: {asked}");
    poll_until("the end of the source", PATIENCE, || {
        let said = recover(&a).map_err(|error| error.to_string())?;
        let left = a.shell(&format!("ctr containers ls -q; ls {RECORDS}"));
        match { left }.read().map_err(|error| error.to_string())? {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{said}: {left}")),
        }
    })?;
    counts_on(&b, "web")?;
    journey::remove_container(&b, "web")?;
    // By the word of a person it goes on, whatever its shim does.
    undecided(&a, &b, &["other"])?;
    journey::remove_container(&b, "other")?;
    a.shell("pkill -STOP -f '[c]ontainerd-shim-runc-v2 .*-id other '")
        .run()?;
    let decided = a.shell("timeout 60 transship recover other --source-runs 2>&1 || true");
    let decided = { decided }.read()?;
    a.shell("pkill -CONT -f '[c]ontainerd-shim-runc-v2 .*-id other '")
        .run()?;
    ensure!(decided.contains("runs on here"), "{decided}");
    counts_on(&a, "other").with_context(|| decided.clone())?;
    journey::remove_container(&a, "other")?;
    nothing_is_left(&a, &b)
}

/// The networks of the node have gone when it is decided that the source goes on.
fn it_goes_on_without_its_network(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    undecided_in_a_network(&a, &b, &["web", "--network", "keep"])?;
    a.shell(&format!("mkdir /run/away; mv {NETWORKS}/* /run/away/"))
        .run()?;
    journey::remove_container(&b, "web")?;
    let decided = { a.shell("transship recover web --source-runs 2>&1 || true") }.read()?;
    ensure!(
        decided.contains("runs on here") && decided.contains("without its network"),
        "{decided}"
    );
    counts_on(&a, "web").with_context(|| decided.clone())?;
    a.shell(&format!("mv /run/away/* {NETWORKS}/")).run()?;
    journey::remove_container(&a, "web")
        .map_err(anyhow::Error::from)
        .map(drop)
}

/// Somebody resumes it past us, while it has given its address away and no packet comes to it.
fn what_was_let_go_by_hand_has_its_network_again(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    let keep = ["web", "--network", "keep", "--tcp", "established"];
    undecided_in_a_network(&a, &b, &keep)?;
    journey::remove_container(&b, "web")?;
    a.shell("ctr tasks resume web").run()?;
    let pid = journey::task_pid(&a, "web")?;
    let inside = |what: &str| a.shell(&format!("nsenter -t {pid} -n {what}")).read();
    let locked = inside("nft list ruleset")?;
    ensure!(locked.contains("transship-migration"), "{locked}");
    let decided = recover(&a)?;
    ensure!(decided.contains("runs on here"), "{decided}");
    let rules = inside("nft list ruleset")?;
    ensure!(!rules.contains("transship"), "{rules}");
    let addresses = inside("ip -o address show")?;
    ensure!(addresses.contains(" 10.77.0."), "{addresses}");
    counts_on(&a, "web")?;
    journey::remove_container(&a, "web")?;
    nothing_is_left(&a, &b)
}

/// As [`undecide`], of a counter that CNI has put into a network.
fn undecided_in_a_network(a: &Node, b: &Node, what: &[&str]) -> anyhow::Result<()> {
    let lan = r#"{"cniVersion":"0.4.0","name":"lan","plugins":[{"type":"bridge","bridge":"lan0",
        "isGateway":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]]}}]}"#;
    for node in [a, b] {
        node.write_file(&format!("{NETWORKS}/05-lan.conflist"), lan)?;
    }
    a.shell(&format!(
        "ctr run --detach --cni --snapshotter transship transship.test/counter:1 {}",
        what[0]
    ))
    .run()?;
    journey::wait_for_count(a, what[0], 3)?;
    undecide(a, b, what)
}

/// A client of containerd resumes it when it has been dumped.
fn what_somebody_lets_go_is_not_moved(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "web")?;
    let to = "/usr/local/bin/link";
    let migrate = ["migrate", "web", "--to", to, "--before-restore"];
    for resume in [
        "ctr tasks resume web",
        "runc --root /run/containerd/runc/default resume web",
    ] {
        let resume = format!("sleep 1; {resume}; sleep 1");
        let migrate = [&migrate[..], &[resume.as_str()]].concat();
        refused(&a, &migrate, 1, "does not stand still any more")?;
        poll_until("the end of all that moved it", PATIENCE, || {
            nobody_is_left(&a, &b)
        })?;
    }
    let migrate = &migrate[..4];
    a.command("transship").args(migrate).run()?;
    counts_on(&b, "web")?;
    journey::remove_container(&b, "web")?;
    nothing_is_left(&a, &b)
}

/// The command is killed in the freeze, when it has hidden the container from containerd's monitor.
fn a_policy_outlives_the_command(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "web")?;
    a.shell("ctr containers label web containerd.io/restart.status=running")
        .run()?;
    begin_of(&a, &b, "frozen", &["web"])?;
    a.shell("pkill -KILL -x transship").run()?;
    go_on(&a, &b)?;
    poll_until("the end of all that moved it", PATIENCE, || {
        nobody_is_left(&a, &b)
    })?;
    counts_on(&a, "web")?;
    let info = a.ctr(&["containers", "info", "web"])?;
    ensure!(
        info.contains("\"containerd.io/restart.status\": \"running\""),
        "{info}"
    );
    a.shell("ctr containers label web containerd.io/restart.status=")
        .run()?;
    journey::remove_container(&a, "web")?;
    nothing_is_left(&a, &b)
}

/// Nobody calls `recover`.
fn a_killed_command_has_a_guard_that_asks(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "web")?;
    begin_of(&a, &b, "running", &["web"])?;
    a.shell("pkill -KILL -x transship").run()?;
    go_on(&a, &b)?;
    poll_until("the end of the source", PATIENCE, || {
        let left = { a.shell(&format!("ctr containers ls -q; ls {RECORDS}")) }.read();
        match left.map_err(|error| error.to_string())? {
            left if left.is_empty() => Ok(()),
            left => Err(left),
        }
    })?;
    counts_on(&b, "web")?;
    poll_until("the end of all that moved it", PATIENCE, || {
        nobody_is_left(&a, &b)
    })?;
    journey::remove_container(&b, "web")?;
    nothing_is_left(&a, &b)
}

/// A counter whose copy runs, which nobody has told.
fn undecided(a: &Node, b: &Node, what: &[&str]) -> anyhow::Result<()> {
    run_alone(a, what[0])?;
    undecide(a, b, what)
}

fn undecide(a: &Node, b: &Node, what: &[&str]) -> anyhow::Result<()> {
    begin_of(a, b, "running", what)?;
    a.shell("touch /run/cut; pkill -KILL -x ssh").run()?;
    // Who is at it would bring it to its end.
    b.shell("pkill -KILL -f '[r]eceive-guard'; pkill -KILL -x transship")
        .run()?;
    go_on(a, b)?;
    let code = wait_for_end(a)?;
    ensure!(code == "6", "exit code {code}");
    counts_on(b, what[0])?;
    Ok(a.shell("rm /run/cut").run()?)
}

fn recover(a: &Node) -> anyhow::Result<String> {
    Ok(a.shell("transship recover --once 2>&1 || true").read()?)
}

fn stands_still(a: &Node) -> anyhow::Result<()> {
    let tasks = a.ctr(&["tasks", "ls"])?;
    ensure!(tasks.contains("PAUSED"), "{tasks}");
    Ok(())
}

fn is_lost(a: &Node) -> anyhow::Result<()> {
    let asked = recover(a)?;
    ensure!(asked.contains(IS_LOST), "{asked}");
    stands_still(a)
}

fn the_source_goes_on(a: &Node, b: &Node, id: &str) -> anyhow::Result<()> {
    b.shell(&format!(
        "ctr tasks kill -s KILL {id} || true; sleep 1; ctr tasks delete {id} || true; ctr containers delete {id}"
    ))
    .run()?;
    a.command("transship")
        .args(["recover", id, "--source-runs"])
        .run()?;
    counts_on(a, id)?;
    journey::remove_container(a, id)?;
    Ok(())
}

/// Beside what those had in use there who were killed.
fn nothing_is_left(a: &Node, b: &Node) -> anyhow::Result<()> {
    b.shell("transship recover --once").run()?;
    journey::check_nothing_left(a)?;
    journey::check_nothing_left(b)
}
