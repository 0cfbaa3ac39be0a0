//! What comes through a pipe: a checkpoint, or the target's side of a migration.
//!
//! ```text
//!  Begin --> a checkpoint of the store
//!  Offer --> migration     the source's side is engine::migrate
//!              image       blobs and layers, under a lease
//!              restore::hold, start        pod: the same of a pod, through the CRI
//!              commitment  the word that lets what is held go
//!              offered_files   what the source brings is what it has offered
//!              late_pages  memory that comes when the copy runs
//!              durable     on the disk before the source is removed
//!              arrival     the record of how far it has come (held_process);  settle: the end of one that was cut off
//!  Ask   --> what became of a migration
//! ```
//!
//! The target makes nothing that it cannot take back until the source says `Commit`; the protocol
//! is drawn in `transship_checkpoint::wire`. What it makes, and how much it takes, is in the
//! [`Request`]: the sender has no part in it.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use transship_checkpoint::manifest::Manifest;
use transship_checkpoint::store::{Checkpoint, Draft, Durability, Store};
use transship_checkpoint::wire::{
    Arriving, Check, Limits, Message, Outcome, Signed, WireError, unexpected,
};
use transship_containerd::Containerd;
use transship_package::signature::{SIGNATURE_FILE, TrustedKeys};
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};

use crate::conversation::{Conversation, LINK_PATIENCE, Reading};
use crate::error::{Context, Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::node_id::node_id;
use crate::origin::Origins;
use crate::progress::Progress;
use crate::restore::Target;
use crate::retention::{check_quota, most_taken};
use crate::room::KEEP_FREE;
use crate::sharing::share;

mod arrival;
mod commitment;
mod durable;
mod held_process;
mod image;
mod late_pages;
mod leases;
mod migration;
mod offered_files;
mod pod;
mod settle;

pub use arrival::{Arrivals, new_migration};
pub use settle::{Settled, run_guard, settle_all};

/// How long the sender of a checkpoint may be silent: it has nobody frozen, and its disk may be slow.
const STREAM_PATIENCE: Duration = Duration::from_secs(5 * 60);

/// What the operator of this node lets come.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name under which a checkpoint is kept; none: the one it has.
    pub name: Option<String>,
    /// How a container that is migrated here is made.
    pub target: Target,
    /// Bytes that are taken, at most.
    pub max_size: Option<u64>,
    /// Whether somebody else makes the pod that is migrated here, with the annotation that names the migration.
    pub wait_for_pod: bool,
    /// How long the link of a migration may be silent.
    pub link_patience: Duration,
    /// Addresses of this node at which the source may connect directly; none: it may not.
    pub data_addresses: Vec<IpAddr>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            name: None,
            target: Target::default(),
            max_size: None,
            wait_for_pod: false,
            link_patience: LINK_PATIENCE,
            data_addresses: Vec::new(),
        }
    }
}

/// What has come.
#[derive(Debug)]
pub enum Received {
    /// A checkpoint of the store.
    Checkpoint(Box<Checkpoint>),
    /// A container that runs here now.
    Migrated {
        /// Its id.
        container: String,
        /// Process id of its first process.
        pid: u32,
    },
    /// Nothing: the source of an earlier migration has asked what became of it.
    Asked(Outcome),
}

