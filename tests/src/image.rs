//! OCI images of our container programs, as archives for `ctr images import`.
//!
//! OCI image layout in a tar (image-spec, image-layout.md):
//!
//! ```text
//! oci-layout                 {"imageLayoutVersion":"1.0.0"}
//! index.json                 one manifest, annotated io.containerd.image.name = reference
//! blobs/sha256/<digest>      manifest, config, layers (tar, not compressed)
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::containerd::PAUSE_IMAGE;
use crate::run::CommandRun as _;
use crate::{Node, Settings, TestbedError, Workload};
use transship_digest::{oci_digest, sha256_hex};
use transship_path_error::During as _;

/// Applets of busybox that tests use inside of containers.
const APPLETS: [&str; 30] = [
    "cat",
    "chmod",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "echo",
    "env",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "ip",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mv",
    "nc",
    "ps",
    "rm",
    "sh",
    "sha256sum",
    "stat",
    "tail",
    "touch",
    "true",
    "wc",
];

/// Port on which the counter listens unless told otherwise.
const COUNTER_PORT: u16 = 7000;

/// A layer as it lies in the archive.
#[derive(Debug, Clone)]
struct LayerBlob {
    content: Vec<u8>,
    media_type: String,
    /// Digest of the uncompressed tar.
    diff_id: String,
    /// Of its descriptor in the manifest.
    annotations: BTreeMap<String, String>,
}

impl LayerBlob {
    fn plain(content: Vec<u8>) -> LayerBlob {
        LayerBlob {
            media_type: LAYER.to_owned(),
            diff_id: oci_digest(&content),
            annotations: BTreeMap::new(),
            content,
        }
    }
}

/// An image that is made here.
#[derive(Debug, Clone)]
pub struct Image {
    reference: String,
    /// Tar files, lowest first.
    layers: Vec<LayerBlob>,
    entrypoint: Vec<String>,
    /// Whether its documents say no more than they must.
    sparse: bool,
}

