//! Archives of other engines: what containerd's CRI, CRI-O and podman write, and kubelet leaves in
//! `/var/lib/kubelet/checkpoints`. One container each.
//!
//! ```text
//! a tar (podman: in zstd, gzip or plain), in any order:
//!   checkpoint/<image>     CRIU's images                          checkpoint/parent: refused
//!   config.dump            id, name, image, runtime, times        checkpointctl's metadata.ContainerConfig
//!   spec.dump              the OCI runtime spec; its annotations name pod and container
//!   status.dump            containerd: the CRI's ContainerStatus
//!   rootfs-diff.tar        the changed files: a layer with `.wh.` names (containerd, gzip), or without
//!                          them (CRI-O, podman)
//!   deleted.files          CRI-O, podman: JSON list of deleted paths, which no `.wh.` name tells
//!   stats-dump dump.log    CRIU's
//!   bind.mounts network.status status container.log ctr.log io.kubernetes.cri-o.LogPath artifacts/
//!   pod.options pod.dump restore.log volumes/   not taken
//!   devshm-checkpoint.tar  podman: the content of /dev/shm; see foreign/podman.rs
//! ```
//!
//! Nothing of an archive decides anything on this node: names of pod, container and image are texts, and the
//! base image is looked for by its digest.

use std::io::{BufReader, Read, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;
use transship_checkpoint::criu_images::{file_names, inet_sockets, processes, regular_files};
use transship_checkpoint::criu_options::{CriuOptions, Tcp};
use transship_checkpoint::manifest::{
    Container, DUMP_LOG_FILE, DUMP_STATS_FILE, Format, IMAGES_DIR, Image, Manifest,
    ROOTFS_DIFF_FILE, SPEC_FILE, Shared, Source, check_name,
};
use transship_checkpoint::store::{Checkpoint, Draft, Durability, Store, digest_files};
use transship_layer::{Member, decompress};
use transship_path_error::During as _;

use crate::error::PackageError;
use crate::import_options::{ImportOptions, OF_MAX_SIZE};
use crate::new_file::{NewFile, check_fits, check_room, room};
use crate::open_package::OpenPackage;

mod dump_files;
mod for_podman;
mod podman;
mod whiteouts;
pub mod write;

use dump_files::{ConfigDump, Named};

/// The type of a directory, in a mode as in `stat`.
const DIRECTORY: u32 = 0o040_000;
/// Where the files lie until the container's name is known.
const UNNAMED: &str = ".unnamed";
/// Most that the names of all members may take, in bytes: zstd makes nothing of a million of them.
const NAMES_LIMIT: usize = 16 << 20;
/// What a name takes beside its bytes.
const NAME_BYTES: usize = 64;
/// Longest JSON that is read, in bytes.
const JSON_LIMIT: u64 = 16 << 20;

/// The engine that has written an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// containerd's CRI.
    Containerd,
    /// CRI-O.
    Crio,
    /// podman.
    Podman,
}

impl Engine {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Crio => "CRI-O",
            Self::Podman => "podman",
        }
    }
}

/// An archive that has been read, and needs to be told which layers lie below its files.
#[derive(Debug)]
pub struct ForeignCheckpoint {
    draft: Draft,
    manifest: Manifest,
    /// Who has written it.
    pub engine: Engine,
    /// Members that were not taken, but would mean something to that engine.
    pub left_out: Vec<String>,
}

impl ForeignCheckpoint {
    /// Whether its container was one of a pod.
    #[must_use]
    pub fn is_of_pod(&self) -> bool {
        self.manifest.pod.is_some()
    }

    /// The image's name, as in `docker.io/library/nginx:1`.
    #[must_use]
    pub fn image_name(&self) -> &str {
        &self.manifest.containers[0].image.name
    }

    /// The image's digest, where the archive has it: that of an index, a manifest or a config.
    #[must_use]
    pub fn image_digest(&self) -> &str {
        &self.manifest.containers[0].image.digest
    }

    /// Makes a checkpoint of it: `digest` is the image's target, `chain_id` what its layers are.
    ///
    /// # Errors
    /// A failing system call; nothing is left then.
    pub fn commit(mut self, digest: &str, chain_id: &str) -> Result<Checkpoint, PackageError> {
        let image = &mut self.manifest.containers[0].image;
        digest.clone_into(&mut image.digest);
        chain_id.clone_into(&mut image.chain_id);
        // What was made of foreign texts must be readable again.
        let json = self.manifest.to_json();
        let manifest = Manifest::parse(&json)?;
        Ok(self.draft.commit_as(manifest, &json, Durability::Synced)?)
    }
}

/// What has come so far.
struct Reading<'p> {
    dir: PathBuf,
    max_bytes: u64,
    bytes: u64,
    json: std::collections::BTreeMap<String, Vec<u8>>,
    seen: std::collections::BTreeSet<String>,
    names: usize,
    left_out: Vec<String>,
    progress: &'p mut dyn FnMut(u64),
}

