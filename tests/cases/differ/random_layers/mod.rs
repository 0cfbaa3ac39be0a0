//! Random stacks of layers, applied by our differ and by containerd's own in one node: the trees must be the
//! same in every attribute. What containerd refuses for a header that is none, we refuse.
//!
//! ```text
//! proptest ──> stacks ──┬──────────────> headers, packing ──> our Apply, transship        ──> merged ─┐
//!                       └─> in_order ──> headers, packing ──> walking's Apply, overlayfs  ──> merged ─┴─ equal?
//! ```
//!
//! The same with blobs that are damaged: what containerd takes, we take, and as the same tree; what it refuses,
//! we refuse.

mod faults;
mod headers;
mod odd;
mod packing;
mod seen;
mod stacks;

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use containerd_client::types::Descriptor;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed, TestRng, TestRunner};
use transship_containerd::{Containerd, ContainerdError};
use transship_testbed::{ContainerdConfig, Node, NodeOptions, Storage, Testbed};

use super::api::{Api, digest_of};
use super::log_counts;
use packing::{Damage, Packing};
use seen::{Seen, Tree};
use stacks::{Entry, Layer};

/// Stacks under one lease: with it go their blobs and snapshots.
const BATCH: usize = 50;
/// After so many failed cases nothing more is looked at.
const MAX_FAILED: usize = 8;
/// How often a failed case is tried without something.
const MAX_STEPS: usize = 200;
/// What containerd says of layers that docs/layers.md lists as taken here.
const TAKEN_BY_US_ALONE: [&str; 2] = ["unhandled tar header type", "not a directory"];

/// A layer as a differ gets it.
struct Blob {
    media_type: String,
    bytes: Vec<u8>,
    tar: Vec<u8>,
}

impl Blob {
    fn of(entries: &[Entry], packing: &Packing) -> anyhow::Result<Self> {
        let tar = packing.tar(entries);
        Ok(Self {
            media_type: packing.media_type(),
            bytes: packing.compress(&tar)?,
            tar,
        })
    }
}

/// What a differ has made of a stack.
#[derive(Debug)]
enum Outcome {
    Refused(ContainerdError),
    /// With so many names that are listed and cannot be opened.
    Tree(Tree, usize),
}

struct Differs<'n> {
    api: Api<'n>,
    /// Our differ's own socket.
    ours: Containerd,
    /// The first part of all keys.
    what: &'static str,
    /// Stacks so far.
    count: usize,
    /// What containerd has refused without a fault of ours, by its reason.
    refused: BTreeMap<String, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Ours,
    Walking,
}

