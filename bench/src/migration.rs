//! A migration beside what CRIU takes alone, and beside the stock checkpoint of the same container.
//!
//! ```text
//!   node a: sandbox, counter ── transship migrate ──> node b: runs there
//!           another one      ── runc checkpoint, runc restore, in memory, on the same node: the floor
//!           another one      ── ctr containers checkpoint --rw --task ──> an image; frozen from
//!                                                                         /tasks/paused to /tasks/resumed
//!   podman.rs                ── podman container checkpoint --export, restore --import
//! ```
//!
//! `lazy` has memory that comes late, `many_files` an image of many files below it all, `pods` moves whole pods.
//!
//! The stock command is given the smaller job: its checkpoint stays on the node (`ctr images export`
//! of it fails, which is tried and told), and the container is not restored.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use transship_testbed::{CommandRun as _, Node, Testbed, journey, poll_until};

use crate::node_clock::time_in_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::{median, millis};

mod lazy;
mod many_files;
mod memory;
mod podman;
mod pods;

const STOCK: &str = "ctr containers checkpoint";
const EVENTS: &str = "events";
const PATIENCE: Duration = Duration::from_secs(30);

/// What `transship migrate --json` says, as far as it is used.
#[derive(Debug, Deserialize)]
struct Migrated {
    timeline: Timeline,
}

#[derive(Debug, Deserialize)]
struct Timeline {
    total_seconds: f64,
    frozen_seconds: f64,
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
struct Step {
    name: String,
    seconds: f64,
}

/// Measures the part.
///
/// # Errors
/// When a step of the journey fails.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    // Lines of stdout, one an event: time, zone, topic.
    a.start_daemon(EVENTS, &["ctr", "events"])?;
    let mut course = Course {
        a: &a,
        b: &b,
        ssh: &ssh,
        turn: 0,
    };
    let mut rows = Vec::new();
    let mut idle = None;
    for memory in &sizes.migration_memory_mb {
        let (found, frozen) = course.measure(*memory, sizes)?;
        rows.extend(found);
        idle = Some((*memory, frozen));
    }
    let (memory, frozen) = idle.context("no memory is migrated")?;
    rows.push(course.measure_rewritten(memory, sizes)?);
    let per_mb = frozen / f64::from(memory);
    rows.extend(course.measure_large((memory, per_mb), sizes)?);
    rows.extend(course.measure_lazy(memory, sizes)?);
    rows.push(course.measure_podman(bed, memory, sizes)?);
    rows.extend(course.measure_many_files(bed, memory, sizes)?);
    rows.push(course.measure_most_memory(memory)?);
    let floor = course.floor_of_several(&pods::memory_mb(sizes), sizes)?;
    a.stop_daemon(EVENTS, "TERM")?;
    drop(ssh);
    rows.extend(pods::measure(bed, sizes, &floor)?);
    Ok(rows)
}

/// The two nodes, and how many containers have gone.
struct Course<'a> {
    a: &'a Node,
    b: &'a Node,
    ssh: &'a str,
    turn: usize,
}

/// What is migrated.
#[derive(Debug, Clone, Copy)]
struct Program {
    memory_mb: u32,
    /// So much of it is written again each second.
    rewrite_mb: u32,
    image: &'static str,
}

impl Program {
    fn idle(memory_mb: u32) -> Program {
        Program {
            memory_mb,
            rewrite_mb: 0,
            image: journey::COUNTER_IMAGE,
        }
    }
}

/// How long the program stood still, in milliseconds, and what the command took.
struct Took {
    frozen: f64,
    total: f64,
    steps: Vec<Step>,
}

impl Took {
    /// What `transship migrate --json` has said.
    fn read(text: &str) -> Result<Took> {
        let migrated: Migrated = serde_json::from_str(text)
            .with_context(|| format!("cannot parse the answer of transship migrate: {text:?}"))?;
        Ok(Took {
            frozen: migrated.timeline.frozen_seconds * 1e3,
            total: migrated.timeline.total_seconds * 1e3,
            steps: migrated.timeline.steps,
        })
    }
}

/// What bare `runc` takes of containers side by side, and of the first of them alone, in milliseconds.
#[derive(Debug, Default)]
struct FloorOfSeveral {
    all: Vec<f64>,
    first: Vec<f64>,
}

/// How long each of them stood still.
fn frozen(all: &[Took]) -> Vec<f64> {
    all.iter().map(|took| took.frozen).collect()
}

