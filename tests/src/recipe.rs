//! Recipes of Debian trees, and the cache of what is made once.
//!
//! ```text
//! <cache_dir>/<name>-<hash of the recipe>      a finished tree, or a file; only ever appears by rename
//! <cache_dir>/<name>.lock                      held while building
//! <cache_dir>/<name>.new*                      half made; removed by the next builder
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use crate::TestbedError;
use crate::run::CommandRun as _;
use transship_path_error::During as _;

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

/// How a tree is made.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    /// The first part of its name.
    pub(crate) name: String,
    /// What is put in, in this order.
    pub(crate) parts: Vec<Part>,
}

impl Recipe {
    /// The place of the tree below `cache_dir`, built or not.
    pub(crate) fn path(&self, cache_dir: &Path) -> PathBuf {
        cache_dir.join(format!("{}-{}", self.name, short_hash(&self.text())))
    }

    /// Gives the path of the tree, building it first when it is not cached.
    pub(crate) fn ensure(&self, cache_dir: &Path) -> Result<PathBuf, TestbedError> {
        let path = self.path(cache_dir);
        make_once(&path, &self.name, |new| self.build(new, cache_dir))?;
        Ok(path)
    }

    fn build(&self, new: &Path, cache_dir: &Path) -> Result<(), TestbedError> {
        for part in &self.parts {
            match part {
                Part::Base { .. } | Part::Image { .. } => part.bootstrap().arg(new).run()?,
                Part::Copy(base) => {
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

    /// All that the tree is made of.
    fn text(&self) -> String {
        let part_text = |part: &Part| match part {
            Part::Copy(base) => base.text(),
            Part::Base { .. } | Part::Image { .. } | Part::Packages { .. } => {
                format!("{:?}", part.bootstrap())
            }
        };
        self.parts.iter().map(part_text).collect()
    }
}

/// Makes `path` by `make`, which is given another path beside it, unless it is there; `name` is that
/// of the lock. Several processes may ask at once: one makes it, the others wait.
pub(crate) fn make_once(
    path: &Path,
    name: &str,
    make: impl FnOnce(&Path) -> Result<(), TestbedError>,
) -> Result<(), TestbedError> {
    if path.try_exists().during("look for", path)? {
        return Ok(());
    }
    let cache_dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(cache_dir).during("create", cache_dir)?;
    let lock = cache_dir.join(format!("{name}.lock"));
    let file = File::create(&lock).during("create", &lock)?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .during("lock", &lock)?;
    if path.try_exists().during("look for", path)? {
        return Ok(());
    }
    eprintln!("building {} (once)", path.display());
    let new = cache_dir.join(format!("{name}.new"));
    remove_if_there(&new)?;
    make(&new)?;
    Ok(fs::rename(&new, path).during("rename to", path)?)
}

/// First digits of the SHA-256 of a text.
pub(crate) fn short_hash(text: &str) -> String {
    transship_digest::hex(&transship_digest::sha256(text)[..6])
}

/// What a tree is put together from.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    /// A minimal Debian with [`PACKAGES`] and more.
    Base {
        suite: &'static str,
        more: &'static [&'static str],
        /// Further arguments of mmdebstrap.
        hooks: &'static [&'static str],
    },
    /// A minimal Debian with these packages and nothing else: the root of an image.
    Image {
        suite: &'static str,
        packages: &'static [&'static str],
        /// Further arguments of mmdebstrap.
        hooks: &'static [&'static str],
    },
    /// A copy of the tree of another recipe.
    Copy(Recipe),
    /// Packages of another suite, installed over those that are there.
    Packages {
        suite: &'static str,
        names: &'static [&'static str],
    },
}

impl Part {
    /// The mmdebstrap command without its target. Only the suite is named: the mirror is
    /// mmdebstrap's default.
    fn bootstrap(&self) -> Command {
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--format=directory"]);
        let suite = match self {
            Part::Base { suite, more, hooks } => {
                let packages = [&PACKAGES, *more].concat();
                command.args([
                    "--variant=minbase",
                    &format!("--include={}", packages.join(",")),
                ]);
                command.arg("--customize-hook=rm -rf \"$1\"/usr/share/{doc,man,locale}");
                command.args(*hooks);
                suite
            }
            Part::Image {
                suite,
                packages,
                hooks,
            } => {
                command.args([
                    "--variant=minbase",
                    &format!("--include={}", packages.join(",")),
                ]);
                command.args(*hooks);
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
            Part::Copy(_) => unreachable!("a copied tree is not bootstrapped"),
        };
        if *suite == "forky" {
            // A testing suite's Release file may have run out on a mirror that follows slowly.
            command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
        }
        command.arg(suite);
        command
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

pub(crate) fn remove_if_there(path: &Path) -> Result<(), TestbedError> {
    let removed = match path.symlink_metadata() {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        _ => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => Ok(other.during("remove", path)?),
    }
}
