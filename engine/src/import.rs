//! A package as a checkpoint of this node. The archive of another engine names its image by digest: it becomes
//! a checkpoint when this node has that image, whatever its name means here.
//!
//! What comes encrypted stays so (sealed.rs): with its keys it is only looked through, in memory.

use std::io::{BufReader, Read};

use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::store::{Checkpoint, Store};
use transship_containerd::Containerd;
use transship_package::PackageError;
use transship_package::encryption::{EncryptionError, is_encrypted};
use transship_package::foreign::ForeignCheckpoint;
use transship_package::import::{ImportOptions, Imported, import as read};
use transship_package::oci::{Blobs, Offered};

use crate::error::{Error, Result};
use crate::origin::Origins;
use crate::progress::Progress;
use crate::sealed::{keep_fetched, keep_sealed, memory_to_look};
use crate::sharing::share;
use crate::shell_words::command_line;

/// Bytes of a package that are looked at before anything is made of it.
const BEGIN: usize = 64 << 10;

/// How what was encrypted lies on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    /// As it came.
    Sealed,
    /// As if it had never been encrypted: its memory comes onto the disk.
    InClear,
}

/// A checkpoint that was read, and from where.
#[derive(Debug)]
pub struct ReadPackage {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The engine that had written it; none: transship.
    pub engine: Option<&'static str>,
    /// Members of its archive that were not taken.
    pub left_out: Vec<String>,
}

/// Reads a package of transship, or the archive of another engine, into `store`. `connect` gives this node's
/// containerd, which is asked for the image of the latter.
///
/// # Errors
/// Nothing is left of it then.
pub async fn import(
    input: impl Read,
    store: &Store,
    (options, lies): (&ImportOptions, Lies),
    connect: impl AsyncFnOnce() -> Result<Containerd>,
    progress: &dyn Progress,
) -> Result<ReadPackage> {
    progress.bytes("import", 0);
    let mut input = BufReader::with_capacity(BEGIN, input);
    if lies == Lies::Sealed && is_encrypted(&mut input).map_err(PackageError::reading)? {
        if options.identities.is_empty() {
            return Err(PackageError::from(EncryptionError::NoIdentity).into());
        }
        // What it is called is inside of it; two at once, or one that is called so, are not in each other's way.
        let unnamed = || format!("imported-{}", std::process::id());
        let name = options.name.clone().unwrap_or_else(unnamed);
        return Ok(ReadPackage {
            checkpoint: keep_sealed(input, store, &name, options, progress)?,
            engine: None,
            left_out: Vec::new(),
        });
    }
    match read(input, store, options, &mut *progress.counter())? {
        Imported::Checkpoint(checkpoint) => {
            let recorded = Origins::of_node().compared(&checkpoint, &options.trusted);
            Origins::or_remove(store, &checkpoint.manifest.name, recorded)?;
            share(store, &checkpoint);
            Ok(ReadPackage {
                checkpoint,
                engine: None,
                left_out: Vec::new(),
            })
        }
        Imported::Foreign(foreign) => {
            let node = connect().await?;
            let node = match foreign.is_of_pod() {
                true => node.in_namespace(CRI_NAMESPACE)?,
                false => node,
            };
            let (digest, chain_id) = find_base(&node, &foreign, &options.architecture).await?;
            Ok(ReadPackage {
                engine: Some(foreign.engine.name()),
                left_out: foreign.left_out.clone(),
                checkpoint: foreign.commit(&digest, &chain_id)?,
            })
        }
    }
}

