//! One request and its answer, with the credentials that the registry asks for.
//!
//! ```text
//!  401 ──> WWW-Authenticate: Basic, or Bearer realm="...",service="...",scope="..." ──> a token ──> once more
//!          GET with the secret, POST with an identity token
//!  408, 429, 5xx, a broken or silent connection ──> worth another attempt
//! ```
//!
//! Credentials and tokens go to the host of the reference alone (credentials to its realm, too), wherever an
//! answer leads.

use std::io::{self, Read};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use data_encoding::BASE64;
use serde::Deserialize;
use ureq::http::{Method, Request, Response, StatusCode};
use ureq::{Body, ResponseExt as _, SendBody};

use super::body::read_body;
use super::{Registry, RegistryError};
use crate::error::PackageError;
use crate::oci::document::{INDEX, MANIFEST};

/// Longest answer that is no blob, in bytes.
const ANSWER_LIMIT: u64 = 64 << 10;

/// A request.
#[derive(Clone)]
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) url: &'a str,
    pub(super) content_type: Option<&'a str>,
    pub(super) content: Content<'a>,
    /// The first byte that is asked for.
    pub(super) from: usize,
    /// Which bytes of a whole are sent: the first and the last one.
    pub(super) sent: Option<(u64, u64)>,
}

impl<'a> Ask<'a> {
    pub(super) fn new(method: Method, url: &'a str) -> Self {
        Self {
            method,
            url,
            content_type: None,
            content: Content::None,
            from: 0,
            sent: None,
        }
    }
}

/// The body of a request.
#[derive(Clone, Copy)]
pub(super) enum Content<'a> {
    None,
    Bytes(&'a [u8]),
    /// What is read from its begin by each attempt.
    Stream {
        size: u64,
        open: &'a dyn Fn() -> io::Result<Box<dyn Read + Send>>,
        /// Bytes at its begin that are not sent.
        skipped: u64,
    },
}

impl Content<'_> {
    /// The same without its first bytes.
    pub(super) fn without(self, skipped: u64) -> Self {
        match self {
            Self::None => Self::None,
            Self::Bytes(bytes) => {
                let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
                Self::Bytes(bytes.get(skipped..).unwrap_or_default())
            }
            Self::Stream { size, open, .. } => Self::Stream {
                size,
                open,
                skipped,
            },
        }
    }
}

/// Why a request has no answer.
enum NotAnswered {
    Http(ureq::Error),
    /// What was to be sent cannot be read.
    Unread(io::Error),
}

impl From<ureq::Error> for NotAnswered {
    fn from(error: ureq::Error) -> Self {
        Self::Http(error)
    }
}

impl From<ureq::http::Error> for NotAnswered {
    fn from(error: ureq::http::Error) -> Self {
        Self::Http(error.into())
    }
}

/// What is sent, and the error that has ended it: the client takes it for one of the connection.
struct Watched {
    source: Box<dyn Read + Send>,
    left: u64,
    error: Option<io::Error>,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match self.source.read(buffer) {
            Ok(0) if self.left > 0 && !buffer.is_empty() => {
                Err(io::Error::from(io::ErrorKind::UnexpectedEof))
            }
            read => read,
        };
        match read {
            Ok(read) => {
                self.left = self.left.saturating_sub(read as u64);
                Ok(read)
            }
            Err(error) => {
                let told = io::Error::from(error.kind());
                self.error = Some(error);
                Err(told)
            }
        }
    }
}

/// What an attempt led to.
pub(super) enum Attempt {
    Answer(Response<Body>),
    Later(Trouble),
}

/// A failure that may be none at the next attempt.
pub(super) struct Trouble {
    pub(super) reason: String,
    /// How long the registry wants to be left alone.
    pub(super) wait: Option<Duration>,
}

impl Trouble {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            wait: None,
        }
    }
}