impl Image {
    /// `transship.test/counter:1`: busybox, some files, and the counter as its entrypoint.
    ///
    /// Import it with [`Node::import_image`]; see workload/src/bin/counter.rs for its options.
    ///
    /// | path | what for |
    /// |---|---|
    /// | /data/counts | empty; the counter appends each value |
    /// | /data/delete-me | the counter deletes it at its start |
    /// | /data/keep/{a,b} | nobody touches them |
    /// | /data/made/ | not in the image: the counter makes it |
    ///
    /// `busybox` is a static busybox, for instance of the node's tree.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn counter(settings: &Settings, busybox: &Path) -> Result<Image, TestbedError> {
        let program = read(&Workload::Counter.build(settings)?)?;
        let mut data = Layer::default();
        data.dir("data")?.dir("data/keep")?;
        data.file("data/counts", b"", 0o644)?
            .file("data/delete-me", b"delete me\n", 0o644)?;
        data.file("data/keep/a", b"a\n", 0o644)?
            .file("data/keep/b", b"b\n", 0o600)?;
        let mut bin = Layer::default();
        bin.dir("usr")?
            .dir("usr/bin")?
            .file("usr/bin/counter", &program, 0o755)?;
        Ok(Image {
            reference: "transship.test/counter:1".to_owned(),
            layers: [base_layer(busybox)?, data.finish()?, bin.finish()?]
                .map(LayerBlob::plain)
                .into(),
            sparse: false,
            entrypoint: vec!["/usr/bin/counter".to_owned()],
        })
    }

    /// `transship.test/holder:1`: busybox, an empty /data, and workload/src/bin/holder.rs.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn holder(settings: &Settings, busybox: &Path) -> Result<Image, TestbedError> {
        let program = read(&Workload::Holder.build(settings)?)?;
        let mut files = Layer::default();
        files.dir("data")?.dir("usr")?.dir("usr/bin")?;
        files.file("usr/bin/holder", &program, 0o755)?;
        Ok(Image {
            reference: "transship.test/holder:1".to_owned(),
            layers: [base_layer(busybox)?, files.finish()?]
                .map(LayerBlob::plain)
                .into(),
            sparse: false,
            entrypoint: vec!["/usr/bin/holder".to_owned()],
        })
    }

    /// `transship.test/podmate:1`: busybox and the program of workload/src/bin/podmate.rs.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn podmate(settings: &Settings, busybox: &Path) -> Result<Image, TestbedError> {
        let program = read(&Workload::Podmate.build(settings)?)?;
        let mut bin = Layer::default();
        bin.dir("usr")?
            .dir("usr/bin")?
            .file("usr/bin/podmate", &program, 0o755)?;
        Ok(Image {
            reference: "transship.test/podmate:1".to_owned(),
            layers: [base_layer(busybox)?, bin.finish()?]
                .map(LayerBlob::plain)
                .into(),
            sparse: false,
            entrypoint: vec!["/usr/bin/podmate".to_owned()],
        })
    }

    /// `transship.test/spin:1`: busybox and workload/src/bin/spin.rs.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn spin(settings: &Settings, busybox: &Path) -> Result<Image, TestbedError> {
        let program = read(&Workload::Spin.build(settings)?)?;
        let mut bin = Layer::default();
        bin.dir("spin")?.dir("usr")?.dir("usr/bin")?;
        bin.file("usr/bin/spin", &program, 0o755)?;
        Ok(Image {
            reference: "transship.test/spin:1".to_owned(),
            layers: [base_layer(busybox)?, bin.finish()?]
                .map(LayerBlob::plain)
                .into(),
            sparse: false,
            entrypoint: vec!["/usr/bin/spin".to_owned()],
        })
    }

    /// `transship.test/pause:1`: a static program that sleeps until SIGTERM, and nothing else; the
    /// CRI's sandbox image, and the sandbox of a `ctr run` pod.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn pause(settings: &Settings) -> Result<Image, TestbedError> {
        let program = read(&Workload::Sandbox.build(settings)?)?;
        let mut layer = Layer::default();
        layer.file("pause", &program, 0o755)?;
        Ok(Image {
            reference: PAUSE_IMAGE.to_owned(),
            layers: vec![LayerBlob::plain(layer.finish()?)],
            sparse: false,
            entrypoint: vec!["/pause".to_owned()],
        })
    }

    /// An image of one layer, a plain tar.
    pub(crate) fn of_layer(reference: String, layer: Vec<u8>) -> Image {
        Image {
            reference,
            layers: vec![LayerBlob::plain(layer)],
            sparse: false,
            entrypoint: vec!["/bin/bash".to_owned()],
        }
    }

    /// This image with one of our programs in /usr/local/bin, under another name.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn with_program(
        self,
        reference: &str,
        program: Workload,
        settings: &Settings,
    ) -> Result<Image, TestbedError> {
        let path = format!("usr/local/bin/{}", program.name());
        let mut layer = Layer::default();
        layer.file(&path, &read(&program.build(settings)?)?, 0o755)?;
        Ok(self.with_layer(reference, layer.finish()?))
    }

    /// This image with one more layer (a plain tar) on top, under another name.
    #[must_use]
    pub fn with_layer(mut self, reference: &str, layer: Vec<u8>) -> Image {
        reference.clone_into(&mut self.reference);
        self.layers.push(LayerBlob::plain(layer));
        self
    }

    /// This image with one more layer on top, `plain` compressed as the suffix says (`+gzip`).
    #[must_use]
    pub fn with_compressed_layer(
        mut self,
        reference: &str,
        plain: &[u8],
        (suffix, content): (&str, Vec<u8>),
    ) -> Image {
        reference.clone_into(&mut self.reference);
        self.layers.push(LayerBlob {
            content,
            media_type: format!("{LAYER}{suffix}"),
            diff_id: oci_digest(plain),
            annotations: BTreeMap::new(),
        });
        self
    }

    /// This image under another name, with an annotation on the descriptor of its top layer.
    #[must_use]
    pub fn with_annotated_top(mut self, reference: &str, key: &str, value: &str) -> Image {
        reference.clone_into(&mut self.reference);
        if let Some(top) = self.layers.last_mut() {
            top.annotations.insert(key.to_owned(), value.to_owned());
        }
        self
    }

    /// This image under another name, with a config that says little more than which layers there are, in an
    /// index beside what is no image.
    #[must_use]
    pub fn with_sparse_documents(mut self, reference: &str) -> Image {
        reference.clone_into(&mut self.reference);
        self.sparse = true;
        self
    }

    /// How many layers it has.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The image's name in containerd.
    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// The archive in memory.
    ///
    /// # Errors
    /// When a path is too long for a tar header.
    pub fn to_archive(&self) -> Result<Vec<u8>, TestbedError> {
        let mut archive = Layer::default();
        archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        archive.dir("blobs")?.dir("blobs/sha256")?;
        let layers = self.layers.iter();
        let layers: Vec<_> = layers
            .map(|layer| {
                let mut descriptor = blob(&layer.media_type, &layer.content);
                if !layer.annotations.is_empty() {
                    descriptor["annotations"] = json!(layer.annotations);
                }
                descriptor
            })
            .collect();
        let mut config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Entrypoint": self.entrypoint,
                "ExposedPorts": { format!("{COUNTER_PORT}/tcp"): {} },
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": self.layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>(),
            },
        });
        if self.sparse {
            for (parent, key) in [("", "architecture"), ("", "os"), ("/rootfs", "type")] {
                let parent = config.pointer_mut(parent).and_then(|it| it.as_object_mut());
                parent.and_then(|parent| parent.remove(key));
            }
        }
        let config = config.to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blob("application/vnd.oci.image.config.v1+json", config.as_bytes()),
            "layers": layers,
        })
        .to_string();
        let mut blobs = vec![config, manifest.clone()];
        let mut described = blob(MANIFEST, manifest.as_bytes());
        if self.sparse {
            let empty = "{}".to_owned();
            let artifact = json!({
                "schemaVersion": 2,
                "config": blob("application/vnd.oci.empty.v1+json", empty.as_bytes()),
                "layers": [],
            })
            .to_string();
            let mut attached = blob(MANIFEST, artifact.as_bytes());
            attached["platform"] = json!({ "architecture": "unknown", "os": "unknown" });
            described["platform"] = json!({ "architecture": "amd64", "os": "linux" });
            let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [described, attached] });
            let index = index.to_string();
            described = blob(INDEX, index.as_bytes());
            blobs.extend([empty, artifact, index]);
        }
        described["annotations"] = json!({
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": self.reference,
        });
        let index = json!({ "schemaVersion": 2, "manifests": [described] }).to_string();
        for content in self
            .layers
            .iter()
            .map(|layer| &layer.content[..])
            .chain(blobs.iter().map(String::as_bytes))
        {
            archive.file(
                &format!("blobs/sha256/{}", sha256_hex(content)),
                content,
                0o644,
            )?;
        }
        archive.file("index.json", index.as_bytes(), 0o644)?;
        archive.finish()
    }
}