impl Differs<'_> {
    /// Applies a stack; `checks` its diff ids, too.
    fn apply(&mut self, by: By, blobs: &[Blob], checks: bool) -> anyhow::Result<Outcome> {
        self.count += 1;
        let key = format!("{}-{}", self.what, self.count);
        self.api.use_snapshotter(match by {
            By::Ours => "transship",
            By::Walking => "overlayfs",
        });
        let api = &self.api;
        let mut parent = String::new();
        for (number, blob) in blobs.iter().enumerate() {
            let active = format!("{key}-{number}-active");
            let mounts = api.prepare(&active, &parent)?;
            let layer = api.write(&blob.media_type, &blob.bytes, &[])?;
            let applied = match by {
                By::Ours => api.apply_through(&self.ours, &layer, mounts),
                By::Walking => api.apply_by_containerd(&layer, mounts),
            };
            let applied: Descriptor = match applied {
                Ok(applied) => applied,
                Err(error) => {
                    api.remove(&active)?;
                    return Ok(Outcome::Refused(error));
                }
            };
            if checks {
                let expected = (digest_of(&blob.tar), i64::try_from(blob.tar.len())?);
                ensure!(
                    (applied.digest, applied.size) == expected,
                    "{by:?}: {expected:?}"
                );
            }
            parent = format!("{key}-{number}");
            api.commit(&active, &parent)?;
        }
        let mounts = api.view(&key, &parent)?;
        let (tree, ghosts) = seen::read_view(&mounts)?;
        Ok(Outcome::Tree(tree, ghosts))
    }

    /// Whether containerd takes the stack; an error where we do not make the same of it.
    fn compare(&mut self, layers: &[Layer]) -> anyhow::Result<bool> {
        let blobs = layers
            .iter()
            .map(|layer| Blob::of(&layer.entries, &layer.packing));
        let ours = blobs.collect::<anyhow::Result<Vec<_>>>()?;
        let mut walking = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            for entries in layer.in_order(number == 0) {
                walking.push(Blob::of(&entries, &layer.packing)?);
            }
        }
        let walking = self.apply(By::Walking, &walking, true)?;
        let ours = self.apply(By::Ours, &ours, true)?;
        let mut entries = layers.iter().flat_map(|layer| &layer.entries);
        let is_faulty = entries.any(|entry| entry.fault.is_some());
        let (mut walking, (ours, ghosts)) = match (walking, ours) {
            (Outcome::Refused(_), Outcome::Refused(_)) if is_faulty => return Ok(false),
            (Outcome::Refused(error), _) if is_faulty => {
                anyhow::bail!("we take what containerd refuses: {}", error.source)
            }
            (Outcome::Tree(..), _) if is_faulty => anyhow::bail!("containerd takes it"),
            // What containerd does not take, we may.
            (Outcome::Refused(error), _) => {
                *self.refused.entry(error.source.to_string()).or_default() += 1;
                return Ok(false);
            }
            (_, Outcome::Refused(error)) => anyhow::bail!("we answer {}", error.source),
            (Outcome::Tree(walking, _), Outcome::Tree(ours, ghosts)) => (walking, (ours, ghosts)),
        };
        ensure!(ghosts == 0, "{ghosts} names are listed and not there");
        for (path, seen) in &mut walking {
            if let Some(own) = ours.get(path)
                && seen.mtime != own.mtime
                && is_without_time(layers, path, seen, own)
            {
                seen.mtime = own.mtime;
            }
        }
        ensure!(walking == ours, "{}", differences(&walking, &ours));
        Ok(true)
    }

    /// Whether containerd takes a damaged layer; an error where we do not make the same of it.
    fn compare_damaged(&mut self, layer: &Layer, damage: &Damage) -> anyhow::Result<bool> {
        let entries = layer.in_order(true).concat();
        let blob = Blob::of(&entries, &layer.packing)?;
        let blobs = [Blob {
            bytes: damage.done_to(blob.bytes),
            ..blob
        }];
        self.compare_blobs(&blobs)
    }

    /// The same of blobs that are as they are, one upon the other.
    fn compare_blobs(&mut self, blobs: &[Blob]) -> anyhow::Result<bool> {
        let walking = self.apply(By::Walking, blobs, false)?;
        let ours = self.apply(By::Ours, blobs, false)?;
        let (mut walking, mut ours) = match (walking, ours) {
            (Outcome::Refused(error), Outcome::Tree(..)) => {
                let reason = error.source.to_string();
                ensure!(
                    TAKEN_BY_US_ALONE.iter().any(|part| reason.contains(part)),
                    "we take what containerd refuses: {reason}"
                );
                return Ok(false);
            }
            (Outcome::Refused(_), _) => return Ok(false),
            (_, Outcome::Refused(error)) => anyhow::bail!("we answer {}", error.source),
            (Outcome::Tree(walking, _), Outcome::Tree(ours, _)) => (walking, ours),
        };
        for seen in walking.values_mut().chain(ours.values_mut()) {
            seen.mtime = (0, 0);
        }
        ensure!(walking == ours, "{}", differences(&walking, &ours));
        Ok(true)
    }
}

/// Whether a directory of the merged tree has no entry in the topmost layer that has something in it:
/// containerd's has the time of the unpacking. Where entries lead through links it is not known whose they are, and
/// containerd sets the time of a directory on what has replaced it.
fn is_without_time(layers: &[Layer], path: &str, walking: &Seen, ours: &Seen) -> bool {
    let path = path.trim_start_matches('/');
    let is_directory = walking.is_directory() && ours.is_directory();
    if layers.iter().any(|layer| layer.leads_through_links) {
        let mut entries = layers.iter().flat_map(|layer| &layer.entries);
        return is_directory || entries.any(|it| it.is_directory_of(walking.mtime.0));
    }
    if !is_directory {
        return false;
    }
    let topmost = layers.iter().rfind(|layer| layer.touched.contains(path));
    topmost.is_some_and(|layer| !layer.named.contains(path))
}

fn differences(walking: &Tree, ours: &Tree) -> String {
    let mut text = String::new();
    let paths: std::collections::BTreeSet<_> = walking.keys().chain(ours.keys()).collect();
    for path in paths {
        let (walking, ours) = (walking.get(path), ours.get(path));
        if walking != ours {
            text += &format!("{path}\n  walking {walking:?}\n  ours    {ours:?}\n");
        }
    }
    text
}

