//! Debian trees with a stock containerd, runc and CRIU, built once and cached.
//!
//! ```text
//! <cache_dir>/<suite>-<hash of the recipe>/    a finished tree; only ever appears by rename
//! <cache_dir>/<suite>.lock                     held while building
//! <cache_dir>/<suite>.new*                     half made; removed by the next builder
//! ```

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use crate::TestbedError;
use crate::error::IoContext as _;
use crate::run::CommandRun as _;

/// What a node consists of besides the minimal base.
///
/// CRIU's network lock fails the dump without iptables and nftables; openssh carries a migration.
const PACKAGES: [&str; 16] = [
    "busybox-static",
    "ca-certificates",
    "containerd",
    "containernetworking-plugins",
    "criu",
    "crun",
    "iproute2",
    "iptables",
    "iputils-ping",
    "jq",
    "nftables",
    "openssh-client",
    "openssh-server",
    "procps",
    "runc",
    "zstd",
];

/// A Debian tree, named after the suite that its containerd comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tree {
    /// containerd 1.6.20 and runc 1.1.5 in trixie's tree: bookworm's own CRIU 3.17.1 does not run
    /// on kernel 6.18 ("Unexpected rt vDSO area bounds").
    Bookworm,
    /// containerd 1.7.24, runc 1.1.15, CRIU 4.1.1.
    Trixie,
    /// containerd 2.1.9, runc 1.3.6, CRIU 4.2.1.
    Forky,
}

impl Tree {
    /// All trees, oldest containerd first.
    pub const ALL: [Tree; 3] = [Tree::Bookworm, Tree::Trixie, Tree::Forky];

    /// The version of containerd in the tree.
    pub fn containerd_version(self) -> &'static str {
        match self {
            Tree::Bookworm => "1.6.20",
            Tree::Trixie => "1.7.24",
            Tree::Forky => "2.1.9",
        }
    }

    /// True for containerd 2.x, which has another configuration format.
    pub fn has_containerd_2(self) -> bool {
        self == Tree::Forky
    }

    /// The path of the tree below `cache_dir` if it has been built.
    pub fn cached(self, cache_dir: &Path) -> Option<PathBuf> {
        Some(self.path(cache_dir)).filter(|path| path.is_dir())
    }

    /// Gives the path of the tree, building it first when it is not cached.
    ///
    /// Several processes may ask at once: one builds, the others wait.
    ///
    /// # Errors
    /// When mmdebstrap is missing or fails: it needs root and a Debian mirror.
    pub fn ensure(self, cache_dir: &Path) -> Result<PathBuf, TestbedError> {
        if let Some(path) = self.cached(cache_dir) {
            return Ok(path);
        }
        fs::create_dir_all(cache_dir).during("create", cache_dir)?;
        let lock = cache_dir.join(format!("{self}.lock"));
        let file = File::create(&lock).during("create", &lock)?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .during("lock", &lock)?;
        if let Some(path) = self.cached(cache_dir) {
            return Ok(path);
        }
        eprintln!(
            "building node tree {self} in {} (once)",
            cache_dir.display()
        );
        let (new, path) = (cache_dir.join(format!("{self}.new")), self.path(cache_dir));
        remove_if_there(&new)?;
        self.build(&new, cache_dir)?;
        fs::rename(&new, &path).during("rename to", &path)?;
        Ok(path)
    }

    fn build(self, new: &Path, cache_dir: &Path) -> Result<(), TestbedError> {
        match self {
            Tree::Trixie | Tree::Forky => self.bootstrap().arg(new).run(),
            Tree::Bookworm => {
                let base = Tree::Trixie.ensure(cache_dir)?;
                Command::new("cp")
                    .args(["-a", "--reflink=auto"])
                    .arg(base)
                    .arg(new)
                    .run()?;
                let packages = new.with_extension("new-packages");
                remove_if_there(&packages)?;
                self.bootstrap().arg(&packages).run()?;
                install_packages(&packages.join("var/cache/apt/archives"), new)?;
                remove_if_there(&packages)
            }
        }
    }

    /// The mmdebstrap command without its target. Only the suite is named: the mirror is
    /// mmdebstrap's default.
    fn bootstrap(self) -> Command {
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--format=directory"]);
        match self {
            Tree::Bookworm => {
                // Only for its two packages: "extract" fetches them and skips all installation.
                command.args(["--variant=extract", "--include=containerd,runc"]);
                command.arg("--skip=cleanup/apt");
            }
            Tree::Trixie | Tree::Forky => {
                command.args([
                    "--variant=minbase",
                    &format!("--include={}", PACKAGES.join(",")),
                ]);
                command.arg("--customize-hook=rm -rf \"$1\"/usr/share/{doc,man,locale}");
            }
        }
        if self == Tree::Forky {
            // A testing suite's Release file may have run out on a mirror that follows slowly.
            command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
        }
        command.arg(self.to_string());
        command
    }

    fn path(self, cache_dir: &Path) -> PathBuf {
        cache_dir.join(format!("{self}-{}", self.recipe_hash()))
    }

    /// First digits of the SHA-256 of all command lines that make the tree.
    fn recipe_hash(self) -> String {
        let mut recipe = format!("{:?}", self.bootstrap());
        if self == Tree::Bookworm {
            recipe += &format!("{:?}", Tree::Trixie.bootstrap());
        }
        Sha256::digest(recipe)
            .iter()
            .take(6)
            .fold(String::new(), |mut text, byte| {
                write!(text, "{byte:02x}").expect("writing to a String does not fail");
                text
            })
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tree::Bookworm => "bookworm",
            Tree::Trixie => "trixie",
            Tree::Forky => "forky",
        })
    }
}

/// Installs containerd and runc from `archives` into the tree, over the newer ones.
fn install_packages(archives: &Path, tree: &Path) -> Result<(), TestbedError> {
    let mut inside = Vec::new();
    for entry in fs::read_dir(archives).during("read", archives)? {
        let entry = entry.during("read", archives)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if ["containerd_", "runc_"]
            .iter()
            .any(|start| name.starts_with(start))
        {
            let target = tree.join("tmp").join(&name);
            fs::copy(entry.path(), &target).during("copy to", &target)?;
            inside.push(format!("/tmp/{name}"));
        }
    }
    if inside.len() != 2 {
        return Err(TestbedError::Unexpected {
            what: "set of packages from bookworm",
            text: format!("{inside:?}"),
        });
    }
    Command::new("chroot")
        .arg(tree)
        .args(["dpkg", "--force-downgrade", "--force-confnew", "--install"])
        .args(&inside)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .run()?;
    for path in inside {
        let path = tree.join(path.trim_start_matches('/'));
        fs::remove_file(&path).during("remove", &path)?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<(), TestbedError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.during("remove", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_recipe_has_its_own_place() {
        let paths: std::collections::BTreeSet<_> = Tree::ALL
            .iter()
            .map(|tree| tree.path(Path::new("/c")))
            .collect();
        assert_eq!(paths.len(), Tree::ALL.len());
        assert!(Tree::Trixie.path(Path::new("/c")).starts_with("/c"));
        assert_eq!(Tree::Trixie.recipe_hash().len(), 12);
    }
}
