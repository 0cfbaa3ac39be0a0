//! Packages that only the owners of some keys can read, in the format of age (age-encryption.org/v1).
//!
//! ```text
//! age-encryption.org/v1\n
//! -> X25519 ...                one stanza for each recipient: the file's key, wrapped for him
//! --- MAC                      of the header
//! nonce[16]
//! 64 KiB pieces, each with a tag of 16 bytes; the number of a piece, and whether it is the last one, are
//! part of its nonce: one that is changed, missing, twice or in another place does not open
//! ```
//!
//! Nothing of a piece is given on before its tag is right.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read, Write};
use std::path::{Path, PathBuf};

use age::stream::{StreamReader, StreamWriter};
use age::{Decryptor, Encryptor, Identity, IdentityFile, Recipient};
use transship_path_error::{During as _, PathError};

/// What an encrypted package begins with.
const MAGIC: &[u8] = b"age-encryption.org/v1\n";
/// Longest head that is read, in bytes: some six hundred recipients. The reader of age has no bound, and parses all of it
/// again with each line.
const HEAD_LIMIT: u64 = 64 << 10;
/// What begins the last line of a head.
const HEAD_END: &[u8] = b"---";
/// What age adds to a head, which differs each time, and the nonce and the tag behind it.
const HEAD_SLACK: u64 = 1 << 10;
/// Longest file of recipients that is read, in bytes.
const RECIPIENTS_LIMIT: u64 = 1 << 20;

/// A failure of encryption.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncryptionError {
    /// A recipient that none is.
    #[error(
        "{text:?} is no recipient: give an age public key (age1...), a public key of ssh, or a file of \
         them, one a line"
    )]
    Recipient {
        /// What was given.
        text: String,
    },
    /// A file of identities that cannot be used.
    #[error("{} has no identity of age or ssh: {reason}", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Nobody could read it.
    #[error("the package cannot be encrypted: {reason}")]
    Encrypt {
        /// Why.
        reason: String,
    },
    /// More than a reader takes.
    #[error(
        "the package cannot be encrypted for so many: their keys would take {bytes} bytes, and {limit} are the most"
    )]
    TooMany {
        /// What they take.
        bytes: u64,
        /// What is taken.
        limit: u64,
    },
    /// No key was given.
    #[error("the package is encrypted: name the file with your identity (--identity)")]
    NoIdentity,
    /// None of the keys fits.
    #[error("the package is encrypted for none of the identities that were given")]
    WrongIdentity,
    /// Its header is damaged, or of a later format.
    #[error("the head of the encrypted package cannot be used: {reason}")]
    Header {
        /// Why.
        reason: String,
    },
    /// A file cannot be read.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// Those who will be able to read a package.
#[derive(Default)]
pub struct Recipients(Vec<Box<dyn Recipient + Send + Sync>>);

impl std::fmt::Debug for Recipients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recipients({})", self.0.len())
    }
}

impl Recipients {
    /// Adds `text`: a public key of age or ssh, or the path of a file with such keys.
    ///
    /// # Errors
    /// It is none of these.
    pub fn add(&mut self, text: &str) -> Result<(), EncryptionError> {
        if let Some(recipient) = parse_recipient(text) {
            self.0.push(recipient);
            return Ok(());
        }
        let no_recipient = |text: &str| EncryptionError::Recipient {
            text: text.to_owned(),
        };
        let path = Path::new(text);
        let looks_like_key = text.starts_with("age1") || text.starts_with("ssh-");
        if looks_like_key || !path.is_file() {
            return Err(no_recipient(text));
        }
        let mut lines = String::new();
        File::open(path)
            .and_then(|file| file.take(RECIPIENTS_LIMIT).read_to_string(&mut lines))
            .during("read", path)?;
        let lines = lines.lines().map(str::trim);
        let mut any = false;
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let recipient = parse_recipient(line).ok_or_else(|| no_recipient(line))?;
            self.0.push(recipient);
            any = true;
        }
        match any {
            true => Ok(()),
            false => Err(no_recipient(text)),
        }
    }

    /// Whether there is nobody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Encrypts what is written to it into `out`; the last piece comes with `finish`.
    pub(crate) fn encrypt<W: Write>(&self, out: W) -> Result<StreamWriter<W>, EncryptionError> {
        let failed = |reason: String| EncryptionError::Encrypt { reason };
        let encryptor = || {
            let recipients = self.0.iter().map(|it| it.as_ref() as &dyn Recipient);
            Encryptor::with_recipients(recipients).map_err(|error| failed(error.to_string()))
        };
        let nothing = { encryptor()?.wrap_output(Vec::new()) }.and_then(StreamWriter::finish);
        let bytes = nothing.map_err(|error| failed(error.to_string()))?.len() as u64;
        let limit = HEAD_LIMIT - HEAD_SLACK;
        if bytes > limit {
            return Err(EncryptionError::TooMany { bytes, limit });
        }
        let writer = encryptor()?.wrap_output(out);
        writer.map_err(|error| failed(error.to_string()))
    }
}

