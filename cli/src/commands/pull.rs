//! `transship pull REF`

use serde::Serialize;
use transship_engine::timeline::human_bytes;
use transship_engine::{Progress as _, Result};
use transship_package::encryption::Identities;
use transship_package::import::ImportOptions;
use transship_package::oci;

use super::import::{architecture, trusted_keys};
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
        identities: Identities::default(),
        trusted: trusted_keys(&args.signed_by)?,
        max_bytes: args.max_size.unwrap_or(u64::MAX),
        architecture: architecture()?,
    };
    let registry = connect(&args.reference, &args.registry)?;
    let progress = Progress::new(global.json);
    progress.bytes("pull", 0);
    let mut count = progress.counter();
    let tag = &args.reference.tag;
    let checkpoint = oci::restore(&registry, tag, &store(), &options, &mut *count)?;
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
