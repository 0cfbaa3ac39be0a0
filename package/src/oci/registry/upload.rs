//! A blob on its way into a registry.
//!
//! ```text
//!  POST  /v2/<name>/blobs/uploads/?mount=<digest>&from=<repository>   201: it has been there; 202: as below
//!  POST  /v2/<name>/blobs/uploads/                                    202, Location: where to put it
//!  PUT   <location>?digest=<digest>                                   201
//!
//!  and when that has broken off:
//!  POST  /v2/<name>/blobs/uploads/                                    202, Location
//!  PATCH <location>, Content-Range: 0-<last>                          broken off again ──┐
//!  GET   <location>                                                   204, Location, Range: 0-<last that it has>
//!  PATCH <location>, Content-Range: <next>-<last>                     202, Location    <─┘
//!  PUT   <location>?digest=<digest>                                   201
//! ```
//!
//! All registries take a blob that comes in one piece, so that is tried first. Not all can tell what they have of one
//! that broke off: Docker's (2.8) takes no further piece of it, and the blob begins anew.

use std::io::{self, Read};

use ureq::Body;
use ureq::http::{Method, Response, StatusCode};

use super::Registry;
use super::exchange::{Ask, Attempt, Content, Trouble, header};
use super::patience::Attempts;
use crate::error::PackageError;
use crate::oci::artifact::Came;
use crate::oci::blobs::Blobs as _;
use crate::oci::digests::check_digest;
use crate::oci::reference::is_repository;

const TAKE_BLOB: &str = "take a blob";
const BYTES: &str = "application/octet-stream";
const FORGOTTEN: &str = "it has forgotten the upload";

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

/// What is sent again in one piece.
const SMALL: u64 = 1 << 20;

