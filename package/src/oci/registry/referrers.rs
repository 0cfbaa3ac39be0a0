//! Artifacts that belong to an image, found from the image.
//!
//! ```text
//!  PUT /v2/<name>/manifests/<digest> ──> OCI-Subject: <digest of the image>    the registry keeps the list itself
//!                                   `─> no such header                          a list has to be kept for it:
//!  GET, PUT /v2/<name>/manifests/sha256-<hex>    an index of the artifacts of the image
//! ```
//!
//! The second is the "referrers tag schema" of the distribution specification (1.1), for registries that do not know the
//! first, such as Docker's.

use ureq::http::Method;

use super::exchange::{Ask, Content, header};
use super::{Registry, RegistryError};
use crate::error::PackageError;
use crate::oci::artifact::ARTIFACT_LIMIT;
use crate::oci::blobs::Blobs as _;
use crate::oci::digests::{check_digest, digest_of};
use crate::oci::document::{Descriptor, INDEX, Index, MANIFEST};

impl Registry {
    /// Puts the manifest of an artifact there, `described` by the descriptor, so that it is found from its `subject`.
    ///
    /// # Errors
    /// The registry does not take it, or has something else where the list of artifacts belongs.
    pub(crate) fn put_referrer(
        &self,
        json: &[u8],
        described: &Descriptor,
        subject: Option<&Descriptor>,
    ) -> Result<(), PackageError> {
        let knows_subjects = self.put_document(MANIFEST, json, None)?;
        let Some(subject) = subject.filter(|_| !knows_subjects) else {
            return Ok(());
        };
        let tag = format!("sha256-{}", check_digest(&subject.digest)?);
        let mut list = match self.manifest(&tag, ARTIFACT_LIMIT) {
            Ok(json) => Index::parse(&json)?,
            Err(PackageError::Registry(RegistryError::NotFound { .. })) => Index::default(),
            Err(error) => return Err(error),
        };
        if list.media_type != INDEX {
            let reason = format!("{tag} is no list of artifacts");
            return Err(PackageError::Unknown { reason });
        }
        if list
            .manifests
            .iter()
            .any(|it| it.digest == described.digest)
        {
            return Ok(());
        }
        list.manifests.push(described.clone());
        self.put_manifest(INDEX, &list.to_json(), Some(&tag))
    }

    /// Puts a manifest or index there; true: the registry lists it among the artifacts of its subject.
    pub(super) fn put_document(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<bool, PackageError> {
        const ACT: &str = "take a manifest";
        let digest = digest_of(bytes);
        let url = format!("{}/manifests/{}", self.base, tag.unwrap_or(&digest));
        let put = Ask {
            content_type: Some(media_type),
            content: Content::Bytes(bytes),
            ..Ask::new(Method::PUT, &url)
        };
        let answer = self.ask(ACT, &put)?;
        if !answer.status().is_success() {
            return Err(self.unexpected(ACT, "repository of this name", answer));
        }
        match header(&answer, "docker-content-digest") {
            Some(stored) if stored != digest => Err(PackageError::Differs {
                member: self.reference.to_string(),
                reason: "the registry has stored another one",
            }),
            _ => Ok(header(&answer, "oci-subject").is_some()),
        }
    }
}
