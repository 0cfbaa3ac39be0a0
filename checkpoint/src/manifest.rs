//! `transship.json`: what a checkpoint is, where it comes from, and the digest of every file.
//!
//! ```text
//! <name>/
//!   transship.json            this file, written last: a directory without it is not a checkpoint
//!   <container>/
//!     spec.dump               OCI runtime spec of the container record
//!     checkpoint/             CRIU images, descriptors.json of runc
//!     rootfs-diff.tar         upperdir as an uncompressed OCI layer tar
//!     dump.log                CRIU's log of the dump
//!   .shared/                  what the containers of a pod share; see shared_dirs.rs
//! ```
//!
//! The format has a version and two lists of features. A reader refuses a version above its own and any
//! of `features` that it does not know: one is listed there only when ignoring it would be wrong. Those of
//! `compatible` may be ignored. docs/format.md has every field.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use transship_cni::Attachment;

use crate::criu_options::CriuOptions;
use crate::shared_dirs::{SHARED_DIR, SharedDir};
use crate::shown_text::deceives;

pub use crate::shared_dirs::CONTENTS_DIR;

/// File name of the manifest inside of a checkpoint.
pub const MANIFEST_FILE: &str = "transship.json";
/// Directory of the CRIU images inside of a container's directory.
pub const IMAGES_DIR: &str = "checkpoint";
/// Where they are before that: a directory of this name at the top of the upperdir or emptyDir that the layer fills. `of` is
/// what that is filled for, and tells it from the directories of others.
#[must_use]
pub fn contents_in_filled(of: &str) -> String {
    format!(".transship-contents-{of}")
}

/// Directories `memory-1`, `memory-2`... beside it: images of memory that was sent before the freeze, each of
/// which builds on the one before; the images of [`IMAGES_DIR`] build on the last one.
pub const MEMORY_DIR: &str = "memory-";
/// The upperdir as an OCI layer, inside of a container's directory.
pub const ROOTFS_DIFF_FILE: &str = "rootfs-diff.tar";
/// The OCI spec, inside of a container's directory.
pub const SPEC_FILE: &str = "spec.dump";
/// CRIU's log of the dump, inside of a container's directory.
pub const DUMP_LOG_FILE: &str = "dump.log";
/// CRIU's figures of the dump, inside of a container's directory.
pub const DUMP_STATS_FILE: &str = "stats-dump";

/// What the directories of links are called that stand beside the images during a restore; they
/// belong to no checkpoint.
pub const LINKED_PREFIX: &str = ".staged-";

/// Largest manifest that is read, in bytes. A pod of 100 containers with 10 000 image files each
/// stays below it.
pub const MANIFEST_LIMIT: u64 = 64 << 20;
/// How long pages are, in bytes: Linux has none outside of this.
const PAGE_SIZES: std::ops::RangeInclusive<u64> = 4096..=256 << 10;

/// The version that this code writes.
pub const FORMAT_VERSION: u32 = 1;
/// The features that this code understands.
const KNOWN_FEATURES: &[&str] = &[SHARED_FEATURE];
/// The feature of a checkpoint with [`Shared`] directories: without them the memory would meet
/// other files than it knows.
pub const SHARED_FEATURE: &str = "shared";