fn parse_recipient(text: &str) -> Option<Box<dyn Recipient + Send + Sync>> {
    if let Ok(recipient) = text.parse::<age::x25519::Recipient>() {
        return Some(Box::new(recipient));
    }
    let recipient = text.parse::<age::ssh::Recipient>().ok()?;
    Some(Box::new(recipient))
}

/// Whether a package is encrypted; its first bytes stay in `input`.
///
/// # Errors
/// It cannot be read.
pub fn is_encrypted(input: &mut impl BufRead) -> io::Result<bool> {
    // The first read of a pipe may give less; a short beginning is no such package.
    let buffer = input.fill_buf()?;
    let length = buffer.len().min(MAGIC.len());
    Ok(length >= 4 && buffer[..length] == MAGIC[..length])
}

/// The keys of somebody who reads packages.
#[derive(Default)]
pub struct Identities(Vec<Box<dyn Identity + Send + Sync>>);

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identities({})", self.0.len())
    }
}

impl Identities {
    /// Adds those of a file: identities of age, one a line, or a private key of ssh without a passphrase.
    ///
    /// # Errors
    /// It cannot be read, or has none.
    pub fn add_file(&mut self, path: &Path) -> Result<(), EncryptionError> {
        let refused = |reason: String| EncryptionError::Identity {
            path: path.to_path_buf(),
            reason,
        };
        let open = || File::open(path).map(BufReader::new);
        let mut first = String::new();
        open()
            .and_then(|file| file.take(64).read_line(&mut first))
            .or_else(|error| match error.kind() {
                // A text that is none is no key; age says so.
                io::ErrorKind::InvalidData => Ok(0),
                _ => Err(error),
            })
            .during("read", path)?;
        let file = open().during("read", path)?;
        if first.starts_with("-----BEGIN") {
            let identity = age::ssh::Identity::from_buffer(file, None)
                .map_err(|error| refused(error.to_string()))?;
            match identity {
                age::ssh::Identity::Unencrypted(_) => self.0.push(Box::new(identity)),
                age::ssh::Identity::Encrypted(_) => {
                    return Err(refused(
                        "it has a passphrase, and nobody is asked".to_owned(),
                    ));
                }
                age::ssh::Identity::Unsupported(_) => {
                    return Err(refused("it is of a kind that age does not take".to_owned()));
                }
            }
            return Ok(());
        }
        let identities = IdentityFile::from_buffer(file)
            .map_err(|error| refused(error.to_string()))?
            .into_identities()
            .map_err(|error| refused(error.to_string()))?;
        if identities.is_empty() {
            return Err(refused("it is empty".to_owned()));
        }
        self.0.extend(identities);
        Ok(())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks that one of them opens the encrypted package `input`, of which the head is read.
    ///
    /// # Errors
    /// None does, or it is none.
    pub fn check(&self, input: impl Read) -> Result<(), EncryptionError> {
        self.decrypt(BufReader::new(input)).map(drop)
    }

    /// Decrypts what comes from `input`, from its first byte on.
    pub(crate) fn decrypt<R: BufRead>(
        &self,
        mut input: R,
    ) -> Result<StreamReader<Opened<R>>, EncryptionError> {
        if self.0.is_empty() {
            return Err(EncryptionError::NoIdentity);
        }
        let head = read_head(&mut input)?;
        let input = Cursor::new(head).chain(input);
        let header = |error: age::DecryptError| match error {
            age::DecryptError::NoMatchingKeys => EncryptionError::WrongIdentity,
            other => EncryptionError::Header {
                reason: other.to_string(),
            },
        };
        let decryptor = Decryptor::new_buffered(input).map_err(header)?;
        let identities = self.0.iter().map(|it| it.as_ref() as &dyn Identity);
        decryptor.decrypt(identities).map_err(header)
    }
}

/// A package whose head has been read.
pub(crate) type Opened<R> = Chain<Cursor<Vec<u8>>, R>;

/// The head of a package to the end of its last line.
fn read_head(input: &mut impl BufRead) -> Result<Vec<u8>, EncryptionError> {
    let mut input = input.take(HEAD_LIMIT);
    let mut head = Vec::new();
    loop {
        let start = head.len();
        let read = input.read_until(b'\n', &mut head);
        let read = read.map_err(|error| EncryptionError::Header {
            reason: error.to_string(),
        })?;
        if head[start..].starts_with(HEAD_END) {
            return Ok(head);
        }
        if read == 0 {
            return Err(EncryptionError::Header {
                reason: match head.len() as u64 == HEAD_LIMIT {
                    true => format!("it has no end in {HEAD_LIMIT} bytes"),
                    false => "it is cut off".to_owned(),
                },
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use age::secrecy::ExposeSecret as _;

    use super::*;

    struct Keys {
        dir: tempfile::TempDir,
        recipients: Recipients,
        identities: Identities,
    }

    fn keys() -> Keys {
        let dir = tempfile::tempdir().unwrap();
        let key = age::x25519::Identity::generate();
        let path = dir.path().join("key.txt");
        let text = format!("# a key\n{}\n", key.to_string().expose_secret());
        std::fs::write(&path, text).unwrap();
        let mut recipients = Recipients::default();
        recipients.add(&key.to_public().to_string()).unwrap();
        let mut identities = Identities::default();
        identities.add_file(&path).unwrap();
        Keys {
            dir,
            recipients,
            identities,
        }
    }

    fn encrypted(keys: &Keys, plain: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = keys.recipients.encrypt(&mut bytes).unwrap();
        writer.write_all(plain).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn decrypted(keys: &Keys, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut plain = Vec::new();
        let mut reader = keys.identities.decrypt(bytes).ok()?;
        reader.read_to_end(&mut plain).ok()?;
        Some(plain)
    }

    #[test]
    fn what_was_tampered_with_does_not_open() {
        let keys = keys();
        let plain: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
        let bytes = encrypted(&keys, &plain);
        assert!(bytes.starts_with(MAGIC));
        assert_eq!(decrypted(&keys, &bytes).as_deref(), Some(plain.as_slice()));
        let other = encrypted(&keys, &plain);
        let piece = 65_536 + 16;
        let body = bytes.len() - (200_000 + 4 * 16);
        for at in [body / 2, body + 5, body + 70_000, bytes.len() - 1] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(decrypted(&keys, &flipped).is_none(), "a bit at {at}");
        }
        for length in [0, 30, body, body + piece, bytes.len() - 1] {
            assert!(
                decrypted(&keys, &bytes[..length]).is_none(),
                "{length} bytes"
            );
        }
        let mut swapped = bytes.clone();
        let (first, second) = (body..body + piece, body + piece..body + 2 * piece);
        swapped[first.clone()].copy_from_slice(&bytes[second.clone()]);
        swapped[second].copy_from_slice(&bytes[first.clone()]);
        assert!(
            decrypted(&keys, &swapped).is_none(),
            "two pieces in another order"
        );
        let mut mixed = bytes.clone();
        mixed[first.clone()].copy_from_slice(&other[first]);
        assert!(
            decrypted(&keys, &mixed).is_none(),
            "a piece of another package"
        );
        let longer = [bytes.as_slice(), b"more"].concat();
        assert!(
            decrypted(&keys, &longer).is_none(),
            "something behind the end"
        );
    }

    /// Gives the same for ever, and counts it.
    struct Endless<'a> {
        first: &'a [u8],
        then: &'a [u8],
        at: usize,
        given: &'a std::cell::Cell<usize>,
    }

    impl Read for Endless<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            assert!(self.given.get() < 64 << 20, "it reads for ever");
            let mut read = self.first.read(buffer)?;
            while read < buffer.len() {
                buffer[read] = self.then[self.at % self.then.len()];
                (read, self.at) = (read + 1, self.at + 1);
            }
            self.given.set(self.given.get() + read);
            Ok(read)
        }
    }

    #[test]
    fn a_head_has_an_end() {
        let keys = keys();
        let line = format!("{}\n", "A".repeat(64));
        for (first, then) in [("", "A"), ("-> x\n", line.as_str()), ("", "-> x\n\n")] {
            let first = [MAGIC, first.as_bytes()].concat();
            let given = std::cell::Cell::new(0);
            let endless = Endless {
                first: &first,
                then: then.as_bytes(),
                at: 0,
                given: &given,
            };
            let opened = keys.identities.decrypt(BufReader::new(endless));
            let error = opened.err().unwrap();
            assert!(matches!(error, EncryptionError::Header { .. }), "{error}");
            assert!(given.get() <= 128 << 10, "{then:?}: {}", given.get());
        }
    }

    #[test]
    fn nothing_is_encrypted_for_more_than_can_be_read_again() {
        let keys = keys();
        let key = age::x25519::Identity::generate().to_public().to_string();
        let mut team = Recipients::default();
        let most = (1..).find(|_| {
            team.add(&key).unwrap();
            team.0.len() % 50 == 0 && team.encrypt(io::sink()).is_err()
        });
        let most = most.unwrap();
        assert!((500..1000).contains(&most), "{most}");
        team.0.truncate(most - 51);
        team.0.extend(keys.recipients.0);
        let mut bytes = Vec::new();
        team.encrypt(&mut bytes).unwrap().finish().unwrap();
        keys.identities.check(bytes.as_slice()).unwrap();
    }

    #[test]
    fn a_wrong_key_and_a_missing_one_are_told() {
        let (mine, yours) = (keys(), keys());
        let bytes = encrypted(&mine, b"memory");
        let error = yours.identities.decrypt(bytes.as_slice()).err().unwrap();
        assert!(matches!(error, EncryptionError::WrongIdentity), "{error}");
        let error = Identities::default()
            .decrypt(bytes.as_slice())
            .err()
            .unwrap();
        assert!(error.to_string().contains("--identity"), "{error}");
        let path = mine.dir.path().join("none.txt");
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(Identities::default().add_file(&path).is_err());
        for text in ["age1qqqq", "ssh-ed25519 AAAA", "/no/such/file", ""] {
            let error = Recipients::default().add(text).unwrap_err();
            assert!(
                matches!(error, EncryptionError::Recipient { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn recipients_may_stand_in_a_file() {
        let (mine, yours) = (keys(), keys());
        let path = mine.dir.path().join("team");
        let key = |keys: &Keys| {
            let text = std::fs::read_to_string(keys.dir.path().join("key.txt")).unwrap();
            let secret = text
                .lines()
                .last()
                .unwrap()
                .parse::<age::x25519::Identity>();
            secret.unwrap().to_public().to_string()
        };
        std::fs::write(&path, format!("# we\n{}\n{}\n", key(&mine), key(&yours))).unwrap();
        let mut recipients = Recipients::default();
        recipients.add(path.to_str().unwrap()).unwrap();
        let both = Keys {
            recipients,
            ..keys()
        };
        let bytes = encrypted(&both, b"memory");
        for reader in [&mine, &yours] {
            assert_eq!(decrypted(reader, &bytes).as_deref(), Some(&b"memory"[..]));
        }
        assert!(decrypted(&both, &bytes).is_none());
    }
}
