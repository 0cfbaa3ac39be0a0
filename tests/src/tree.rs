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

/// crun loads it at run time, so its package does not need it. Only forky's crun is tested with it.
const LIBCRIU: &str = "libcriu2";

/// CRIU and those of its libraries that trixie does not have, or not in this version.
const CRIU_PACKAGES: [&str; 4] = ["criu", "libcompel1", "libnet9", "libnl-3-200"];

/// A Debian tree, named after the suite that its containerd comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tree {
    /// containerd 1.6.20, runc 1.1.5 in trixie's tree, with its CRIU: bookworm's own CRIU 3.17.1
    /// does not run on kernel 6.18 ("Unexpected rt vDSO area bounds").
    Bookworm,
    /// containerd 1.7.24, runc 1.1.15, and CRIU 4.2.1 from forky: trixie's own CRIU 4.1.1 cannot
    /// dump a TCP socket on kernels from 6.16 on ("Can't get 1:16 opt", CRIU issue 2705).
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

    /// The parts of the tree, in the order in which they are put in.
    fn recipe(self) -> Vec<Part> {
        let base = |suite| Part::Base { suite };
        let packages = |suite, names| Part::Packages { suite, names };
        match self {
            Tree::Forky => vec![base("forky")],
            Tree::Trixie => vec![base("trixie"), packages("forky", &CRIU_PACKAGES)],
            Tree::Bookworm => {
                vec![
                    Part::Tree(Tree::Trixie),
                    packages("bookworm", &["containerd", "runc"]),
                ]
            }
        }
    }

    fn build(self, new: &Path, cache_dir: &Path) -> Result<(), TestbedError> {
        for part in self.recipe() {
            match &part {
                Part::Base { .. } => part.bootstrap().arg(new).run()?,
                Part::Tree(base) => {
                    let base = base.ensure(cache_dir)?;
                    Command::new("cp")
                        .args(["-a", "--reflink=auto"])
                        .arg(base)
                        .arg(new)
                        .run()?;
                }
                Part::Packages { names, .. } => {
                    let packages = new.with_extension("new-packages");
                    remove_if_there(&packages)?;
                    part.bootstrap().arg(&packages).run()?;
                    install_packages(&packages.join("var/cache/apt/archives"), names, new)?;
                    remove_if_there(&packages)?;
                }
            }
        }
        Ok(())
    }

    fn path(self, cache_dir: &Path) -> PathBuf {
        cache_dir.join(format!("{self}-{}", self.recipe_hash()))
    }

    /// First digits of the SHA-256 of all that the tree is made of.
    fn recipe_hash(self) -> String {
        Sha256::digest(self.recipe_text())
            .iter()
            .take(6)
            .fold(String::new(), |mut text, byte| {
                write!(text, "{byte:02x}").expect("writing to a String does not fail");
                text
            })
    }

    fn recipe_text(self) -> String {
        let part_text = |part: Part| match part {
            Part::Tree(tree) => tree.recipe_text(),
            Part::Base { .. } | Part::Packages { .. } => format!("{:?}", part.bootstrap()),
        };
        self.recipe().into_iter().map(part_text).collect()
    }
}

/// What a tree is put together from.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// A minimal Debian with [`PACKAGES`].
    Base { suite: &'static str },
    /// A copy of another tree.
    Tree(Tree),
    /// Packages of another suite, installed over those that are there.
    Packages {
        suite: &'static str,
        names: &'static [&'static str],
    },
}

impl Part {
    /// The mmdebstrap command without its target. Only the suite is named: the mirror is
    /// mmdebstrap's default.
    fn bootstrap(self) -> Command {
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--format=directory"]);
        let suite = match self {
            Part::Base { suite } => {
                let mut packages = PACKAGES.to_vec();
                if suite == "forky" {
                    packages.push(LIBCRIU);
                }
                command.args([
                    "--variant=minbase",
                    &format!("--include={}", packages.join(",")),
                ]);
                command.arg("--customize-hook=rm -rf \"$1\"/usr/share/{doc,man,locale}");
                suite
            }
            Part::Packages { suite, names } => {
                // "extract" fetches the packages and skips all installation.
                command.args([
                    "--variant=extract",
                    &format!("--include={}", names.join(",")),
                ]);
                command.arg("--skip=cleanup/apt");
                suite
            }
            Part::Tree(_) => unreachable!("a copied tree is not bootstrapped"),
        };
        if suite == "forky" {
            // A testing suite's Release file may have run out on a mirror that follows slowly.
            command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
        }
        command.arg(suite);
        command
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

/// Installs the packages of these names from `archives` into the tree, over other versions.
fn install_packages(archives: &Path, names: &[&str], tree: &Path) -> Result<(), TestbedError> {
    let mut inside = Vec::new();
    for entry in fs::read_dir(archives).during("read", archives)? {
        let entry = entry.during("read", archives)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // "runc_1.1.5+ds1-1_amd64.deb"
        let package = name.split('_').next().unwrap_or_default();
        if names.contains(&package) {
            let target = tree.join("tmp").join(&name);
            fs::copy(entry.path(), &target).during("copy to", &target)?;
            inside.push(format!("/tmp/{name}"));
        }
    }
    if inside.len() != names.len() {
        return Err(TestbedError::Unexpected {
            what: "set of packages from another suite",
            text: format!("{inside:?} for {names:?}"),
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