/// Receives a checkpoint or a migration. `connect` makes the connection to containerd, which a
/// checkpoint does not need.
///
/// # Errors
/// Nothing of it is left then. One that the other side has caused is told to it, and is a
/// [`WireError::Failed`] here.
pub async fn receive(
    connect: impl AsyncFnOnce() -> Result<Containerd>,
    store: &Store,
    request: Request,
    (input, output): (impl Read + Send + 'static, impl Write + Send + 'static),
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Received> {
    let mut conversation = Conversation::new(input, output, interrupt.clone());
    match conversation.receive("a checkpoint or a migration").await? {
        Message::Begin { name } => {
            conversation.wait_at_most(STREAM_PATIENCE.max(request.link_patience));
            let name = request.name.clone().unwrap_or(name);
            let limits = Limits {
                max_bytes: most_taken(store, Path::new(NODE_CONFIG), request.max_size)?,
                keep_free: KEEP_FREE,
            };
            let draft = store.draft(&name)?;
            let arriving = Arriving::into_dir(draft.dir(), limits, Check::Sha256);
            let (manifest, signed) = receive_files(&mut conversation, arriving, progress).await?;
            let config = Path::new(NODE_CONFIG);
            let rules =
                NodeConfig::read(config).context("cannot tell whose checkpoints are taken")?;
            let keys = &rules.checkpoints.signed_by;
            let named = named_and_signed(manifest, &name, signed.as_deref(), keys)?;
            check_quota(store, config, named.0.size())?;
            let checkpoint = keep_signed(draft, named, signed).await?;
            let trusted = TrustedKeys::parse(keys.iter().map(String::as_str))?;
            Origins::of_node().compared(&checkpoint, &trusted)?;
            let shared = (store.clone(), checkpoint.clone());
            tokio::task::spawn_blocking(move || share(&shared.0, &shared.1)).await?;
            Ok(Received::Checkpoint(Box::new(checkpoint)))
        }
        Message::Offer(offer) => {
            conversation.watch(request.link_patience)?;
            let accepted = async {
                let node = connect().await?;
                migration::accept(
                    &node,
                    store,
                    &mut conversation,
                    *offer,
                    &request,
                    (interrupt, progress),
                )
                .await
            };
            let result = accepted.await;
            if let Err(error) = &result {
                tell(&mut conversation, error).await;
            }
            result
        }
        Message::Ask { migration } => {
            conversation.watch(request.link_patience)?;
            let answer = async {
                let node = connect().await?;
                let outcome =
                    settle::outcome(&node, store, &Arrivals::default(), &migration).await?;
                Ok::<_, Error>((outcome, node_id()?))
            };
            match answer.await {
                Ok((outcome, node)) => {
                    let told = conversation.send(Message::Answer { outcome, node }).await;
                    conversation.close();
                    told.map(|()| Received::Asked(outcome))
                }
                Err(error) => {
                    conversation.give_up(error.one_line()).await;
                    Err(error)
                }
            }
        }
        other => Err(unexpected("a checkpoint or a migration", &other).into()),
    }
}

/// Ends the conversation with a source whose migration has failed here, for it to go on.
async fn tell(conversation: &mut Conversation, error: &Error) {
    if comes_from_the_other_side(error) {
        return;
    }
    match error.kind() {
        // It must not hear that the copy does not run; it asks.
        Kind::Uncertain => conversation.close(),
        _ => conversation.give_up(error.one_line()).await,
    }
}

/// Whether the other side knows already, because it is the one that has failed.
pub fn comes_from_the_other_side(error: &crate::error::Error) -> bool {
    matches!(error.cause::<WireError>(), Some(WireError::Failed { .. }))
}

/// Receives the files of a checkpoint, and compares them with its manifest.
async fn receive_files(
    conversation: &mut Conversation,
    arriving: Arriving,
    progress: &dyn Progress,
) -> Result<(Manifest, Option<Box<Signed>>)> {
    progress.step("receive");
    let count = Arc::new(Mutex::new(progress.counter()));
    let arriving = Arc::new(arriving);
    let end = {
        let arriving = Arc::clone(&arriving);
        let step = move |receiver: &mut Reading| {
            receiver.receive_files(&arriving, &mut |bytes| {
                if let Ok(mut count) = count.lock() {
                    count(bytes);
                }
            })
        };
        conversation.read_files(step).await?
    };
    let arriving =
        Arc::into_inner(arriving).ok_or_else(|| Error::failed("a file still arrives"))?;
    match end {
        Message::End { manifest, signed } => Ok((arriving.compare(&manifest)?, signed)),
        other => Err(unexpected("the end of the checkpoint", &other).into()),
    }
}

/// The manifest under the name that it gets here, and its bytes. One of `keys` has signed it, where there are any; under
/// another name nobody has.
fn named_and_signed(
    mut manifest: Manifest,
    name: &str,
    signed: Option<&Signed>,
    keys: &[String],
) -> Result<(Manifest, Vec<u8>)> {
    let json = signed.map_or(&b""[..], |it| it.json.as_bytes());
    let trusted = TrustedKeys::parse(keys.iter().map(String::as_str))?;
    trusted.check(json, signed.map(|it| it.signature.as_str()))?;
    if signed.is_none() {
        name.clone_into(&mut manifest.name);
        // One from the future would be the newest of its pod for ever.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        manifest.created = manifest
            .created
            .min(now.map_or(u64::MAX, |it| it.as_secs()));
        let json = manifest.to_json();
        return Ok((manifest, json));
    }
    if Manifest::parse(json)? != manifest {
        return Err(Error::refused("what is signed is of another checkpoint"));
    }
    if manifest.name != name {
        let message = format!(
            "it is signed under the name that it has, {:?}",
            manifest.name
        );
        return Err(Error::refused(message).hint("without --name"));
    }
    Ok((manifest, json.to_vec()))
}

async fn keep(draft: Draft, manifest: Manifest, durability: Durability) -> Result<Checkpoint> {
    tokio::task::spawn_blocking(move || draft.commit(manifest, durability))
        .await
        .context("the checkpoint was not kept")?
        .map_err(Into::into)
}

async fn keep_signed(
    draft: Draft,
    (manifest, json): (Manifest, Vec<u8>),
    signed: Option<Box<Signed>>,
) -> Result<Checkpoint> {
    tokio::task::spawn_blocking(move || {
        if let Some(signed) = signed {
            let path = draft.dir().join(SIGNATURE_FILE);
            let written = std::fs::write(&path, &signed.signature);
            written.with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(draft.commit_as(manifest, &json, Durability::Synced)?)
    })
    .await
    .context("the checkpoint was not kept")?
}

#[cfg(test)]
mod tests {
    use transship_package::signature::Signer;

    use super::*;

    #[test]
    fn what_the_node_s_keys_have_not_signed_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        std::fs::write(
            &key,
            include_bytes!("../../package/tests/fixtures/minisign.key"),
        )
        .unwrap();
        let manifest = Manifest {
            name: "web".into(),
            created: 1,
            ..Manifest::default()
        };
        let json = String::from_utf8(manifest.to_json()).unwrap();
        let signed = Signed {
            signature: Signer::read(&key).unwrap().sign(json.as_bytes()).unwrap(),
            json,
        };
        let take = |name: &str, signed: Option<&Signed>, keys: &[String]| {
            named_and_signed(manifest.clone(), name, signed, keys)
        };
        let keys = ["RWThgSI8U3mWXyR4obbFHrJWAiO5hyezKvOkATr62ipuRZ473CZ9VTE8".to_owned()];
        let (taken, json) = take("web", Some(&signed), &keys).unwrap();
        assert_eq!(
            (taken, json),
            (manifest.clone(), signed.json.clone().into_bytes())
        );
        take("web", Some(&signed), &[]).unwrap();
        assert_eq!(take("other", None, &[]).unwrap().0.name, "other");
        let future = Manifest {
            created: u64::MAX,
            ..manifest.clone()
        };
        let taken = named_and_signed(future, "web", None, &[]).unwrap().0;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(taken.created <= now.as_secs());
        let said = |name, signed, keys: &[String]| take(name, signed, keys).unwrap_err().one_line();
        assert!(said("web", None, &keys).contains("is not signed"));
        assert!(said("other", Some(&signed), &keys).contains("under the name"));
        let mut changed = signed.clone();
        changed.json = changed.json.replace("\"web\"", "\"wee\"");
        assert!(said("wee", Some(&changed), &keys).contains("none of the keys"));
        assert!(said("web", Some(&changed), &[]).contains("of another checkpoint"));
    }
}