/// The medians of the steps that are in the freeze, in milliseconds, for a note.
fn medians_of_steps(all: &[Took]) -> String {
    let of = |name: &str| {
        let steps = all.iter().flat_map(|took| &took.steps);
        let times: Vec<f64> = steps
            .filter(|step| step.name == name)
            .map(|step| step.seconds * 1e3)
            .collect();
        format!("{name} {:.0} ms", median(&times).unwrap_or_default())
    };
    let parts = ["dump", "transfer", "restore", "commit"].map(of);
    format!("medians: {}", parts.join(", "))
}

impl Course<'_> {
    /// The rows, and how long the program with memory sent before stood still.
    fn measure(&mut self, memory_mb: u32, sizes: &Sizes) -> Result<(Vec<Row>, f64)> {
        let (mut with, mut without, mut floor) = (Vec::new(), Vec::new(), Vec::new());
        let (mut stock, mut checkpoint) = (Vec::new(), Vec::new());
        let mut exported = String::new();
        for round in 0..sizes.migrations {
            eprintln!("   {memory_mb} MB, round {}", round + 1);
            let program = Program::idle(memory_mb);
            with.push(self.migrate(program, &[])?);
            without.push(self.migrate(program, &["--max-precopy-rounds", "0"])?);
            floor.push(self.bare(program)?);
            let (times, frozen, export) = self.stock(program)?;
            checkpoint.push(times);
            stock.push(frozen);
            exported = export;
        }
        let (from, until) = match memory_mb {
            0..100 => (1.5, 1.5),
            _ => (0.7, 1.1),
        };
        let size = format!("{memory_mb} MB in memory");
        let row = |name: String, ours: &[f64], peer, theirs: &[f64], better| {
            Row::of_pairs(name, "ms", ours, peer, theirs, better)
        };
        let beside_floor = |name, ours: &[f64]| {
            row(
                format!("frozen, {size}, {name}"),
                ours,
                FLOOR,
                &floor,
                Better::Growth,
            )
        };
        let beside_stock = |name, ours: &[f64]| {
            let name = format!("frozen, {size}, {name}: beside a checkpoint alone");
            row(name, ours, STOCK, &stock, Better::Less)
        };
        let whole = format!("whole command, {size}: beside a checkpoint alone");
        let notes = [&with, &without].map(|all| medians_of_steps(all));
        let [note_with, note_without] = notes;
        let total: Vec<f64> = with.iter().map(|took| took.total).collect();
        let [with, without] = [with, without].map(|all| frozen(&all));
        let median = median(&with).context("no round")?;
        let rows = vec![
            beside_floor("memory sent before", &with)
                .goal(Goal::RatioAtMost(from))
                .note(note_with),
            beside_floor("all in the freeze", &without)
                .goal(Goal::RatioAtMost(until))
                .note(note_without),
            beside_stock("memory sent before", &with).note(exported),
            beside_stock("all in the freeze", &without),
            row(whole, &total, STOCK, &checkpoint, Better::Less),
        ];
        Ok((rows, median))
    }

    /// A program that writes to its memory all the time.
    fn measure_rewritten(&mut self, memory_mb: u32, sizes: &Sizes) -> Result<Row> {
        let program = Program {
            rewrite_mb: 20,
            ..Program::idle(memory_mb)
        };
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for round in 0..sizes.migrations {
            eprintln!("   {memory_mb} MB, rewritten, round {}", round + 1);
            ours.push(self.migrate(program, &[])?);
            floor.push(self.bare(program)?);
        }
        let note = medians_of_steps(&ours);
        let ours = frozen(&ours);
        let name = format!("frozen, {memory_mb} MB in memory, 20 MB/s of it rewritten");
        let row = Row::of_pairs(name, "ms", &ours, FLOOR, &floor, Better::Growth);
        Ok(row.goal(Goal::RatioAtMost(0.9)).note(note))
    }

    /// A large program: what each megabyte takes, beside that of a smaller one, and the floor.
    fn measure_large(&mut self, (small_mb, per_mb): (u32, f64), sizes: &Sizes) -> Result<Vec<Row>> {
        let memory_mb = sizes.large_memory_mb;
        let program = Program::idle(memory_mb);
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for round in 0..sizes.migrations {
            eprintln!("   {memory_mb} MB, round {}", round + 1);
            ours.push(self.migrate(program, &[])?);
            floor.push(self.bare(program)?);
        }
        let note = medians_of_steps(&ours);
        let ours = frozen(&ours);
        let name = format!("frozen, {memory_mb} MB in memory, memory sent before");
        let of_large = median(&ours).context("no round")? / f64::from(memory_mb);
        let growth = Row::new(name.clone(), "ms per MB", of_large)
            .beside(&format!("{small_mb} MB"), per_mb, Better::Growth)
            .goal(Goal::RatioAtMost(1.1))
            .note(note);
        let name = format!("{name}: beside the floor");
        let beside_floor = Row::of_pairs(name, "ms", &ours, FLOOR, &floor, Better::Growth);
        Ok(vec![growth, beside_floor])
    }

    /// A counter in a sandbox that answers; gives the ids of both.
    fn counter(&mut self, program: Program) -> Result<(String, String)> {
        self.turn += 1;
        let (sandbox, counter) = (
            format!("sandbox-{}", self.turn),
            format!("counter-{}", self.turn),
        );
        journey::run_sandbox(self.a, &sandbox)?;
        let [memory, rewrite] = [program.memory_mb, program.rewrite_mb].map(|mb| mb.to_string());
        let options = ["--memory-mb", &memory, "--rewrite-mb-per-second", &rewrite];
        journey::run_counter_as(self.a, program.image, &counter, &sandbox, &options, &[])?;
        journey::ask(self.a, &journey::sandbox_address(self.a, &sandbox)?)?;
        if program.image == many_files::IMAGE {
            many_files::change(self.a, &counter)?;
        }
        Ok((sandbox, counter))
    }

    fn migrate(&mut self, program: Program, more: &[&str]) -> Result<Took> {
        let (here, counter) = self.counter(program)?;
        let there = format!("{here}-b");
        journey::run_sandbox(self.b, &there)?;
        let mut migrate = self.a.command("transship");
        migrate.args(["migrate", &counter, "--to", self.ssh]);
        migrate.args(["--sandbox", &there, "--json"]).args(more);
        let took = Took::read(&migrate.read()?)?;
        let reply = journey::ask(self.b, &journey::sandbox_address(self.b, &there)?)?;
        ensure!(
            reply.memory_ok,
            "the copy's memory is not what it was: {reply:?}"
        );
        for (node, id) in [(self.a, &here), (self.b, &counter), (self.b, &there)] {
            remove_container(node, id)?;
        }
        Ok(took)
    }

    /// `runc checkpoint` and `runc restore` of the same container in memory, on one node: no transfer.
    fn bare(&mut self, program: Program) -> Result<f64> {
        self.bare_side_by_side(&[program])
    }

    /// The same of several containers at once, until the last one is done.
    fn bare_side_by_side(&mut self, programs: &[Program]) -> Result<f64> {
        let containers: Vec<(String, String)> = (programs.iter())
            .map(|program| self.counter(*program))
            .collect::<Result<_>>()?;
        let counters: Vec<&str> = containers.iter().map(|(_, id)| id.as_str()).collect();
        let script = BARE.replace("COUNTERS", &counters.join(" "));
        let times = time_in_node(self.a, &script)?;
        for (sandbox, counter) in &containers {
            remove_container(self.a, counter)?;
            remove_container(self.a, sandbox)?;
        }
        Ok(times.iter().map(|time| millis(*time)).sum())
    }

    /// The floor of containers side by side, and that of the first of them alone.
    fn floor_of_several(&mut self, memory_mb: &[u32], sizes: &Sizes) -> Result<FloorOfSeveral> {
        let programs: Vec<Program> = memory_mb.iter().map(|mb| Program::idle(*mb)).collect();
        let mut floor = FloorOfSeveral::default();
        // Nobody has given back the addresses of sandboxes that are gone, and there are 253.
        self.a.shell("rm -f /var/lib/cni/networks/*/10.*").run()?;
        for round in 0..sizes.migrations {
            eprintln!("   floor of {memory_mb:?} MB, round {}", round + 1);
            floor.all.push(self.bare_side_by_side(&programs)?);
            floor.first.push(self.bare_side_by_side(&programs[..1])?);
        }
        Ok(floor)
    }

    /// The stock checkpoint: how long it takes, how long the container is paused, and whether its image can
    /// leave the node.
    fn stock(&mut self, program: Program) -> Result<(f64, f64, String)> {
        let (sandbox, counter) = self.counter(program)?;
        let image = format!("transship.test/stock:{}", self.turn);
        let command = format!("timed ctr containers checkpoint --rw --task {counter} {image}");
        let times = time_in_node(self.a, &command)?;
        let frozen = last_pause(self.a)?;
        let export = format!("ctr images export /dev/null {image}");
        let exported = match self.a.shell(&export).run() {
            Ok(()) => "its image could be exported".to_owned(),
            Err(error) => format!("its image cannot leave the node: {}", last_line(&error)),
        };
        self.a.ctr(&["images", "rm", "--sync", &image])?;
        for id in [&counter, &sandbox] {
            remove_container(self.a, id)?;
        }
        Ok((
            times.iter().map(|time| millis(*time)).sum(),
            frozen,
            exported,
        ))
    }
}

