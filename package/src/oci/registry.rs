//! A registry as a place for blobs: the distribution protocol of OCI over HTTP(S).
//!
//! ```text
//!  HEAD   /v2/<name>/blobs/<digest>            is it there?
//!  GET    /v2/<name>/blobs/<digest>            broken off: from there on, with Range
//!  GET, PUT /v2/<name>/manifests/<tag or digest>
//!
//!  exchange.rs   one request, its credentials, and whether it is worth another attempt
//!  patience.rs   how many attempts, and how long
//!  body.rs       what comes, unless it comes too slowly
//!  upload.rs     a blob that goes there, or is there under another name
//!  referrers.rs  artifacts that belong to an image
//! ```
//!
//! What comes is read up to the size that is expected, and compared with its digest.

mod body;
mod exchange;
mod patience;
mod referrers;
#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
pub(crate) mod tests;
mod upload;

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use ureq::http::{Method, Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use self::body::read_body;
use self::exchange::{Ask, Attempt, Trouble, header};
use self::patience::Attempts;
pub use self::patience::Patience;
pub(crate) use self::upload::Streamed;
use super::blobs::Blobs;
use super::credentials::Credentials;
use super::digests::{check_digest, digest_of};
use super::document::Descriptor;
use super::reference::Reference;
use crate::error::PackageError;
use crate::registry_error::RegistryError;

/// How often a blob or manifest is asked for that is another one.
const LIES: u32 = 3;

/// How a registry is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transport {
    /// Without TLS.
    pub plain_http: bool,
    /// Whoever it says it is.
    pub skip_verify: bool,
    /// How long it is waited for.
    pub patience: Patience,
}

/// A repository of a registry.
pub struct Registry {
    agent: Agent,
    reference: Reference,
    /// Scheme and host.
    origin: String,
    base: String,
    patience: Patience,
    credentials: Option<Credentials>,
    /// The header that the last answer asked for.
    authorization: Mutex<Option<String>>,
    /// Whether it has answered anything.
    has_answered: AtomicBool,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.base)
    }
}

impl Registry {
    /// The repository of `reference`. `authorities` are those that sign for registries, in PEM; none: those that
    /// browsers know.
    ///
    /// # Errors
    /// The authorities cannot be read.
    pub fn new(
        reference: Reference,
        transport: Transport,
        authorities: Option<&[u8]>,
        credentials: Option<Credentials>,
    ) -> Result<Self, PackageError> {
        let mut tls = TlsConfig::builder().disable_verification(transport.skip_verify);
        if let Some(pem) = authorities {
            let items = ureq::tls::parse_pem(pem);
            let certificates = items.filter_map(|item| match item {
                Ok(ureq::tls::PemItem::Certificate(it)) => Some(it),
                _ => None,
            });
            let certificates: Vec<_> = certificates.collect();
            if certificates.is_empty() {
                return Err(RegistryError::Unusable {
                    registry: reference.host,
                    act: "be trusted".to_owned(),
                    reason: "what was named as its authorities has no certificate in PEM"
                        .to_owned(),
                }
                .into());
            }
            tls = tls.root_certs(RootCerts::from(certificates));
        }
        let silence = Some(transport.patience.silence);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(!transport.plain_http)
            .tls_config(tls.build())
            .timeout_connect(silence)
            .timeout_recv_response(Some(transport.patience.silence * 2))
            .timeout_per_read(silence)
            .timeout_per_write(silence)
            .user_agent(concat!("transship/", env!("CARGO_PKG_VERSION")))
            .build();
        let scheme = if transport.plain_http {
            "http"
        } else {
            "https"
        };
        let (host, name) = place_of(&reference);
        let origin = format!("{scheme}://{host}");
        Ok(Self {
            agent: Agent::new_with_config(config),
            base: format!("{origin}/v2/{name}"),
            origin,
            reference,
            patience: transport.patience,
            credentials,
            authorization: Mutex::new(None),
            has_answered: AtomicBool::new(false),
        })
    }

    fn registry(&self) -> String {
        self.reference.host.clone()
    }

    /// The error for what fails however often it is tried.
    fn failed(&self, act: &str, trouble: Trouble) -> PackageError {
        RegistryError::Failed {
            registry: self.registry(),
            act: act.to_owned(),
            reason: trouble.reason,
        }
        .into()
    }

    /// Asks until there is an answer that another attempt would not change.
    fn ask(&self, act: &str, ask: &Ask<'_>) -> Result<Response<Body>, PackageError> {
        let mut attempts = Attempts::new(self.patience);
        loop {
            match self.attempt(act, ask)? {
                Attempt::Answer(answer) => return Ok(answer),
                Attempt::Later(trouble) if !attempts.wait(trouble.wait) => {
                    return Err(self.failed(act, trouble));
                }
                Attempt::Later(_) => {}
            }
        }
    }

