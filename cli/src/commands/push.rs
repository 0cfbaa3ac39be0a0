//! `transship push NAME REF`

use std::path::PathBuf;

use serde::Serialize;
use transship_checkpoint::shown_text::printable;
use transship_engine::push::{Form, push};
use transship_engine::registry::{self, Reached};
use transship_engine::timeline::human_bytes;
use transship_engine::{Error, Result};
use transship_package::encryption::Recipients;
use transship_package::oci::{Pushed, Reference, Registry, StoreOptions, Stored};
use transship_package::signature::Signer;

use super::{opened_to_leave, print};
use crate::args::{Global, PushArgs, RegistryArgs};
use crate::progress::Progress;

/// What is there now.
#[derive(Serialize)]
struct Done {
    reference: String,
    #[serde(flatten)]
    pushed: Pushed,
}

pub(crate) async fn run(global: &Global, args: PushArgs) -> Result<()> {
    let is_encrypted = !args.encrypt_to.is_empty();
    let opened = opened_to_leave(&args.name, &args.keys, is_encrypted, global.json)?;
    let checkpoint = opened.checkpoint.clone();
    let reference = &args.reference;
    if reference.is_digest() {
        let message = format!("{reference} is a digest: what is pushed gets a tag");
        return Err(Error::refused(message));
    }
    let registry = connect(reference, &args.registry)?;
    let options = StoreOptions {
        level: args.level,
        signer: args.sign.as_deref().map(Signer::read).transpose()?,
    };
    let mut recipients = Recipients::default();
    for text in &args.encrypt_to {
        recipients.add(text)?;
    }
    let form = match (recipients.is_empty(), args.artifact_only) {
        (false, _) => Form::EncryptedTo(recipients),
        (true, true) => Form::Alone,
        (true, false) => Form::WithImages(super::connect(global).await?),
    };
    let progress = Progress::new(global.json);
    let pushed = push(form, checkpoint, options, registry, reference, &progress).await?;
    drop(progress);
    let done = Done {
        reference: reference.to_string(),
        pushed,
    };
    print(global, &done, || text(&done))
}

fn text(done: &Done) -> String {
    let mut text = pushed(&done.reference, &done.pushed.stored);
    let mounted = done.pushed.stored.mounted_bytes;
    if mounted > 0 {
        let mounted = human_bytes(mounted);
        text += &format!("{mounted} were in another repository of the registry\n");
    }
    for image in &done.pushed.images {
        text += &format!("image of {} ({})\n", image.container, image.digest);
        for only in &image.left_out {
            let path = printable(&only.path);
            text += &format!("  only in the checkpoint: {path}, {}\n", only.reason);
        }
        let listed = image.left_out.len() as u64;
        if image.left_out_count > listed {
            text += &format!("  and {} more\n", image.left_out_count - listed);
        }
    }
    text
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