const FLOOR: &str = "runc checkpoint + restore";
/// Files as they are when it has been dumped; its output goes where the shim's does, into a pipe.
const BARE: &str = r#"
tasks=/run/containerd/io.containerd.runtime.v2.task/default
mkdir -p /run/bare; mount -t tmpfs tmpfs /run/bare; cd /run/bare
each() {
  local pids=() id pid
  for id in COUNTERS; do "$1" $id & pids+=($!); done
  for pid in ${pids[@]}; do wait $pid; done
}
dump() { runc --root /run/containerd/runc/default checkpoint --image-path /run/bare/$1/images --work-path /run/bare/$1/work $1; }
for id in COUNTERS; do
  mkdir -p $id/bundle
  jq ".root.path = \"rootfs\" | .linux.cgroupsPath = \"/bare-$id\" | .annotations = {}" $tasks/$id/config.json >$id/bundle/config.json
done
timed each dump
for id in COUNTERS; do cp -a $tasks/$id/rootfs $id/bundle/rootfs; done
mkfifo out; cat out >said 2>&1 & exec 5>out
bare() {
  runc restore --detach --pid-file /run/bare/$1/pid --bundle /run/bare/$1/bundle \
    --image-path /run/bare/$1/images --work-path /run/bare/$1/work bare-$1 1>&5 2>&5 </dev/null \
    || { cat said >&2; return 1; }
}
timed each bare
exec 5>&-; for id in COUNTERS; do runc delete --force bare-$id; done
cd /; umount /run/bare"#;

