//! A checkpoint that lies sealed in a store: encrypted, with what the node must know of it beside it in clear.
//!
//! ```text
//! <root>/<name>/
//!   sealed.json   { "format": { "version": 1 },
//!                   "package": { "path": "sealed.age", "size": BYTES, "sha256": DIGEST },
//!                   "manifest": DIGEST of the transship.json in the package,
//!                   "bytes": of all files when it is opened,
//!                   "head": a manifest without files, images and options }
//!   sealed.age    the package, encrypted by age; docs/format.md
//!
//! <opened>/<key>/files/<name>/   the same opened: in memory, as long as somebody needs it; the key is a digest of the
//!                                package's digest and the name
//! ```
//!
//! The head is what is listed, counted and pruned by. Its name is the one that the checkpoint has here; the package may
//! have been made under another one. Whoever opens the package compares it with the manifest in there,
//! so that neither can be that of another checkpoint.

use serde::{Deserialize, Serialize};
use transship_digest::sha256_hex;

use crate::manifest::{
    Container, FORMAT_VERSION, File, Format, Manifest, ManifestError, Shared, Source,
};

/// The file that makes a directory a sealed checkpoint.
pub const SEALED_FILE: &str = "sealed.json";
/// The encrypted package beside it.
pub const PACKAGE_FILE: &str = "sealed.age";

/// What is known of a sealed checkpoint without a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Version and features of this file.
    pub format: Format,
    /// The encrypted package.
    pub package: File,
    /// SHA-256 of the manifest in it, under the name that is in the head, lower-case hexadecimal.
    pub manifest: String,
    /// Bytes of all its files when it is opened.
    pub bytes: u64,
    /// See [`Sealed::head_of`].
    pub head: Manifest,
}

impl Sealed {
    /// That of a package; `digest` is that of the manifest's bytes in it.
    #[must_use]
    pub fn new(package: File, manifest: &Manifest, digest: String) -> Self {
        Self {
            format: Format::default(),
            package,
            manifest: digest,
            bytes: manifest.size(),
            head: Self::head_of(manifest),
        }
    }

    /// What of a manifest stays in clear: names, the moment, the node, the pod.
    #[must_use]
    pub fn head_of(manifest: &Manifest) -> Manifest {
        let containers = manifest.containers.iter().map(|container| Container {
            name: container.name.clone(),
            id: container.id.clone(),
            namespace: container.namespace.clone(),
            ..Container::default()
        });
        Manifest {
            format: Format::default(),
            name: manifest.name.clone(),
            created: manifest.created,
            source: Source {
                hostname: manifest.source.hostname.clone(),
                architecture: manifest.source.architecture.clone(),
                ..Source::default()
            },
            pod: manifest.pod.clone(),
            containers: containers.collect(),
            not_running: manifest.not_running.clone(),
            shared: Shared::default(),
        }
    }

    /// Parses and checks it.
    ///
    /// # Errors
    /// A later version, an unknown feature, a digest that none is, or a name that is not a plain one.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct OnlyFormat {
            format: Format,
        }
        let OnlyFormat { format } = serde_json::from_slice(json)?;
        if format.version > FORMAT_VERSION {
            return Err(ManifestError::Version {
                found: format.version,
            });
        }
        if let Some(feature) = format.features.first() {
            return Err(ManifestError::Feature {
                feature: feature.clone(),
            });
        }
        let mut sealed: Self = serde_json::from_slice(json)?;
        sealed.head = Self::head_of(&Manifest::parse(&sealed.head.to_json())?);
        for digest in [&sealed.package.sha256, &sealed.manifest] {
            let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            if digest.len() != 64 || !digest.bytes().all(is_digit) {
                return Err(ManifestError::Digest {
                    path: PACKAGE_FILE.to_owned(),
                });
            }
        }
        match sealed.package.path == PACKAGE_FILE {
            true => Ok(sealed),
            false => Err(ManifestError::Name {
                what: "the package",
                name: sealed.package.path,
            }),
        }
    }

    /// The name of the directory in memory where it is opened.
    #[must_use]
    pub fn opened_key(&self) -> String {
        let named = format!("{} {}", self.package.sha256, self.head.name);
        sha256_hex(named)
    }

    /// It as JSON.
    ///
    /// # Panics
    /// Never: every field can be written as JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut json =
            serde_json::to_vec_pretty(self).expect("strings, numbers and lists are always JSON");
        json.push(b'\n');
        json
    }

    /// Whether it speaks of this manifest, whose bytes have this digest.
    #[must_use]
    pub fn is_of(&self, manifest: &Manifest, digest: &str) -> bool {
        self.manifest == digest
            && self.head == Self::head_of(manifest)
            && self.bytes == manifest.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let file = |path: &str| File {
            path: path.into(),
            size: 7,
            sha256: "a".repeat(64),
        };
        Manifest {
            name: "web".into(),
            created: 5,
            source: Source {
                hostname: "node-a".into(),
                kernel: "6.12".into(),
                ..Source::default()
            },
            containers: vec![Container {
                name: "c".into(),
                id: "1f0c".into(),
                labels: [("secret".to_owned(), "label".to_owned())].into(),
                files: vec![file("spec.dump")],
                ..Container::default()
            }],
            ..Manifest::default()
        }
    }

    fn sealed() -> Sealed {
        let package = File {
            path: PACKAGE_FILE.into(),
            size: 1,
            sha256: "b".repeat(64),
        };
        Sealed::new(package, &manifest(), "c".repeat(64))
    }

    #[test]
    fn only_what_is_listed_is_in_clear() {
        let json = String::from_utf8(sealed().to_json()).unwrap();
        for hidden in ["spec.dump", "secret", "6.12"] {
            assert!(!json.contains(hidden), "{json}");
        }
        let back = Sealed::parse(json.as_bytes()).unwrap();
        assert_eq!(back, sealed());
        assert!(back.is_of(&manifest(), &"c".repeat(64)));
    }

    #[test]
    fn it_speaks_of_one_manifest() {
        let mut other = manifest();
        other.created = 6;
        let digest = "c".repeat(64);
        assert!(!sealed().is_of(&other, &digest));
        assert!(!sealed().is_of(&manifest(), &"d".repeat(64)));
    }

    #[test]
    fn what_it_must_not_say_is_refused() {
        type Spoil = fn(&mut Sealed);
        let spoils: [Spoil; 6] = [
            |it| it.format.version = 2,
            |it| it.format.features.push("more".into()),
            |it| it.package.sha256 = "../../x".into(),
            |it| it.package.path = "../x".into(),
            |it| it.head.name = "../x".into(),
            |it| it.head.containers[0].name = "..".into(),
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let mut spoilt = sealed();
            spoil(&mut spoilt);
            assert!(Sealed::parse(&spoilt.to_json()).is_err(), "{number}");
        }
    }
}
