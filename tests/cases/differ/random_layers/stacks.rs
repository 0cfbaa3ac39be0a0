//! Which layers are generated: any entries, and then as many of them as containerd can take in one of its
//! orders.
//!
//! The order of the entries of a layer means nothing (OCI image-spec, layer.md), but containerd's differ
//! depends on it. So it is given the same layer in two: the deletions first, then all else
//! ([`Layer::in_order`]). What containerd cannot say in that way either is left out here, and stands in
//! docs/layers.md.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;

use super::faults::Fault;
use super::headers::Style;
use super::packing::Packing;

/// What an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// With so many bytes, and a hole in the middle.
    File(u16),
    Directory,
    Symlink(String),
    HardLink(String),
    Fifo,
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    /// Of the name itself.
    Whiteout,
    /// Of the directory itself.
    Opaque,
    /// A global header, which is nobody's.
    Global,
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) path: String,
    /// What stands before the path.
    pub(super) prefix: &'static str,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) owner: (u64, u64),
    pub(super) mtime: (u64, u32),
    pub(super) xattrs: Vec<(String, Vec<u8>)>,
    pub(super) style: Style,
    /// What containerd refuses the layer for.
    pub(super) fault: Option<Fault>,
}

impl Entry {
    /// Whether it is one of a directory with this time; a record of noise says 1.
    pub(super) fn is_directory_of(&self, mtime: i64) -> bool {
        self.kind == Kind::Directory && [self.mtime.0, 1].contains(&mtime.cast_unsigned())
    }
}

/// A layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Layer {
    pub(super) entries: Vec<Entry>,
    /// Directories whose times are the layer's: it has entries for them.
    pub(super) named: BTreeSet<String>,
    /// Directories that it has something in.
    pub(super) touched: BTreeSet<String>,
    /// Some entries lie below a symlink of the layer.
    pub(super) leads_through_links: bool,
    pub(super) packing: Packing,
}

impl Layer {
    /// The deletions as a layer of their own, which the rest goes upon.
    pub(super) fn in_order(&self, is_lowest: bool) -> Vec<Vec<Entry>> {
        let is_deletion = |entry: &&Entry| matches!(entry.kind, Kind::Whiteout | Kind::Opaque);
        let mut deletions: Vec<_> = self.entries.iter().filter(is_deletion).cloned().collect();
        let rest = self.entries.iter().filter(|entry| !is_deletion(entry));
        let mut rest: Vec<_> = rest.cloned().collect();
        for entry in &mut rest {
            entry.style.is_sparse_of_gnu = false;
        }
        deletions.sort_by(|a, b| a.path.cmp(&b.path));
        let gone: Vec<_> = deletions.iter().map(|entry| entry.path.clone()).collect();
        deletions.retain(|entry| !gone.iter().any(|gone| is_below(&entry.path, gone)));
        deletions.dedup_by(|a, b| a.path == b.path);
        if deletions.is_empty() {
            return vec![rest];
        }
        if is_lowest {
            deletions.extend(rest);
            return vec![deletions];
        }
        vec![deletions, rest]
    }
}

/// Symlinks that a path is followed through.
const MAX_LINKS: usize = 40;

/// Whether a path lies below another one.
fn is_below(path: &str, of: &str) -> bool {
    path.strip_prefix(of)
        .is_some_and(|rest| rest.starts_with('/'))
}

fn is_at_or_below(path: &str, of: &str) -> bool {
    path == of || is_below(path, of)
}

/// The directories on the way to a path, outermost first.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// An entry before it is known what the other ones make.
#[derive(Debug, Clone)]
struct Pick {
    path: String,
    prefix: &'static str,
    kind: u8,
    link: &'static str,
    index: Index,
    len: u16,
    mode: u32,
    owner: (u64, u64),
    mtime: (u64, u32),
    value: Vec<u8>,
    style: Style,
}

fn paths() -> impl Strategy<Value = String> {
    let long = "a-name-of-exactly-one-hundred-bytes-so-that-it-is-too-long-for-the-field-together-with-others-1234567";
    let name = prop::sample::select(vec![
        "a",
        "a",
        "a",
        "b",
        "b",
        "b",
        "c",
        "c",
        "usr",
        "usr",
        "lib",
        "lib",
        "name with ü",
        "-",
        long,
    ]);
    prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
}