/// A manifest that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not JSON, or not this JSON.
    #[error("the manifest cannot be parsed")]
    Parse(#[from] serde_json::Error),
    /// Written by a later program.
    #[error("the checkpoint has format version {found}; this program reads up to {FORMAT_VERSION}")]
    Version {
        /// The version that was found.
        found: u32,
    },
    /// Needs something that this program does not know.
    #[error("the checkpoint needs {feature:?}, which this program does not know")]
    Feature {
        /// The unknown feature.
        feature: String,
    },
    /// A page that no machine has: memory would be taken by it.
    #[error("the checkpoint comes from a machine with pages of {found} bytes, which none has")]
    PageSize {
        /// What the manifest says.
        found: u64,
    },
    /// Longer than any real one.
    #[error("the manifest is longer than {MANIFEST_LIMIT} bytes")]
    TooLong,
    /// A digest that none is.
    #[error("the digest of {path:?} is not 64 hexadecimal digits in lower case")]
    Digest {
        /// The file.
        path: String,
    },
    /// Two files of one name.
    #[error("the manifest has the file {path:?} twice")]
    FileTwice {
        /// The file.
        path: String,
    },
    /// A name that could lead out of the checkpoint's directory, or is empty or too long.
    #[error("{what} {name:?} is not a plain name")]
    Name {
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Two containers of one name.
    #[error("the checkpoint {checkpoint:?} has the container {container:?} twice")]
    Twice {
        /// Name of the checkpoint.
        checkpoint: String,
        /// The container.
        container: String,
    },
    /// No such container.
    #[error("the checkpoint {checkpoint:?} has no container {container:?}; it has {present}")]
    NoContainer {
        /// Name of the checkpoint.
        checkpoint: String,
        /// The container asked for.
        container: String,
        /// Those that are there, for the message.
        present: String,
    },
}

/// Version and features of the format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// See [`FORMAT_VERSION`].
    pub version: u32,
    /// What a reader must know to use the checkpoint.
    #[serde(default)]
    pub features: Vec<String>,
    /// What a reader may leave unread.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compatible: Vec<String>,
}

impl Default for Format {
    /// What this code writes, without a feature.
    fn default() -> Self {
        Self {
            version: FORMAT_VERSION,
            features: Vec::new(),
            compatible: Vec::new(),
        }
    }
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Version and features.
    pub format: Format,
    /// The checkpoint's name: also the name of its directory.
    pub name: String,
    /// Seconds since 1970 at the moment of the dump.
    pub created: u64,
    /// The node that it was taken on.
    pub source: Source,
    /// The pod that the containers make up, when it is a checkpoint of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// The containers, in the order in which they were dumped.
    pub containers: Vec<Container>,
    /// The containers of the pod that did not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_running: Vec<NotRunning>,
    /// What they share.
    #[serde(default, skip_serializing_if = "Shared::is_empty")]
    pub shared: Shared,
}

/// A container of a pod that did not run when the checkpoint was taken. A reader may leave it unread.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NotRunning {
    /// Its name in the pod.
    pub name: String,
    /// Whether it had ended with 0, and what it has left for the others came along: then it does not run
    /// again beside those that are restored.
    #[serde(default)]
    pub done: bool,
    /// The code with which it had ended, where that is another one: then it ends so again. A pod that does not restart its
    /// containers has seen it fail, and any other one starts it after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<u8>,
}

impl NotRunning {
    /// The code with which it is to end again without running.
    #[must_use]
    pub fn ended_with(&self) -> Option<u8> {
        self.failed.or(self.done.then_some(0))
    }
}

/// The directories that the containers of a pod share.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Shared {
    /// Names of the containers that have `/dev/shm` of the sandbox.
    #[serde(default)]
    pub shm: Vec<String>,
    /// The emptyDir volumes.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// Every file below [`SHARED_DIR`].
    #[serde(default)]
    pub files: Vec<File>,
}

/// One emptyDir volume.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Volume {
    /// Its name in the pod.
    pub name: String,
    /// Names of the containers that have it mounted.
    pub containers: Vec<String>,
}

impl Shared {
    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The directories that the container `name` has mounted.
    pub fn of_container<'a>(&'a self, name: &'a str) -> impl Iterator<Item = SharedDir> + 'a {
        let has = move |containers: &[String]| containers.iter().any(|container| container == name);
        let volumes = self.volumes.iter().filter(move |it| has(&it.containers));
        has(&self.shm)
            .then_some(SharedDir::Shm)
            .into_iter()
            .chain(volumes.map(|volume| SharedDir::EmptyDir(volume.name.clone())))
    }
}

