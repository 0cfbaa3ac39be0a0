//! Memory that comes late: from the source while the copy runs (`--lazy`), or from what is on the target already
//! (`--lazy-pages`). What is told is how long neither copy ran.

use anyhow::{Context as _, Result};

use super::{Course, FLOOR, Program, frozen, medians_of_steps};
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::median;

const FROM_SOURCE: [&str; 4] = ["--lazy", "--accept-loss", "--max-precopy-rounds", "0"];
const FROM_TARGET: [&str; 1] = ["--lazy-pages"];

impl Course<'_> {
    /// Both ways, and a large program the second way.
    pub(super) fn measure_lazy(&mut self, memory_mb: u32, sizes: &Sizes) -> Result<Vec<Row>> {
        let program = Program::idle(memory_mb);
        let (mut from_source, mut from_target) = (Vec::new(), Vec::new());
        let (mut floor, mut large) = (Vec::new(), Vec::new());
        for round in 0..sizes.migrations {
            eprintln!("   {memory_mb} MB, late, round {}", round + 1);
            from_source.push(self.migrate(program, &FROM_SOURCE)?);
            from_target.push(self.migrate(program, &FROM_TARGET)?);
            floor.push(self.bare(program)?);
            let program = Program::idle(sizes.large_memory_mb);
            large.push(self.migrate(program, &FROM_TARGET)?);
        }
        let beside_floor = |name, took: &[_]| {
            let name = format!("frozen, {memory_mb} MB in memory, {name}");
            let row = Row::of_pairs(name, "ms", &frozen(took), FLOOR, &floor, Better::Growth);
            row.note(medians_of_steps(took))
        };
        let name = format!(
            "frozen, {} MB in memory, memory sent before and read late (--lazy-pages)",
            sizes.large_memory_mb
        );
        let [small, large] = [&from_target, &large].map(|took| median(&frozen(took)));
        let (small, large) = (small.context("no round")?, large.context("no round")?);
        Ok(vec![
            beside_floor("memory sent late (--lazy)", &from_source).goal(Goal::RatioAtMost(0.4)),
            beside_floor(
                "memory sent before and read late (--lazy-pages)",
                &from_target,
            ),
            Row::new(name, "ms", large)
                .beside(&format!("{memory_mb} MB"), small, Better::Growth)
                .goal(Goal::RatioAtMost(2.0)),
        ])
    }
}
