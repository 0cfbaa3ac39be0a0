//! `transship inspect NAME|FILE|REF`

use std::fs::File;
use std::path::Path;

use transship_engine::{Context as _, Error, Kind, Result};
use transship_package::contents::Contents;
use transship_package::layer_changes::Digests;
use transship_package::look::look;
use transship_package::oci::{Blobs, Layout, Offered, Reference};

use super::import::only_tag;
use super::keys::identities;
use super::push::connect as registry_of;
use super::{opened, print};
use crate::args::{Global, InspectArgs};

mod text;

pub(crate) fn run(global: &Global, args: &InspectArgs) -> Result<()> {
    let path = Path::new(&args.name);
    if let Some(place) = args.name.strip_prefix("oci:") {
        let (contents, note) = look_into_layout(place, args)?;
        return print(global, &contents, || text::text(&contents, &note, args.all));
    }
    let found = match args.name.contains('/') {
        true => Err(Error::not_found(format!("there is no file {}", args.name))),
        false => opened(&args.name, &args.keys, global.json),
    };
    let (contents, note) = match found {
        Err(error) if error.kind() == Kind::NotFound && path.is_file() => {
            let file = File::open(path);
            let file = file.with_context(|| format!("cannot open {}", path.display()))?;
            let looked = look(file, &identities(&args.keys)?, Digests::LeftOut)?;
            let mut note = ", every digest is right".to_owned();
            if looked.encrypted {
                note += ", encrypted";
            }
            if looked.signed {
                note += ", signed";
            }
            (looked.contents, note)
        }
        Err(error) if error.kind() == Kind::NotFound => match args.name.parse::<Reference>() {
            Ok(reference) => look_into_registry(&reference, args)?,
            Err(_) => return Err(error),
        },
        found => {
            let opened = found?;
            let checkpoint = &opened.checkpoint;
            let mut note = String::new();
            if opened.was_sealed() {
                note += ", sealed";
            }
            if args.verify {
                checkpoint.verify()?;
                note += ", every digest is right";
            }
            (Contents::of(checkpoint, Digests::LeftOut)?, note)
        }
    };
    print(global, &contents, || text::text(&contents, &note, args.all))
}

fn look_into_registry(reference: &Reference, args: &InspectArgs) -> Result<(Contents, String)> {
    let registry = registry_of(reference, &args.registry)?;
    look_at_blobs(&registry, &reference.tag, args)
}

/// `DIR` or `DIR:TAG`.
fn look_into_layout(place: &str, args: &InspectArgs) -> Result<(Contents, String)> {
    let (dir, tag) = match place.rsplit_once(':') {
        Some((dir, tag)) if !Path::new(place).is_dir() => (dir, Some(tag.to_owned())),
        _ => (place, None),
    };
    let dir = Path::new(dir);
    let layout = Layout::open(dir)?;
    let tag = match tag {
        Some(tag) => tag,
        None => only_tag(&layout, dir)?,
    };
    look_at_blobs(&layout, &tag, args)
}

fn look_at_blobs(blobs: &dyn Blobs, tag: &str, args: &InspectArgs) -> Result<(Contents, String)> {
    let identities = identities(&args.keys)?;
    let offered = Offered::read(blobs, tag, &identities, None)?;
    let contents = offered.look(blobs, &identities, Digests::LeftOut)?;
    let mut note = match offered.is_encrypted() {
        true => ", every digest is right, encrypted",
        false => ", memory was not fetched",
    }
    .to_owned();
    if offered.is_signed() {
        note += ", signed";
    }
    Ok((contents, note))
}
