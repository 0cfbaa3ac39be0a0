//! Two linked nodes with a stock containerd, held up until stdin ends: for looking around by hand,
//! and for the tests that kill their holder.
//!
//! ```text
//! testbed trixie|forky|bookworm
//!   stdout  one line of JSON, the testbed's traces, once all is up
//!   stderr  how to enter the nodes
//! testbed prepare TREE...
//!   builds the trees (and "servers", the image of the servers that the tests move) and the programs of
//!   the containers, as far as they are not there
//! ```

use std::io::Read as _;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use transship_testbed::{
    ContainerdConfig, DebianImage, Image, Settings, Testbed, Traces, Tree, Workload,
};

fn main() -> ExitCode {
    if let Some(code) = transship_testbed::node_role(std::env::args_os()) {
        return code;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let settings =
        Settings::from_variables(|name| std::env::var_os(name), std::env::current_exe()?);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["prepare", ref names @ ..] => prepare(names, &settings),
        [name] => hold(tree(name)?, &settings),
        _ => bail!("usage: testbed bookworm|trixie|forky, or testbed prepare TREE..."),
    }
}

fn tree(name: &str) -> anyhow::Result<Tree> {
    let tree = Tree::ALL.into_iter().find(|tree| tree.to_string() == name);
    tree.with_context(|| format!("no tree {name:?}"))
}

fn prepare(names: &[&str], settings: &Settings) -> anyhow::Result<()> {
    for name in names {
        match *name {
            "servers" => drop(DebianImage::SERVERS.tree(settings)?),
            name => drop(tree(name)?.ensure(&settings.cache_dir)?),
        }
    }
    for workload in [Workload::Sandbox, Workload::Counter] {
        workload.build(settings)?;
    }
    Ok(())
}

fn hold(tree: Tree, settings: &Settings) -> anyhow::Result<()> {
    let bed = Testbed::new(tree, settings)?;
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    bed.link(&a, &b)?;
    let image = Image::counter(settings, &bed.tree_dir().join("bin/busybox"))?;
    for node in [&a, &b] {
        node.start_containerd(&ContainerdConfig::default())?;
        node.import_image(&image, "overlayfs")?;
        node.import_image(&Image::pause(settings)?, "overlayfs")?;
        eprintln!(
            "node {}: nsenter --target {} --all",
            node.name(),
            node.pid()
        );
    }
    println!("{}", serde_json::to_string(&Traces::of(&bed))?);
    std::io::stdin().read_to_end(&mut Vec::new())?;
    bed.stop()?;
    Ok(())
}
