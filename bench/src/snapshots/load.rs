//! Load on one snapshots socket, and what it took.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use transship_containerd::Snapshotter;

use crate::daemon::Process;
use crate::namespace::{KEPT, NAMESPACE};
use crate::report::{Better, Goal, Row};
use crate::statistics::{median, median_millis, millis};

/// The calls of a cycle, in their order.
pub(crate) const CALLS: [&str; 4] = ["Prepare", "Mounts", "Commit", "Remove"];
/// Which of [`CALLS`] is Commit.
pub(crate) const COMMIT: usize = 2;
/// Clients that fill a daemon with snapshots.
const FILLERS: usize = 32;
/// Stats in a turn.
const STATS: usize = 100;

/// A socket under load.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) socket: PathBuf,
    /// Name by which containerd knows the snapshotter.
    pub(crate) snapshotter: String,
    /// The process behind the socket.
    pub(crate) process: Process,
    /// A directory on the disk of its snapshots.
    pub(crate) disk: PathBuf,
    /// Committed snapshots that [`Target::fill`] has made.
    pub(crate) present: usize,
}

/// What one turn of cycles took.
#[derive(Debug)]
pub(crate) struct Turn {
    /// Cycles per second, of all clients together.
    pub(crate) cycles: f64,
    /// Median of each of [`CALLS`], in milliseconds.
    pub(crate) calls: [f64; 4],
    /// Processor milliseconds of the daemon per cycle.
    pub(crate) daemon_cpu: f64,
    /// Processor milliseconds of this program per cycle.
    pub(crate) client_cpu: f64,
    /// What it still worked on after the last answer, in milliseconds.
    pub(crate) idle_after: f64,
}