/// Where an upload goes on.
#[derive(Default)]
enum Place {
    /// It begins.
    #[default]
    Nowhere,
    /// The registry waits for it there, and has nothing of it.
    Begun(String),
    /// A piece for there has broken off.
    Broken(String),
}

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
        let mut place = Place::Nowhere;
        for repository in others.take(MOST_REPOSITORIES) {
            match self.mount(blob.digest, repository)? {
                Begun::Mounted => return Ok(Came::Mounted),
                Begun::At(location) => place = Place::Begun(location),
                // It is sent the blob, whatever its reason is; one that takes nothing says so then.
                Begun::Later(_) | Begun::Refused(_) => {}
            }
        }
        let content = Content::Stream {
            size: blob.size,
            open: blob.open,
            skipped: 0,
        };
        self.upload_patiently(blob.digest, blob.size, content, place)?;
        Ok(Came::Sent)
    }

    /// Puts a blob there that is in memory.
    pub(super) fn put_bytes(&self, digest: &str, bytes: &[u8]) -> Result<(), PackageError> {
        check_digest(digest)?;
        let content = Content::Bytes(bytes);
        self.upload_patiently(digest, bytes.len() as u64, content, Place::Nowhere)
    }

    fn upload_patiently(
        &self,
        digest: &str,
        size: u64,
        content: Content<'_>,
        mut place: Place,
    ) -> Result<(), PackageError> {
        let mut attempts = Attempts::new(self.patience);
        let mut is_first = true;
        loop {
            let trouble = match is_first || size < SMALL {
                true => self.put_whole(digest, content, &mut place)?,
                false => self.go_on_with(digest, size, content, &mut place, &mut attempts)?,
            };
            let Some(trouble) = trouble else {
                return Ok(());
            };
            is_first = false;
            if !attempts.wait(trouble.wait) {
                return Err(self.failed(TAKE_BLOB, trouble));
            }
            // The blob may have come although the answer has not.
            if self.has(digest, size)? {
                return Ok(());
            }
        }
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
        Ok(match self.place_in(&answer) {
            Some(location) => Begun::At(location),
            None => Begun::Later(Trouble::new("it names no place for the blob")),
        })
    }

    /// The place that an answer names for what comes next.
    fn place_in(&self, answer: &Response<Body>) -> Option<String> {
        let location = header(answer, "location")?;
        match location.as_str() {
            path if path.starts_with('/') => Some(format!("{}{path}", self.origin)),
            url if url.contains("://") => Some(location),
            _ => None,
        }
    }

    /// A place for the blob.
    fn begun(&self, place: &mut Place) -> Result<Begun, PackageError> {
        if let Place::Begun(location) = std::mem::take(place) {
            return Ok(Begun::At(location));
        }
        match self.begin(&format!("{}/blobs/uploads/", self.base))? {
            Begun::Refused(answer) => {
                Err(self.unexpected(TAKE_BLOB, "repository of this name", *answer))
            }
            begun => Ok(begun),
        }
    }

    /// Puts it there in one piece. A trouble: it has to begin anew, because what the registry has of it is not known.
    fn put_whole(
        &self,
        digest: &str,
        content: Content<'_>,
        place: &mut Place,
    ) -> Result<Option<Trouble>, PackageError> {
        match self.begun(place)? {
            Begun::At(location) => self.put_last(digest, content, &location),
            Begun::Later(trouble) => Ok(Some(trouble)),
            Begun::Mounted | Begun::Refused(_) => Ok(None),
        }
    }

    /// Puts it there from where it broke off on. A trouble: `place` says where it goes on.
    fn go_on_with(
        &self,
        digest: &str,
        size: u64,
        content: Content<'_>,
        place: &mut Place,
        attempts: &mut Attempts,
    ) -> Result<Option<Trouble>, PackageError> {
        let mut reached = None;
        if let Place::Broken(location) = place {
            match self.reached(location, size)? {
                Ok(there) => reached = there,
                Err(trouble) => return Ok(Some(trouble)),
            }
            *place = Place::Nowhere;
        }
        let (mut location, from) = match reached {
            Some(reached) => reached,
            None => match self.begun(place)? {
                Begun::At(location) => (location, 0),
                Begun::Later(trouble) => return Ok(Some(trouble)),
                Begun::Mounted | Begun::Refused(_) => return Ok(None),
            },
        };
        attempts.reached(from);
        if from < size {
            let patch = Ask {
                content_type: Some(BYTES),
                content: content.without(from),
                sent: Some((from, size - 1)),
                ..Ask::new(Method::PATCH, &location)
            };
            let answer = match self.attempt(TAKE_BLOB, &patch)? {
                Attempt::Answer(answer) => answer,
                Attempt::Later(trouble) => {
                    *place = Place::Broken(location);
                    return Ok(Some(trouble));
                }
            };
            match answer.status() {
                StatusCode::ACCEPTED => {}
                StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Ok(Some(Trouble::new(FORGOTTEN)));
                }
                _ => return Err(self.unexpected(TAKE_BLOB, "upload of this name", answer)),
            }
            location = self.place_in(&answer).unwrap_or(location);
        }
        let trouble = self.put_last(digest, Content::Bytes(&[]), &location)?;
        if trouble.is_some() {
            *place = Place::Broken(location);
        }
        Ok(trouble)
    }

    /// Where an upload goes on, and what the registry has of it; none: it does not say. An error: for now.
    fn reached(
        &self,
        location: &str,
        size: u64,
    ) -> Result<Result<Option<(String, u64)>, Trouble>, PackageError> {
        let answer = match self.attempt(TAKE_BLOB, &Ask::new(Method::GET, location))? {
            Attempt::Answer(answer) => answer,
            Attempt::Later(trouble) => return Ok(Err(trouble)),
        };
        let range = header(&answer, "range").unwrap_or_default();
        let last = range.strip_prefix("bytes=").unwrap_or(&range);
        let last = last.strip_prefix("0-").and_then(|it| it.parse().ok());
        // "0-0" is said of nothing, too.
        let last = last.filter(|last: &u64| (1..size).contains(last));
        Ok(Ok(match (answer.status(), last) {
            (StatusCode::NO_CONTENT, Some(last)) => {
                let next = self.place_in(&answer);
                Some((next.unwrap_or_else(|| location.to_owned()), last + 1))
            }
            _ => None,
        }))
    }

    /// The request that ends an upload.
    fn put_last(
        &self,
        digest: &str,
        content: Content<'_>,
        location: &str,
    ) -> Result<Option<Trouble>, PackageError> {
        let separator = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{separator}digest={}", digest.replace(':', "%3A"));
        let put = Ask {
            content_type: Some(BYTES),
            content,
            ..Ask::new(Method::PUT, &url)
        };
        match self.attempt(TAKE_BLOB, &put)? {
            Attempt::Later(trouble) => Ok(Some(trouble)),
            Attempt::Answer(answer) => match answer.status() {
                StatusCode::CREATED => Ok(None),
                StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE => {
                    Ok(Some(Trouble::new(FORGOTTEN)))
                }
                _ => Err(self.unexpected(TAKE_BLOB, "upload of this name", answer)),
            },
        }
    }
}