fn picks() -> impl Strategy<Value = Pick> {
    let links = vec![
        "a",
        "b/c",
        "../a",
        "/usr/lib",
        "../../b",
        "/",
        ".",
        "c/..",
        "nowhere/x",
        "lib//./x",
    ];
    let what = (
        paths(),
        prop::sample::select(vec!["", "", "", "", "./", "/", "x/../", "../", "//./"]),
        prop::sample::select(vec![
            0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7, 7, 8, 9,
        ]),
        prop::sample::select(links),
        any::<Index>(),
        prop_oneof![Just(0), 1..2000u16],
    );
    let attributes = (
        prop::sample::select(vec![0o644, 0o755, 0o4755, 0o1777, 0o2700, 0o6711, 0o0]),
        prop::sample::select(vec![
            (0, 0),
            (1000, 1000),
            (65534, 3),
            (3_000_000, 7),
            (7, 4_294_967_294),
        ]),
        (
            0..2_000_000_000u64,
            prop_oneof![Just(0), 0..1_000_000_000u32],
        ),
        prop::collection::vec(any::<u8>(), 0..40),
        Style::any(),
    );
    (what, attributes).prop_map(
        |((path, prefix, kind, link, index, len), (mode, owner, mtime, value, style))| Pick {
            path,
            prefix,
            kind,
            link,
            index,
            len,
            mode,
            owner,
            mtime,
            value,
            style,
        },
    )
}

/// One to four layers. One stack in ten has a fault.
pub(super) fn stacks() -> impl Strategy<Value = Vec<Layer>> {
    let layers = prop::collection::vec(
        (prop::collection::vec(picks(), 1..14), Packing::any()),
        1..5,
    );
    let fault = prop::option::weighted(0.1, (any::<Index>(), Fault::any()));
    (layers, fault).prop_map(|(layers, fault)| {
        let mut below = Below::default();
        let layers = layers.into_iter();
        let mut layers: Vec<_> = layers
            .map(|(picks, packing)| Layer {
                packing,
                ..below.layer(picks)
            })
            .collect();
        forget_setgid(&mut layers);
        if let Some((index, fault)) = fault {
            spoil(&mut layers, index, fault);
        }
        layers
    })
}

/// What nobody names gets its group from a setgid directory that is there already: one of a lower layer, too, as long
/// as the deletions are put before the rest for containerd.
fn forget_setgid(layers: &mut [Layer]) {
    let is_deletion = |entry: &Entry| matches!(entry.kind, Kind::Whiteout | Kind::Opaque);
    let last = { layers.iter() }.rposition(|layer| layer.entries.iter().any(is_deletion));
    let layers = layers.iter_mut().take(last.map_or(0, |last| last + 1));
    for entry in layers.flat_map(|layer| &mut layer.entries) {
        if entry.kind == Kind::Directory {
            entry.mode &= !0o2000;
        }
    }
}

/// Gives a fault to one of the entries that containerd's order of them keeps.
fn spoil(layers: &mut [Layer], index: Index, fault: Fault) {
    let entries = layers.iter_mut().flat_map(|layer| &mut layer.entries);
    let is_fit = |entry: &&mut Entry| match entry.kind {
        Kind::Whiteout | Kind::Opaque | Kind::Global => false,
        Kind::File(_) => true,
        // Types without data have no size.
        _ => fault != Fault::NegativeSize,
    };
    let mut fit: Vec<_> = entries.filter(is_fit).collect();
    if !fit.is_empty() {
        let entry = index.index(fit.len());
        fit[entry].style = fit[entry].style.with(fault);
        fit[entry].fault = Some(fault);
    }
}

/// What the layers so far have made.
#[derive(Debug, Default)]
struct Below {
    /// Names that have been something else than one and the same directory in all layers. What containerd
    /// gives a directory below one that no entry names, depends on hidden files.
    changed: BTreeSet<String>,
}

/// What the layer that is being made has.
#[derive(Debug, Default)]
struct Made {
    layer: Layer,
    /// All but deletions.
    kinds: BTreeMap<String, Kind>,
    deleted: BTreeSet<String>,
    opaque: BTreeSet<String>,
    /// What hard links can lead to.
    files: Vec<String>,
    /// Directories that were something else before. What is deleted below them was skipped, or is gone.
    replaced: BTreeSet<String>,
}

