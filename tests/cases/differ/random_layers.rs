//! Random stacks of layers, applied by our differ and by containerd's own in one node: the trees must be the
//! same in every attribute.
//!
//! ```text
//! proptest ──> stacks of layers ──> tars ──> Apply by ours    ──> merged tree ─┐
//!                                       └──> Apply by walking ──> merged tree ─┴─ equal?
//! ```
//!
//! What docs/layers.md lists as different is not generated: a layer has either symlinks or deletions,
//! a deleted name is not made again in the same layer, hard links stay in their layer. The times of
//! directories are left out: containerd's are those of the unpacking where the layer names none.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use containerd_client::tonic::Code;
use containerd_client::types::Mount;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, TestRunner};
use transship_testbed::{CommandRun as _, Node, NodeOptions, Testbed};

use super::api::Api;
use super::{PLAIN, log_counts, restart_stock, start};

/// Stacks that are listed by one shell in the node.
const BATCH: usize = 50;

#[derive(Debug, Clone)]
enum Kind {
    File(u16),
    Directory,
    Symlink(&'static str),
    /// To one of the layer's files.
    HardLink(prop::sample::Index),
    Fifo,
    Device,
    /// Of one of the names that earlier layers have.
    Whiteout(prop::sample::Index),
    Opaque,
}

#[derive(Debug, Clone)]
struct Entry {
    path: String,
    /// What stands before the path.
    prefix: &'static str,
    kind: Kind,
    mode: u32,
    owner: (u64, u64),
    mtime: u64,
    has_xattr: bool,
    /// Whether header fields are spelled as GNU tar spells what does not fit.
    is_gnu: bool,
}

type Layer = Vec<Entry>;

fn paths() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c", "usr", "lib"]);
    prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
}

fn entries(has_links: bool) -> impl Strategy<Value = Entry> {
    let made = prop_oneof![
        4 => (0..2000u16).prop_map(Kind::File),
        4 => Just(Kind::Directory),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Device),
        2 => any::<prop::sample::Index>().prop_map(Kind::HardLink),
    ];
    let targets = vec![
        "a",
        "b/c",
        "../a",
        "/usr/lib",
        "../../b",
        "/",
        ".",
        "c/..",
        "nowhere/x",
    ];
    let own = if has_links {
        prop::sample::select(targets)
            .prop_map(Kind::Symlink)
            .boxed()
    } else {
        prop_oneof![
            3 => any::<prop::sample::Index>().prop_map(Kind::Whiteout),
            1 => Just(Kind::Opaque),
        ]
        .boxed()
    };
    (
        paths(),
        prop::sample::select(vec!["", "", "", "./", "/", "x/../", "../"]),
        prop_oneof![3 => made, 1 => own],
        prop::sample::select(vec![0o644, 0o755, 0o4755, 0o1777, 0o2700, 0o0]),
        prop::sample::select(vec![(0, 0), (1000, 1000), (65534, 3), (3_000_000, 7)]),
        1_000_000..2_000_000_000u64,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(path, prefix, kind, mode, owner, mtime, has_xattr, is_gnu)| Entry {
                path,
                prefix,
                kind,
                mode,
                owner,
                mtime,
                has_xattr,
                is_gnu,
            },
        )
}

fn layers() -> impl Strategy<Value = Layer> {
    any::<bool>().prop_flat_map(|has_links| prop::collection::vec(entries(has_links), 1..12))
}