/// Makes a checkpoint of what has the tag `tag` among blobs.
///
/// # Errors
/// It is none, or cannot be had. Nothing of it is left then, but for what has come when the blobs cannot be had for now: the
/// next attempt goes on with it.
pub fn import_blobs(
    blobs: &dyn Blobs,
    tag: &str,
    store: &Store,
    (options, lies): (&ImportOptions, Lies),
    act: &str,
    progress: &dyn Progress,
) -> Result<Checkpoint> {
    let offered = Offered::read(blobs, tag, &options.identities, Some(options))?;
    let name = options.name.as_deref().unwrap_or(offered.name());
    store.check_free(name)?;
    progress.bytes(
        act,
        match offered.is_encrypted() {
            true => offered.package_bytes(),
            false => offered.bytes(),
        },
    );
    let taken = take_offered(
        &offered,
        blobs,
        store,
        (options, lies),
        &mut *progress.counter(),
    );
    taken.map_err(|error| {
        let passing = error.cause::<PackageError>();
        match passing.is_some_and(PackageError::is_passing) {
            true => error.hint("try again later: what has come is kept for a day"),
            false => error,
        }
    })
}

/// Makes a checkpoint of one that is offered. `progress` gets the bytes that come.
pub(crate) fn take_offered(
    offered: &Offered,
    blobs: &dyn Blobs,
    store: &Store,
    (options, lies): (&ImportOptions, Lies),
    progress: &mut dyn FnMut(u64),
) -> Result<Checkpoint> {
    if !offered.is_encrypted() || lies == Lies::InClear {
        let checkpoint = offered.restore(blobs, store, options, progress)?;
        let recorded = Origins::of_node().compared(&checkpoint, &options.trusted);
        Origins::or_remove(store, &checkpoint.manifest.name, recorded)?;
        share(store, &checkpoint);
        return Ok(checkpoint);
    }
    let memory = memory_to_look(store, offered.bytes())?;
    let package = offered.fetch_package(blobs, store, options.max_bytes, progress)?;
    keep_fetched(package, store, &memory, options)
}

/// The digest of the config of the image that a container of a checkpoint has below its files.
///
/// # Errors
/// This node does not have it.
pub async fn config_of_base(
    node: &Containerd,
    container: &transship_checkpoint::manifest::Container,
) -> Result<String> {
    let wanted = &container.image.chain_id;
    for image in node.images().await? {
        let Some(target) = image.target else { continue };
        let bases = node.image_bases(&target).await?;
        if let Some(base) = bases.into_iter().find(|it| it.chain_id == *wanted) {
            return Ok(base.config);
        }
    }
    let (name, namespace) = (&container.image.name, node.namespace());
    let message =
        format!("the namespace {namespace:?} of this node does not have the image {name}");
    Err(Error::refused(message).hint(pull_command(namespace, name)))
}

/// Digest and chain id of the image below the files of the archive.
async fn find_base(
    node: &Containerd,
    foreign: &ForeignCheckpoint,
    architecture: &str,
) -> Result<(String, String)> {
    let (name, digest) = (foreign.image_name(), foreign.image_digest());
    for image in node.images().await? {
        let Some(target) = image.target else { continue };
        let bases = node.image_bases(&target).await?;
        let fits = |of: &str| match digest {
            "" => image.name == name,
            digest => of == digest,
        };
        let here = bases
            .iter()
            .filter(|it| it.architecture == go_name(architecture));
        for base in here {
            if fits(&target.digest) || fits(&base.manifest) || fits(&base.config) {
                return Ok((target.digest, base.chain_id.clone()));
            }
        }
    }
    let called = match digest {
        "" => name.to_owned(),
        digest => format!("{name} ({digest})"),
    };
    let namespace = node.namespace();
    let message = format!(
        "the archive is of a container of the image {called}, which is not in the namespace {namespace:?} of \
         this node"
    );
    let reference = match (digest, name.rsplit_once(':')) {
        ("", _) => name.to_owned(),
        (digest, Some((repository, tag))) if !tag.contains('/') => format!("{repository}@{digest}"),
        (digest, _) => format!("{name}@{digest}"),
    };
    Err(Error::refused(message).hint(pull_command(namespace, &reference)))
}

/// The command by which a node gets an image, whoever has named it.
pub(crate) fn pull_command(namespace: &str, image: &str) -> String {
    command_line(&["ctr", "-n", namespace, "images", "pull", image])
}

/// What Go, and so an image, calls a machine.
fn go_name(machine: &str) -> &str {
    match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
