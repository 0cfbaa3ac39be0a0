//! A registry as a place for blobs: the distribution protocol of OCI over HTTP(S).
//!
//! ```text
//!  HEAD   /v2/<name>/blobs/<digest>            is it there?
//!  POST   /v2/<name>/blobs/uploads/            where to put it  ──> PUT <location>?digest=<digest>
//!  GET    /v2/<name>/blobs/<digest>
//!  GET, PUT /v2/<name>/manifests/<tag or digest>
//!  401 ──> WWW-Authenticate: Basic, or Bearer realm="...",service="...",scope="..." ──> a token
//!  429, 5xx, a broken or silent connection ──> once more, later, a few times
//! ```
//!
//! What comes is read up to the size that is expected, and compared with its digest.

use std::io::Read as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use data_encoding::BASE64;
use serde::Deserialize;
use ureq::http::{Method, Request, Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::blobs::{Blobs, check_digest, digest_of};
use super::credentials::Credentials;
use super::document::{Descriptor, INDEX, MANIFEST};
use super::reference::Reference;
use crate::error::PackageError;

/// A connection that is silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// How long the attempts wait for each other: what a busy registry needs.
const WAITS: [Duration; 5] = [
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
    Duration::from_secs(15),
];
/// Longest that a registry is waited for when it says for how long.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Longest answer that is no blob, in bytes.
const ANSWER_LIMIT: u64 = 64 << 10;

/// A failure of a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// A reference that none is.
    #[error("{text:?} is no reference: HOST/NAME:TAG or HOST/NAME@sha256:DIGEST")]
    Reference {
        /// What was given.
        text: String,
    },
    /// It has no such thing.
    #[error("{registry} has no {what}")]
    NotFound {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// It wants to know who asks, or that is not enough.
    #[error("{registry} refuses to {act}: {reason}")]
    Refused {
        /// The registry.
        registry: String,
        /// The act.
        act: String,
        /// Its words.
        reason: String,
    },
    /// It cannot be reached, or fails, however often it is asked.
    #[error("{registry} cannot {act}: {reason}")]
    Failed {
        /// The registry.
        registry: String,
        /// The act.
        act: String,
        /// Why.
        reason: String,
    },
    /// The credentials of the configuration cannot be used.
    #[error("the credentials for {registry} cannot be had: {reason}")]
    Credentials {
        /// The registry.
        registry: String,
        /// Why.
        reason: String,
    },
}

/// How a registry is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transport {
    /// Without TLS.
    pub plain_http: bool,
    /// Whoever it says it is.
    pub skip_verify: bool,
}

/// A repository of a registry.
pub struct Registry {
    agent: Agent,
    reference: Reference,
    base: String,
    credentials: Option<Credentials>,
    /// The header that the last answer asked for.
    authorization: Mutex<Option<String>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.base)
    }
}

