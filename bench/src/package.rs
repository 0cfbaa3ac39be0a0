//! A checkpoint of 500 MB of memory, half of which compresses, into a file and out of it, beside tar and zstd.
//!
//! ```text
//!  checkpoint of a counter, its pages replaced ──> transship export, import   (ours)
//!                                              ──> tar | zstd -T0, and back   (the peer)
//!                          one page in 1280    ──> export --format oci: what the second one adds
//! ```
//!
//! Both sides write to the disk of the node, and sync what they have written.

use anyhow::{Context as _, Result};
use transship_testbed::{CommandRun as _, Node, Testbed, journey};

use crate::node_clock::time_in_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::{megabytes, millis};

const PEER: &str = "tar, zstd -T0";
const STORE: &str = "/var/lib/transship/checkpoints";

/// Measures the part.
///
/// # Errors
/// When a checkpoint, an export or an import fails.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let node = bed.node("package")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    prepare(&node, sizes.package_mb)?;
    let mut turns: [Vec<f64>; 6] = Default::default();
    for round in 0..=sizes.slow_rounds {
        let times = time_in_node(&node, TURN)?;
        // The first finds everything cold.
        if round > 0 {
            for (all, time) in turns.iter_mut().zip(times) {
                all.push(millis(time));
            }
        }
    }
    let [export, pack, import, unpack, encrypt, decrypt] = &turns;
    let mb = sizes.package_mb;
    let beside = |what: &str, ours: &[f64], theirs: &[f64]| {
        let name = format!("{what}, {mb} MB of memory");
        let row = Row::of_pairs(name, "ms", ours, PEER, theirs, Better::Less);
        row.goal(Goal::RatioAtLeast(1.0))
    };
    let encrypted = |what: &str, ours: &[f64], plain: &[f64]| {
        let name = format!("{what} encrypted, {mb} MB of memory");
        let row = Row::of_pairs(name, "ms", ours, "not encrypted", plain, Better::Growth);
        row.goal(Goal::RatioAtMost(1.2))
    };
    Ok(vec![
        beside("export", export, pack),
        beside("import", import, unpack),
        encrypted("export", encrypt, export),
        encrypted("import", decrypt, import),
        second(&node, changed(mb))?,
        peak(
            &node,
            "export",
            "transship export half /var/lib/transship/p",
        )?,
        peak(
            &node,
            "import",
            "transship import /var/lib/transship/p --name back",
        )?,
        peak(
            &node,
            "export --format oci",
            "transship export half /var/lib/transship/layout-of-peak --format oci",
        )?,
        size(&node, mb)?,
    ])
}

/// Pages that a program changes between two checkpoints which has nothing to do: 100 of 500 MB.
fn changed(mb: u32) -> u32 {
    (mb / 5).max(1)
}

/// A checkpoint whose pages are half noise and half text, and a second one in which some are others.
fn prepare(node: &Node, mb: u32) -> Result<()> {
    let script = format!(
        "ctr run --detach --snapshotter transship transship.test/counter:1 web /usr/bin/counter --memory-mb 1
         transship checkpoint web --name half >/dev/null
         pages={STORE}/half/web/checkpoint/pages-1.img
         {{ head -c {half}M /dev/urandom; seq 100000000 | head -c {half}M; }} >$pages
         digest() {{
             set -- $1 $(stat -c %s $1/web/checkpoint/pages-1.img) \
                 $(sha256sum <$1/web/checkpoint/pages-1.img)
             jq --arg name $(basename $1) --argjson size $2 --arg digest $3 '.name = $name |
                 (.containers[0].files[] | select(.path == \"checkpoint/pages-1.img\")) |=
                 (.size = $size | .sha256 = $digest)' $1/transship.json >/root/m
             cat /root/m >$1/transship.json
         }}
         digest {STORE}/half
         cp -a {STORE}/half {STORE}/later
         for at in $(seq {changed}); do
             dd if=/dev/urandom of={STORE}/later/web/checkpoint/pages-1.img bs=4096 count=1 \
                 seek=$((at * {mb} * 256 / ({changed} + 1))) conv=notrunc status=none
         done
         digest {STORE}/later
         ssh-keygen -q -t ed25519 -N '' -f /root/key
         transship inspect half --verify >/dev/null; transship inspect later --verify >/dev/null
         sync",
        half = mb / 2,
        changed = changed(mb)
    );
    Ok(node.command("bash").args(["-eu", "-c", &script]).run()?)
}

/// Ours and the peer's by turns: export, pack, import, unpack, encrypted export and import.
const TURN: &str = "
cd /var/lib/transship
pack() { tar -C checkpoints/half -c . | zstd -q -T0 -3 -o t; sync -f t; }
unpack() { mkdir out; zstd -q -dc t | tar -C out -x; sync -f out; }
timed transship export half p
timed pack
timed transship import p --name back
timed unpack
timed transship export half e --encrypt-to /root/key.pub
transship rm back
timed transship import e --name back --identity /root/key
transship rm back
rm -r p t e out
sync -f .";

/// What the second checkpoint adds to a layout that has the first one.
fn second(node: &Node, changed: u32) -> Result<Row> {
    let export = |name: &str| -> Result<[f64; 2]> {
        let line = format!("transship export {name} /var/lib/transship/layout --format oci --json");
        let figures: serde_json::Value = serde_json::from_str(&node.shell(&line).read()?)?;
        let of = |key: &str| figures[key].as_u64().map(megabytes).context("no figure");
        Ok([of("bytes")?, of("new_bytes")?])
    };
    let [all, _] = export("half")?;
    let [_, new] = export("later")?;
    let name = format!("second checkpoint, {changed} pages changed");
    let row = Row::new(name, "MB", new);
    let row = row.beside("the first one", all, Better::Growth);
    Ok(row.goal(Goal::RatioAtMost(0.2)))
}

/// Bytes of the package that [`peak`] has left.
fn size(node: &Node, mb: u32) -> Result<Row> {
    const SIZES: &str = "cd /var/lib/transship
stat -c %s p
tar -C checkpoints/half -c . | zstd -q -T0 -3 | wc -c";
    let sizes = node.shell(SIZES).read()?;
    let figure = |line: Option<&str>| -> Result<f64> {
        Ok(megabytes(line.context("no figure")?.trim().parse()?))
    };
    let mut lines = sizes.lines();
    let (ours, theirs) = (figure(lines.next())?, figure(lines.next())?);
    let name = format!("package of {mb} MB of memory");
    Ok(Row::new(name, "MB", ours).beside(PEER, theirs, Better::Less))
}

/// Most memory that a command has had. busybox's `time` takes the kernel's kilobytes for pages.
fn peak(node: &Node, what: &str, line: &str) -> Result<Row> {
    const PEAK: &str = "import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
    let mut command = node.command("python3");
    command.args(["-c", PEAK]).args(line.split(' '));
    let kilobytes: u64 = command.read()?.trim().parse().context("no figure")?;
    let row = Row::new(
        format!("peak memory of {what}"),
        "MB",
        megabytes(kilobytes * 1024),
    );
    Ok(row.goal(Goal::AtMost(128.0)))
}