/// Writes the tar of one layer. `known` are the names of the layers below, and then of this one, too.
fn tar_of(layer: &Layer, known: &mut BTreeSet<String>) -> Vec<u8> {
    let below: Vec<_> = known.iter().cloned().collect();
    let (mut made, mut files) = (BTreeSet::new(), Vec::new());
    let mut deleted: Vec<String> = Vec::new();
    let mut tar = tar::Builder::new(Vec::new());
    for entry in layer {
        let is_below = |path: &str, of: &str| path == of || path.starts_with(&format!("{of}/"));
        let mut header = if entry.is_gnu {
            tar::Header::new_gnu()
        } else {
            tar::Header::new_ustar()
        };
        header.set_mode(entry.mode);
        header.set_uid(if entry.is_gnu {
            entry.owner.0
        } else {
            entry.owner.0.min(0o7_777_777)
        });
        header.set_gid(entry.owner.1);
        header.set_mtime(entry.mtime);
        header.set_size(0);
        let mut name = format!("{}{}", entry.prefix, entry.path);
        let mut data = Vec::new();
        let mut link = None;
        match &entry.kind {
            Kind::Whiteout(index) if !below.is_empty() => {
                let gone = index.get(&below).clone();
                let is_made = |made: &String| is_below(made, &gone) || is_below(&gone, made);
                if made.iter().any(is_made)
                    || deleted
                        .iter()
                        .any(|other| is_below(&gone, other) || is_below(other, &gone))
                {
                    continue;
                }
                let (parent, base) = gone.rsplit_once('/').unwrap_or(("", &gone));
                name = Path::new(parent)
                    .join(format!(".wh.{base}"))
                    .display()
                    .to_string();
                header.set_entry_type(tar::EntryType::Regular);
                deleted.push(gone);
            }
            Kind::Whiteout(_) => continue,
            _ if deleted.iter().any(|gone| is_below(&entry.path, gone)) => continue,
            Kind::Opaque => {
                name.push_str("/.wh..wh..opq");
                header.set_entry_type(tar::EntryType::Regular);
                made.insert(entry.path.clone());
            }
            Kind::HardLink(index) => {
                if files.is_empty() {
                    continue;
                }
                let target: &String = index.get(&files);
                header.set_entry_type(tar::EntryType::Link);
                link = Some(target.clone());
                made.insert(entry.path.clone());
            }
            kind => {
                let entry_type = match kind {
                    Kind::Directory => tar::EntryType::Directory,
                    Kind::Symlink(target) => {
                        link = Some((*target).to_owned());
                        tar::EntryType::Symlink
                    }
                    Kind::Fifo => tar::EntryType::Fifo,
                    Kind::Device => {
                        header.set_device_major(1).expect("GNU and ustar have it");
                        header.set_device_minor(3).expect("GNU and ustar have it");
                        tar::EntryType::Char
                    }
                    _ => tar::EntryType::Regular,
                };
                header.set_entry_type(entry_type);
                if let Kind::File(len) = kind {
                    data = entry.path.bytes().cycle().take((*len).into()).collect();
                    files.push(entry.path.clone());
                }
                made.insert(entry.path.clone());
            }
        }
        if entry.has_xattr && matches!(entry.kind, Kind::File(_) | Kind::Directory) {
            let records = [
                ("SCHILY.xattr.user.test", entry.path.as_bytes()),
                ("mtime", b"1234567.5"),
            ];
            tar.append_pax_extensions(records).expect("a Vec takes all");
        }
        let bytes = &mut header.as_old_mut().name;
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        if let Some(link) = link {
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        }
        header.set_size(data.len() as u64);
        header.set_cksum();
        tar.append(&header, &data[..]).expect("a Vec takes all");
    }
    known.extend(made);
    tar.into_inner().expect("a Vec takes all")
}

/// What one differ has made of a stack: Apply's answers, and the attributes that no `find` shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Applied {
    refused: Option<Code>,
    xattrs: BTreeMap<String, String>,
}

/// Applies a stack; its top is then committed under `key`.
fn apply(api: &Api<'_>, key: &str, tars: &[(String, Vec<u8>)]) -> anyhow::Result<Applied> {
    let mut parent = String::new();
    let mut applied = Applied::default();
    for (number, (media_type, blob)) in tars.iter().enumerate() {
        let active = format!("{key}-{number}-active");
        let mounts = api.prepare(&active, &parent)?;
        let layer = api.write(media_type, blob, &[])?;
        let top = top_of(&mounts).context("no directory in the mounts")?;
        if let Err(code) = api.apply(&layer, mounts) {
            api.remove(&active)?;
            applied.refused = Some(code);
            break;
        }
        read_xattrs(&api.node().path_from_outside(&top), "", &mut applied.xattrs)?;
        let name = format!("{key}-{number}");
        api.commit(&active, &name)?;
        parent = name;
    }
    if !parent.is_empty() {
        api.view(key, &parent)?;
    }
    Ok(applied)
}

/// The directory that a snapshot of a layer fills.
fn top_of(mounts: &[Mount]) -> Option<String> {
    let [mount] = mounts else { return None };
    let mut options = mount.options.iter();
    let upper = options.find_map(|option| option.strip_prefix("upperdir="));
    Some(upper.unwrap_or(&mount.source).to_owned())
}

