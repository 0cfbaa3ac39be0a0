//! Two linked nodes with a stock containerd, held up until stdin ends: for looking around by hand,
//! and for the tests that kill their holder.
//!
//! ```text
//! testbed trixie|forky|bookworm
//!   stdout  one line of JSON, the testbed's traces, once all is up
//!   stderr  how to enter the nodes
//! ```

use std::io::Read as _;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use transship_testbed::{ContainerdConfig, Image, Settings, Testbed, Traces, Tree};

fn main() -> ExitCode {
    if let Some(code) = transship_testbed::node_role(std::env::args_os()) {
        return code;
    }
    match hold() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> anyhow::Result<()> {
    let [_, name] = &std::env::args().collect::<Vec<_>>()[..] else {
        bail!("usage: testbed bookworm|trixie|forky");
    };
    let tree = Tree::ALL.into_iter().find(|tree| tree.to_string() == *name);
    let tree = tree.with_context(|| format!("no tree {name:?}"))?;
    let settings =
        Settings::from_variables(|name| std::env::var_os(name), std::env::current_exe()?);
    let bed = Testbed::new(tree, &settings)?;
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    bed.link(&a, &b)?;
    let image = Image::counter(&settings, &bed.tree_dir().join("bin/busybox"))?;
    for node in [&a, &b] {
        node.start_containerd(&ContainerdConfig::default())?;
        node.import_image(&image, "overlayfs")?;
        node.import_image(&Image::pause(&settings)?, "overlayfs")?;
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