impl Node {
    /// Imports the image into containerd, unpacked for `snapshotter`.
    ///
    /// # Errors
    /// When ctr fails.
    pub fn import_image(&self, image: &Image, snapshotter: &str) -> Result<(), TestbedError> {
        self.import_image_into("default", image, snapshotter)
    }

    /// Imports the image into another containerd namespace, such as the CRI's "k8s.io".
    ///
    /// # Errors
    /// When ctr fails.
    pub fn import_image_into(
        &self,
        namespace: &str,
        image: &Image,
        snapshotter: &str,
    ) -> Result<(), TestbedError> {
        let import = ["images", "import", "--snapshotter", snapshotter, "-"];
        self.command("ctr")
            .args(["-n", namespace])
            .args(import)
            .feed(&image.to_archive()?)
            .map(drop)
    }
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn blob(media_type: &str, content: &[u8]) -> serde_json::Value {
    json!({
        "mediaType": media_type,
        "digest": oci_digest(content),
        "size": content.len(),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TestbedError> {
    Ok(fs::read(path).during("read", path)?)
}

fn base_layer(busybox: &Path) -> Result<Vec<u8>, TestbedError> {
    let mut layer = Layer::default();
    layer
        .dir("bin")?
        .file("bin/busybox", &read(busybox)?, 0o755)?;
    for applet in APPLETS {
        layer.link(&format!("bin/{applet}"), "busybox")?;
    }
    for dir in ["dev", "proc", "sys", "run", "tmp", "etc", "root"] {
        layer.dir(dir)?;
    }
    layer.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)?;
    layer.file("etc/group", b"root:x:0:\n", 0o644)?;
    layer.finish()
}

/// A tar being written in memory.
struct Layer(tar::Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }
}

impl Layer {
    fn dir(&mut self, path: &str) -> Result<&mut Layer, TestbedError> {
        self.entry(path, tar::EntryType::Directory, b"", 0o755)
    }

    fn file(&mut self, path: &str, content: &[u8], mode: u32) -> Result<&mut Layer, TestbedError> {
        self.entry(path, tar::EntryType::Regular, content, mode)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<&mut Layer, TestbedError> {
        let mut header = header(tar::EntryType::Symlink, 0, 0o777);
        self.0
            .append_link(&mut header, path, target)
            .during("pack", path)?;
        Ok(self)
    }

    fn entry(
        &mut self,
        path: &str,
        kind: tar::EntryType,
        content: &[u8],
        mode: u32,
    ) -> Result<&mut Layer, TestbedError> {
        let mut header = header(kind, content.len() as u64, mode);
        self.0
            .append_data(&mut header, path, content)
            .during("pack", path)?;
        Ok(self)
    }

    fn finish(self) -> Result<Vec<u8>, TestbedError> {
        Ok(self.0.into_inner().during("finish", "image archive")?)
    }
}

/// A fixed time: the same content gives the same digest.
fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(1_600_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header
}
