//! `transship pull REF`

use serde::Serialize;
use transship_checkpoint::store::Checkpoint;
use transship_engine::import::architecture;
use transship_engine::timeline::human_bytes;
use transship_engine::{Error, Progress as _, Result};
use transship_package::PackageError;
use transship_package::import::ImportOptions;
use transship_package::oci::{Blobs, Offered};

use super::import::trusted_keys;
use super::inspect::identities;
use super::push::connect;
use super::{print, store};
use crate::args::{Global, PullArgs};
use crate::progress::Progress;

/// What came.
#[derive(Serialize)]
struct Done {
    name: String,
    directory: String,
    bytes: u64,
}

pub(crate) fn run(global: &Global, args: PullArgs) -> Result<()> {
    let options = ImportOptions {
        name: args.name,
        name_without: String::new(),
        identities: identities(&args.keys)?,
        trusted: trusted_keys(&args.signed_by)?,
        max_bytes: args.max_size.unwrap_or(u64::MAX),
        architecture: architecture()?,
    };
    let registry = connect(&args.reference, &args.registry)?;
    let progress = Progress::new(global.json);
    let checkpoint = from_blobs(&registry, &args.reference.tag, &options, "pull", &progress);
    let checkpoint = checkpoint.map_err(|error| {
        let is_passing = error.is_passing();
        let error = Error::from(error);
        match is_passing {
            true => error.hint("try again later: what has come is kept for a day"),
            false => error,
        }
    })?;
    drop(progress);
    let done = Done {
        name: checkpoint.manifest.name.clone(),
        directory: checkpoint.dir.display().to_string(),
        bytes: checkpoint.manifest.size(),
    };
    print(global, &done, || {
        format!("{} ({})\n", done.directory, human_bytes(done.bytes))
    })
}

/// A checkpoint of this node, of what has this tag among blobs.
pub(super) fn from_blobs(
    blobs: &dyn Blobs,
    tag: &str,
    options: &ImportOptions,
    act: &'static str,
    progress: &Progress,
) -> std::result::Result<Checkpoint, PackageError> {
    let offered = Offered::read(blobs, tag, &options.identities, Some(options))?;
    progress.bytes(act, offered.bytes());
    offered.restore(blobs, &store(), options, &mut *progress.counter())
}