impl Registry {
    pub(super) fn attempt(&self, act: &str, ask: &Ask<'_>) -> Result<Attempt, PackageError> {
        let is_own = self.is_own(ask.url);
        let mut own: Option<String> = None;
        loop {
            // Another thread may have got one for something else meanwhile.
            let shared = || self.authorization().clone().filter(|_| is_own);
            let authorization = own.clone().or_else(shared);
            let answer = match self.send(ask, authorization.as_deref()) {
                Ok(answer) => {
                    self.has_answered.store(true, Ordering::Relaxed);
                    answer
                }
                Err(NotAnswered::Unread(error)) => {
                    return Err(PackageError::Unread { source: error });
                }
                Err(NotAnswered::Http(error)) if is_passing(&error) => {
                    let trouble = Trouble::new(error.to_string());
                    // One that is started anew in the middle is waited for; one that was never there has a wrong name.
                    return match is_refused(&error) && !self.has_answered.load(Ordering::Relaxed) {
                        true => Err(self.failed(act, trouble)),
                        false => Ok(Attempt::Later(trouble)),
                    };
                }
                Err(NotAnswered::Http(error)) => {
                    return Err(RegistryError::Unusable {
                        registry: self.registry(),
                        act: act.to_owned(),
                        reason: error.to_string(),
                    }
                    .into());
                }
            };
            let status = answer.status();
            // A redirection may have led elsewhere, and whoever asks there asks for nothing of this registry's.
            let asks_for_itself = is_own && self.is_own(&answer.get_uri().to_string());
            if status == StatusCode::UNAUTHORIZED && asks_for_itself && own.is_none() {
                let challenge = header(&answer, "www-authenticate").unwrap_or_default();
                if let Some(fresh) = self.authorize(&challenge)? {
                    *self.authorization() = Some(fresh.clone());
                    own = Some(fresh);
                    continue;
                }
            }
            let is_passing = status.is_server_error()
                || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
            if !is_passing {
                return Ok(Attempt::Answer(answer));
            }
            let seconds = header(&answer, "retry-after").and_then(|it| it.parse().ok());
            return Ok(Attempt::Later(Trouble {
                reason: match seconds {
                    Some(seconds) => format!("it answers {status}, and asks for {seconds} s"),
                    None => format!("it answers {status}"),
                },
                wait: seconds.map(Duration::from_secs),
            }));
        }
    }

    /// Whether this is at the host of the reference.
    fn is_own(&self, url: &str) -> bool {
        let path = url.strip_prefix(&self.origin);
        path.is_some_and(|path| path.starts_with('/'))
    }

