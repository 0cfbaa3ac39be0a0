//! `transship inspect NAME`

use std::fmt::Write as _;

use transship_checkpoint::manifest::{Container, Manifest};

use super::{print, store};
use crate::args::{Global, NameArgs};
use transship_engine::Result;
use transship_engine::restore::open;
use transship_engine::timeline::human_bytes;

pub(crate) fn run(global: &Global, args: &NameArgs) -> Result<()> {
    let checkpoint = open(&store(), &args.name)?;
    if args.verify {
        checkpoint.verify()?;
    }
    print(global, &checkpoint.manifest, || {
        text(&checkpoint.manifest, args.verify)
    })
}

fn text(manifest: &Manifest, verified: bool) -> String {
    let source = &manifest.source;
    let created = std::time::UNIX_EPOCH + std::time::Duration::from_secs(manifest.created);
    let mut text = format!(
        "{}\n  taken     {} on {} ({}, Linux {}, containerd {})\n  size      {}{}\n",
        manifest.name,
        transship_containerd::rfc3339(created),
        source.hostname,
        source.architecture,
        source.kernel,
        source.containerd,
        human_bytes(manifest.size()),
        if verified {
            ", every digest is right"
        } else {
            ""
        }
    );
    for container in &manifest.containers {
        describe(&mut text, container);
    }
    for (dir, containers) in (!manifest.shared.shm.is_empty())
        .then(|| ("/dev/shm".to_owned(), &manifest.shared.shm))
        .into_iter()
        .chain(manifest.shared.volumes.iter().map(|volume| {
            let name = format!("emptyDir {}", volume.name);
            (name, &volume.containers)
        }))
    {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {dir}, shared by {}", containers.join(", "));
    }
    text
}

fn describe(text: &mut String, container: &Container) {
    let size = |filter: &dyn Fn(&str) -> bool| -> u64 {
        container
            .files
            .iter()
            .filter(|file| filter(&file.path))
            .map(|file| file.size)
            .sum()
    };
    let joined = if container.joined.is_empty() {
        "its own".to_owned()
    } else {
        format!("joins {} of a sandbox", container.joined.join(", "))
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "  container {} (namespace {})\n    image       {} {}\n    namespaces  {joined}\n    \
         memory      {}\n    upperdir    {}\n    tcp         {:?}, file locks {}",
        container.id,
        container.namespace,
        container.image.name,
        container.image.digest,
        human_bytes(size(&|path| path.starts_with("checkpoint/pages-"))),
        human_bytes(size(&|path| path == "rootfs-diff.tar")),
        container.criu.tcp,
        if container.criu.file_locks {
            "kept"
        } else {
            "not kept"
        },
    );
}
