//! A dump begins while the container still runs, and waits for its freeze: whoever gives up then has touched nothing.
//!
//! ```text
//!  freeze      runtime and CRIU wait, the container runs
//!  checkpoint  the runtime cannot dump
//! ```

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::journey::fails_with;
use crate::migration_faults::counts_on;
use crate::moments::paced_front;

const PATIENCE: Duration = Duration::from_secs(90);
/// Its file has the name of a runtime whose dumps can be held.
const RUNTIME: &str = "/opt/paced/transship-runc";
const MOMENTS: &str = r#"    *" pause "*)
        stop_at freeze
        ;;
    *" checkpoint "*)
        [ ! -e /run/no-dump ] || { echo no dump today >&2; exit 1; }
        ;;"#;
const WAITS: &str = "pgrep -f '^flock -s .*/begin'";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "migration_begun",
        tree: Tree::Trixie,
        run: a_dump_that_waits_touches_nothing,
    }]
    .into_iter()
}

fn a_dump_that_waits_touches_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    a.write_file(RUNTIME, paced_front(MOMENTS))?;
    a.shell(&format!("chmod +x {RUNTIME}")).run()?;
    let run = format!(
        "ctr run --detach --snapshotter transship --runc-binary {RUNTIME} transship.test/counter:1 web"
    );
    a.shell(&run).run()?;
    journey::wait_for_count(&a, "web", 3)?;
    // Its shim says nothing of it while it waits for the freeze.
    let counts = format!(
        "wc -c </proc/{}/root/data/counts",
        journey::task_pid(&a, "web")?
    );

    // What it is told before the freeze it is told while the container runs.
    a.shell("touch /run/no-dump /run/stop-at-freeze").run()?;
    let migrate = ["migrate", "web", "--to", ssh.as_str()];
    fails_with(&a, &migrate, 1, "no dump today")?;
    a.shell("test ! -e /run/at-freeze; rm /run/no-dump").run()?;
    counts_on(&a, "web")?;

    for signal in ["KILL", "INT"] {
        let begin = format!("transship migrate web --to '{ssh}'; echo $? >/run/moved");
        a.start_daemon("move", &["sh", "-c", &begin])?;
        poll_until("the freeze", PATIENCE, || {
            let freezes = a.shell(&format!("test -e /run/at-freeze && {WAITS}"));
            { freezes }.run().map_err(|error| error.to_string())
        })?;
        let before: String = a.shell(&counts).read()?;
        poll_until("it to count on", PATIENCE, || {
            let now: String = a.shell(&counts).read().map_err(|error| error.to_string())?;
            (now != before).then_some(()).ok_or(now)
        })?;
        a.shell(&format!(
            "pkill -{signal} -x transship; rm /run/stop-at-freeze"
        ))
        .run()?;
        a.wait_for_daemon_end("move")?;
        let code: String = a
            .shell("cat /run/moved; rm /run/moved /run/at-freeze")
            .read()?;
        ensure!(code.trim() != "0", "exit code {code}");
        poll_until("the end of the dump", PATIENCE, || {
            no_dump_is_left(&a).map_err(|error| error.to_string())
        })?;
        counts_on(&a, "web")?;
        a.shell("touch /run/stop-at-freeze").run()?;
    }
    a.shell("rm /run/stop-at-freeze").run()?;
    poll_until("all that was made to go", PATIENCE, || {
        let left = journey::check_nothing_left(&b);
        left.map_err(|error| error.to_string())
    })?;
    a.command("transship").args(migrate).run()?;
    counts_on(&b, "web")?;
    journey::remove_container(&b, "web")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

/// Neither runtime nor CRIU, nor what they have written.
fn no_dump_is_left(node: &Node) -> anyhow::Result<()> {
    let left =
        format!("! {WAITS}; ! pgrep -x 'criu|transship'; ! ls -d /run/transship/opened/dump-*");
    Ok(node.shell(&left).run()?)
}
