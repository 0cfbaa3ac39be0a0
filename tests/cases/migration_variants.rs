//! Containers that are not like the others: many files, a timer that nobody reads, one that is paused or that its client
//! removes, and several of one image at once.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, DebianImage, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::journey::fails_with;
use crate::migration_faults::{counts_on, run_alone};

const IMAGE: &str = "transship.test/servers:1";
const PATIENCE: Duration = Duration::from_secs(60);
/// Its tmpfs are looked at by CRIU, which makes a place for them in /tmp meanwhile.
const MANY_FILES: &str = "
import os, time
os.makedirs('/data/d')
for i in range(20000): open(f'/data/d/{i}', 'w').write(str(i))
n = 0
while True:
    n += 1; open('/data/state.new', 'w').write(f'{n} {len(os.listdir(\"/data/d\"))}'); os.rename('/data/state.new', '/data/state'); time.sleep(0.1)";
/// It looks at its timer less often than that expires.
const SLOW_READER: &str = "
import ctypes, os, struct, time
os.makedirs('/data')
libc = ctypes.CDLL(None)
timer = libc.timerfd_create(1, 0o4000)
libc.timerfd_settime(timer, 0, struct.pack('qqqq', 0, 20000000, 0, 20000000), None)
n = 0
while True:
    time.sleep(0.15)
    try: n += struct.unpack('Q', os.read(timer, 8))[0] > 0
    except BlockingIOError: pass
    open('/data/state.new', 'w').write(f'{n} ticks'); os.rename('/data/state.new', '/data/state')";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case(
            "migration_of_programs",
            programs_go_on as fn(&Testbed) -> anyhow::Result<()>,
        ),
        case(
            "migration_of_one_image",
            one_image_goes_with_several_at_once,
        ),
        case("migration_beside_clients", others_have_it_in_hand),
    ]
    .into_iter()
}

fn programs_go_on(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    a.import_image(&DebianImage::SERVERS.image(bed.settings())?, "transship")?;
    for (id, source, state) in [
        ("files", MANY_FILES, "20000"),
        ("timer", SLOW_READER, "ticks"),
    ] {
        let mut run = a.command("ctr");
        run.args(["run", "--detach", "--snapshotter", "transship"]);
        run.args([IMAGE, id, "/usr/bin/python3", "-c", source])
            .run()?;
        goes_on(&a, id, state)?;
        let checkpoint = format!("transship checkpoint {id} --name {id}; transship rm {id}");
        a.shell(&checkpoint).run()?;
        for (from, to, ssh) in [(&a, &b, &to_b), (&b, &a, &to_a)] {
            let mut migrate = from.command("transship");
            migrate.args(["migrate", id, "--to", ssh]).run()?;
            goes_on(to, id, state)?;
        }
        journey::remove_container(&a, id)?;
    }
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

/// It says how often it has been there, and the state.
fn goes_on(node: &Node, id: &str, state: &str) -> anyhow::Result<()> {
    let read = || -> Result<u64, String> {
        let said = journey::read_in_container(node, id, "/data/state")?;
        match said.split_once(' ') {
            Some((count, now)) if now == state => count.parse().map_err(|_| said.clone()),
            _ => Err(said),
        }
    };
    let before = poll_until("a state", PATIENCE, read)?;
    poll_until("the program to go on", PATIENCE, || match read()? {
        now if now > before + 2 => Ok(()),
        now => Err(format!("it is at {now}")),
    })?;
    Ok(())
}

/// As whoever empties a node moves them.
fn one_image_goes_with_several_at_once(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let to_b = bed.ssh(&a, &b)?;
    let ids = ["one", "two", "three", "four"];
    for id in ids {
        run_alone(&a, id)?;
    }
    let moves = ids.map(|id| format!("transship migrate {id} --to '{to_b}' & p_{id}=$!;"));
    let waits = ids.map(|id| format!("wait $p_{id} || failed=\"$failed {id}\";"));
    let script = format!(
        "set +e; failed=; {} {} [ -z \"$failed\" ]",
        moves.concat(),
        waits.concat()
    );
    a.shell(&script).run()?;
    for id in ids {
        counts_on(&b, id)?;
        journey::remove_container(&b, id)?;
    }
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn others_have_it_in_hand(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let to_b = bed.ssh(&a, &b)?;
    run_alone(&a, "web")?;
    a.ctr(&["tasks", "pause", "web"])?;
    let migrate = ["migrate", "web", "--to", to_b.as_str()];
    fails_with(&a, &migrate, 4, "tasks resume web")?;
    let tasks = a.ctr(&["tasks", "ls"])?;
    ensure!(tasks.contains("PAUSED"), "{tasks}");
    a.ctr(&["tasks", "resume", "web"])?;
    journey::remove_container(&a, "web")?;
    // Its ctr waits for it, and deletes task and container when it has ended.
    for id in ["attached-1", "attached-2", "attached-3"] {
        let run = ["ctr", "run", "--rm", "--snapshotter", "transship"];
        let run = [&run[..], &[journey::COUNTER_IMAGE, id, "/usr/bin/counter"]].concat();
        a.start_daemon(id, &run)?;
        journey::wait_for_count(&a, id, 3)?;
        let mut migrate = a.command("transship");
        migrate.args(["migrate", id, "--to", &to_b]).run()?;
        counts_on(&b, id)?;
        journey::remove_container(&b, id)?;
        a.wait_for_daemon_end(id)?;
    }
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}