/// Generates cases and compares them; failed ones are made smaller first, and told together. Of a hundred
/// cases containerd must take `least`, else the test says little.
fn run<S: Strategy>(
    count: usize,
    (seed, least): (u8, usize),
    strategy: &S,
    differs: &mut Differs<'_>,
    compare: impl Fn(&mut Differs<'_>, &S::Value) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed_bytes(seed));
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let (mut taken, mut failed) = (0, Vec::new());
    for number in 0..count {
        if number % BATCH == 0 {
            differs.api.renew_lease(differs.what)?;
        }
        let case = strategy.new_tree(&mut runner);
        let mut case = case.map_err(|reason| anyhow::anyhow!("{reason}"))?;
        match compare(differs, &case.current()) {
            Ok(is_taken) => taken += usize::from(is_taken),
            Err(error) => {
                let (smallest, error) = smallest(&mut case, error, |case| compare(differs, case));
                failed.push(format!("case {number}: {error:#}\n{smallest:#?}"));
                if failed.len() == MAX_FAILED {
                    break;
                }
            }
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    println!("{count} cases, {taken} taken by containerd");
    ensure!(
        taken * 100 >= count * least,
        "containerd has taken {taken} of {count}: {:#?}",
        differs.refused
    );
    Ok(())
}

/// The same cases in each run, and others with PROPTEST_RNG_SEED.
fn seed_bytes(seed: u8) -> [u8; 32] {
    let mut bytes = [seed; 32];
    if let RngSeed::Fixed(more) = Config::default().rng_seed {
        bytes[..8].copy_from_slice(&more.to_le_bytes());
    }
    bytes
}

/// Leaves out of a failed case what it fails without.
fn smallest<T: ValueTree>(
    case: &mut T,
    mut error: anyhow::Error,
    mut compare: impl FnMut(&T::Value) -> anyhow::Result<bool>,
) -> (T::Value, anyhow::Error) {
    let mut smallest = case.current();
    let mut is_going = case.simplify();
    for _ in 0..MAX_STEPS {
        if !is_going {
            break;
        }
        is_going = match compare(&case.current()) {
            Err(smaller) => {
                (error, smallest) = (smaller, case.current());
                case.simplify()
            }
            Ok(_) => case.complicate(),
        };
    }
    (smallest, error)
}

pub(super) fn random_stacks_become_the_same_trees(bed: &Testbed) -> anyhow::Result<()> {
    let (node, stacks) = in_node(bed, "stack", compare_stacks)?;
    let handed_on = log_counts(&node, "handed on to the next differ")?;
    ensure!(handed_on * 20 < stacks, "{handed_on} layers were handed on");
    Ok(())
}

pub(super) fn damaged_layers_are_taken_as_containerd_takes_them(
    bed: &Testbed,
) -> anyhow::Result<()> {
    in_node(bed, "damaged", compare_damaged)?;
    Ok(())
}

/// Compares in a node of its own; tells how many stacks were applied.
fn in_node(
    bed: &Testbed,
    what: &'static str,
    compare: fn(&mut Differs<'_>, usize) -> anyhow::Result<()>,
) -> anyhow::Result<(Node, usize)> {
    // 256, or twice what `make test-long` asks for.
    let cases = usize::try_from(Config::default().cases)?;
    let cases = if cases > 256 { cases * 2 } else { cases };
    // Each layer is four synced transactions of containerd.
    let node = bed.node_with(
        "a",
        &NodeOptions {
            storage: Storage::Tmpfs("4g".to_owned()),
            ..NodeOptions::default()
        },
    )?;
    node.start_snapshotter_with(&["--log-level", "debug"])?;
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    let stacks = std::thread::scope(|scope| {
        let comparing = scope.spawn(|| -> anyhow::Result<usize> {
            let api = Api::of(&node)?;
            let ours = api.at("/run/transship/diff.sock")?;
            seen::enter_mounts_of(&node)?;
            let mut differs = Differs {
                api,
                ours,
                what,
                count: 0,
                refused: BTreeMap::new(),
            };
            compare(&mut differs, cases)?;
            Ok(differs.count)
        });
        let panicked = |_| anyhow::anyhow!("the thread panicked");
        comparing.join().map_err(panicked)?
    })?;
    Ok((node, stacks))
}

pub(super) fn odd_layers_are_taken_as_containerd_takes_them(bed: &Testbed) -> anyhow::Result<()> {
    in_node(bed, "odd", odd::compare)?;
    Ok(())
}

fn compare_stacks(differs: &mut Differs<'_>, cases: usize) -> anyhow::Result<()> {
    run(
        cases,
        (1, 75),
        &stacks::stacks(),
        differs,
        |differs, layers| differs.compare(layers),
    )
}

fn compare_damaged(differs: &mut Differs<'_>, cases: usize) -> anyhow::Result<()> {
    let damaged = (stacks::stacks(), Damage::any());
    run(
        cases / 2,
        (2, 20),
        &damaged,
        differs,
        |differs, (layers, damage)| {
            let layer = layers.first().context("no layer")?;
            differs.compare_damaged(layer, damage)
        },
    )
}