/// Names whose JSON is read.
const JSON: [&str; 4] = ["config.dump", SPEC_FILE, "status.dump", "deleted.files"];
/// Names that mean nothing here.
const MEANINGLESS: [&str; 7] = [
    "status",
    "bind.mounts",
    "network.status",
    "restore.log",
    "pod.options",
    "pod.dump",
    "artifacts",
];
/// Names that tell an archive of an engine from anything else.
const KNOWN: [&str; 13] = [
    "checkpoint",
    "config.dump",
    "spec.dump",
    "status.dump",
    "status",
    "rootfs-diff.tar",
    "deleted.files",
    "stats-dump",
    "artifacts",
    "bind.mounts",
    "dump.log",
    podman::SHM_FILE,
    "volumes",
];

/// Whether a package that begins with this member can be one of theirs.
pub(crate) fn is_foreign(first: &str) -> bool {
    let first = first.split('/').next().unwrap_or_default();
    KNOWN.contains(&first) || MEANINGLESS.contains(&first) || first.ends_with(".log")
}

/// Reads an archive; its first member is the current one. `name` is what the checkpoint is called.
pub(crate) fn read(
    mut package: OpenPackage<'_>,
    first: (String, Member),
    store: &Store,
    name: &str,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64),
) -> Result<ForeignCheckpoint, PackageError> {
    if !options.trusted.is_empty() {
        return Err(crate::signature::SignatureError::Missing.into());
    }
    let draft = store.draft(name)?;
    let mut reading = Reading {
        dir: draft.dir().join(UNNAMED),
        max_bytes: options.max_bytes,
        bytes: 0,
        json: Default::default(),
        seen: Default::default(),
        names: 0,
        left_out: Vec::new(),
        progress,
    };
    std::fs::create_dir(&reading.dir).during("make", &reading.dir)?;
    let mut next = Some(first);
    while let Some((path, member)) = next {
        reading.take(&mut package, &path, &member)?;
        next = package.next()?;
    }
    let (manifest, engine, left_out) = reading.finish(draft.dir(), name, &options.architecture)?;
    Ok(ForeignCheckpoint {
        draft,
        manifest,
        engine,
        left_out,
    })
}