/// What an attempt led to.
enum Attempt {
    Answer(Response<Body>),
    /// Worth another one.
    Later(String, Option<Duration>),
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
            tls = tls.root_certs(RootCerts::from(certificates.collect::<Vec<_>>()));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .tls_config(tls.build())
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE * 4))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .user_agent(concat!("transship/", env!("CARGO_PKG_VERSION")))
            .build();
        let scheme = if transport.plain_http {
            "http"
        } else {
            "https"
        };
        Ok(Self {
            agent: Agent::new_with_config(config),
            base: format!("{scheme}://{}/v2/{}", reference.host, reference.name),
            reference,
            credentials,
            authorization: Mutex::new(None),
        })
    }

    fn registry(&self) -> String {
        self.reference.host.clone()
    }

    /// Asks until there is an answer that another attempt would not change.
    fn ask(
        &self,
        act: &str,
        method: &Method,
        url: &str,
        content_type: Option<&str>,
        body: Option<&[u8]>,
    ) -> Result<Response<Body>, PackageError> {
        let mut waits = WAITS.into_iter();
        loop {
            let (reason, wait) = match self.attempt(method, url, content_type, body)? {
                Attempt::Answer(answer) => return Ok(answer),
                Attempt::Later(reason, wait) => (reason, wait),
            };
            let Some(next) = waits.next() else {
                return Err(RegistryError::Failed {
                    registry: self.registry(),
                    act: act.to_owned(),
                    reason,
                }
                .into());
            };
            std::thread::sleep(wait.unwrap_or(next).min(LONGEST_WAIT));
        }
    }

    fn attempt(
        &self,
        method: &Method,
        url: &str,
        content_type: Option<&str>,
        body: Option<&[u8]>,
    ) -> Result<Attempt, PackageError> {
        let mut is_first = true;
        loop {
            let authorization = self.lock().clone();
            let answer = match self.send(method, url, content_type, body, authorization.as_deref())
            {
                Ok(answer) => answer,
                Err(error) => return Ok(Attempt::Later(error.to_string(), None)),
            };
            let status = answer.status();
            if status == StatusCode::UNAUTHORIZED && is_first {
                is_first = false;
                let challenge = header(&answer, "www-authenticate").unwrap_or_default();
                if let Some(fresh) = self.authorize(&challenge)? {
                    *self.lock() = Some(fresh);
                    continue;
                }
            }
            if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
                let wait = header(&answer, "retry-after").and_then(|it| it.parse().ok());
                let reason = format!("it answers {status}");
                return Ok(Attempt::Later(reason, wait.map(Duration::from_secs)));
            }
            return Ok(Attempt::Answer(answer));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn send(
        &self,
        method: &Method,
        url: &str,
        content_type: Option<&str>,
        body: Option<&[u8]>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, ureq::Error> {
        let mut request = Request::builder().method(method.clone()).uri(url);
        request = request.header("accept", format!("{MANIFEST}, {INDEX}, */*"));
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        match body {
            Some(body) => self.agent.run(request.body(body)?),
            None => self.agent.run(request.body(())?),
        }
    }

    /// The header that answers a challenge; none when there is nothing to answer it with.
    fn authorize(&self, challenge: &str) -> Result<Option<String>, PackageError> {
        let basic = self.credentials.as_ref().map(|it| {
            let text = format!("{}:{}", it.user, it.secret);
            format!("Basic {}", BASE64.encode(text.as_bytes()))
        });
        let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Ok(basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Ok(None);
        }
        let value = |key: &str| {
            let start = parameters.find(&format!("{key}=\""))? + key.len() + 2;
            let rest = &parameters[start..];
            Some(rest[..rest.find('"')?].to_owned())
        };
        let Some(realm) = value("realm") else {
            return Ok(None);
        };
        let mut url = realm;
        for key in ["service", "scope"] {
            if let Some(value) = value(key) {
                let separator = if url.contains('?') { '&' } else { '?' };
                url = format!("{url}{separator}{key}={}", escape(&value));
            }
        }
        let failed = |reason: String| RegistryError::Credentials {
            registry: self.registry(),
            reason,
        };
        let mut answer = self
            .send(&Method::GET, &url, None, None, basic.as_deref())
            .map_err(|error| failed(error.to_string()))?;
        if !answer.status().is_success() {
            return Err(failed(format!("{url} answers {}", answer.status())).into());
        }
        #[derive(Deserialize)]
        struct Token {
            #[serde(alias = "access_token")]
            token: String,
        }
        let text = read_answer(&mut answer).map_err(|error| failed(error.to_string()))?;
        let token: Token =
            serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
        Ok(Some(format!("Bearer {}", token.token)))
    }

    /// An answer that is not the expected one.
    fn unexpected(&self, act: &str, what: &str, mut answer: Response<Body>) -> PackageError {
        let registry = self.registry();
        if answer.status() == StatusCode::NOT_FOUND {
            let what = what.to_owned();
            return RegistryError::NotFound { registry, what }.into();
        }
        let words = read_answer(&mut answer).unwrap_or_default();
        let words: String = words.chars().take(300).collect();
        let reason = format!("{} {}", answer.status(), words.escape_debug());
        let act = act.to_owned();
        RegistryError::Refused {
            registry,
            act,
            reason,
        }
        .into()
    }

    /// Reads an answer to its end, `limit` bytes at most.
    fn read(&self, act: &str, answer: Response<Body>, limit: u64) -> Result<Vec<u8>, PackageError> {
        let mut bytes = Vec::new();
        let mut body = answer
            .into_body()
            .into_with_config()
            .limit(limit + 1)
            .reader();
        match body.by_ref().take(limit + 1).read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(error) => Err(RegistryError::Failed {
                registry: self.registry(),
                act: act.to_owned(),
                reason: error.to_string(),
            }
            .into()),
        }
    }
}

fn header(answer: &Response<Body>, name: &str) -> Option<String> {
    Some(answer.headers().get(name)?.to_str().ok()?.to_owned())
}

