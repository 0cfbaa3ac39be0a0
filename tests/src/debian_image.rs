//! OCI images of programs as Debian ships them.
//!
//! ```text
//! <cache_dir>/image-<name>-<hash of the recipe>     the tree, made by mmdebstrap ──> Image
//! ```

use std::path::PathBuf;
use std::process::Command;

use crate::recipe::{Part, Recipe};
use crate::run::CommandRun as _;
use crate::{Image, Settings, TestbedError};

const SUITE: &str = "trixie";

/// What no program of an image reads, as patterns of tar; devices come from the container's own /dev.
const UNREAD: [&str; 8] = [
    "./dev/*",
    "./usr/lib/*/perl*",
    "./usr/share/doc/*",
    "./usr/share/info/*",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./usr/share/perl*",
    "./var/lib/dpkg/*",
];

/// An image of a minimal Debian with some packages.
#[derive(Debug, Clone, Copy)]
pub struct DebianImage {
    /// Its name in the cache and in its reference.
    pub name: &'static str,
    /// What it has besides the minimal base.
    pub packages: &'static [&'static str],
    /// Further arguments of mmdebstrap, such as hooks.
    pub hooks: &'static [&'static str],
    /// Patterns of tar: what of the tree is not put into the image.
    pub left_out: &'static [&'static str],
}

impl DebianImage {
    /// The servers that `.ci/run` moves.
    pub const SERVERS: DebianImage = DebianImage {
        name: "servers",
        packages: &["memcached", "nginx-light", "python3", "redis-server"],
        hooks: &[],
        left_out: &[],
    };

    /// etcd and its client.
    pub const ETCD: DebianImage = DebianImage {
        name: "etcd",
        packages: &["etcd-client", "etcd-server"],
        hooks: &[],
        left_out: &[],
    };

    /// PostgreSQL, for a machine where other users' programs can be dumped.
    pub const POSTGRESQL: DebianImage = DebianImage {
        name: "postgresql",
        packages: &["postgresql"],
        hooks: &[],
        // For its compiler, without which it runs as well.
        left_out: &[
            "./usr/lib/*/libLLVM*",
            "./usr/lib/*/libz3*",
            "./usr/lib/postgresql/*/lib/bitcode",
        ],
    };

    /// The image; its tree is made once and cached as those of the nodes are.
    ///
    /// # Errors
    /// When mmdebstrap fails.
    pub fn image(&self, settings: &Settings) -> Result<Image, TestbedError> {
        let mut pack = Command::new("tar");
        pack.args(["--create", "--numeric-owner", "--xattrs", "--directory"]);
        pack.arg(self.tree(settings)?);
        for pattern in UNREAD.iter().chain(self.left_out) {
            pack.arg(format!("--exclude={pattern}"));
        }
        let layer = pack.arg(".").feed(b"")?;
        Ok(Image::of_layer(
            format!("transship.test/{}:1", self.name),
            layer,
        ))
    }

    /// The version of one of its packages.
    ///
    /// # Errors
    /// When the tree has no such package.
    pub fn version(&self, settings: &Settings, package: &str) -> Result<String, TestbedError> {
        let mut query = Command::new("dpkg-query");
        query
            .arg("--admindir")
            .arg(self.tree(settings)?.join("var/lib/dpkg"));
        query
            .args(["--show", "--showformat=${Version}", package])
            .read()
    }

    /// Makes its tree, if it is not cached, and gives its path.
    ///
    /// # Errors
    /// When mmdebstrap fails.
    pub fn tree(&self, settings: &Settings) -> Result<PathBuf, TestbedError> {
        let recipe = Recipe {
            name: format!("image-{}", self.name),
            parts: vec![Part::Image {
                suite: SUITE,
                packages: self.packages,
                hooks: self.hooks,
            }],
        };
        recipe.ensure(&settings.cache_dir)
    }
}