/// The pod that a checkpoint was taken of, as kubelet named it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace: the checkpoint is restored into pods of this one only.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// Its service account, as far as it was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
}

/// The node that a checkpoint was taken on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Source {
    /// Host name.
    pub hostname: String,
    /// Machine as in `uname -m`.
    pub architecture: String,
    /// Kernel release as in `uname -r`.
    pub kernel: String,
    /// containerd's version.
    pub containerd: String,
    /// The version of CRIU; none where it was not asked, as with those below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<String>,
    /// The version of runc.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runc: Option<String>,
    /// The version of crun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crun: Option<String>,
    /// Bytes of a page of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// Which cgroups: 1 or 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroups: Option<u8>,
    /// Its processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<Processor>,
}

/// What a processor can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Its name.
    pub model: String,
    /// What `/proc/cpuinfo` lists, in alphabetical order.
    pub features: Vec<String>,
}

/// One container of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its name, which is also the name of its directory: the CRI's container name, else its id.
    pub name: String,
    /// Its id in containerd.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The image that the lower layers come from.
    pub image: Image,
    /// Snapshotter of the source.
    pub snapshotter: String,
    /// containerd's name of the runtime (`io.containerd.runc.v2`).
    pub runtime: String,
    /// Options of the runc shim in the container record, when there were any.
    #[serde(default)]
    pub runtime_options: Option<RuntimeOptions>,
    /// The namespaces that it shared with a sandbox, as in the OCI spec (`network`, `ipc`, ...).
    #[serde(default)]
    pub joined: Vec<String>,
    /// The networks of CNI that it was in by itself. A reader may leave it unread.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Attachment>,
    /// The container's streams as containerd knew them.
    #[serde(default)]
    pub stdio: Stdio,
    /// CRIU's options of the dump.
    #[serde(default)]
    pub criu: CriuOptions,
    /// Labels of the container record.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What the layer of its files could not say.
    #[serde(default, skip_serializing_if = "Losses::is_empty")]
    pub losses: Losses,
    /// Every file below the container's directory, by its path there.
    pub files: Vec<File>,
}

/// What an OCI layer cannot say of an upperdir. A reader may leave it unread.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Losses {
    /// Changed files that had further hard links in the image, and are separate files now.
    #[serde(default)]
    pub lower_links: u64,
    /// Files with inode flags such as `chattr +i`.
    #[serde(default)]
    pub inode_flags: u64,
    /// Extended attributes named like those of overlayfs itself.
    #[serde(default)]
    pub xattrs: u64,
    /// Some of the paths.
    #[serde(default)]
    pub examples: Vec<String>,
}

impl Losses {
    /// Whether nothing was lost.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The image of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Image {
    /// Name as in `ctr images ls`.
    pub name: String,
    /// Digest of the target (index or manifest).
    pub digest: String,
    /// Chain id of the lower layers: what the upperdir is a diff against.
    pub chain_id: String,
    /// The same layers, made again out of the source's snapshots because their blobs were gone: for a
    /// migration to a node that has not got the original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuilt: Option<Rebuilt>,
}

/// An image that was made out of snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rebuilt {
    /// Digest of its manifest.
    pub digest: String,
    /// Chain id of its layers: their files are those of the original, their tars are not.
    pub chain_id: String,
}

/// The container's streams.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stdio {
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// FIFO path or URI, empty when there is none.
    pub stdout: String,
    /// FIFO path or URI, empty when there is none.
    pub stderr: String,
}

