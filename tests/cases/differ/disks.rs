//! Layers on disks: a btrfs, which shares blocks and tells when one of them does not come back as it was written;
//! one whose power is cut.

use std::process::Command;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Disk, FileSystem, NodeOptions, Testbed, Tree};

use super::{
    CHANGE, PLAIN, difference, in_snapshot, list_tree, nothing_half_stays, start, top_of_image,
};
use crate::Case;

pub(super) fn cases() -> impl Iterator<Item = Case> {
    let cases: [(_, fn(&Testbed) -> _); 3] = [
        ("differ_power_cut", a_pulled_image_survives_a_power_cut),
        ("differ_raw", raw_copies_share_their_blocks),
        ("differ_bad_disk", what_cannot_be_read_becomes_no_layer),
    ];
    cases.into_iter().map(|(what, run)| Case {
        what,
        tree: Tree::Forky,
        run,
    })
}

pub(crate) fn on(
    file_system: FileSystem,
    bed: &Testbed,
    test: impl FnOnce(&Disk, &Testbed) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let disk = Disk::make(&bed.settings().work_dir, file_system)?;
    let mut settings = bed.settings().clone();
    disk.path().clone_into(&mut settings.work_dir);
    let on_disk = Testbed::new(bed.tree(), &settings)?;
    let tested = test(&disk, &on_disk);
    if tested.is_err() {
        for node in on_disk.nodes() {
            eprintln!("{}", node.logs());
        }
    }
    on_disk.stop()?;
    tested
}

/// The power goes at the moment at which containerd says that an image is there: each of its layers is whole.
fn a_pulled_image_survives_a_power_cut(bed: &Testbed) -> anyhow::Result<()> {
    const LAYERS: usize = 10;
    on(FileSystem::Ext4, bed, |disk, bed| {
        let (node, _containerd, mut image) = start(bed, &NodeOptions::default())?;
        for layer in 0..LAYERS {
            image = image.with_layer("transship.test/layers:1", files(layer)?);
        }
        node.write_file("/var/lib/containerd/image.tar", image.to_archive()?)?;
        node.shell("sync").run()?;
        disk.write_late()?;
        node.shell("ctr images import --snapshotter transship /var/lib/containerd/image.tar")
            .run()?;
        let cut = disk.after_power_cut()?;
        let trees = |disk: &Disk| {
            let list = list_tree(true);
            let root = "io.containerd.snapshotter.v1.transship";
            Command::new("sh")
                .arg("-c")
                .arg(format!(
                    "for dir in $(find . -type d -name {root})/snapshots/*/fs; do (
                       echo $dir; cd $dir; {list}
                     ) done"
                ))
                .current_dir(disk.path())
                .read()
        };
        let (live, found) = (trees(disk)?, trees(&cut)?);
        ensure!(live.contains("./dir9/file99 f"), "{live}");
        ensure!(found == live, "{}", difference(&live, &found));
        Ok(())
    })
}

/// A layer of small files and a larger one.
fn files(layer: usize) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for file in 0..100 {
        let content = format!("{layer} {file}\n").repeat(if file == 0 { 200_000 } else { 500 });
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_600_000_000);
        let path = format!("dir{layer}/file{file}");
        tar.append_data(&mut header, path, content.as_bytes())?;
    }
    Ok(tar.into_inner()?)
}

/// A file of the upperdir, and then a layer, that the disk cannot read back: nothing half is made of
/// either.
fn what_cannot_be_read_becomes_no_layer(bed: &Testbed) -> anyhow::Result<()> {
    const TEXT: &str = "a line that this disk will not give back";
    on(FileSystem::Btrfs, bed, |disk, bed| {
        let (node, _containerd, _) = start(bed, &NodeOptions::default())?;
        let top = top_of_image(&node, "transship")?;
        node.ctr(&[
            "snapshots",
            "--snapshotter",
            "transship",
            "prepare",
            "active",
            &top,
        ])?;
        let write =
            format!("head -c 5000000 /dev/urandom >first; yes '{TEXT}' | head -c 9000000 >large");
        in_snapshot(&node, "transship", "active", &write)?;
        let layer = "/var/lib/containerd/layer.tar";
        node.shell(&format!(
            "transship snapshot export active -o {layer}
             sync
             for file in {layer} /var/lib/containerd/*/snapshots/*/fs/large; do
               dd if=$file iflag=nocache count=0 status=none
             done"
        ))
        .run()?;
        ensure!(
            disk.spoil(TEXT.as_bytes())? > 0,
            "the text lies on the disk"
        );
        let contents = || node.ctr(&["content", "ls", "-q"]);
        let before = contents()?;
        for command in [
            format!(
                "ctr snapshots --snapshotter transship diff --media-type {PLAIN} active >/dev/null"
            ),
            "transship snapshot export active -o /root/out.tar".to_owned(),
            format!("transship snapshot import --parent {top} broken {layer}"),
        ] {
            let error = node.shell(&command).read_failure()?.to_lowercase();
            ensure!(error.contains("input/output error"), "{command}: {error}");
        }
        nothing_half_stays(&node)?;
        ensure!(contents()? == before, "content was left");
        node.shell("test ! -e /root/out.tar").run()?;
        let list = node.ctr(&["snapshots", "--snapshotter", "transship", "ls"])?;
        ensure!(!list.contains("broken"), "{list}");
        Ok(())
    })
}

/// `transship snapshot export --raw` and `import --raw`: by reflink, or not at all.
fn raw_copies_share_their_blocks(bed: &Testbed) -> anyhow::Result<()> {
    on(FileSystem::Btrfs, bed, |_, bed| copy_raw(bed))?;
    let (node, _containerd, _) = start(bed, &NodeOptions::default())?;
    let top = top_of_image(&node, "transship")?;
    let dir = "/var/lib/containerd/raw";
    let error = node
        .shell(&format!("transship snapshot export {top} --raw {dir}"))
        .read_failure()?;
    ensure!(error.contains("by reflink"), "{error}");
    node.shell(&format!("test ! -e {dir}")).run()?;
    Ok(())
}

fn copy_raw(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _containerd, _) = start(bed, &NodeOptions::default())?;
    for snapshotter in ["overlayfs", "transship"] {
        let top = top_of_image(&node, snapshotter)?;
        let of = ["snapshots", "--snapshotter", snapshotter];
        node.ctr(&[&of[..], &["prepare", "active", &top]].concat())?;
        let change = format!("{CHANGE}\nhead -c 50000000 /dev/urandom >large");
        in_snapshot(&node, snapshotter, "active", &change)?;
        let truth = in_snapshot(&node, snapshotter, "active", &list_tree(true))?;
        let used = "sync; df --output=used -B1 /var/lib/containerd | tail -1";
        let used = || -> anyhow::Result<u64> { Ok(node.shell(used).read()?.trim().parse()?) };
        let before = used()?;
        node.shell(&format!(
            "dir=/var/lib/containerd/raw
             transship snapshot export --snapshotter {snapshotter} active --raw $dir
             transship snapshot import --snapshotter {snapshotter} --parent {top} copy --raw $dir
             rm -r $dir"
        ))
        .run()?;
        let grown = used()?.saturating_sub(before);
        ensure!(grown < 20_000_000, "two copies of 50 MB took {grown} bytes");
        let tree = in_snapshot(&node, snapshotter, "copy", &list_tree(true))?;
        ensure!(tree == truth, "{}", difference(&truth, &tree));
    }
    Ok(())
}