/// The attributes that programs have set on the files and directories of a layer.
fn read_xattrs(dir: &Path, path: &str, all: &mut BTreeMap<String, String>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{path}/{}", entry.file_name().display());
        let kind = entry.file_type()?;
        if kind.is_file() || kind.is_dir() {
            let mut names = vec![0; 4096];
            let len = rustix::fs::llistxattr(entry.path(), &mut names[..])?;
            for attribute in names[..len].split(|byte| *byte == 0) {
                if !attribute.starts_with(b"user.")
                    && !attribute.starts_with(b"security.capability")
                {
                    continue;
                }
                let mut value = vec![0; 4096];
                let len = rustix::fs::lgetxattr(entry.path(), attribute, &mut value[..])?;
                let attribute = String::from_utf8_lossy(attribute).into_owned();
                let value = String::from_utf8_lossy(&value[..len]).into_owned();
                all.insert(format!("{name} {attribute}"), value);
            }
        }
        if kind.is_dir() {
            read_xattrs(&entry.path(), &name, all)?;
        }
    }
    Ok(())
}

/// Shows the merged trees of some stacks. Names that are listed and cannot be opened are left out.
fn list(node: &Node, keys: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut script = "export LIBMOUNT_FORCE_MOUNT2=always; mkdir -p /mnt\n".to_owned();
    for key in keys {
        writeln!(
            script,
            "echo '=== {key}'
             if mount=$(ctr snapshots --snapshotter transship mounts /mnt {key} 2>/dev/null); then
             eval \"$mount\"
             (cd /mnt; exec 2>/dev/null
             find . -mindepth 1 ! -type d -printf '%p %y %m %U:%G %n %T@ %s %l\\n' | sort
             find . -mindepth 1 -type d -printf '%p %y %m %U:%G\\n' | sort
             find . -type b,c -exec stat -c '%n %t:%T' {{}} + | sort
             find . -type f -exec sha256sum {{}} + | sort -k 2)
             umount /mnt; fi"
        )?;
    }
    let mut trees = BTreeMap::new();
    let listed = node.shell(&script).read()?;
    for part in listed.split("=== ").skip(1) {
        let (key, tree) = part.split_once('\n').context("no line")?;
        trees.insert(key.to_owned(), tree.to_owned());
    }
    Ok(trees)
}

pub(super) fn random_stacks_become_the_same_trees(bed: &Testbed) -> anyhow::Result<()> {
    let (node, containerd, _) = start(bed, &NodeOptions::default())?;
    // 256, or what `make test-long` asks for.
    let cases = Config::default().cases;
    let stacks = usize::try_from(if cases > 256 { cases * 2 } else { cases })?;
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(layers(), 1..4);
    let mut generated = Vec::new();
    for number in 0..stacks {
        let tree = strategy.new_tree(&mut runner);
        let stack = tree
            .map_err(|reason| anyhow::anyhow!("{reason}"))?
            .current();
        let mut known = BTreeSet::new();
        let mut tars = Vec::new();
        for layer in &stack {
            let tar = tar_of(layer, &mut known);
            tars.push(if number % 2 == 0 {
                (PLAIN.to_owned(), tar)
            } else {
                (format!("{PLAIN}+gzip"), gzip(&tar)?)
            });
        }
        generated.push((stack, tars));
    }
    let run = |prefix: &str| -> anyhow::Result<Vec<(Applied, String)>> {
        let api = Api::of(&node)?;
        let mut results = Vec::new();
        let numbers: Vec<_> = (0..stacks).collect();
        for batch in numbers.chunks(BATCH) {
            let mut applied = Vec::new();
            for number in batch {
                applied.push(apply(
                    &api,
                    &format!("{prefix}-{number}"),
                    &generated[*number].1,
                )?);
            }
            let keys: Vec<_> = batch
                .iter()
                .map(|number| format!("{prefix}-{number}"))
                .collect();
            let mut trees = list(&node, &keys)?;
            for (applied, key) in applied.into_iter().zip(&keys) {
                results.push((applied, trees.remove(key).unwrap_or_default()));
            }
        }
        Ok(results)
    };
    let ours = run("ours")?;
    let left = log_counts(&node, "left to the next differ")?;
    restart_stock(&node, containerd)?;
    let walking = run("walking")?;
    let mut refused = 0;
    for (number, (ours, walking)) in ours.iter().zip(&walking).enumerate() {
        if walking.0.refused.is_some() {
            // We may take what containerd does not.
            refused += 1;
            continue;
        }
        ensure!(
            ours == walking,
            "stack {number}: {:#?}\nours: {:?}\n{}\nwalking:\n{}",
            generated[number].0,
            ours.0,
            ours.1,
            walking.1
        );
    }
    println!("{stacks} stacks, {refused} refused by containerd, {left} layers left to it");
    // Else the test says little.
    ensure!(refused * 2 < stacks, "{refused} of {stacks} are refused");
    Ok(())
}

fn gzip(data: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data)?;
    Ok(encoder.finish()?)
}