impl Made {
    fn is_link(&self, path: &str) -> bool {
        matches!(self.kinds.get(path), Some(Kind::Symlink(_)))
    }

    /// Where a path leads; none: in a circle.
    fn followed(&self, path: &str) -> Option<String> {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            let link = ancestors(&path).find_map(|above| match self.kinds.get(above) {
                Some(Kind::Symlink(target)) => Some((above.to_owned(), target)),
                _ => None,
            });
            let Some((link, target)) = link else {
                return Some(path);
            };
            let rest = &path[link.len() + 1..];
            let above = link.rsplit_once('/').map_or("", |(above, _)| above);
            let led = match target.starts_with('/') {
                true => format!("{target}/{rest}"),
                false => format!("{above}/{target}/{rest}"),
            };
            let mut clean: Vec<&str> = Vec::new();
            for component in led.split('/') {
                match component {
                    "" | "." => {}
                    ".." => drop(clean.pop()),
                    component => clean.push(component),
                }
            }
            path = clean.join("/");
        }
        None
    }

    fn lies_below_link(&self, path: &str) -> bool {
        ancestors(path).any(|above| self.is_link(above))
    }

    /// Directories whose attributes no entry tells.
    fn unnamed(&self) -> impl Iterator<Item = &String> {
        self.layer.touched.difference(&self.layer.named)
    }
}

impl Below {
    fn layer(&mut self, picks: Vec<Pick>) -> Layer {
        let mut made = Made::default();
        for pick in picks {
            if let Some(kind) = kind_of(&pick, &made)
                && !self.leads_to_changed(&pick.path, &made)
            {
                self.add(&mut made, pick, kind);
            }
        }
        let is_other = |(path, kind): (String, Kind)| (kind != Kind::Directory).then_some(path);
        self.changed
            .extend(made.kinds.into_iter().filter_map(is_other));
        self.changed.extend(made.deleted);
        self.changed.extend(made.opaque);
        made.layer
    }

    /// Whether a path leads through links to where it is not clear what a directory is like that no entry names.
    fn leads_to_changed(&self, path: &str, made: &Made) -> bool {
        made.lies_below_link(path)
            && made.followed(path).is_none_or(|led| {
                ancestors(&led).any(|it| self.changed.contains(it) || made.deleted.contains(it))
            })
    }

    fn add(&self, made: &mut Made, pick: Pick, kind: Kind) {
        if kind != Kind::Global {
            let is_deletion = matches!(kind, Kind::Whiteout | Kind::Opaque);
            if made.lies_below_link(&pick.path) {
                made.layer.leads_through_links |= !is_deletion;
            } else {
                self.name_parents(made, &pick, kind == Kind::Opaque);
            }
            let above = ancestors(&pick.path).map(str::to_owned);
            made.layer.touched.extend(above);
            match &kind {
                Kind::Whiteout => {
                    made.deleted.insert(pick.path.clone());
                }
                Kind::Opaque => {
                    made.layer.touched.insert(pick.path.clone());
                    made.opaque.insert(pick.path.clone());
                }
                kind => {
                    if *kind == Kind::Directory {
                        made.layer.named.insert(pick.path.clone());
                        made.layer.touched.insert(pick.path.clone());
                    } else {
                        made.files.push(pick.path.clone());
                    }
                    let kind = match kind {
                        // Which is a further name of a symlink.
                        Kind::HardLink(target) if made.is_link(target) => {
                            made.kinds[target].clone()
                        }
                        kind => kind.clone(),
                    };
                    let before = made.kinds.get(&pick.path);
                    if kind == Kind::Directory && !matches!(before, None | Some(Kind::Directory)) {
                        made.replaced.insert(pick.path.clone());
                    }
                    made.kinds.insert(pick.path.clone(), kind);
                }
            }
        }
        let xattrs = match &kind {
            Kind::Directory => vec![("user.directory".to_owned(), pick.value.clone())],
            Kind::File(_) | Kind::HardLink(_) if pick.len.is_multiple_of(3) => vec![
                ("user.file".to_owned(), pick.value.clone()),
                ("user.é".to_owned(), vec![]),
            ],
            _ => Vec::new(),
        };
        made.layer.entries.push(Entry {
            path: pick.path,
            prefix: pick.prefix,
            kind,
            mode: pick.mode,
            owner: pick.owner,
            mtime: pick.mtime,
            xattrs,
            style: pick.style,
            fault: None,
        });
    }

