//! The files that a directory of images has: those of `criu/image-desc.c` that CRIU 3.17 and later
//! write for a container, CRIU's figures, and the runtime's own. CRIU opens by name; what it opens for
//! features that no container has (`binfmt-misc.img`, `autofs-*.img`, `apparmor.img` with policies that it
//! loads into the kernel), or for dumps of earlier versions (`creds-*.img`, `rlimit-*.img`, and an image for
//! each kind of open file, such as `packetsk.img`, which it reads where there is no `files.img`), is not
//! admitted.

use std::fs;
use std::io;
use std::path::Path;

use super::ImageError;

/// Names without a number.
const WHOLE: &[&str] = &[
    "bpfmap-data.img",
    "cgroup.img",
    "config.dump",
    "cpuinfo.img",
    "criu.conf",
    "descriptors.json",
    "fifo-data.img",
    "filelocks.img",
    "files.img",
    "inventory.img",
    "irmap-cache",
    "memfd.img",
    "pipes-data.img",
    "pstree.img",
    "remap-fpath.img",
    "seccomp.img",
    "sk-queues.img",
    "stats-dump",
    "stats-restore",
    "tty-data.img",
    "tty-info.img",
];

/// What comes before a number (decimal, or hexadecimal for ghost files and sockets), and after it.
const NUMBERED: &[(&str, &str)] = &[
    ("core-", ".img"),
    ("fdinfo-", ".img"),
    ("fs-", ".img"),
    ("ghost-file-", ".img"),
    ("ids-", ".img"),
    ("ifaddr-", ".img"),
    ("ip6tables-", ".img"),
    ("ipcns-msg-", ".img"),
    ("ipcns-sem-", ".img"),
    ("ipcns-shm-", ".img"),
    ("ipcns-var-", ".img"),
    ("iptables-", ".img"),
    ("mm-", ".img"),
    ("mountpoints-", ".img"),
    ("netdev-", ".img"),
    ("netns-", ".img"),
    ("netns-ct-", ".img"),
    ("netns-exp-", ".img"),
    ("nftables-", ".img"),
    ("pagemap-", ".img"),
    ("pagemap-shmem-", ".img"),
    ("pages-", ".img"),
    ("pidns-", ".img"),
    ("route-", ".img"),
    ("route6-", ".img"),
    ("rule-", ".img"),
    ("tcp-stream-", ".img"),
    ("timens-", ".img"),
    ("tmpfs-dev-", ".tar.gz.img"),
    ("userns-", ".img"),
    ("utsns-", ".img"),
];

/// Whether a directory of images may have a file of this name.
#[must_use]
pub fn is_image(name: &str) -> bool {
    // As CRIU writes it: with a zero before it, it is another file of the same number.
    let is_number = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits && (text == "0" || (1..=20).contains(&text.len()) && !text.starts_with('0'))
    };
    WHOLE.contains(&name)
        || NUMBERED.iter().any(|(before, after)| {
            name.strip_prefix(before)
                .and_then(|rest| rest.strip_suffix(after))
                .is_some_and(is_number)
        })
}

/// The directory with the images that those beside it build on: images of memory alone, and perhaps what these build
/// on.
pub const PARENT_DIR: &str = "parent";
/// More of them than a migration ever makes.
const MOST_PARENTS: usize = 1000;

/// The files of a directory that no image is: those of another name, and those that are not regular.
///
/// # Errors
/// The directory cannot be listed.
pub fn strangers(dir: &Path) -> Result<Vec<String>, ImageError> {
    let (mut strangers, mut dir) = (Vec::new(), dir.to_path_buf());
    let (mut allowed, mut depth): (fn(&str) -> bool, usize) = (is_image, 0);
    loop {
        let mut has_parent = false;
        let io = |source: io::Error| ImageError::Io {
            act: "list",
            path: dir.clone(),
            source,
        };
        for entry in fs::read_dir(&dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let kind = entry.file_type().map_err(io)?;
            if kind.is_dir() && name == PARENT_DIR && depth < MOST_PARENTS {
                has_parent = true;
            } else if !kind.is_file() || !name.to_str().is_some_and(allowed) {
                strangers.push(name.to_string_lossy().into_owned());
            }
        }
        if !has_parent {
            break;
        }
        dir.push(PARENT_DIR);
        (allowed, depth) = (is_memory, depth + 1);
    }
    strangers.sort_unstable();
    Ok(strangers)
}

/// The names in a directory of which each is one of an image.
///
/// # Errors
/// The directory cannot be listed.
pub(super) fn all(dir: &Path) -> Result<Vec<String>, ImageError> {
    let io = |source: io::Error| ImageError::Io {
        act: "list",
        path: dir.to_path_buf(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        names.extend(
            name.to_str()
                .filter(|name| is_image(name))
                .map(str::to_owned),
        );
    }
    names.sort_unstable();
    Ok(names)
}

/// Whether an image has pages of a process, or says which.
fn is_memory(name: &str) -> bool {
    let of_process = ["pagemap-", "pages-"].iter().any(|it| name.starts_with(it));
    of_process && is_image(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_of_a_container_are_admitted() {
        for name in [
            "core-1.img",
            "tmpfs-dev-97.tar.gz.img",
            "ghost-file-1f.img",
            "inventory.img",
            "pages-12.img",
            "netns-ct-3.img",
        ] {
            assert!(is_image(name), "{name}");
        }
        for name in [
            "core-.img",
            "core-x.img",
            "core-1.img.new",
            "binfmt-misc.img",
            "autofs-1.img",
            "creds-1.img",
            "parent",
            "../core-1.img",
            "tmpfs-9.img",
            "core-01.img",
            // CRIU reads them in the place of files.img.
            "packetsk.img",
            "tunfile.img",
            "apparmor.img",
        ] {
            assert!(!is_image(name), "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("core-1.img"), b"").unwrap();
        std::os::unix::fs::symlink("core-1.img", dir.path().join("mm-1.img")).unwrap();
        fs::write(dir.path().join("x"), b"").unwrap();
        assert_eq!(strangers(dir.path()).unwrap(), ["mm-1.img", "x"]);
        let parent = dir.path().join(PARENT_DIR);
        fs::create_dir_all(parent.join(PARENT_DIR)).unwrap();
        fs::write(parent.join("pages-1.img"), b"").unwrap();
        fs::write(parent.join(PARENT_DIR).join("core-2.img"), b"").unwrap();
        let expected = ["core-2.img", "mm-1.img", "x"];
        assert_eq!(strangers(dir.path()).unwrap(), expected);
    }
}
