//! `transship push NAME REF`

use std::path::PathBuf;

use serde::Serialize;
use transship_engine::registry::{self, Reached};
use transship_engine::restore::open;
use transship_engine::timeline::human_bytes;
use transship_engine::{Error, Progress as _, Result};
use transship_package::oci::{self, Reference, Registry, StoreOptions, Stored};
use transship_package::signature::Signer;

use super::{print, store};
use crate::args::{Global, PushArgs, RegistryArgs};
use crate::progress::Progress;

/// What is there now.
#[derive(Serialize)]
struct Done {
    reference: String,
    #[serde(flatten)]
    stored: Stored,
}

pub(crate) fn run(global: &Global, args: &PushArgs) -> Result<()> {
    let checkpoint = open(&store(), &args.name)?;
    let _in_use = checkpoint.lock_for_reading()?;
    if args.reference.is_digest() {
        let message = format!("{} is a digest: what is pushed gets a tag", args.reference);
        return Err(Error::refused(message));
    }
    let registry = connect(&args.reference, &args.registry)?;
    let progress = Progress::new(global.json);
    progress.bytes("push", checkpoint.manifest.size());
    let mut count = progress.counter();
    let tag = &args.reference.tag;
    let options = StoreOptions {
        level: args.level,
        signer: args.sign.as_deref().map(Signer::read).transpose()?,
    };
    let stored = oci::store(&checkpoint, &options, &registry, tag, &mut *count)?;
    drop(progress);
    let done = Done {
        reference: args.reference.to_string(),
        stored,
    };
    print(global, &done, || pushed(&done.reference, &done.stored))
}

/// What was put among blobs, for people.
pub(super) fn pushed(reference: &str, stored: &Stored) -> String {
    format!(
        "{reference} ({})\n{} in {} blobs, of which {} in {} were not there\n",
        stored.digest,
        human_bytes(stored.bytes),
        stored.blobs,
        human_bytes(stored.new_bytes),
        stored.new_blobs
    )
}

/// The registry of a reference, with the credentials that Docker has for it.
pub(super) fn connect(reference: &Reference, args: &RegistryArgs) -> Result<Registry> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
    let config = args.docker_config.clone().or_else(home);
    registry::connect(
        reference,
        &Reached {
            plain_http: args.plain_http,
            skip_verify: args.skip_verify,
            authorities: args.tlscacert.as_deref(),
            docker_config: config.as_deref(),
        },
    )
}
