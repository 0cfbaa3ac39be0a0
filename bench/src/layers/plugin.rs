//! Apply and Diff through containerd: the walking differ, or ours.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use containerd_client::services::v1::DiffRequest;
use containerd_client::types::Descriptor;

use super::big_image::BigImage;
use super::changes::{Changed, FEW, Snapshot};
use super::{Bench, Differ};
use crate::namespace::{KEPT, NAMESPACE, TAR};
use crate::node_clock::time_in_node;
use crate::report::{Better, Goal, Row};
use crate::statistics::{median_millis, megabytes, spaced};

const WALKING: &str = "walking differ";
const NOT_THERE: &str = "the snapshotter serves no diff plugin";
/// Turns of a Diff that takes milliseconds.
const FAST_TURNS: usize = 10;
/// From this on it does not count as fast.
const SLOW: Duration = Duration::from_millis(500);

/// containerd's garbage collection has ended so long after what has woken it.
const SETTLE: Duration = Duration::from_millis(300);

const COMMAND: Goal = Goal::RatioAtLeast(100.0);
const CALL: Goal = Goal::RatioAtLeast(300.0);
const MANY: Goal = Goal::RatioAtLeast(2.0);
const APPLY: Goal = Goal::RatioAtLeast(1.5);
const IMAGE_GROWTH: Goal = Goal::RatioAtMost(1.2);
const PEAK_MB: Goal = Goal::AtMost(64.0);

/// Times of Apply of the large layer.
#[derive(Debug, Default)]
pub(super) struct Applied {
    walking: Vec<Duration>,
    ours: Vec<Duration>,
}

/// Times of Diff with one differ.
#[derive(Debug)]
pub(super) struct Diffs {
    command: Vec<Duration>,
    command_unchanged: Vec<Duration>,
    few: Vec<Duration>,
    few_small: Vec<Duration>,
    many: Vec<Duration>,
    large: Vec<Duration>,
}

impl Bench<'_> {
    /// Applies a layer into fresh snapshots.
    pub(super) fn apply(
        &mut self,
        differ: Differ,
        layer: &Descriptor,
        applied: &mut Applied,
    ) -> Result<()> {
        let rounds = self.sizes.slow_rounds.min(2);
        for round in 0..rounds {
            let key = format!("apply/{differ:?}/{round}");
            let (client, snapshots) = (&self.client, &self.snapshots);
            let took = self.runtime.block_on(async {
                let mounts = snapshots.prepare(&key, "", KEPT).await?;
                let start = Instant::now();
                client.apply(layer, mounts).await?;
                let took = start.elapsed();
                snapshots.remove(&key).await?;
                anyhow::Ok(took)
            })?;
            match differ {
                Differ::Walking => applied.walking.push(took),
                Differ::Ours => applied.ours.push(took),
            }
            self.sync()?;
        }
        Ok(())
    }

    /// Times of the Diff call of a changed snapshot against its parent.
    fn diff(&mut self, snapshot: &Snapshot, most: usize) -> Result<Vec<Duration>> {
        let (client, snapshots) = (&self.client, &self.snapshots);
        let key = &snapshot.key;
        self.runtime.block_on(async {
            let view = format!("view/{key}");
            let left = snapshots.view(&view, snapshot.parent, KEPT).await?;
            let right = snapshots.mounts(key).await?;
            let kept = KEPT
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let kept: HashMap<_, _> = kept.collect();
            let mut took: Vec<Duration> = Vec::new();
            while took.len() < most {
                let start = Instant::now();
                let request = DiffRequest {
                    left: left.clone(),
                    right: right.clone(),
                    media_type: TAR.to_owned(),
                    r#ref: format!("{key}/{start:?}"),
                    labels: kept.clone(),
                    ..DiffRequest::default()
                };
                let layer = client.diff(request).await?;
                took.push(start.elapsed());
                let is_slow = start.elapsed() > SLOW;
                // Each turn writes and commits anew. The collector, which the removal wakes, must
                // not fall into the next turn.
                client.delete_blob(&layer.digest).await?;
                tokio::time::sleep(SETTLE).await;
                if is_slow && took.len() >= self.sizes.slow_rounds {
                    break;
                }
            }
            snapshots.remove(&view).await?;
            Ok(took)
        })
    }
}