    /// Makes entries for the directories on the way whose attributes nobody else tells.
    fn name_parents(&self, made: &mut Made, pick: &Pick, and_itself: bool) {
        let own = and_itself.then_some(pick.path.as_str());
        for above in ancestors(&pick.path).chain(own) {
            let is_hidden = |path: &str| self.changed.contains(path) || made.deleted.contains(path);
            let is_unclear = is_hidden(above)
                || ancestors(above).any(|path| is_hidden(path) || made.opaque.contains(path));
            if !is_unclear || made.layer.named.contains(above) {
                continue;
            }
            match made.kinds.get(above) {
                None | Some(Kind::Directory) => {}
                // A deletion below a file of the layer.
                Some(_) => return,
            }
            made.kinds.insert(above.to_owned(), Kind::Directory);
            made.layer.named.insert(above.to_owned());
            made.layer.touched.insert(above.to_owned());
            made.layer.entries.push(Entry {
                path: above.to_owned(),
                prefix: "",
                kind: Kind::Directory,
                mode: 0o750,
                owner: pick.owner,
                mtime: pick.mtime,
                xattrs: vec![("user.directory".to_owned(), b"named".to_vec())],
                style: Style::default(),
                fault: None,
            });
        }
    }
}

/// What a pick becomes, if it becomes anything.
fn kind_of(pick: &Pick, made: &Made) -> Option<Kind> {
    let path = pick.path.as_str();
    let kind = match pick.kind {
        0 => Kind::File(pick.len),
        1 => Kind::Directory,
        2 => Kind::Symlink(pick.link.to_owned()),
        3 if made.files.is_empty() => return None,
        3 => Kind::HardLink(pick.index.get(&made.files).clone()),
        4 => Kind::Fifo,
        5 => Kind::CharDevice(1, u32::from(pick.len) + 1),
        6 => Kind::BlockDevice(259, u32::from(pick.len) << 8),
        7 => Kind::Whiteout,
        8 => Kind::Opaque,
        _ => return Some(Kind::Global),
    };
    let lies_below_replaced = ancestors(path).any(|above| made.replaced.contains(above));
    let is_fit = match kind {
        Kind::Whiteout => {
            let is_unclear = made.unnamed().any(|below| is_at_or_below(below, path));
            !made.layer.leads_through_links && !is_unclear && !lies_below_replaced
        }
        Kind::Opaque => {
            let is_unclear = made.unnamed().any(|below| is_below(below, path));
            let is_blocked = made
                .kinds
                .iter()
                .any(|(other, kind)| is_at_or_below(path, other) && *kind != Kind::Directory);
            let is_blocked = is_blocked || lies_below_replaced || made.replaced.contains(path);
            !made.layer.leads_through_links && !is_unclear && !is_blocked
        }
        _ => {
            let deletes = !made.deleted.is_empty() || !made.opaque.is_empty();
            // containerd sets the time of a directory in the end, on what is there then, and where a symlink
            // leads.
            let is_replaced = match made.kinds.get(path) {
                Some(Kind::Directory) => kind != Kind::Directory,
                Some(Kind::Symlink(_)) => true,
                _ => false,
            };
            let holds_others = made.kinds.keys().any(|other| is_below(other, path))
                || made.opaque.iter().any(|other| is_at_or_below(other, path));
            // What is deleted below a file, and so skipped, is not deleted in a directory that replaces it.
            let deletes_below_file = kind == Kind::Directory
                && !matches!(made.kinds.get(path), None | Some(Kind::Directory))
                && { made.deleted.iter().chain(&made.opaque) }.any(|other| is_below(other, path));
            let is_below_file = ancestors(path).any(|above| match made.kinds.get(above) {
                None | Some(Kind::Directory | Kind::Symlink(_)) => false,
                Some(_) => true,
            });
            !(made.lies_below_link(path) && deletes
                || is_replaced
                || deletes_below_file
                || kind != Kind::Directory && holds_others
                || is_below_file)
        }
    };
    is_fit.then_some(kind)
}