    /// What is at `url`, `most` bytes at most. Where a transfer breaks off the next attempt goes on.
    fn fetch(&self, act: &str, what: &str, url: &str, most: u64) -> Result<Vec<u8>, PackageError> {
        let mut attempts = Attempts::new(self.patience);
        let mut bytes = Vec::new();
        loop {
            let ask = Ask {
                from: bytes.len(),
                ..Ask::new(Method::GET, url)
            };
            let trouble = match self.attempt(act, &ask)? {
                Attempt::Later(trouble) => trouble,
                Attempt::Answer(answer) => match self.go_on(act, what, answer, &mut bytes, most)? {
                    None => return Ok(bytes),
                    Some(trouble) => trouble,
                },
            };
            attempts.reached(bytes.len() as u64);
            if !attempts.wait(trouble.wait) {
                return Err(self.failed(act, trouble));
            }
        }
    }

    /// Adds an answer to what is there of a body; none: that is all of it.
    fn go_on(
        &self,
        act: &str,
        what: &str,
        answer: Response<Body>,
        bytes: &mut Vec<u8>,
        most: u64,
    ) -> Result<Option<Trouble>, PackageError> {
        let from = bytes.len();
        match answer.status() {
            StatusCode::OK => bytes.clear(),
            StatusCode::PARTIAL_CONTENT if from > 0 => {
                let range = header(&answer, "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {from}-")) {
                    bytes.clear();
                    return Ok(Some(Trouble::new(format!("it gives the range {range:?}"))));
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => {
                bytes.clear();
                return Ok(Some(Trouble::new("it does not go on where it broke off")));
            }
            _ => return Err(self.unexpected(act, what, answer)),
        }
        let body = answer.into_body().into_with_config().limit(u64::MAX);
        let read = read_body(body.reader(), bytes, most, self.patience);
        Ok(read.err().map(|error| Trouble::new(error.to_string())))
    }
}

/// Host and repository of a reference: those of Docker's own registry are not what everybody calls them.
fn place_of(reference: &Reference) -> (&str, String) {
    let name = reference.name.as_str();
    match reference.host.as_str() {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => {
            let library = if name.contains('/') { "" } else { "library/" };
            ("registry-1.docker.io", format!("{library}{name}"))
        }
        host => (host, name.to_owned()),
    }
}

impl Blobs for Registry {
    fn has(&self, digest: &str, size: u64) -> Result<bool, PackageError> {
        const ACT: &str = "look for a blob";
        check_digest(digest)?;
        let url = format!("{}/blobs/{digest}", self.base);
        let answer = self.ask(ACT, &Ask::new(Method::HEAD, &url))?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(false),
            status if status.is_success() => {
                let length = header(&answer, "content-length").and_then(|it| it.parse().ok());
                Ok(length.is_none_or(|length: u64| length == size))
            }
            _ => Err(self.unexpected(ACT, digest, answer)),
        }
    }

    fn put(&self, digest: &str, bytes: &[u8]) -> Result<(), PackageError> {
        self.put_bytes(digest, bytes)
    }

    fn get(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, PackageError> {
        const ACT: &str = "give a blob";
        let digest = &descriptor.digest;
        check_digest(digest)?;
        if descriptor.size > limit {
            return Err(PackageError::TooLarge {
                bytes: descriptor.size,
                limit,
                of: "a blob of this kind",
            });
        }
        let url = format!("{}/blobs/{digest}", self.base);
        let mut lies = 0;
        loop {
            // One byte more tells that there are more.
            let bytes = self.fetch(ACT, digest, &url, descriptor.size + 1)?;
            lies += 1;
            match descriptor.check(&bytes, limit) {
                Ok(()) => return Ok(bytes),
                Err(error) if lies == LIES => return Err(error),
                // A proxy in between may have spoilt it.
                Err(_) => {}
            }
        }
    }

    fn manifest(&self, reference: &str, limit: u64) -> Result<Vec<u8>, PackageError> {
        let what = match reference == self.reference.tag {
            true => self.reference.to_string(),
            false => reference.to_owned(),
        };
        let url = format!("{}/manifests/{reference}", self.base);
        let mut lies = 0;
        loop {
            let bytes = self.fetch("give a manifest", &what, &url, limit + 1)?;
            if bytes.len() as u64 > limit {
                return Err(PackageError::TooLarge {
                    bytes: bytes.len() as u64,
                    limit,
                    of: "a manifest",
                });
            }
            if !reference.starts_with("sha256:") || digest_of(&bytes) == reference {
                return Ok(bytes);
            }
            lies += 1;
            if lies == LIES {
                return Err(PackageError::Differs {
                    member: what,
                    reason: "its digest differs from the one that was asked for",
                });
            }
        }
    }

    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), PackageError> {
        self.put_document(media_type, bytes, tag).map(drop)
    }
}
