//! Where a checkpoint comes from, for a node that asks for signatures (`signed-by` in node.toml): one that it has taken
//! needs none.
//!
//! ```text
//!  checkpoint, migration ──> here ────────────┐
//!  import, pull, receive: signed, compared ───┼──> origins (sandbox/src/origins.rs) ──> restored
//!  anything else: checked when it is restored ┘
//! ```

use std::path::Path;

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::Manifest;
use transship_checkpoint::store::{Checkpoint, Store};
use transship_digest::sha256_hex;
use transship_package::signature::{SIGNATURE_FILE, SIGNATURE_LIMIT, TrustedKeys};
use transship_sandbox::SandboxError;
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};
use transship_sandbox::origins::{DEFAULT_ORIGINS_DIR, Origin, is_known, manifest_of, record};

use crate::error::{Context as _, Error, Result, one_line};

/// Where the records are, and who asks for them.
#[derive(Debug, Clone, Copy)]
pub struct Origins<'a> {
    /// node.toml.
    pub config: &'a Path,
    /// The records.
    pub records: &'a Path,
}

impl Origins<'static> {
    /// Those of this node.
    #[must_use]
    pub fn of_node() -> Self {
        Self {
            config: Path::new(NODE_CONFIG),
            records: Path::new(DEFAULT_ORIGINS_DIR),
        }
    }
}

impl Origins<'_> {
    /// Records that this node makes a checkpoint, before it is at its `place`: a power cut in between must not leave one that
    /// this node takes for somebody else's.
    ///
    /// # Errors
    /// Somebody asks for signatures, and a system call failed; or node.toml cannot be read.
    pub(crate) fn makes_here(&self, manifest: &Manifest, place: &Path) -> Result<()> {
        match self.made_here(manifest, place) {
            Err(error) if self.keys()?.is_empty() => {
                let (name, error) = (&manifest.name, one_line(&error));
                tracing::warn!(
                    "{name:?} counts as one of another node where signatures are asked for: {error}"
                );
                Ok(())
            }
            recorded => Ok(recorded?),
        }
    }

    /// Records that this node has made a checkpoint with this manifest, which is in `dir`.
    ///
    /// # Errors
    /// A system call failed.
    fn made_here(&self, manifest: &Manifest, dir: &Path) -> Result<(), SandboxError> {
        record(
            self.records,
            &sha256_hex(manifest.to_json()),
            &Origin::Here,
            dir,
        )
    }

    /// The same where somebody asks for signatures now: for what lives for one restore.
    ///
    /// # Errors
    /// A system call failed, or node.toml cannot be read.
    pub(crate) fn made_here_for_now(&self, checkpoint: &Checkpoint) -> Result<()> {
        match self.keys()?.is_empty() {
            true => Ok(()),
            false => Ok(self.made_here(&checkpoint.manifest, &checkpoint.dir)?),
        }
    }

    /// Records that one of the keys that are `trusted` has signed a checkpoint of which each file was compared. One that
    /// lies sealed is not: whoever opens it compares it.
    ///
    /// # Errors
    /// It cannot be read, or a system call failed.
    pub(crate) fn compared(&self, checkpoint: &Checkpoint, trusted: &TrustedKeys) -> Result<()> {
        if trusted.is_empty() || checkpoint.sealed.is_some() {
            return Ok(());
        }
        let (json, digest) = manifest_of(&checkpoint.dir)?;
        self.note_signed(checkpoint, &json, &digest, trusted)
    }

    /// Checks that this node may restore a checkpoint.
    ///
    /// # Errors
    /// [`crate::Kind::Refused`]: node.toml asks for a signature of one of its keys, it has none, and this node has not
    /// made it.
    pub fn require(&self, checkpoint: &Checkpoint) -> Result<()> {
        let keys = self.keys()?;
        if keys.is_empty() {
            return Ok(());
        }
        let (json, digest) = manifest_of(&checkpoint.dir)?;
        // Who can write there may have put another one there since it was opened.
        if Manifest::parse(&json)? != checkpoint.manifest {
            let name = &checkpoint.manifest.name;
            return Err(Error::refused(format!("the manifest of {name:?} changes")));
        }
        if is_known(self.records, &digest, &keys)? {
            return Ok(());
        }
        let trusted = TrustedKeys::parse(keys.iter().map(String::as_str))?;
        let checked = || {
            // What is signed is what is compared.
            let signed = Checkpoint {
                manifest: Manifest::parse(&json)?,
                ..checkpoint.clone()
            };
            trusted.check(&json, signature_of(checkpoint)?.as_deref())?;
            signed.verify()?;
            self.note_signed(checkpoint, &json, &digest, &trusted)
        };
        checked().map_err(|error: Error| {
            let name = &checkpoint.manifest.name;
            let message = format!(
                "{name:?} may not be restored: this node has not taken it, and takes what others have with a signature alone \
                 (signed-by under [checkpoints] in {NODE_CONFIG})"
            );
            let sign = format!("transship export {name} FILE --sign KEY, and import FILE, if you trust it");
            Error::refused(message).because(error).hint(sign)
        })
    }

    /// Removes a new checkpoint of which it could not be recorded whose it is: nothing is left of what has failed.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn or_remove(store: &Store, name: &str, recorded: Result<()>) -> Result<()> {
        if recorded.is_err() {
            // Why it is to go says more than why it does not.
            drop(store.remove(name));
        }
        recorded
    }

    fn keys(&self) -> Result<Vec<String>> {
        let rules = NodeConfig::read(self.config);
        Ok({ rules }
            .context("cannot tell whose checkpoints are restored")?
            .checkpoints
            .signed_by)
    }

    fn note_signed(
        &self,
        checkpoint: &Checkpoint,
        json: &[u8],
        digest: &str,
        trusted: &TrustedKeys,
    ) -> Result<()> {
        let key = trusted.check(json, signature_of(checkpoint)?.as_deref())?;
        // What has come back here was made here nevertheless.
        let is_of_here = is_known(self.records, digest, &[])?;
        if let Some(key) = key.filter(|_| !is_of_here) {
            let origin = Origin::Signed(key.to_owned());
            record(self.records, digest, &origin, &checkpoint.dir)?;
        }
        Ok(())
    }
}

