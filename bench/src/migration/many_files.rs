//! An image of many files, some of which the container has changed: what a migration and the stock checkpoint make of
//! that.

use anyhow::Result;
use transship_testbed::{CommandRun as _, Node, Testbed, journey};

use super::{Course, Program, STOCK, frozen, medians_of_steps};
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::spaced;

pub(super) const IMAGE: &str = "transship.test/counter-files:1";
/// Files that each container changes.
const CHANGED: u32 = 100;
const FILES_PER_DIR: u32 = 100;
const FILE_BYTES: usize = 1024;

impl Course<'_> {
    /// Beside the same program over the small image, and beside the stock checkpoint.
    pub(super) fn measure_many_files(
        &mut self,
        bed: &Testbed,
        memory_mb: u32,
        sizes: &Sizes,
    ) -> Result<Vec<Row>> {
        let files = sizes.image_files[0];
        let image = journey::counter_image(bed)?.with_layer(IMAGE, layer(files)?);
        for node in [self.a, self.b] {
            node.import_image(&image, "transship")?;
        }
        let many = Program {
            image: IMAGE,
            ..Program::idle(memory_mb)
        };
        let small = Program::idle(memory_mb);
        let at_once: &[&str] = &["--max-precopy-rounds", "0"];
        let (mut with, mut without) = (Vec::new(), Vec::new());
        let (mut small_with, mut small_without) = (Vec::new(), Vec::new());
        let mut stock = Vec::new();
        for round in 0..sizes.migrations {
            eprintln!(
                "   {memory_mb} MB, {} files, round {}",
                spaced(files as usize),
                round + 1
            );
            with.push(self.migrate(many, &[])?);
            small_with.push(self.migrate(small, &[])?);
            without.push(self.migrate(many, at_once)?);
            small_without.push(self.migrate(small, at_once)?);
            let (_, paused, _) = self.stock(many)?;
            stock.push(paused);
        }
        let what = format!(
            "frozen, {memory_mb} MB in memory, {CHANGED} of {} files changed",
            spaced(files as usize)
        );
        let beside_small = |how: &str, ours: &[f64], theirs: &[f64]| {
            let name = format!("{what}, {how}");
            Row::of_pairs(
                name,
                "ms",
                ours,
                "ours, small image",
                theirs,
                Better::Growth,
            )
            .goal(Goal::RatioAtMost(1.1))
        };
        let beside_stock = |how: &str, ours: &[f64], least| {
            let name = format!("{what}, {how}: beside a checkpoint alone");
            Row::of_pairs(name, "ms", ours, STOCK, &stock, Better::Less)
                .goal(Goal::RatioAtLeast(least))
        };
        let notes = [&with, &without].map(|all| medians_of_steps(all));
        let [note_with, note_without] = notes;
        let [with, without, small_with, small_without] =
            [with, without, small_with, small_without].map(|all| frozen(&all));
        Ok(vec![
            beside_small("memory sent before", &with, &small_with).note(note_with),
            beside_small("all in the freeze", &without, &small_without).note(note_without),
            beside_stock("memory sent before", &with, 10.0),
            beside_stock("all in the freeze", &without, 8.0),
        ])
    }
}

fn path(number: u32) -> String {
    format!("many/d{}/f{number}", number / FILES_PER_DIR)
}

/// The layer with the files.
fn layer(files: u32) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    let content = [b'x'; FILE_BYTES];
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o755);
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    layer.append_data(&mut header.clone(), "many/", std::io::empty())?;
    for dir in 0..files.div_ceil(FILES_PER_DIR) {
        let path = format!("many/d{dir}/");
        layer.append_data(&mut header.clone(), path, std::io::empty())?;
    }
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(FILE_BYTES as u64);
    for number in 0..files {
        layer.append_data(&mut header.clone(), path(number), &content[..])?;
    }
    Ok(layer.into_inner()?)
}

/// Changes some of the files, as the container sees them.
pub(super) fn change(node: &Node, container: &str) -> Result<()> {
    let pid = journey::task_pid(node, container)?;
    let changes =
        (0..CHANGED).map(|number| format!("echo changed >>/proc/{pid}/root/{}", path(number)));
    let changes: Vec<String> = changes.collect();
    Ok(node.shell(&changes.join("\n")).run()?)
}