impl Reading<'_> {
    fn take(
        &mut self,
        package: &mut OpenPackage<'_>,
        path: &str,
        member: &Member,
    ) -> Result<(), PackageError> {
        let refused = |reason: &str| PackageError::Member {
            member: path.to_owned(),
            reason: reason.to_owned(),
        };
        self.names = self.names.saturating_add(path.len() + NAME_BYTES);
        if self.names > NAMES_LIMIT {
            return Err(refused("the names of the members are too long together"));
        }
        if !self.seen.insert(path.to_owned()) {
            return Err(refused("it is there twice"));
        }
        if JSON.contains(&path) {
            let json = package.read_all(path, member, JSON_LIMIT)?;
            self.json.insert(path.to_owned(), json);
            return Ok(());
        }
        if path == podman::SHM_FILE {
            let content = package.read_all(path, member, podman::SHM_LIMIT)?;
            self.json.insert(path.to_owned(), content);
            return Ok(());
        }
        if let Some(image) = path.strip_prefix("checkpoint/") {
            if !file_names::is_image(image) {
                return Err(refused("it is no image of CRIU"));
            }
            return self.write(package, path, member);
        }
        match path {
            DUMP_STATS_FILE | DUMP_LOG_FILE => self.write(package, path, member),
            ROOTFS_DIFF_FILE => self.write_layer(package),
            "pre-checkpoint" => Err(refused("dumps before the last one are not taken")),
            other if other.starts_with("pre-checkpoint/") => {
                Err(refused("dumps before the last one are not taken"))
            }
            other => {
                let first = other.split('/').next().unwrap_or_default();
                if !MEANINGLESS.contains(&first) {
                    self.left_out.push(other.to_owned());
                }
                Ok(())
            }
        }
    }

    fn write(
        &mut self,
        package: &mut OpenPackage<'_>,
        path: &str,
        member: &Member,
    ) -> Result<(), PackageError> {
        // A claim costs nothing.
        self.check_size(member.size)?;
        check_room(&self.dir, member.size)?;
        let mut file = NewFile::create(&self.dir, path)?;
        package.read_pieces(&mut |piece| {
            self.add(piece.len());
            file.write(piece)
        })?;
        file.finish()
    }

    /// The layer, decompressed: what is on the disk is read often. Nobody has said how much that is, and zeros
    /// take no room.
    fn write_layer(&mut self, package: &mut OpenPackage<'_>) -> Result<(), PackageError> {
        let room = room(&self.dir)?;
        let mut file = NewFile::create(&self.dir, ROOTFS_DIFF_FILE)?;
        let data = BufReader::new(package.data());
        let mut plain = decompress(data).map_err(PackageError::reading)?;
        let mut piece = vec![0; 256 << 10];
        loop {
            let read = plain.read(&mut piece).map_err(PackageError::reading)?;
            if read == 0 {
                return file.finish();
            }
            self.check_size(read as u64)?;
            self.add(read);
            check_fits(file.length.saturating_add(read as u64), room)?;
            file.write(&piece[..read])?;
        }
    }

    fn check_size(&self, more: u64) -> Result<(), PackageError> {
        let bytes = self.bytes.saturating_add(more);
        match bytes > self.max_bytes {
            true => Err(PackageError::TooLarge {
                bytes,
                limit: self.max_bytes,
                of: OF_MAX_SIZE,
            }),
            false => Ok(()),
        }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes as u64);
        (self.progress)(bytes as u64);
    }

    /// Makes the container's directory of what came, and the manifest.
    fn finish(
        mut self,
        draft: &Path,
        name: &str,
        here: &str,
    ) -> Result<(Manifest, Engine, Vec<String>), PackageError> {
        let images = self.dir.join(IMAGES_DIR);
        let missing = |member: &str| PackageError::Missing {
            member: member.to_owned(),
        };
        for image in ["inventory.img", "pstree.img"] {
            if !images.join(image).is_file() {
                return Err(missing(&format!("checkpoint/{image}")));
            }
        }
        let mut spec_json = self
            .json
            .remove(SPEC_FILE)
            .ok_or_else(|| missing(SPEC_FILE))?;
        let config = self
            .json
            .remove("config.dump")
            .ok_or_else(|| missing("config.dump"))?;
        let config = ConfigDump::parse(&config)?;
        let mut spec: Value = dump_files::parse(SPEC_FILE, &spec_json)?;
        let named = Named::of(&spec, &config);
        check_name("the container's name", &named.container)?;
        let status = self.json.remove("status.dump");
        let labels =
            status.map_or_else(|| Ok(named.labels.clone()), |it| dump_files::labels(&it))?;
        let found = processes::architecture(&images)?.unwrap_or(here);
        if found != here {
            return Err(PackageError::Architecture {
                found: found.to_owned(),
                here: here.to_owned(),
            });
        }
        let shm = self.json.remove(podman::SHM_FILE);
        let mut root = None;
        match named.engine {
            Engine::Podman => {
                // The root of podman's containers has no rights to write; CRIU compares them.
                root = regular_files::mode_of(&images, "/")?.map(|mode| mode & 0o7777);
                podman::make_portable(&self.dir, &mut spec, shm.as_deref())?;
                spec_json = serde_json::to_vec(&spec).expect("it was JSON before");
            }
            Engine::Containerd | Engine::Crio => {
                self.left_out
                    .extend(shm.map(|_| podman::SHM_FILE.to_owned()));
            }
        }
        self.write_spec_and_layer(&spec_json, root)?;
        let dir = draft.join(&named.container);
        std::fs::rename(&self.dir, &dir).during("rename", &self.dir)?;
        let in_pod = named.pod.is_some();
        let mut criu = CriuOptions::of_kind(in_pod);
        let images = dir.join(IMAGES_DIR);
        if images.join("files.img").is_file() && !inet_sockets::connections(&images)?.is_empty() {
            // CRIU has dumped them, so it was told to.
            criu.tcp = Tcp::Established;
        }
        let container = Container {
            id: config.id,
            namespace: if in_pod { "k8s.io" } else { "default" }.to_owned(),
            image: Image {
                name: config.image_name,
                digest: config.image_digest,
                ..Image::default()
            },
            snapshotter: "overlayfs".to_owned(),
            runtime: "io.containerd.runc.v2".to_owned(),
            joined: dump_files::joined(&spec),
            criu,
            labels,
            files: digest_files(&dir)?,
            name: named.container,
            ..Container::default()
        };
        let manifest = Manifest {
            format: Format::default(),
            name: name.to_owned(),
            created: config.checkpointed,
            source: Source {
                architecture: found.to_owned(),
                ..Source::default()
            },
            pod: named.pod,
            containers: vec![container],
            not_running: Vec::new(),
            shared: Shared::default(),
        };
        Ok((manifest, named.engine, self.left_out))
    }

    /// `root` are the rights of the container's root, where they differ from those of other engines. CRIU compares
    /// them with what it finds; a layer that says others, as one of ours does, is what it will find.
    fn write_spec_and_layer(&mut self, spec: &[u8], root: Option<u32>) -> Result<(), PackageError> {
        let path = self.dir.join(SPEC_FILE);
        std::fs::File::create_new(&path)
            .and_then(|mut file| file.write_all(spec))
            .during("write", &path)?;
        let layer = self.dir.join(ROOTFS_DIFF_FILE);
        if !self.seen.contains(ROOTFS_DIFF_FILE) {
            // Nothing was changed: a tar without a member.
            std::fs::write(&layer, [0; 1024]).during("write", &layer)?;
        }
        let deleted: Vec<String> = match self.json.remove("deleted.files") {
            None => Vec::new(),
            Some(deleted) => dump_files::parse("deleted.files", &deleted)?,
        };
        if deleted.is_empty() && root.is_none() {
            return Ok(());
        }
        let in_layer = whiteouts::append(&layer, &deleted, root)?;
        if let Some(mode) = in_layer.filter(|_| in_layer != root && root.is_some()) {
            let images = self.dir.join(IMAGES_DIR);
            regular_files::set_mode(&images, "/", DIRECTORY | mode)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
