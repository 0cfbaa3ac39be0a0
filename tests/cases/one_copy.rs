//! From the freeze on, the source of a migration executes no instruction: what it had written then is
//! the last that it ever writes.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;

const CHILDREN: usize = 6;
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let many = Case {
        what: "one_copy_of_many",
        tree: Tree::Forky,
        run: more_processes_than_a_shell_may_open_files,
    };
    Case::on_all_trees("one_copy", the_source_ends_where_it_was_frozen).chain([many])
}

/// Soft limit of open files of the shell that commands are typed in.
const OPEN_FILES: usize = 256;

fn more_processes_than_a_shell_may_open_files(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let processes = OPEN_FILES + 64;
    let all = format!(
        "b=/bin/busybox; i=1; while [ $i -lt {processes} ]; do $b tail -f /dev/null & i=$((i+1)); done; wait"
    );
    journey::run_program(&a, "many", &["/bin/busybox", "sh", "-c", &all])?;
    let run_on = |node: &Node| {
        poll_until("all processes", PATIENCE, || {
            let pids = node.ctr(&["tasks", "ps", "many"]);
            let pids = pids.map_err(|error| error.to_string())?;
            // The first line is the heading.
            let running = pids.lines().count() - 1;
            { running == processes }
                .then_some(())
                .ok_or_else(|| format!("{running} of {processes}"))
        })
    };
    run_on(&a)?;
    a.shell(&format!(
        "ulimit -Sn {OPEN_FILES}; transship migrate many --to '{ssh}'"
    ))
    .run()?;
    run_on(&b)?;
    journey::check_nothing_left(&a)?;
    journey::remove_container(&b, "many")?;
    journey::check_nothing_left(&b)
}

fn the_source_ends_where_it_was_frozen(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let image = Image::spin(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.import_image(&image, "transship")?;
    for round in 1..=3 {
        migrate_once(&a, &b, &ssh).with_context(|| format!("migration {round}"))?;
    }
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn migrate_once(a: &Node, b: &Node, ssh: &str) -> anyhow::Result<()> {
    for node in [a, b] {
        node.shell("rm -rf /srv/spin /srv/frozen; mkdir -p /srv/spin")
            .run()?;
    }
    let children = CHILDREN.to_string();
    a.ctr(&[
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        "--mount",
        "type=bind,src=/srv/spin,dst=/spin,options=rbind:rw",
        "transship.test/spin:1",
        "spin",
        "/usr/bin/spin",
        &children,
        "/spin",
    ])?;
    poll_until("all children to count", PATIENCE, || {
        let counts = counts(a, "/srv/spin").map_err(|error| error.to_string())?;
        match counts.len() == CHILDREN && counts.iter().all(|count| *count > 0) {
            true => Ok(()),
            false => Err(format!("{counts:?}")),
        }
    })?;
    // The source stands still when this runs, and the copy is not there yet. CRIU wants the files that
    // it opens to be as long as they were.
    let keep = format!("cp -a /srv/spin /srv/frozen && tar -c -C /srv spin | {ssh} tar -x -C /srv");
    a.command("transship")
        .args(["migrate", "spin", "--to", ssh, "--before-restore", &keep])
        .args(["--allow", "host-mounts"])
        .run()?;
    let (frozen, last) = (counts(a, "/srv/frozen")?, counts(a, "/srv/spin")?);
    ensure!(
        frozen == last,
        "the source counted on: {last:?} after {frozen:?}"
    );
    poll_until("the copy to count on", PATIENCE, || {
        let now = counts(b, "/srv/spin").map_err(|error| error.to_string())?;
        match now.iter().zip(&frozen).all(|(now, frozen)| now > frozen) {
            true => Ok(()),
            false => Err(format!("{now:?} after {frozen:?}")),
        }
    })?;
    journey::remove_container(b, "spin")?;
    Ok(())
}

/// What each child has counted to.
fn counts(node: &Node, dir: &str) -> anyhow::Result<Vec<u64>> {
    let text = node.shell(&format!(
        "for file in {dir}/*; do cat \"$file\"; echo; done"
    ));
    let text = { text }.read()?;
    let lines = text.lines().filter(|line| !line.is_empty());
    Ok(lines.map(str::parse).collect::<Result<_, _>>()?)
}
