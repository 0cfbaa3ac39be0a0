//! `transship export NAME FILE`

mod target;

use std::fs::File;
use std::io::{BufWriter, Write};

use serde::Serialize;
use transship_checkpoint::store::Checkpoint;
use transship_engine::import::config_of_base;
use transship_engine::sealed::sealed_package;
use transship_engine::timeline::human_bytes;
use transship_engine::{Context as _, Error, Progress as _, Result};
use transship_package::encryption::Recipients;
use transship_package::export::{ExportOptions, export};
use transship_package::foreign::{self, Engine};
use transship_package::oci::{self, Layout, StoreOptions};
use transship_package::signature::Signer;

use self::target::Target;
use super::push::pushed;
use super::{connect, opened_to_leave, print, store};
use crate::args::{ExportArgs, FormatArg, Global};
use crate::progress::Progress;

/// What was written.
#[derive(Serialize)]
struct Done {
    name: String,
    file: String,
    bytes: u64,
    package_bytes: u64,
}

pub(crate) async fn run(global: &Global, args: ExportArgs) -> Result<()> {
    if args.format == FormatArg::Transship && is_copied(&args) {
        return copy_sealed(global, &args);
    }
    let is_encrypted = !args.encrypt_to.is_empty();
    let opened = opened_to_leave(&args.name, &args.keys, is_encrypted, global.json)?;
    let checkpoint = opened.checkpoint.clone();
    let engine = match args.format {
        FormatArg::Transship | FormatArg::Oci => None,
        FormatArg::Containerd => Some(Engine::Containerd),
        FormatArg::Crio => Some(Engine::Crio),
        FormatArg::Podman => Some(Engine::Podman),
    };
    let is_archive = ![FormatArg::Transship, FormatArg::Oci].contains(&args.format);
    let is_package = args.format == FormatArg::Transship;
    if !args.encrypt_to.is_empty() && !is_package || args.sign.is_some() && is_archive {
        let message = "only the formats of transship are signed, and only a package is encrypted";
        return Err(Error::refused(message).hint("--format transship"));
    }
    let mut options = ExportOptions {
        level: (args.level > 0).then_some(args.level),
        ..ExportOptions::default()
    };
    let mut recipients = Recipients::default();
    for text in &args.encrypt_to {
        recipients.add(text)?;
    }
    options.recipients = recipients;
    if let Some(path) = &args.sign {
        options.signer = Some(Signer::read(path)?);
    }
    let content = match engine {
        None => Content::Package(&options),
        Some(engine) => Content::Archive(Archive {
            engine,
            container: args.container.as_deref(),
            image_config: match engine {
                Engine::Podman => Some(image_config(global, &checkpoint, &args).await?),
                _ => None,
            },
        }),
    };
    let progress = Progress::new(global.json);
    let bytes = checkpoint.manifest.size();
    progress.bytes("export", bytes);
    if args.format == FormatArg::Oci {
        let layout = Layout::create(&args.file)?;
        let tag = &checkpoint.manifest.name;
        let options = StoreOptions {
            level: args.level.max(1),
            signer: options.signer,
        };
        let stored = oci::store(
            &checkpoint,
            &options,
            &layout,
            tag,
            &mut *progress.counter(),
        )?;
        drop(progress);
        let reference = format!("{}:{tag}", args.file.display());
        return print(global, &stored, || pushed(&reference, &stored));
    }
    let target = Target::of(&args.file)?;
    let package_bytes = target.write(|file| {
        let out = BufWriter::with_capacity(1 << 20, file);
        let out = write(&checkpoint, &content, out, &progress)?;
        out.into_inner().context("cannot write the package")
    })?;
    drop(progress);
    let Some(package_bytes) = package_bytes else {
        return Ok(());
    };
    let done = Done {
        name: checkpoint.manifest.name.clone(),
        file: args.file.display().to_string(),
        bytes,
        package_bytes,
    };
    print(global, &done, || {
        let (bytes, package_bytes) = (human_bytes(bytes), human_bytes(package_bytes));
        format!("{} ({package_bytes}, of {bytes})\n", done.file)
    })
}

/// Whether nothing of it has to be read: it is sealed, and stays so.
fn is_copied(args: &ExportArgs) -> bool {
    let sealed = store().find(&args.name).is_ok_and(|it| it.sealed.is_some());
    sealed
        && args.keys.keys.identity.is_empty()
        && args.encrypt_to.is_empty()
        && args.sign.is_none()
}

/// The package of a sealed checkpoint, for those that it was sealed for.
fn copy_sealed(global: &Global, args: &ExportArgs) -> Result<()> {
    let mut package = sealed_package(&store(), &args.name)?;
    // The kernel copies it: by reference where the file system can.
    let copy = |mut file: File| {
        std::io::copy(&mut package.file, &mut file).context("cannot write the package")?;
        Ok(file)
    };
    let Some(package_bytes) = Target::of(&args.file)?.write(copy)? else {
        return Ok(());
    };
    let done = Done {
        name: args.name.clone(),
        file: args.file.display().to_string(),
        bytes: package.bytes,
        package_bytes,
    };
    print(global, &done, || {
        format!("{} ({}, sealed)\n", done.file, human_bytes(package_bytes))
    })
}

/// What is written.
enum Content<'a> {
    Package(&'a ExportOptions),
    Archive(Archive<'a>),
}

/// The archive of another engine.
struct Archive<'a> {
    engine: Engine,
    container: Option<&'a str>,
    image_config: Option<String>,
}

/// The digest of the config of the container's image.
async fn image_config(
    global: &Global,
    checkpoint: &Checkpoint,
    args: &ExportArgs,
) -> Result<String> {
    let container = checkpoint.manifest.container(args.container.as_deref())?;
    let node = connect(global).await?.in_namespace(&container.namespace)?;
    config_of_base(&node, container).await
}

fn write<W: Write>(
    checkpoint: &Checkpoint,
    content: &Content<'_>,
    out: W,
    progress: &Progress,
) -> Result<W> {
    let mut count = progress.counter();
    Ok(match content {
        Content::Package(options) => export(checkpoint, options, out, &mut *count)?,
        Content::Archive(archive) => foreign::write::write(
            checkpoint,
            archive.container,
            archive.engine,
            archive.image_config.as_deref(),
            out,
            &mut *count,
        )?,
    })
}