    fn authorization(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn send(
        &self,
        ask: &Ask<'_>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, NotAnswered> {
        let mut request = Request::builder().method(ask.method.clone()).uri(ask.url);
        request = request.header("accept", format!("{MANIFEST}, {INDEX}, */*"));
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        if let Some(content_type) = ask.content_type {
            request = request.header("content-type", content_type);
        }
        if ask.from > 0 {
            request = request.header("range", format!("bytes={}-", ask.from));
        }
        if let Some((first, last)) = ask.sent {
            request = request.header("content-range", format!("{first}-{last}"));
        }
        let (size, open, skipped) = match ask.content {
            Content::None => return Ok(self.agent.run(request.body(())?)?),
            Content::Bytes(bytes) => return Ok(self.agent.run(request.body(bytes)?)?),
            Content::Stream {
                size,
                open,
                skipped,
            } => (size, open, skipped),
        };
        let mut source = open().map_err(NotAnswered::Unread)?;
        io::copy(&mut (&mut source).take(skipped), &mut io::sink()).map_err(NotAnswered::Unread)?;
        let left = size.saturating_sub(skipped);
        let mut watched = Watched {
            source,
            left,
            error: None,
        };
        let request = request.header("content-length", left);
        let answer = self
            .agent
            .run(request.body(SendBody::from_reader(&mut watched))?);
        match watched.error {
            Some(error) => Err(NotAnswered::Unread(error)),
            None => Ok(answer?),
        }
    }

    /// The header that answers a challenge; none when there is nothing to answer it with.
    fn authorize(&self, challenge: &str) -> Result<Option<String>, PackageError> {
        let secret = self.credentials.as_ref().filter(|it| it.has_secret());
        let basic = secret.map(|it| {
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
        let named = ["service", "scope"].map(|key| value(key).map(|it| (key, it)));
        let query = query_of(named.into_iter().flatten());
        let token = self
            .credentials
            .as_ref()
            .map(|it| it.identity_token.as_str());
        let token = token.filter(|it| !it.is_empty());
        // As OAuth2 has it: a token that lasts is exchanged for one that does not.
        let form = token.map(|token| {
            let grant = [
                ("grant_type", "refresh_token".to_owned()),
                ("client_id", "transship".to_owned()),
                ("refresh_token", token.to_owned()),
            ];
            format!("{}&{query}", query_of(grant))
        });
        let url = match (&form, query.is_empty(), realm.contains('?')) {
            (Some(_), ..) | (None, true, _) => realm,
            (None, false, true) => format!("{realm}&{query}"),
            (None, false, false) => format!("{realm}?{query}"),
        };
        let ask = match &form {
            Some(form) => Ask {
                content_type: Some("application/x-www-form-urlencoded"),
                content: Content::Bytes(form.as_bytes()),
                ..Ask::new(Method::POST, &url)
            },
            None => Ask::new(Method::GET, &url),
        };
        let basic = basic.filter(|_| form.is_none());
        let failed = |reason: String| RegistryError::Credentials {
            registry: self.registry(),
            reason,
        };
        let mut answer = self
            .send(&ask, basic.as_deref())
            .map_err(|error| match error {
                NotAnswered::Http(error) => failed(error.to_string()),
                NotAnswered::Unread(error) => failed(error.to_string()),
            })?;
        if !answer.status().is_success() {
            return Err(failed(format!("{url} answers {}", answer.status())).into());
        }
        // Some answer with both names.
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let (text, whole) = self.read_answer(&mut answer);
        whole.map_err(|error| failed(error.to_string()))?;
        let token: Token =
            serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
        let token = token.token.or(token.access_token);
        let token = token.ok_or_else(|| failed(format!("{url} gives no token")))?;
        Ok(Some(format!("Bearer {token}")))
    }

    /// What there is of a short answer, and whether that is all of it.
    fn read_answer(&self, answer: &mut Response<Body>) -> (String, io::Result<()>) {
        let mut bytes = Vec::new();
        let body = answer.body_mut().as_reader();
        let read = read_body(body, &mut bytes, ANSWER_LIMIT, self.patience);
        (String::from_utf8_lossy(&bytes).into_owned(), read)
    }

    /// The error for an answer that is not the expected one.
    pub(super) fn unexpected(
        &self,
        act: &str,
        what: &str,
        mut answer: Response<Body>,
    ) -> PackageError {
        let registry = self.registry();
        if answer.status() == StatusCode::NOT_FOUND {
            let what = what.to_owned();
            return RegistryError::NotFound { registry, what }.into();
        }
        // As many as have come.
        let (words, _) = self.read_answer(&mut answer);
        let words: String = words.chars().take(300).collect();
        let reason = format!("{} {}", answer.status(), words.trim().escape_debug());
        RegistryError::Refused {
            registry,
            act: act.to_owned(),
            reason,
        }
        .into()
    }
}

/// Whether another attempt may go better: not when what it said was no HTTP or TLS, or its certificate is not trusted.
fn is_passing(error: &ureq::Error) -> bool {
    match error {
        // rustls tells of certificates so.
        ureq::Error::Io(error) => error.kind() != std::io::ErrorKind::InvalidData,
        ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_)
        | ureq::Error::BodyStalled => true,
        _ => false,
    }
}

/// Whether nobody listens there.
fn is_refused(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        ureq::Error::ConnectionFailed => true,
        _ => false,
    }
}

/// A header of an answer, when it is a text.
pub(super) fn header(answer: &Response<Body>, name: &str) -> Option<String> {
    Some(answer.headers().get(name)?.to_str().ok()?.to_owned())
}

fn query_of<'a>(values: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let values = values.into_iter();
    let values: Vec<_> = values
        .map(|(key, it)| format!("{key}={}", escape(&it)))
        .collect();
    values.join("&")
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
