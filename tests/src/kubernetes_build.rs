//! Kubernetes' programs, built once from bookworm's source package, as its debian/rules do.
//!
//! ```text
//! <cache_dir>/kubernetes-<hash>/        kubelet, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl
//! <cache_dir>/kubernetes.new-tree       bookworm with its Go and the source, while it is built (3 GB)
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::recipe::{make_once, remove_if_there, short_hash};
use crate::run::CommandRun as _;
use crate::{DebianImage, Settings, TestbedError};
use transship_path_error::During as _;

const SUITE: &str = "bookworm";
const NEEDED: &str =
    "ca-certificates,dpkg-dev,golang-github-modern-go-reflect2-dev,golang-go,make,procps,rsync";

/// Kubernetes 1.20.2, the newest that Debian has, with all that it needs beside Go.
const FETCH: &str = r#"--customize-hook=set -e
sed 's/^deb /deb-src /' "$1"/etc/apt/sources.list >"$1"/etc/apt/sources.list.d/source.list
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
apt-get update
mkdir "$1"/src && cd "$1"/src
apt-get source --download-only kubernetes"#;

/// In GOPATH mode, and one package at a time: the linker and the compiler take a gigabyte each. It brings reflect2 1.0.1,
/// which does not know the maps of Go 1.18 and later: the API server would end when it reads what a webhook answers.
const BUILD: &str = r#"--customize-hook=chroot "$1" sh -euc '
cd /src && dpkg-source --no-check -x *.dsc kubernetes && cd kubernetes
reflect2=github.com/modern-go/reflect2
rm vendor/$reflect2/*.go vendor/$reflect2/*.s
cp /usr/share/gocode/src/$reflect2/*.go /usr/share/gocode/src/$reflect2/*.s vendor/$reflect2/
mkdir -p .go/src/k8s.io && ln -s ../../.. .go/src/k8s.io/kubernetes
export GOPATH="$PWD/.go" CGO_ENABLED=0 HOME=/root GOFLAGS=-p=1 PATH="/usr/lib/go/bin:$PATH" KUBE_GIT_VERSION=v1.20.2
make WHAT="cmd/kubelet cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler cmd/kubectl"'"#;

/// Where they lie in the tree.
const BUILT: &str = "src/kubernetes/_output/local/bin/linux/amd64";
const PROGRAMS: [&str; 5] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];

/// Gives the paths of Kubernetes' programs and of etcd, built when they are not cached.
pub(crate) fn programs(settings: &Settings) -> Result<Vec<PathBuf>, TestbedError> {
    let hash = short_hash(&[SUITE, NEEDED, FETCH, BUILD].concat());
    let dir = settings.cache_dir.join(format!("kubernetes-{hash}"));
    make_once(&dir, "kubernetes", build)?;
    let etcd = DebianImage::ETCD.tree(settings)?.join("usr/bin/etcd");
    Ok(PROGRAMS
        .iter()
        .map(|name| dir.join(name))
        .chain([etcd])
        .collect())
}

fn build(new: &Path) -> Result<(), TestbedError> {
    let tree = new.with_extension("new-tree");
    remove_if_there(&tree)?;
    Command::new("mmdebstrap")
        .args(["--quiet", "--format=directory", "--variant=minbase"])
        .arg(format!("--include={NEEDED}"))
        .args([FETCH, BUILD, SUITE])
        .arg(&tree)
        .run()?;
    fs::create_dir(new).during("create", new)?;
    for name in PROGRAMS {
        let built = tree.join(BUILT).join(name);
        fs::copy(&built, new.join(name)).during("copy", &built)?;
    }
    remove_if_there(&tree)
}