/// How long the last pause of a task on the node was, in milliseconds.
fn last_pause(node: &Node) -> Result<f64> {
    let pause = poll_until("the events of the pause", PATIENCE, || {
        let log = node
            .read_file(&format!("/var/log/{EVENTS}.log"))
            .map_err(|error| error.to_string())?;
        let log = String::from_utf8_lossy(&log).into_owned();
        let at = |topic: &str| {
            let line = log.lines().rfind(|line| line.contains(topic))?;
            // "2026-01-02 03:04:05.678901234 +0000 UTC default /tasks/paused {...}"
            seconds_of_day(line.split_whitespace().nth(1)?)
        };
        match (at("/tasks/paused"), at("/tasks/resumed")) {
            (Some(paused), Some(resumed)) if resumed >= paused => Ok(resumed - paused),
            _ => Err(log),
        }
    })?;
    Ok(millis(pause))
}

/// "03:04:05.678901234" as the time since midnight.
fn seconds_of_day(text: &str) -> Option<Duration> {
    let mut parts = text.split(':');
    let (hours, minutes) = (
        parts.next()?.parse::<u32>().ok()?,
        parts.next()?.parse::<u32>().ok()?,
    );
    let seconds: f64 = parts.next()?.parse().ok()?;
    Duration::try_from_secs_f64(f64::from(hours * 3600 + minutes * 60) + seconds).ok()
}

fn remove_container(node: &Node, id: &str) -> Result<()> {
    node.shell(&format!(
        "ctr tasks rm --force {id} >/dev/null && ctr containers rm {id}"
    ))
    .run()?;
    Ok(())
}

fn last_line(error: &transship_testbed::TestbedError) -> String {
    let text = error.to_string();
    text.trim().lines().last().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_events_are_read() {
        assert_eq!(
            seconds_of_day("01:02:03.5"),
            Some(Duration::from_millis(3_723_500))
        );
        assert_eq!(seconds_of_day("x"), None);
    }
}
