//! `transship pull REF`

use std::path::Path;

use transship_engine::Result;
use transship_engine::import::import_blobs;
use transship_engine::machine::architecture;
use transship_engine::retention::most_taken;
use transship_package::import::ImportOptions;
use transship_sandbox::admission::node_config::NODE_CONFIG;

use super::import::{Done, text};
use super::keys::{identities, trusted_keys};
use super::push::connect;
use super::{print, store};
use crate::args::{Global, PullArgs};
use crate::progress::Progress;

pub(crate) fn run(global: &Global, args: PullArgs) -> Result<()> {
    let options = ImportOptions {
        name: args.name,
        name_without: String::new(),
        identities: identities(&args.keys.keys)?,
        trusted: trusted_keys(&args.signed_by)?,
        max_bytes: most_taken(&store(), Path::new(NODE_CONFIG), args.max_size)?,
        architecture: architecture()?,
    };
    let registry = connect(&args.reference, &args.registry)?;
    let progress = Progress::new(global.json);
    let how = (&options, args.keys.lies());
    let tag = &args.reference.tag;
    let checkpoint = import_blobs(&registry, tag, &store(), how, "pull", &progress)?;
    drop(progress);
    let done = Done::of(&checkpoint);
    print(global, &done, || text(&done))
}
