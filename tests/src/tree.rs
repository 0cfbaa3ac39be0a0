//! The node trees: Debian with a stock containerd, runc and CRIU, built once and cached.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::TestbedError;
use crate::recipe::{Part, Recipe};

/// CRIU and those of its libraries that trixie does not have, or not in this version.
pub(crate) const CRIU_PACKAGES: [&str; 4] = ["criu", "libcompel1", "libnet9", "libnl-3-200"];

/// What only forky's nodes have: the library that crun loads at run time, so that its package does
/// not need it, and crit, CRIU's own reader of images.
const FORKY: [&str; 2] = ["libcriu2", "python3-pycriu"];

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
        Some(self.recipe().path(cache_dir)).filter(|path| path.is_dir())
    }

    /// Gives the path of the tree, building it first when it is not cached.
    ///
    /// Several processes may ask at once: one builds, the others wait.
    ///
    /// # Errors
    /// When mmdebstrap is missing or fails: it needs root and a Debian mirror.
    pub fn ensure(self, cache_dir: &Path) -> Result<PathBuf, TestbedError> {
        self.recipe().ensure(cache_dir)
    }

    pub(crate) fn recipe(self) -> Recipe {
        let base = |suite, more| Part::Base {
            suite,
            more,
            hooks: &[],
        };
        let packages = |suite, names| Part::Packages { suite, names };
        let parts = match self {
            Tree::Forky => vec![base("forky", &FORKY)],
            Tree::Trixie => vec![base("trixie", &[]), packages("forky", &CRIU_PACKAGES)],
            Tree::Bookworm => {
                vec![
                    Part::Copy(Tree::Trixie.recipe()),
                    packages("bookworm", &["containerd", "runc"]),
                ]
            }
        };
        Recipe {
            name: self.to_string(),
            parts,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_recipe_has_its_own_place() {
        let paths: std::collections::BTreeSet<_> = Tree::ALL
            .iter()
            .map(|tree| tree.recipe().path(Path::new("/c")))
            .collect();
        assert_eq!(paths.len(), Tree::ALL.len());
        let path = Tree::Trixie.recipe().path(Path::new("/c"));
        assert!(path.starts_with("/c"));
        assert_eq!(path.file_name().unwrap().len(), "trixie-".len() + 12);
    }
}
