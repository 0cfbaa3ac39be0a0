//! CRIU's own reader takes the images that were edited here: crit, of CRIU 4.2.1, on images that three
//! versions of CRIU have written.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use transship_checkpoint::criu_images::ipc_sysctls::{IpcSysctls, set_sysctls};
use transship_checkpoint::criu_images::ipcns::{IpcKind, IpcObject, objects, remove_objects};
use transship_checkpoint::criu_images::seccomp::{Filter, write_filters};
use transship_checkpoint::criu_images::threads::{ThreadEdit, edit, threads};
use transship_checkpoint::criu_images::utsns::{UtsNames, set_names};
use transship_testbed::{CommandRun as _, Node, Testbed, Tree};

use crate::Case;

const VERSIONS: [&str; 3] = ["4.1.1", "4.2.1", "4.3"];
const IMAGES: &str = "/root/images";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "crit_reads_edited_images",
        tree: Tree::Forky,
        run: crit_reads_edited_images,
    }]
    .into_iter()
}

fn crit_reads_edited_images(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    for version in VERSIONS {
        edit_and_read(&node, version).with_context(|| format!("images of CRIU {version}"))?;
    }
    Ok(())
}

fn edit_and_read(node: &Node, version: &str) -> anyhow::Result<()> {
    let images = node.path_from_outside(IMAGES);
    copy_sample(version, &images)?;
    set_names(
        &images,
        &UtsNames {
            node: "target".into(),
            domain: "d".into(),
        },
    )?;
    let live: IpcSysctls = [
        ("kernel/shmmax", vec![u64::MAX]),
        ("kernel/sem", vec![1; 4]),
    ]
    .into();
    set_sysctls(&images, &live)?;
    let unwanted: Vec<IpcObject> = objects(&images)?
        .into_iter()
        .filter(|object| object.kind != IpcKind::Sem)
        .collect();
    ensure!(unwanted.len() == 2, "{unwanted:?}");
    remove_objects(&images, &unwanted)?;

    let tid = threads(&images)?
        .first()
        .map(|it| it.tid)
        .context("no thread")?;
    let changes = ThreadEdit {
        no_new_privileges: true,
        bounding: Some(1 << 33 | 1),
        seccomp_filter: Some(0),
        oom_score_adj: Some(-7),
        ..ThreadEdit::default()
    };
    edit(&images, tid, &changes)?;
    let filter = Filter {
        program: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f],
        next: None,
        flags: 4,
    };
    write_filters(&images, &[filter])?;

    let core = decode(node, &format!("core-{tid}.img"))?;
    let thread = &core["entries"][0]["thread_core"];
    ensure!(thread["creds"]["no_new_privs"] == 1, "{thread}");
    ensure!(thread["creds"]["cap_bnd"] == json!([1, 2]), "{thread}");
    ensure!(thread["seccomp_mode"] == "filter", "{thread}");
    ensure!(core["entries"][0]["tc"]["oom_score_adj"] == -7, "{core}");
    let filters = decode(node, "seccomp.img")?;
    ensure!(
        filters["entries"][0]["seccomp_filters"][0]["flags"] == 4,
        "{filters}"
    );
    let names = decode(node, "utsns-10.img")?;
    ensure!(names["entries"][0]["nodename"] == "target", "{names}");
    ensure!(names["entries"][0]["domainname"] == "d", "{names}");
    let limits = decode(node, "ipcns-var-9.img")?;
    ensure!(limits["entries"][0]["shm_ctlmax"] == u64::MAX, "{limits}");
    ensure!(
        limits["entries"][0]["sem_ctls"] == json!([1, 1, 1, 1]),
        "{limits}"
    );
    for (kind, count) in [("shm", 0), ("msg", 0), ("sem", 1)] {
        let image = decode(node, &format!("ipcns-{kind}-9.img"))?;
        let entries = image["entries"].as_array().map(Vec::len);
        ensure!(entries == Some(count), "{kind}: {image}");
    }
    Ok(())
}

fn copy_sample(version: &str, to: &Path) -> anyhow::Result<()> {
    let samples = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../checkpoint/src/criu_images/samples"
    );
    if to.try_exists()? {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir(to)?;
    for image in fs::read_dir(Path::new(samples).join(format!("criu-{version}")))? {
        let image = image?;
        fs::copy(image.path(), to.join(image.file_name()))?;
    }
    Ok(())
}

fn decode(node: &Node, image: &str) -> anyhow::Result<Value> {
    let text = node
        .command("crit")
        .args(["decode", "-i", &format!("{IMAGES}/{image}")])
        .read()?;
    Ok(serde_json::from_str(&text)?)
}