impl Target {
    /// Makes committed snapshots until there are `count`.
    pub(crate) async fn fill(&mut self, count: usize) -> Result<()> {
        let first = self.present;
        let tasks: Vec<_> = (0..FILLERS)
            .map(|n| {
                let target = self.clone();
                tokio::spawn(async move {
                    let client = target.connect().await?;
                    for i in (first + n..count).step_by(FILLERS) {
                        let (key, name) = (format!("fill/{i}"), present_name(i));
                        client.prepare(&key, "", KEPT).await?;
                        client.commit(&name, &key, KEPT).await?;
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        for task in tasks {
            task.await??;
        }
        self.present = self.present.max(count);
        Ok(())
    }

    /// Runs cycles with `clients` clients for the given time.
    pub(crate) async fn run(&self, clients: usize, length: Duration) -> Result<Turn> {
        // Keys are never used again: containerd removes some time after it was told.
        static TURN: AtomicU64 = AtomicU64::new(0);
        let turn = TURN.fetch_add(1, Ordering::Relaxed);
        self.process.settle()?;
        // What came before must be on disk: else its writeback, which goes on for a minute after many
        // thousand new directories, is paid by whoever's turn it is.
        self.sync()?;
        let mut connections = Vec::new();
        for _ in 0..clients {
            connections.push(self.connect().await?);
        }
        let (daemon_cpu, client_cpu) = self.processor_times()?;
        let start = Instant::now();
        let tasks: Vec<_> = (0..clients)
            .zip(connections)
            .map(|(n, client)| {
                tokio::spawn(run_cycles(
                    client,
                    format!("load/{turn}/{n}"),
                    start + length,
                ))
            })
            .collect();
        let mut took: [Vec<Duration>; 4] = Default::default();
        for task in tasks {
            for (all, one) in took.iter_mut().zip(task.await??) {
                all.extend(one);
            }
        }
        let (elapsed, ended) = (start.elapsed(), Instant::now());
        let client_cpu_end = Process::itself().processor_time()?;
        self.process.settle()?;
        let idle_after = ended.elapsed();
        let daemon_cpu_end = self.process.processor_time()?;
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let cycles = took[0].len() as f64;
        Ok(Turn {
            cycles: cycles / elapsed.as_secs_f64(),
            calls: took.map(|took| median_millis(&took)),
            daemon_cpu: millis(daemon_cpu_end.saturating_sub(daemon_cpu)) / cycles,
            client_cpu: millis(client_cpu_end.saturating_sub(client_cpu)) / cycles,
            idle_after: millis(idle_after),
        })
    }

    fn sync(&self) -> Result<()> {
        let context = || format!("cannot sync {}", self.disk.display());
        let disk = File::open(&self.disk).with_context(context)?;
        nix::unistd::syncfs(&disk).with_context(context)
    }

    fn processor_times(&self) -> Result<(Duration, Duration)> {
        Ok((
            self.process.processor_time()?,
            Process::itself().processor_time()?,
        ))
    }

    /// Median of Stat of snapshots that are there, in milliseconds.
    pub(crate) async fn run_stats(&self, round: usize) -> Result<f64> {
        let client = self.connect().await?;
        let own = "stat/own";
        if self.present == 0 {
            client.prepare(own, "", KEPT).await?;
        }
        let mut took = Vec::new();
        for i in round * STATS..(round + 1) * STATS {
            // Far apart from one another, as containers are.
            let name = match self.present {
                0 => own.to_owned(),
                present => present_name(i * 7919 % present),
            };
            let start = Instant::now();
            client.stat(&name).await?;
            took.push(start.elapsed());
        }
        if self.present == 0 {
            client.remove(own).await?;
        }
        Ok(median_millis(&took))
    }

    /// What a List takes, in milliseconds.
    pub(crate) async fn run_list(&self) -> Result<f64> {
        let client = self.connect().await?;
        let start = Instant::now();
        let (mut pages, mut count) = (client.list_pages(&[]).await?, 0);
        while let Some(page) = pages.next().await? {
            count += page.len();
        }
        let took = start.elapsed();
        ensure!(
            count == self.present,
            "List gave {count} of {} snapshots",
            self.present
        );
        Ok(millis(took))
    }

    async fn connect(&self) -> Result<Snapshotter> {
        Ok(Snapshotter::connect(&self.socket, NAMESPACE, &self.snapshotter).await?)
    }
}

/// As long as the chain ids that containerd names layers by.
fn present_name(i: usize) -> String {
    format!("sha256:{i:064x}")
}

async fn run_cycles(
    client: Snapshotter,
    prefix: String,
    until: Instant,
) -> Result<[Vec<Duration>; 4]> {
    let mut took: [Vec<Duration>; 4] = Default::default();
    for i in 0.. {
        if Instant::now() >= until {
            break;
        }
        let (key, name) = (format!("{prefix}/{i}"), format!("{prefix}/{i}/done"));
        let mut start = Instant::now();
        let mut lap = |call: usize| {
            took[call].push(start.elapsed());
            start = Instant::now();
        };
        client.prepare(&key, "", KEPT).await?;
        lap(0);
        client.mounts(&key).await?;
        lap(1);
        client.commit(&name, &key, KEPT).await?;
        lap(2);
        client.remove(&name).await?;
        lap(3);
    }
    Ok(took)
}

/// Turns of one side in one case.
#[derive(Debug, Default)]
pub(crate) struct Turns(pub(crate) Vec<Turn>);

/// Has the sides take so many turns each, one side right after the other, and who begins changes: what
/// the machine does to one side it does to the other, and what one leaves behind is not always paid by
/// the same.
pub(crate) async fn take_turns<const SIDES: usize>(
    sides: [&Target; SIDES],
    clients: usize,
    rounds: usize,
    length: Duration,
) -> Result<[Turns; SIDES]> {
    let mut turns = std::array::from_fn(|_| Turns::default());
    for round in 0..rounds {
        for n in order_of_round(round, SIDES) {
            turns[n].0.push(sides[n].run(clients, length).await?);
        }
    }
    Ok(turns)
}

/// Who takes a turn after whom.
pub(crate) fn order_of_round(round: usize, sides: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sides).collect();
    if !round.is_multiple_of(2) {
        order.reverse();
    }
    order
}

impl Turns {
    /// One figure of each turn.
    pub(crate) fn each(&self, of: impl Fn(&Turn) -> f64) -> Vec<f64> {
        self.0.iter().map(of).collect()
    }

    pub(crate) fn median(&self, of: impl Fn(&Turn) -> f64) -> f64 {
        median(&self.each(of)).unwrap_or(f64::NAN)
    }

    /// Where the time of a cycle went: the shortest profile there is.
    pub(crate) fn profile(&self) -> String {
        format!(
            "per cycle the daemon took {:.2} ms of processor, the load {:.2} ms; idle {:.0} ms after the \
             last answer",
            self.median(|turn| turn.daemon_cpu),
            self.median(|turn| turn.client_cpu),
            self.median(|turn| turn.idle_after),
        )
    }
}

/// A row for the cycles of a case and one for each of its calls.
pub(crate) fn compare_cycles(
    case: &str,
    own: &Turns,
    peer: &str,
    other: &Turns,
    goal: Option<Goal>,
) -> Vec<Row> {
    let cycles = |turn: &Turn| turn.cycles;
    let row = Row::of_pairs(
        format!("cycles{case}"),
        "1/s",
        &own.each(cycles),
        peer,
        &other.each(cycles),
        Better::More,
    )
    .goal_if(goal);
    // A goal's row says where the time went.
    let row = match goal {
        Some(_) => row.note(own.profile()),
        None => row,
    };
    let calls = CALLS.iter().enumerate().map(|(i, call)| {
        let p50 = |turn: &Turn| turn.calls[i];
        Row::of_pairs(
            format!("{call} p50{case}"),
            "ms",
            &own.each(p50),
            peer,
            &other.each(p50),
            Better::Less,
        )
    });
    std::iter::once(row).chain(calls).collect()
}