fn read_answer(answer: &mut Response<Body>) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    let reader = answer.body_mut().as_reader();
    reader.take(ANSWER_LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What may stand in a query as it is; the rest is escaped.
fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:,".contains(&byte);
    text.bytes()
        .fold(String::new(), |text, byte| match plain(byte) {
            true => text + &char::from(byte).to_string(),
            false => format!("{text}%{byte:02X}"),
        })
}

impl Blobs for Registry {
    fn has(&self, digest: &str, size: u64) -> Result<bool, PackageError> {
        check_digest(digest)?;
        let url = format!("{}/blobs/{digest}", self.base);
        let answer = self.ask("look for a blob", &Method::HEAD, &url, None, None)?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(false),
            status if status.is_success() => {
                let length = header(&answer, "content-length").and_then(|it| it.parse().ok());
                Ok(length.is_none_or(|length: u64| length == size))
            }
            _ => Err(self.unexpected("look for a blob", digest, answer)),
        }
    }

    fn put(&self, digest: &str, bytes: &[u8]) -> Result<(), PackageError> {
        const ACT: &str = "take a blob";
        check_digest(digest)?;
        let mut last = None;
        // An upload that is broken off is begun anew: its place may be gone with it.
        for _ in 0..3 {
            let url = format!("{}/blobs/uploads/", self.base);
            let answer = self.ask(ACT, &Method::POST, &url, None, Some(&[]))?;
            if answer.status() != StatusCode::ACCEPTED {
                return Err(self.unexpected(ACT, "repository of this name", answer));
            }
            let location = header(&answer, "location").unwrap_or_default();
            let location = match location.starts_with('/') {
                true => {
                    let root = self.base.find("/v2/").unwrap_or(self.base.len());
                    format!("{}{location}", &self.base[..root])
                }
                false => location,
            };
            let separator = if location.contains('?') { '&' } else { '?' };
            let url = format!("{location}{separator}digest={}", digest.replace(':', "%3A"));
            let octets = Some("application/octet-stream");
            let answer = self.ask(ACT, &Method::PUT, &url, octets, Some(bytes))?;
            if answer.status() == StatusCode::CREATED {
                return Ok(());
            }
            let is_gone = answer.status() == StatusCode::NOT_FOUND;
            let error = self.unexpected(ACT, "upload of this name", answer);
            if !is_gone {
                return Err(error);
            }
            last = Some(error);
        }
        Err(last.expect("three attempts were made"))
    }

    fn get(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, PackageError> {
        const ACT: &str = "give a blob";
        check_digest(&descriptor.digest)?;
        if descriptor.size > limit {
            return Err(PackageError::TooLarge {
                bytes: descriptor.size,
                limit,
                of: "a blob of this kind",
            });
        }
        let url = format!("{}/blobs/{}", self.base, descriptor.digest);
        let mut last = None;
        // One that breaks off in the middle, or is another one, is asked for again.
        for _ in 0..3 {
            let answer = self.ask(ACT, &Method::GET, &url, None, None)?;
            if !answer.status().is_success() {
                return Err(self.unexpected(ACT, &descriptor.digest, answer));
            }
            let read = self.read(ACT, answer, descriptor.size);
            match read.and_then(|bytes| descriptor.check(&bytes, limit).map(|()| bytes)) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("three attempts were made"))
    }

    fn get_tagged(&self, tag: &str, limit: u64) -> Result<Vec<u8>, PackageError> {
        const ACT: &str = "give a manifest";
        let url = format!("{}/manifests/{tag}", self.base);
        let answer = self.ask(ACT, &Method::GET, &url, None, None)?;
        if !answer.status().is_success() {
            return Err(self.unexpected(ACT, &self.reference.to_string(), answer));
        }
        let bytes = self.read(ACT, answer, limit)?;
        let is_digest = tag.starts_with("sha256:");
        if bytes.len() as u64 > limit || is_digest && digest_of(&bytes) != tag {
            return Err(PackageError::Differs {
                member: self.reference.to_string(),
                reason: "its digest differs from the one that was asked for",
            });
        }
        Ok(bytes)
    }

    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), PackageError> {
        const ACT: &str = "take a manifest";
        let digest = digest_of(bytes);
        let url = format!("{}/manifests/{}", self.base, tag.unwrap_or(&digest));
        let answer = self.ask(ACT, &Method::PUT, &url, Some(media_type), Some(bytes))?;
        let stored = header(&answer, "docker-content-digest");
        if !answer.status().is_success() {
            return Err(self.unexpected(ACT, "repository of this name", answer));
        }
        match stored {
            Some(stored) if stored != digest => Err(PackageError::Differs {
                member: self.reference.to_string(),
                reason: "the registry has stored another one",
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    use super::*;

    /// A registry that gives these answers, one after the other, whatever it is asked; and what it was asked.
    struct Scripted {
        host: String,
        asked: Arc<Mutex<Vec<String>>>,
    }

    fn scripted(answers: &[String]) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let mut answers: VecDeque<String> = answers.iter().cloned().collect();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(answer) = answers.pop_front() else {
                    return;
                };
                heard.lock().unwrap().push(read_request(&stream));
                // A client that has gone away is not this test's matter.
                drop((&stream).write_all(answer.as_bytes()));
            }
        });
        Scripted { host, asked }
    }

    fn read_request(stream: &TcpStream) -> String {
        let mut reader = BufReader::new(stream);
        let (mut request, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
                break;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            request += &line;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        request
    }

    fn answer(status: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}"
        )
    }

    fn registry(of: &Scripted, credentials: Option<Credentials>) -> Registry {
        let reference = format!("{}/shop/web:1", of.host).parse().unwrap();
        let transport = Transport {
            plain_http: true,
            ..Transport::default()
        };
        Registry::new(reference, transport, None, credentials).unwrap()
    }

    #[test]
    fn a_busy_registry_is_asked_again() {
        let blob = Descriptor::new("x", b"content");
        let script = scripted(&[
            answer("429 Too Many Requests", "retry-after: 0\r\n", ""),
            answer("500 Internal Server Error", "", "sorry"),
            answer("200 OK", "", "contend"),
            // It breaks off in the middle.
            "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\ncon".to_owned(),
            answer("200 OK", "", "content"),
        ]);
        let got = registry(&script, None).get(&blob, 100).unwrap();
        assert_eq!(got, b"content");
        assert_eq!(script.asked.lock().unwrap().len(), 5);
    }

    #[test]
    fn one_that_lies_is_found_out() {
        let blob = Descriptor::new("x", b"content");
        let lie = answer("200 OK", "", "contend");
        let script = scripted(&[lie.clone(), lie.clone(), lie]);
        let error = registry(&script, None)
            .get(&blob, 100)
            .unwrap_err()
            .to_string();
        assert!(error.contains("digest differs"), "{error}");
        // More than was announced is not read.
        let more = answer("200 OK", "", &"content".repeat(1000));
        let script = scripted(&[more.clone(), more.clone(), more]);
        assert!(registry(&script, None).get(&blob, 100).is_err());
        let large = Descriptor {
            size: 10 << 40,
            ..blob.clone()
        };
        let script = scripted(&[]);
        let error = registry(&script, None)
            .get(&large, 100)
            .unwrap_err()
            .to_string();
        assert!(error.contains("100 are taken at most"), "{error}");
        let script = scripted(&[answer("404 Not Found", "", "")]);
        let error = registry(&script, None)
            .get(&blob, 100)
            .unwrap_err()
            .to_string();
        assert!(error.contains("has no sha256:"), "{error}");
    }

    #[test]
    fn a_token_is_fetched_with_the_credentials() {
        let blob = Descriptor::new("x", b"content");
        let tokens = scripted(&[answer("200 OK", "", r#"{"token": "T"}"#)]);
        let challenge = format!(
            "www-authenticate: Bearer realm=\"http://{}/token\",service=\"s\",scope=\"repository:web:pull\"\r\n",
            tokens.host
        );
        let script = scripted(&[
            answer("401 Unauthorized", &challenge, ""),
            answer("200 OK", "", "content"),
        ]);
        let credentials = Credentials {
            user: "me".into(),
            secret: "secret".into(),
        };
        registry(&script, Some(credentials))
            .get(&blob, 100)
            .unwrap();
        let asked = tokens.asked.lock().unwrap();
        assert!(
            asked[0].starts_with("GET /token?service=s&scope=repository:web:pull "),
            "{asked:?}"
        );
        assert!(asked[0].contains("Basic bWU6c2VjcmV0"), "{asked:?}");
        assert!(script.asked.lock().unwrap()[1].contains("Bearer T"));
    }

    #[test]
    fn a_refusal_is_told_in_its_words() {
        let words = r#"{"errors": [{"message": "no room"}]}"#;
        let script = scripted(&[answer("403 Forbidden", "", words)]);
        let error = registry(&script, None)
            .put(&digest_of(b"x"), b"x")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("refuses to take a blob") && error.contains("no room"),
            "{error}"
        );
    }
}
