//! A blob on its way into a registry.
//!
//! ```text
//!  POST /v2/<name>/blobs/uploads/?mount=<digest>&from=<repository>   201: it has been there; 202: as below
//!  POST /v2/<name>/blobs/uploads/                                    202, Location: where to put it
//!  PUT  <location>?digest=<digest>                                   201
//! ```
//!
//! What breaks off begins anew: registries differ in how they tell what they have of an upload, and all take one that
//! comes in one piece.

use std::io::{self, Read};

use ureq::Body;
use ureq::http::{Method, Response, StatusCode};

use super::Registry;
use super::exchange::{Ask, Attempt, Content, Trouble, header};
use super::patience::Attempts;
use crate::error::PackageError;
use crate::oci::artifact::Came;
use crate::oci::blobs::{Blobs as _, check_digest};
use crate::oci::reference::is_repository;

const TAKE_BLOB: &str = "take a blob";

/// A blob that is read while it is sent.
pub(crate) struct Streamed<'a> {
    pub(crate) digest: &'a str,
    /// Bytes of it.
    pub(crate) size: u64,
    /// Repositories of the same registry that may have it.
    pub(crate) repositories: &'a [String],
    /// Gives it from its begin.
    pub(crate) open: &'a dyn Fn() -> io::Result<Box<dyn Read + Send>>,
}

/// Repositories that a registry is asked about, for one blob.
const MOST_REPOSITORIES: usize = 3;

/// Where an upload goes to.
enum Begun {
    /// Nowhere: the registry had the blob in another repository.
    Mounted,
    At(String),
    Later(Trouble),
    Refused(Box<Response<Body>>),
}

impl Registry {
    /// Puts a blob there, unless it is there already or in one of the repositories that may have it.
    ///
    /// # Errors
    /// It cannot be read, or the registry does not take it.
    pub(crate) fn put_streamed(&self, blob: &Streamed<'_>) -> Result<Came, PackageError> {
        check_digest(blob.digest)?;
        if self.has(blob.digest, blob.size)? {
            return Ok(Came::WasThere);
        }
        let own = &self.reference.name;
        let others = blob.repositories.iter();
        let others = others.filter(|it| *it != own && is_repository(it));
        let mut begun = None;
        for repository in others.take(MOST_REPOSITORIES) {
            match self.mount(blob.digest, repository)? {
                Begun::Mounted => return Ok(Came::Mounted),
                Begun::At(location) => begun = Some(location),
                // It is sent the blob, whatever its reason is; one that takes nothing says so then.
                Begun::Later(_) | Begun::Refused(_) => {}
            }
        }
        let content = Content::Stream {
            size: blob.size,
            open: blob.open,
        };
        self.upload_patiently(blob.digest, blob.size, &content, begun)?;
        Ok(Came::Sent)
    }

    /// Puts a blob there that is in memory.
    pub(super) fn put_bytes(&self, digest: &str, bytes: &[u8]) -> Result<(), PackageError> {
        check_digest(digest)?;
        self.upload_patiently(digest, bytes.len() as u64, &Content::Bytes(bytes), None)
    }

    /// `begun`: where the registry waits for it already.
    fn upload_patiently(
        &self,
        digest: &str,
        size: u64,
        content: &Content<'_>,
        mut begun: Option<String>,
    ) -> Result<(), PackageError> {
        let mut attempts = Attempts::new(self.patience);
        while let Some(trouble) = self.upload(digest, content, begun.take())? {
            if !attempts.wait(trouble.wait) {
                return Err(self.failed(TAKE_BLOB, trouble));
            }
            // The blob may have come although the answer has not.
            if self.has(digest, size)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Asks the registry to take the blob from another of its repositories.
    fn mount(&self, digest: &str, repository: &str) -> Result<Begun, PackageError> {
        let from = repository.replace('/', "%2F");
        let digest = digest.replace(':', "%3A");
        let url = format!("{}/blobs/uploads/?mount={digest}&from={from}", self.base);
        let mut attempts = Attempts::new(self.patience);
        loop {
            match self.begin(&url)? {
                Begun::Later(trouble) if attempts.wait(trouble.wait) => {}
                begun => return Ok(begun),
            }
        }
    }

    fn begin(&self, url: &str) -> Result<Begun, PackageError> {
        let begin = Ask {
            content: Content::Bytes(&[]),
            ..Ask::new(Method::POST, url)
        };
        let answer = match self.attempt(TAKE_BLOB, &begin)? {
            Attempt::Later(trouble) => return Ok(Begun::Later(trouble)),
            Attempt::Answer(answer) => answer,
        };
        match answer.status() {
            StatusCode::CREATED => return Ok(Begun::Mounted),
            StatusCode::ACCEPTED => {}
            _ => return Ok(Begun::Refused(Box::new(answer))),
        }
        let location = header(&answer, "location").unwrap_or_default();
        Ok(match location.as_str() {
            path if path.starts_with('/') => Begun::At(format!("{}{path}", self.origin)),
            url if url.contains("://") => Begun::At(url.to_owned()),
            _ => Begun::Later(Trouble::new("it names no place for the blob")),
        })
    }

    /// A trouble: the upload has to begin anew, because what the registry has of it is not known.
    fn upload(
        &self,
        digest: &str,
        content: &Content<'_>,
        begun: Option<String>,
    ) -> Result<Option<Trouble>, PackageError> {
        let begun = match begun {
            Some(location) => Begun::At(location),
            None => self.begin(&format!("{}/blobs/uploads/", self.base))?,
        };
        let location = match begun {
            Begun::At(location) => location,
            Begun::Later(trouble) => return Ok(Some(trouble)),
            Begun::Mounted => return Ok(None),
            Begun::Refused(answer) => {
                return Err(self.unexpected(TAKE_BLOB, "repository of this name", *answer));
            }
        };
        let separator = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{separator}digest={}", digest.replace(':', "%3A"));
        let put = Ask {
            content_type: Some("application/octet-stream"),
            content: *content,
            ..Ask::new(Method::PUT, &url)
        };
        match self.attempt(TAKE_BLOB, &put)? {
            Attempt::Later(trouble) => Ok(Some(trouble)),
            Attempt::Answer(answer) => match answer.status() {
                StatusCode::CREATED => Ok(None),
                StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE => {
                    Ok(Some(Trouble::new("it has forgotten the upload")))
                }
                _ => Err(self.unexpected(TAKE_BLOB, "upload of this name", answer)),
            },
        }
    }
}