/// The signature beside its manifest.
fn signature_of(checkpoint: &Checkpoint) -> Result<Option<String>> {
    let (dir, file) = (&checkpoint.dir, Path::new(SIGNATURE_FILE));
    match read_regular(dir, file, Links::Refused, SIGNATURE_LIMIT) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        signature => {
            let failed = || format!("cannot read {}", dir.join(file).display());
            let signature = signature.with_context(failed)?;
            Ok(Some(String::from_utf8_lossy(&signature).into_owned()))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::path::PathBuf;

    use transship_checkpoint::manifest::Container;
    use transship_checkpoint::store::{Durability, Store, digest_files};
    use transship_package::signature::Signer;

    use super::*;

    const KEY: &str = "RWThgSI8U3mWXyR4obbFHrJWAiO5hyezKvOkATr62ipuRZ473CZ9VTE8";

    struct Node {
        _root: tempfile::TempDir,
        config: PathBuf,
        records: PathBuf,
        key: PathBuf,
        checkpoint: Checkpoint,
    }

    /// A checkpoint `web` of a container `c`, whose memory is "memory".
    pub(crate) fn checkpoint_in(store: &Store) -> Checkpoint {
        let draft = store.draft("web").unwrap();
        fs::create_dir_all(draft.dir().join("c/checkpoint")).unwrap();
        fs::write(draft.dir().join("c/checkpoint/pages-1.img"), "memory").unwrap();
        let files = digest_files(&draft.dir().join("c")).unwrap();
        let manifest = Manifest {
            name: "web".into(),
            created: 1,
            containers: vec![Container {
                name: "c".into(),
                files,
                ..Container::default()
            }],
            ..Manifest::default()
        };
        draft.commit(manifest, Durability::Ephemeral).unwrap()
    }

    impl Node {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let key = root.path().join("key");
            fs::write(
                &key,
                include_bytes!("../../package/tests/fixtures/minisign.key"),
            )
            .unwrap();
            Self {
                config: root.path().join("node.toml"),
                records: root.path().join("origins"),
                key,
                checkpoint: checkpoint_in(&Store::at(root.path().join("store"))),
                _root: root,
            }
        }

        fn origins(&self) -> Origins<'_> {
            Origins {
                config: &self.config,
                records: &self.records,
            }
        }

        fn asks_for(&self, keys: &str) {
            let rules = format!("[checkpoints]\nsigned-by = [{keys}]\n");
            fs::write(&self.config, rules).unwrap();
        }

        fn sign(&self) {
            let json = self.checkpoint.manifest.to_json();
            let signature = Signer::read(&self.key).unwrap().sign(&json).unwrap();
            fs::write(self.checkpoint.dir.join(SIGNATURE_FILE), signature).unwrap();
        }

        fn said(&self) -> String {
            let error = self.origins().require(&self.checkpoint).unwrap_err();
            assert_eq!(error.kind(), crate::Kind::Refused);
            error.one_line()
        }
    }

    #[test]
    fn what_lay_there_before_the_demand_is_not_restored_unsigned() {
        let node = Node::new();
        node.origins().require(&node.checkpoint).unwrap();
        node.asks_for(&format!("{KEY:?}"));
        assert!(node.said().contains("is not signed"), "{}", node.said());
        node.sign();
        node.origins().require(&node.checkpoint).unwrap();
        // It has been compared: its files are root's from now on, and its key is asked for each time.
        node.origins().require(&node.checkpoint).unwrap();
        node.asks_for("\"RWQJKBc0lJSR6RQySY5Z8QaRWgIVCSg0JWsjTQDEsOL08nDXf1iTTfVm\"");
        assert!(node.said().contains("none of the keys"), "{}", node.said());
    }

    #[test]
    fn what_is_signed_has_the_files_that_were_signed() {
        let node = Node::new();
        node.asks_for(&format!("{KEY:?}"));
        node.sign();
        let pages = node.checkpoint.dir.join("c/checkpoint/pages-1.img");
        fs::write(&pages, "m3mory").unwrap();
        assert!(node.said().contains("pages-1.img"), "{}", node.said());
    }

    #[test]
    fn what_cannot_be_recorded_is_not_taken_where_it_would_be_refused() {
        let node = Node::new();
        fs::write(&node.records, "no directory").unwrap();
        let (manifest, dir) = (&node.checkpoint.manifest, &node.checkpoint.dir);
        node.origins().makes_here(manifest, dir).unwrap();
        node.asks_for(&format!("{KEY:?}"));
        node.origins().makes_here(manifest, dir).unwrap_err();
    }

    #[test]
    fn what_this_node_has_taken_needs_no_signature() {
        let mut node = Node::new();
        node.asks_for(&format!("{KEY:?}"));
        let (manifest, dir) = (&node.checkpoint.manifest, &node.checkpoint.dir);
        node.origins().makes_here(manifest, dir).unwrap();
        node.origins().require(&node.checkpoint).unwrap();
        // Whoever changes its manifest has made another one.
        let mut changed = manifest.clone();
        changed.created += 1;
        fs::write(dir.join("transship.json"), changed.to_json()).unwrap();
        assert!(node.said().contains("changes"), "{}", node.said());
        node.checkpoint.manifest = changed;
        assert!(node.said().contains("is not signed"), "{}", node.said());
    }
}
