//! Checkpoints that pods want from registries, fetched in the background.
//!
//! ```text
//!  the sandbox's hook ──> wanted ──> here: is the registry allowed, the checkpoint signed, is there room?
//!                     <── state <──  pulling 34 % ... ready, or why not
//! ```
//!
//! One that fails is tried again when a call wants it again, and goes on with what has come.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use transship_checkpoint::store::Store;
use transship_package::PackageError;
use transship_package::import::ImportOptions;
use transship_package::oci::{Offered, Reference};
use transship_package::signature::TrustedKeys;
use transship_sandbox::SandboxError;
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};
use transship_sandbox::wanted_image::{
    DEFAULT_IMAGES_DIR, PullState, Pulled, WantedImage, list, manifest_digest, serve,
};

use crate::error::{Context as _, Error, Result};
use crate::import::{Lies, take_offered};
use crate::machine::architecture;
use crate::registry::{Reached, connect};
use crate::retention::check_quota;
use crate::sealed::identities_of_node;

/// How often is looked for new ones.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long one is left alone that somebody else fetches, or all, when somebody else serves.
const IN_TRANSFER: Duration = Duration::from_secs(10);
/// Transfers at once; each has several threads.
const AT_ONCE: usize = 2;
/// What nobody has wanted for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Fetches what is wanted, as long as this runs.
pub(crate) async fn fetch_wanted(store: Store) {
    let images = Path::new(DEFAULT_IMAGES_DIR);
    let mut is_told = false;
    let _serving = loop {
        match serve(images) {
            Ok(Some(lock)) => break lock,
            Ok(None) if is_told => {}
            // It may be a hook that looks whether somebody does.
            Ok(None) => {
                tracing::warn!("another process fetches what pods want from registries");
                is_told = true;
            }
            Err(error) => {
                tracing::warn!(%error, "nothing is fetched from registries");
                return;
            }
        }
        tokio::time::sleep(IN_TRANSFER).await;
    };
    // Threads, not tasks: a transfer that is under way does not keep this program from ending.
    // By digest: what two registries have of one is one.
    let mut running: BTreeMap<String, JoinHandle<()>> = BTreeMap::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        running.retain(|_, thread| !thread.is_finished());
        let wanted = list(images).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tell what pods want from registries");
            Vec::new()
        });
        for image in wanted {
            if running.len() < AT_ONCE
                && !running.contains_key(image.digest())
                && has_to_be_fetched(&image)
            {
                let store = store.clone();
                let digest = image.digest().to_owned();
                let fetch = move || fetch(&image, &store);
                running.insert(digest, std::thread::spawn(fetch));
            }
        }
    }
}

fn has_to_be_fetched(image: &WantedImage) -> bool {
    match image.state() {
        Ok(Some(PullState::Ready(_) | PullState::Failed(_))) => image.is_wanted_again(),
        // Nobody has begun, or who has is gone.
        Ok(None | Some(PullState::Pulling(_))) | Err(_) => true,
    }
}

fn fetch(image: &WantedImage, store: &Store) {
    let reference = &image.reference;
    let state = match pull(image, store) {
        Ok(pulled) => {
            tracing::info!(%reference, checkpoint = %pulled.checkpoint, "pulled");
            PullState::Ready(pulled)
        }
        // `transship pull` has it: the state stays, and there is another attempt.
        Err(error) if is_in_transfer(&error) => return std::thread::sleep(IN_TRANSFER),
        Err(error) => {
            let reason = error.one_line();
            tracing::warn!(%reference, %reason, "cannot be pulled");
            PullState::Failed(reason)
        }
    };
    if let Err(error) = image.set_state(&state) {
        tracing::warn!(%reference, %error, "nobody hears how far it is");
    }
}

fn is_in_transfer(error: &Error) -> bool {
    matches!(
        error.cause::<PackageError>(),
        Some(PackageError::InTransfer)
    )
}

fn pull(image: &WantedImage, store: &Store) -> Result<Pulled> {
    image.set_state(&PullState::Pulling(0))?;
    let config = Path::new(NODE_CONFIG);
    let rules = NodeConfig::read(config).context("cannot tell what may be pulled")?;
    let reference: Reference = image.reference.parse()?;
    let (images, keys) = (&rules.images, &rules.checkpoints.signed_by);
    // It may have changed since the pod was asked for.
    if !images.registries.contains(&reference.host) || keys.is_empty() {
        let message = format!("{NODE_CONFIG} does not allow it");
        return Err(Error::refused(message));
    }
    let options = ImportOptions {
        name: None,
        name_without: String::new(),
        identities: identities_of_node(config)?,
        trusted: TrustedKeys::parse(keys.iter().map(String::as_str))?,
        max_bytes: u64::MAX,
        architecture: architecture()?,
    };
    let named = |path: &'_ Path| !path.as_os_str().is_empty();
    let registry = connect(
        &reference,
        &Reached {
            plain_http: images.plain_http.contains(&reference.host),
            skip_verify: false,
            authorities: Some(images.authorities.as_path()).filter(|it| named(it)),
            docker_config: Some(images.docker_config.as_path()).filter(|it| named(it)),
        },
    )?;
    let offered = Offered::read(
        &registry,
        &reference.tag,
        &options.identities,
        Some(&options),
    )?;
    let pulled = Pulled {
        checkpoint: offered.name().to_owned(),
        manifest: offered.manifest_digest(),
        keys: keys.clone(),
    };
    match manifest_digest(store, offered.name()) {
        Some(there) if there == pulled.manifest => return Ok(pulled),
        Some(_) => {
            let name = offered.name();
            let message = format!("this node has another checkpoint that is called {name:?}");
            return Err(Error::refused(message));
        }
        None => {}
    }
    let bytes = match offered.is_encrypted() {
        // What came encrypted does not lie here in clear.
        true => offered.package_bytes(),
        false => offered.bytes(),
    };
    check_quota(store, config, bytes)?;
    let (total, mut came, mut told) = (bytes.max(1), 0_u64, 0);
    let mut progress = |bytes: u64| {
        came = came.saturating_add(bytes);
        let percent = u8::try_from(came.saturating_mul(100) / total).unwrap_or(99);
        // All of it is not yet whole, compared and synced.
        let percent = percent.min(99);
        if percent > told {
            told = percent;
            // The next one will do as well.
            drop(image.set_state(&PullState::Pulling(percent)));
        }
    };
    let how = (&options, Lies::Sealed);
    take_offered(&offered, &registry, store, how, &mut progress)?;
    Ok(pulled)
}

/// Forgets what nobody has wanted for a week.
///
/// # Errors
/// The records cannot be listed or removed.
pub(crate) fn forget_old() -> Result<(), SandboxError> {
    for image in list(Path::new(DEFAULT_IMAGES_DIR))? {
        let age = { image.wanted_at() }.and_then(|it| SystemTime::now().duration_since(it).ok());
        if age.is_some_and(|age| age > FORGOTTEN) {
            image.forget()?;
        }
    }
    Ok(())
}
