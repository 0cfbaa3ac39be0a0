//! The documents of OCI images, as far as they are written and read here.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::digests::{check_digest, digest_of};
use crate::error::PackageError;

/// Media type of an index.
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of a manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Longest list of a document that is read: three bytes of it may be an entry, which takes two hundred in memory. An
/// artifact of ours, which is no longer than 4 MiB, has half as many at most.
const MOST_DESCRIPTORS: usize = 32 << 10;

/// What names a blob.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
    /// What kind of artifact it is the manifest of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// For which machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// More about it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// As Go calls it.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Which kind of the architecture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// An index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Index {
    pub(crate) schema_version: u32,
    pub(crate) media_type: String,
    #[serde(deserialize_with = "not_too_many")]
    pub(crate) manifests: Vec<Descriptor>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            schema_version: 2,
            media_type: INDEX.to_owned(),
            manifests: Vec::new(),
            annotations: BTreeMap::new(),
        }
    }
}

/// A manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    pub(crate) media_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    pub(crate) config: Descriptor,
    #[serde(deserialize_with = "not_too_many")]
    pub(crate) layers: Vec<Descriptor>,
    /// The manifest that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) subject: Option<Descriptor>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Default for Manifest {
    fn default() -> Self {
        Self {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            artifact_type: None,
            config: Descriptor::default(),
            layers: Vec::new(),
            subject: None,
            annotations: BTreeMap::new(),
        }
    }
}

impl Descriptor {
    /// That of bytes.
    pub(crate) fn new(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: digest_of(bytes),
            size: bytes.len() as u64,
            ..Self::default()
        }
    }

    /// One of its annotations.
    pub(crate) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// Compares bytes with it.
    pub(crate) fn check(&self, bytes: &[u8], limit: u64) -> Result<(), PackageError> {
        check_digest(&self.digest)?;
        let differs = |reason| PackageError::Differs {
            member: self.digest.clone(),
            reason,
        };
        if bytes.len() as u64 > limit || bytes.len() as u64 != self.size {
            return Err(differs("its length differs from the manifest's"));
        }
        match digest_of(bytes) == self.digest {
            true => Ok(()),
            false => Err(differs("its digest differs from the manifest's")),
        }
    }
}

fn not_too_many<'de, D: Deserializer<'de>>(list: D) -> Result<Vec<Descriptor>, D::Error> {
    struct Bounded;
    impl<'de> Visitor<'de> for Bounded {
        type Value = Vec<Descriptor>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of {MOST_DESCRIPTORS} descriptors at most")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(next) = list.next_element()? {
                if all.len() == MOST_DESCRIPTORS {
                    return Err(A::Error::invalid_length(all.len() + 1, &self));
                }
                all.push(next);
            }
            Ok(all)
        }
    }
    list.deserialize_seq(Bounded)
}

fn parse<T: DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, PackageError> {
    serde_json::from_slice(json).map_err(|error| PackageError::Member {
        member: what.to_owned(),
        reason: format!("it cannot be parsed: {error}"),
    })
}

fn to_json<T: Serialize>(document: &T) -> Vec<u8> {
    serde_json::to_vec(document).expect("strings, numbers and lists are always JSON")
}

impl Index {
    pub(crate) fn parse(json: &[u8]) -> Result<Self, PackageError> {
        parse("the index", json)
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }
}

impl Manifest {
    pub(crate) fn parse(json: &[u8]) -> Result<Self, PackageError> {
        parse("the manifest", json)
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three bytes are an entry, which takes two hundred in memory.
    #[test]
    fn lists_have_an_end() {
        let list = |count: usize| format!("[{}]", vec!["{}"; count].join(","));
        let manifest =
            |count| Manifest::parse(format!("{{\"layers\":{}}}", list(count)).as_bytes());
        let index = |count| Index::parse(format!("{{\"manifests\":{}}}", list(count)).as_bytes());
        assert_eq!(manifest(20_000).unwrap().layers.len(), 20_000);
        assert_eq!(index(20_000).unwrap().manifests.len(), 20_000);
        for error in [
            manifest(40_000).map(drop).unwrap_err(),
            index(40_000).map(drop).unwrap_err(),
        ] {
            assert!(error.to_string().contains("cannot be parsed"), "{error}");
        }
    }
}
