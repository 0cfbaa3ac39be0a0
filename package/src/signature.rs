//! Signatures of checkpoints, in the format of minisign.
//!
//! ```text
//! <checkpoint>/transship.json           what is signed: it has the digest of every file
//! <checkpoint>/transship.json.minisig   untrusted comment, signature, trusted comment, signature of both
//! ```

use std::io::Cursor;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use minisign::SecretKey;
use minisign_verify::{PublicKey, Signature};
use transship_path_error::{During as _, PathError};

/// File name of the signature beside the manifest.
pub const SIGNATURE_FILE: &str = "transship.json.minisig";
/// Longest signature that is read, in bytes.
pub const SIGNATURE_LIMIT: u64 = 16 << 10;

/// A failure of signatures.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// A secret key that cannot be used.
    #[error("{} is no secret key of minisign that can be used: {reason}", path.display())]
    SecretKey {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A public key that none is.
    #[error("{text:?} is no public key of minisign")]
    PublicKey {
        /// What was given.
        text: String,
    },
    /// The signature could not be made.
    #[error("the checkpoint cannot be signed: {reason}")]
    Sign {
        /// Why.
        reason: String,
    },
    /// There is none.
    #[error("the checkpoint is not signed, and a signature is asked for")]
    Missing,
    /// There is one, and it is not that of a trusted key.
    #[error(
        "the signature of the checkpoint is by none of the keys that are trusted, or it does not fit"
    )]
    Untrusted,
    /// A file cannot be read.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// Signs checkpoints.
pub struct Signer(SecretKey);

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// The secret key of a file that `minisign -G -W` has made: nobody is asked for a password.
    ///
    /// # Errors
    /// The file is none, or the key has a password.
    pub fn read(path: &Path) -> Result<Self, SignatureError> {
        let refused = |reason: &str| SignatureError::SecretKey {
            path: path.to_path_buf(),
            reason: reason.to_owned(),
        };
        let text = std::fs::read_to_string(path).during("read", path)?;
        let encoded = text.lines().nth(1).unwrap_or_default();
        let bytes = BASE64.decode(encoded.as_bytes());
        let bytes = bytes.map_err(|_| refused("its second line is no base64"))?;
        // sig_alg[2] kdf_alg[2] ...; a key without a password has no checksum, which the crate's own
        // reader of files wants.
        match bytes.get(..4) {
            Some([b'E', b'd', 0, 0]) => {}
            Some([b'E', b'd', ..]) => {
                return Err(refused(
                    "it has a password (minisign -G -W makes one without)",
                ));
            }
            _ => return Err(refused("it is something else")),
        }
        let key = SecretKey::from_bytes(&bytes);
        Ok(Self(key.map_err(|_| refused("it is cut off"))?))
    }

    /// The signature of a manifest, as its file has it.
    ///
    /// # Errors
    /// [`SignatureError::Sign`].
    pub fn sign(&self, manifest: &[u8]) -> Result<String, SignatureError> {
        let comment = "signature of a checkpoint of transship";
        let signature = minisign::sign(None, &self.0, Cursor::new(manifest), None, Some(comment));
        let signature = signature.map_err(|error| SignatureError::Sign {
            reason: error.to_string(),
        })?;
        Ok(signature.into_string())
    }
}

/// The keys whose signatures count.
#[derive(Debug, Default)]
pub struct TrustedKeys(Vec<(String, PublicKey)>);

impl TrustedKeys {
    /// Reads keys as `minisign -G` prints them: 56 letters and digits of base64.
    ///
    /// # Errors
    /// One is none.
    pub fn parse<'k>(keys: impl IntoIterator<Item = &'k str>) -> Result<Self, SignatureError> {
        let parse = |text: &str| {
            let none = |_| SignatureError::PublicKey {
                text: text.to_owned(),
            };
            PublicKey::from_base64(text)
                .map(|key| (text.to_owned(), key))
                .map_err(none)
        };
        Ok(Self(keys.into_iter().map(parse).collect::<Result<_, _>>()?))
    }

    /// Whether no signature is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks the manifest's signature, when one is asked for, and gives the key that has made it.
    ///
    /// # Errors
    /// There is none, or it is by no key of these.
    pub fn check(
        &self,
        manifest: &[u8],
        signature: Option<&str>,
    ) -> Result<Option<&str>, SignatureError> {
        if self.is_empty() {
            return Ok(None);
        }
        let signature = signature.ok_or(SignatureError::Missing)?;
        let signature = Signature::decode(signature).map_err(|_| SignatureError::Untrusted)?;
        let fits =
            |(_, key): &&(String, PublicKey)| key.verify(manifest, &signature, false).is_ok();
        match self.0.iter().find(fits) {
            Some((key, _)) => Ok(Some(key)),
            None => Err(SignatureError::Untrusted),
        }
    }
}

#[cfg(test)]
mod tests {
    use minisign::KeyPair;

    use super::*;

    fn pair(dir: &Path) -> (Signer, String) {
        let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair().unwrap();
        let path = dir.join("key");
        std::fs::write(&path, sk.to_box(None).unwrap().to_string()).unwrap();
        (Signer::read(&path).unwrap(), pk.to_base64())
    }

    #[test]
    fn only_a_signature_of_a_trusted_key_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, my_key) = pair(dir.path());
        let (yours, _) = pair(dir.path());
        let trusted = TrustedKeys::parse([my_key.as_str()]).unwrap();
        let manifest = b"{\"name\": \"web\"}";
        let good = mine.sign(manifest).unwrap();
        let by = trusted.check(manifest, Some(&good)).unwrap();
        assert_eq!(by, Some(my_key.as_str()));
        let missing = trusted.check(manifest, None).unwrap_err();
        assert!(matches!(missing, SignatureError::Missing));
        let other = yours.sign(manifest).unwrap();
        for (manifest, signature) in [
            (&manifest[..], other.as_str()),
            (b"{\"name\": \"wed\"}", &good),
            (manifest, "no signature"),
        ] {
            let error = trusted.check(manifest, Some(signature)).unwrap_err();
            assert!(matches!(error, SignatureError::Untrusted), "{error}");
        }
        // Nobody asks for one.
        TrustedKeys::default().check(manifest, None).unwrap();
        assert!(TrustedKeys::parse(["RWQ"]).is_err());
        let path = dir.path().join("none");
        for text in ["no key", "a\n!", "a\nRWQ="] {
            std::fs::write(&path, text).unwrap();
            assert!(Signer::read(&path).is_err(), "{text}");
        }
    }

    /// A key of Debian's minisign 0.11: `minisign -G -W`.
    #[test]
    fn keys_of_minisign_itself_sign() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/minisign.key");
        let signer = Signer::read(Path::new(path)).unwrap();
        let key = "RWThgSI8U3mWXyR4obbFHrJWAiO5hyezKvOkATr62ipuRZ473CZ9VTE8";
        let trusted = TrustedKeys::parse([key]).unwrap();
        let signature = signer.sign(b"manifest").unwrap();
        trusted.check(b"manifest", Some(&signature)).unwrap();
    }
}