/// Options of the runc shim that belong to the container; the rest belong to the node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RuntimeOptions {
    /// The OCI runtime of the source: a name or a path. Empty: `runc`.
    pub binary_name: String,
    /// Whether the OCI runtime asks systemd for cgroups.
    #[serde(default)]
    pub systemd_cgroup: bool,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Path below the container's directory, with `/`.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Parses and checks a manifest. Nothing that it returns leads out of the checkpoint's
    /// directory.
    ///
    /// # Errors
    /// A later version, an unknown feature, or a name that is not a plain one.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        // The format comes first: a later version may have other fields.
        #[derive(Deserialize)]
        struct OnlyFormat {
            format: Format,
        }
        if json.len() as u64 > MANIFEST_LIMIT {
            return Err(ManifestError::TooLong);
        }
        let OnlyFormat { format } = serde_json::from_slice(json)?;
        if format.version > FORMAT_VERSION {
            return Err(ManifestError::Version {
                found: format.version,
            });
        }
        if let Some(feature) = format
            .features
            .iter()
            .find(|f| !KNOWN_FEATURES.contains(&f.as_str()))
        {
            return Err(ManifestError::Feature {
                feature: feature.clone(),
            });
        }
        let manifest: Self = serde_json::from_slice(json)?;
        check_name("the checkpoint's name", &manifest.name)?;
        manifest.check_texts()?;
        let page_size = manifest.source.page_size;
        if let Some(found) =
            page_size.filter(|it| !it.is_power_of_two() || !PAGE_SIZES.contains(it))
        {
            return Err(ManifestError::PageSize { found });
        }
        let mut names = BTreeSet::new();
        for container in &manifest.containers {
            check_name("the container's name", &container.name)?;
            // Its directory stands beside the manifest and what the containers share.
            if container.name.starts_with('.') || container.name == MANIFEST_FILE {
                return Err(ManifestError::Name {
                    what: "the container's name",
                    name: container.name.clone(),
                });
            }
            if !names.insert(&container.name) {
                return Err(ManifestError::Twice {
                    checkpoint: manifest.name.clone(),
                    container: container.name.clone(),
                });
            }
        }
        for container in &manifest.not_running {
            check_name("the container's name", &container.name)?;
        }
        for volume in &manifest.shared.volumes {
            check_name("the volume's name", &volume.name)?;
        }
        for (_, files) in manifest.directories() {
            check_files(files)?;
        }
        Ok(manifest)
    }

    /// Texts that are shown on terminals and written into logs hold nothing that is not seen there.
    fn check_texts(&self) -> Result<(), ManifestError> {
        let source = &self.source;
        let pod = self.pod.iter();
        let of_pod = pod.flat_map(|pod| [&pod.name, &pod.namespace, &pod.uid]);
        let of_containers = self.containers.iter().flat_map(|container| {
            let image = &container.image;
            [
                &container.id,
                &container.namespace,
                &container.snapshotter,
                &container.runtime,
                &image.name,
                &image.digest,
                &image.chain_id,
            ]
            .into_iter()
            .chain({ image.rebuilt.iter() }.flat_map(|it| [&it.digest, &it.chain_id]))
            .chain(&container.joined)
        });
        let texts = [
            &source.hostname,
            &source.architecture,
            &source.kernel,
            &source.containerd,
        ];
        let programs = [&source.criu, &source.runc, &source.crun];
        let texts = texts.into_iter().chain(programs.into_iter().flatten());
        let of_processor = source.processor.iter().flat_map(|it| &it.features);
        let model = source.processor.iter().map(|it| &it.model);
        let texts = texts.chain(model).chain(of_processor);
        let mut all = texts.chain(of_pod).chain(of_containers);
        match all.find(|text| text.chars().any(deceives)) {
            Some(text) => Err(ManifestError::Name {
                what: "the text",
                name: text.clone(),
            }),
            None => Ok(()),
        }
    }

    /// The directories of the checkpoint, each with the files in it.
    pub fn directories(&self) -> impl Iterator<Item = (&str, &[File])> {
        let shared = (SHARED_DIR, self.shared.files.as_slice());
        let containers = self.containers.iter();
        containers
            .map(|container| (container.name.as_str(), container.files.as_slice()))
            .chain((!self.shared.is_empty()).then_some(shared))
    }

    /// The manifest as JSON.
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

    /// The code with which the container of the pod had ended, when it is to end so again without running.
    #[must_use]
    pub fn ended_with(&self, name: &str) -> Option<u8> {
        let found = { self.not_running.iter() }.find(|it| it.name == name)?;
        found.ended_with()
    }

    /// The container called `name`; without a name the only one.
    ///
    /// # Errors
    /// [`ManifestError::NoContainer`].
    pub fn container(&self, name: Option<&str>) -> Result<&Container, ManifestError> {
        let found = match name {
            Some(name) => self.containers.iter().find(|c| c.name == name),
            None if self.containers.len() == 1 => self.containers.first(),
            None => None,
        };
        found.ok_or_else(|| ManifestError::NoContainer {
            checkpoint: self.name.clone(),
            container: name.unwrap_or_default().to_owned(),
            present: self
                .containers
                .iter()
                .map(|c| c.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// Bytes of all files.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.directories()
            .flat_map(|(_, files)| files)
            .fold(0, |sum: u64, file| sum.saturating_add(file.size))
    }
}

/// Paths that stay in their directory, each once, with a digest that can be one.
fn check_files(files: &[File]) -> Result<(), ManifestError> {
    let mut paths = BTreeSet::new();
    for file in files {
        for part in file.path.split('/') {
            check_name("the file's path", part)?;
        }
        let path = || file.path.clone();
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        // A migration's files were compared on the way; such a digest fits nothing.
        let is_left_out = file.sha256.is_empty();
        if !is_left_out && file.sha256.len() != 64 || !file.sha256.bytes().all(is_digit) {
            return Err(ManifestError::Digest { path: path() });
        }
        if !paths.insert(&file.path) {
            return Err(ManifestError::FileTwice { path: path() });
        }
    }
    Ok(())
}

/// Checks that a name is one path component that cannot lead anywhere else, and that a person sees where it ends.
///
/// # Errors
/// [`ManifestError::Name`].
pub fn check_name(what: &'static str, name: &str) -> Result<(), ManifestError> {
    let plain = !name.is_empty()
        && name.len() <= 255
        && name.trim() == name
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || deceives(c));
    if plain {
        Ok(())
    } else {
        Err(ManifestError::Name {
            what,
            name: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component_that_can_be_seen() {
        for name in ["a", "a b", "..a", ".a", "ä"] {
            check_name("the name", name).unwrap();
        }
        for name in [
            "", ".", "..", "a/b", "a\0", "a\n", " ", "a ", " a", "\u{a0}",
        ] {
            assert!(check_name("the name", name).is_err(), "{name:?}");
        }
        assert!(check_name("the name", &"a".repeat(256)).is_err());
    }

    fn manifest() -> Manifest {
        Manifest {
            format: Format::default(),
            name: "web".into(),
            created: 1,
            source: Source::default(),
            pod: None,
            not_running: Vec::new(),
            shared: Shared::default(),
            containers: vec![Container {
                name: "counter".into(),
                id: "counter".into(),
                namespace: "default".into(),
                image: Image::default(),
                snapshotter: "transship".into(),
                runtime: "io.containerd.runc.v2".into(),
                runtime_options: None,
                joined: vec!["network".into()],
                networks: Vec::new(),
                stdio: Stdio::default(),
                criu: CriuOptions::default(),
                labels: BTreeMap::new(),
                losses: Losses::default(),
                files: vec![File {
                    path: "checkpoint/a.img".into(),
                    size: 3,
                    sha256: "0".repeat(64),
                }],
            }],
        }
    }

    #[test]
    fn survives_a_round_trip() {
        assert_eq!(Manifest::parse(&manifest().to_json()).unwrap(), manifest());
    }

    #[test]
    fn refuses_a_later_version_before_it_looks_at_the_rest() {
        let error = Manifest::parse(br#"{"format":{"version":2},"other":1}"#).unwrap_err();
        assert!(
            matches!(error, ManifestError::Version { found: 2 }),
            "{error}"
        );
        let error =
            Manifest::parse(br#"{"format":{"version":1,"features":["encrypted"]}}"#).unwrap_err();
        assert!(matches!(error, ManifestError::Feature { .. }), "{error}");
    }

    #[test]
    fn refuses_paths_that_lead_out() {
        for path in ["../x", "/etc/passwd", "a//b", "a/../b", "", "a/\0"] {
            let mut hostile = manifest();
            hostile.containers[0].files[0].path = path.into();
            let parsed = Manifest::parse(&hostile.to_json());
            assert!(
                matches!(parsed, Err(ManifestError::Name { .. })),
                "{path:?}"
            );
            let mut hostile = manifest();
            hostile.containers[0].name = path.into();
            if path.contains('/') || path.is_empty() {
                assert!(Manifest::parse(&hostile.to_json()).is_err(), "{path:?}");
            }
        }
    }

    #[test]
    fn what_is_shown_holds_no_control_characters() {
        let changes: [fn(&mut Manifest); 3] = [
            |it| it.source.hostname = "a\u{1b}[2J".into(),
            |it| it.containers[0].image.name = "a\rb".into(),
            |it| it.containers[0].id = "a\u{9b}b".into(),
        ];
        for change in changes {
            let mut hostile = manifest();
            change(&mut hostile);
            let error = Manifest::parse(&hostile.to_json()).unwrap_err().to_string();
            assert!(!error.chars().any(char::is_control), "{error:?}");
        }
    }

    #[test]
    fn sizes_add_up_without_overflow() {
        let mut hostile = manifest();
        hostile.containers[0].files[0].size = u64::MAX;
        let twice = hostile.containers[0].files[0].clone();
        hostile.containers[0].files.push(twice);
        assert_eq!(hostile.size(), u64::MAX);
    }

    #[test]
    fn a_file_is_there_once_with_a_digest() {
        let mut twice = manifest();
        let again = twice.containers[0].files[0].clone();
        twice.containers[0].files.push(again);
        let error = Manifest::parse(&twice.to_json()).unwrap_err();
        assert!(matches!(error, ManifestError::FileTwice { .. }), "{error}");
        for digest in ["x", &"0".repeat(63), &"A".repeat(64), &"g".repeat(64)] {
            let mut wrong = manifest();
            wrong.containers[0].files[0].sha256 = digest.into();
            let error = Manifest::parse(&wrong.to_json()).unwrap_err();
            assert!(matches!(error, ManifestError::Digest { .. }), "{error}");
        }
        for name in ["transship.json", ".shared"] {
            let mut hidden = manifest();
            hidden.containers[0].name = name.into();
            assert!(Manifest::parse(&hidden.to_json()).is_err(), "{name}");
        }
    }

    #[test]
    fn a_page_is_one_of_a_machine() {
        for (size, is_one) in [
            (0, false),
            (1, false),
            (4095, false),
            (4096, true),
            (65536, true),
            (1 << 62, false),
        ] {
            let mut other = manifest();
            other.source.page_size = Some(size);
            let parsed = Manifest::parse(&other.to_json());
            assert_eq!(parsed.is_ok(), is_one, "{size}");
        }
    }

    #[test]
    fn what_may_be_ignored_is_kept() {
        let mut later = manifest();
        later.format.compatible = vec!["colour".into()];
        assert_eq!(Manifest::parse(&later.to_json()).unwrap(), later);
    }

    #[test]
    fn a_container_is_there_once() {
        let mut twice = manifest();
        twice.containers.push(twice.containers[0].clone());
        let error = Manifest::parse(&twice.to_json()).unwrap_err();
        let said = r#"the checkpoint "web" has the container "counter" twice"#;
        assert_eq!(error.to_string(), said);
    }

    #[test]
    fn a_missing_container_names_those_that_are_there() {
        let error = manifest().container(Some("db")).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"the checkpoint "web" has no container "db"; it has counter"#
        );
        assert_eq!(manifest().container(None).unwrap().name, "counter");
    }
}
