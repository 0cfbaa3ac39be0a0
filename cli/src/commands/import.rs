//! `transship import FILE`

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use transship_checkpoint::store::Checkpoint;
use transship_engine::import::{import, import_blobs};
use transship_engine::machine::architecture;
use transship_engine::retention::most_taken;
use transship_engine::timeline::human_bytes;
use transship_engine::{Context as _, Error, Result};
use transship_package::import::ImportOptions;
use transship_package::oci::Layout;
use transship_sandbox::admission::node_config::NODE_CONFIG;

use super::keys::{identities, trusted_keys};
use super::{connect, print, store};
use crate::args::{Global, ImportArgs};
use crate::progress::Progress;

/// What was read.
#[derive(Serialize)]
pub(super) struct Done {
    name: String,
    directory: String,
    bytes: u64,
    /// Bytes of its package, when it lies sealed.
    #[serde(skip_serializing_if = "Option::is_none")]
    sealed_bytes: Option<u64>,
    /// Who had written the archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<&'static str>,
    /// Members of it that were not taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<String>,
}

impl Done {
    pub(super) fn of(checkpoint: &Checkpoint) -> Self {
        let sealed = checkpoint.sealed.as_deref();
        Self {
            name: checkpoint.manifest.name.clone(),
            directory: checkpoint.dir.display().to_string(),
            bytes: sealed.map_or_else(|| checkpoint.manifest.size(), |it| it.bytes),
            sealed_bytes: sealed.map(|it| it.package.size),
            engine: None,
            left_out: Vec::new(),
        }
    }
}

pub(crate) async fn run(global: &Global, args: ImportArgs) -> Result<()> {
    let trusted = trusted_keys(&args.signed_by)?;
    // kubelet's archives have the pod, the container and the time in their file's name.
    let stem = args.file.file_stem().unwrap_or_default().to_string_lossy();
    let options = ImportOptions {
        name_without: match stem.as_ref() {
            "-" => "imported".to_owned(),
            stem => stem.trim_end_matches(".tar").replace(':', ""),
        },
        name: args.name,
        identities: identities(&args.keys.keys)?,
        trusted,
        max_bytes: most_taken(&store(), Path::new(NODE_CONFIG), args.max_size)?,
        architecture: architecture()?,
    };
    let how = (&options, args.keys.lies());
    if args.file.is_dir() {
        let layout = Layout::open(&args.file)?;
        let tag = match args.tag {
            Some(tag) => tag,
            None => only_tag(&layout, &args.file)?,
        };
        let progress = Progress::new(global.json);
        let checkpoint = import_blobs(&layout, &tag, &store(), how, "import", &progress)?;
        drop(progress);
        let done = Done::of(&checkpoint);
        return print(global, &done, || text(&done));
    }
    let input: Box<dyn Read> = match args.file == Path::new("-") {
        true => Box::new(std::io::stdin()),
        false => {
            let file = File::open(&args.file);
            Box::new(file.with_context(|| format!("cannot open {}", args.file.display()))?)
        }
    };
    let progress = Progress::new(global.json);
    let connect = async || connect(global).await;
    let read = import(input, &store(), how, connect, &progress).await?;
    drop(progress);
    let done = Done {
        engine: read.engine,
        left_out: read.left_out,
        ..Done::of(&read.checkpoint)
    };
    print(global, &done, || text(&done))
}

pub(super) fn text(done: &Done) -> String {
    let sealed = { done.sealed_bytes }.map(|bytes| format!(", sealed in {}", human_bytes(bytes)));
    let mut text = format!(
        "{} ({}{})\n",
        done.directory,
        human_bytes(done.bytes),
        sealed.unwrap_or_default()
    );
    if let Some(engine) = done.engine {
        text += &format!("made of an archive of {engine}\n");
    }
    if !done.left_out.is_empty() {
        text += &format!("not taken from it: {}\n", done.left_out.join(", "));
    }
    text
}

/// The tag of a layout that has no other one.
pub(super) fn only_tag(layout: &Layout, dir: &Path) -> Result<String> {
    let mut tags = layout.tags()?;
    match tags.len() {
        0 => Err(Error::not_found(format!("{} has no tag", dir.display()))),
        1 => Ok(tags.remove(0)),
        several => {
            let message = format!("{} has {several} tags", dir.display());
            Err(Error::refused(message).hint(format!("name one of them: {}", tags.join(", "))))
        }
    }
}
