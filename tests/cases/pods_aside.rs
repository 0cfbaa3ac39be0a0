//! Containers of a pod that moves are restored side by side: `create` of one answers while CRIU still restores it. Whoever is
//! killed then, one copy of the pod counts on, and nothing of the other is left.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Node, PodContainer, PodNamespaces, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::pods::{FIRST, SECOND, start_two};

const PATIENCE: Duration = Duration::from_secs(90);
const THIRD: PodContainer<'static> = PodContainer {
    name: "third",
    command: &["/usr/bin/counter", "--memory-mb", "1", "--port", "7002"],
    // Its `create` answers when it is restored.
    tty: true,
    ..FIRST
};
/// Who is killed, by its command line.
const KILLED: [&str; 4] = [
    "transship-create-asid[e]",
    "transship-restore-guar[d]",
    "criu swr[k]",
    "containerd-shim-runc-v2 -namespace k8s.i[o]",
];
/// When, in seconds after the first `create` that answers early was begun.
const AFTER: [&str; 3] = ["0", "0.05", "0.12"];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "pod_aside",
        tree: Tree::Forky,
        run: one_pod_whoever_is_killed,
    }]
    .into_iter()
}

fn one_pod_whoever_is_killed(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    let cri = a.cri()?;
    let pod = cri.run_pod(("shop", "three"), &[], PodNamespaces::Usual)?;
    for container in [&FIRST, &SECOND, &THIRD] {
        cri.run_container(&pod, container)?;
    }
    counts_on(&a, &b)?;
    for (from, to, link) in [(&a, &b, &to_b), (&b, &a, &to_a)] {
        migrate(from, link).run()?;
        counts_on(to, from)?;
    }
    let mut failed = 0;
    for killed in KILLED {
        for after in AFTER {
            let what = || format!("{killed} killed after {after} s");
            let strike = format!(
                "until pgrep -f '{}' >/dev/null; do [ ! -e /run/over ] || exit 0; done; sleep {after}
                 pkill -KILL -f '{killed}' || true",
                KILLED[0]
            );
            b.shell("rm -f /run/over").run()?;
            b.start_daemon("strike", &["sh", "-c", &strike])?;
            let moved = migrate(&a, &to_b).output()?;
            b.shell("touch /run/over").run()?;
            b.wait_for_daemon_end("strike")?;
            if moved.status.success() {
                counts_on(&b, &a).with_context(what)?;
                migrate(&b, &to_a).run().with_context(what)?;
            } else {
                failed += 1;
                let said = String::from_utf8_lossy(&moved.stderr).into_owned();
                ensure!(moved.status.code() == Some(5), "{}: {said}", what());
                eprintln!("{}: {said}", what());
            }
            counts_on(&a, &b).with_context(what)?;
            journey::check_no_pod_left(&b).with_context(what)?;
            let script = "set +e; find /run/transship/opened -mindepth 1 2>/dev/null; pgrep -x criu; \
                 pgrep -f 'transship-(create|restore|hol[d])'; true";
            poll_until("the end of what restored", PATIENCE, || {
                match b.shell(script).read() {
                    Ok(left) if left.is_empty() => Ok(()),
                    Ok(left) => Err(left),
                    Err(error) => Err(error.to_string()),
                }
            })
            .with_context(what)?;
        }
    }
    ensure!(failed > 0, "nobody was killed in time");
    Ok(())
}

/// Moves the pod to the node that `link` leads to.
fn migrate(from: &Node, link: &str) -> Command {
    let mut migrate = from.command("transship");
    migrate.args(["migrate", "--pod", "shop/three", "--to", link]);
    migrate.args(["--allow", "unmasked-paths"]);
    migrate
}

/// Three counters run on one node and none on the other, and count on without a gap.
fn counts_on(runs: &Node, ended: &Node) -> anyhow::Result<()> {
    let read = "test $(pgrep -c -x counter) = 3
        for pid in $(pgrep -x counter); do
            awk '$1 != NR { exit 1 } END { print NR }' /proc/$pid/root/data/counts
        done";
    let counts = || -> Result<Vec<u64>, String> {
        let none = ended.shell("! pgrep -x counter").run();
        none.map_err(|error| format!("it runs there: {error}"))?;
        let text = runs.shell(read).read().map_err(|error| error.to_string())?;
        let counts = text
            .lines()
            .map(|line| line.parse().map_err(|_| text.clone()));
        counts.collect()
    };
    let before = poll_until("one copy", PATIENCE, counts)?;
    poll_until("all to count on", PATIENCE, || {
        let now = counts()?;
        let mut all = before.iter().zip(&now);
        let have = now.len() == before.len() && all.all(|(before, now)| before < now);
        have.then_some(())
            .ok_or_else(|| format!("{before:?} {now:?}"))
    })?;
    Ok(())
}
