//! What the runtime front costs a container that has nothing to do with it.
//!
//! `transship-runc create` looks at the bundle and becomes runc. One after the other, a hundred
//! times, in one bundle; the difference of each pair is taken.

use anyhow::{Context as _, Result, ensure};
use transship_testbed::{CommandRun as _, Testbed};

use crate::node_clock::time_in_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::{median, median_millis, millis};

const ADDED_MS: Goal = Goal::AtMost(3.0);

/// A static busybox that sleeps; no terminal, so that nobody need hold one.
const MAKE_BUNDLE: &str = "
mkdir -p /var/lib/transship/bundle/rootfs/bin && cd /var/lib/transship/bundle
cp /bin/busybox rootfs/bin/
runc spec
jq '.process.terminal = false | .process.args = [\"/bin/busybox\", \"true\"] | .process.rlimits = []' \
  config.json >config.new && mv config.new config.json";

/// Measures the part.
///
/// # Errors
/// When runc fails.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let node = bed.node("front")?;
    ensure!(
        node.has_binary("transship-runc"),
        "transship-runc has not been built"
    );
    node.shell(MAKE_BUNDLE).run()?;
    // The first pair finds everything cold.
    let script = format!(
        "one() {{ \"$1\" create --bundle /var/lib/transship/bundle it && \"$1\" delete --force it; }}
         one runc; one transship-runc
         for i in $(seq {}); do timed one transship-runc; timed one runc; done",
        sizes.pairs
    );
    let times = time_in_node(&node, &script)?;
    let (own, other): (Vec<_>, Vec<_>) =
        times.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
    let added: Vec<f64> = own
        .iter()
        .zip(&other)
        .map(|(own, other)| millis(*own) - millis(*other))
        .collect();
    let added = median(&added).context("no pair was measured")?;
    Ok(vec![
        Row::new("create + delete", "ms", median_millis(&own)).beside(
            "runc",
            median_millis(&other),
            Better::Less,
        ),
        Row::new("added to create + delete", "ms", added).goal(ADDED_MS),
    ])
}