pub(super) fn measure_diffs(bench: &mut Bench<'_>, changed: &Changed) -> Result<Diffs> {
    let slow = bench.sizes.slow_rounds;
    Ok(Diffs {
        command: time_command(bench, &changed.few)?,
        command_unchanged: time_command(bench, &changed.nothing)?,
        few: bench.diff(&changed.few, FAST_TURNS)?,
        few_small: bench.diff(&changed.few_small, FAST_TURNS)?,
        many: bench.diff(&changed.many, slow)?,
        large: bench.diff(&changed.large, slow)?,
    })
}

/// Times of `ctr snapshots diff`, its own start included.
fn time_command(bench: &Bench<'_>, snapshot: &Snapshot) -> Result<Vec<Duration>> {
    let turns = bench.sizes.slow_rounds + 2;
    let script = format!(
        "ctr -n {NAMESPACE} content ls -q >/tmp/kept
         for i in $(seq {turns}); do
           timed ctr -n {NAMESPACE} snapshots --snapshotter {} diff {}
           ctr -n {NAMESPACE} content ls -q | grep -vxFf /tmp/kept | xargs -r ctr -n {NAMESPACE} content rm >/dev/null
           sleep 0.3
         done",
        super::SNAPSHOTTER,
        snapshot.key,
    );
    time_in_node(&bench.node, &script)
}

pub(super) fn compare(
    apply: &Applied,
    walking: &Diffs,
    ours: Option<&Diffs>,
    [large, small]: [BigImage; 2],
) -> Vec<Row> {
    let files = spaced(large.files as usize);
    let row = |name: String, of: fn(&Diffs) -> &Vec<Duration>, goal: Option<Goal>| {
        compared(name, ours.map(of), of(walking)).goal_if(goal)
    };
    let mut rows = vec![
        row(
            format!("`ctr snapshots diff`, {FEW} of {files} files changed"),
            |diffs| &diffs.command,
            Some(COMMAND),
        ),
        // What ctr and containerd take for themselves.
        row(
            format!("`ctr snapshots diff`, nothing of {files} files changed"),
            |diffs| &diffs.command_unchanged,
            None,
        ),
        row(
            format!("Diff, {FEW} of {files} files changed"),
            |diffs| &diffs.few,
            Some(CALL),
        ),
        row(
            format!(
                "Diff, {FEW} of {} files changed",
                spaced(small.files as usize)
            ),
            |diffs| &diffs.few_small,
            None,
        ),
        row(
            "Diff, many small files changed".to_owned(),
            |diffs| &diffs.many,
            Some(MANY),
        ),
        row(
            "Diff, one large file".to_owned(),
            |diffs| &diffs.large,
            None,
        ),
    ];
    let name = format!("Diff of {FEW} files beside the small image, over {files} files");
    let growth = match ours {
        Some(ours) => Row::new(name, "ms", median_millis(&ours.few)).beside(
            "ours, small image",
            median_millis(&ours.few_small),
            Better::Growth,
        ),
        None => Row::missing(name, "ms", NOT_THERE),
    };
    rows.push(growth.goal(IMAGE_GROWTH));
    let ours = Some(&apply.ours).filter(|ours| !ours.is_empty());
    rows.push(compared(format!("Apply, {files} files"), ours, &apply.walking).goal(APPLY));
    rows
}

fn compared(name: String, ours: Option<&Vec<Duration>>, walking: &[Duration]) -> Row {
    let row = match ours {
        Some(ours) => Row::new(name, "ms", median_millis(ours)),
        None => Row::missing(name, "ms", NOT_THERE),
    };
    row.beside(WALKING, median_millis(walking), Better::Less)
}

pub(super) fn peak_row(bytes: Option<u64>) -> Row {
    let name = "most memory of the snapshotter during all of it";
    let row = match bytes {
        Some(bytes) => Row::new(name, "MB", megabytes(bytes)),
        None => Row::missing(name, "MB", NOT_THERE),
    };
    row.goal(PEAK_MB)
}
