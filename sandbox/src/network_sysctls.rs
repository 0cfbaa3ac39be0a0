//! Sysctls of a network namespace (`net.*`), as a spec has them.
//!
//! The OCI runtime writes them when it makes a container, and not when it restores one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::error::SandboxError;
use crate::pins::in_network;

const SYSCTLS: &str = "/proc/sys";
const NETWORK: &str = "net.";

/// Those of a network namespace among the sysctls of a spec.
pub fn of_network<'s>(
    sysctls: impl IntoIterator<Item = (&'s str, &'s str)>,
) -> BTreeMap<String, String> {
    let sysctls = sysctls.into_iter();
    let of_network = sysctls.filter(|(name, _)| name.starts_with(NETWORK));
    of_network
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Sets sysctls in the network namespace of a process, which is not this program's.
///
/// # Errors
/// One is none of a network, or the kernel does not have it or its value.
pub fn set_network_sysctls(
    pid: i32,
    sysctls: &BTreeMap<String, String>,
) -> Result<(), SandboxError> {
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
    // What is below /proc/sys/net is that of the namespace of who opens it.
    in_network("set the sysctls of", &namespace, || {
        for (name, value) in sysctls {
            let failed = |error| io::Error::other(format!("{name}={value}: {error}"));
            let path = place(name).map_err(failed)?;
            fs::write(path, value).map_err(failed)?;
        }
        Ok(())
    })
}

/// As runc finds it; a name leads nowhere else.
fn place(name: &str) -> io::Result<PathBuf> {
    let below = name.replace('.', "/");
    let is_plain = below.split('/').all(|part| {
        let mut parts = Path::new(part).components();
        matches!(parts.next(), Some(Component::Normal(_)))
    });
    match name.starts_with(NETWORK) && is_plain && !name.contains('\0') {
        true => Ok(Path::new(SYSCTLS).join(below)),
        false => Err(io::Error::other("it is no sysctl of a network")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_to_no_other_sysctl() {
        let somaxconn = place("net.core.somaxconn").unwrap();
        assert_eq!(somaxconn, Path::new("/proc/sys/net/core/somaxconn"));
        for other in [
            "kernel.core_pattern",
            "net...kernel.core_pattern",
            "net./kernel/core_pattern",
            "net.",
            "net",
            "network.x",
        ] {
            assert!(place(other).is_err(), "{other}");
        }
    }

    #[test]
    fn those_of_other_namespaces_are_left() {
        let all = [("net.a", "1"), ("kernel.shmmax", "2"), ("network.b", "3")];
        let of_network = of_network(all);
        assert_eq!(of_network.keys().collect::<Vec<_>>(), ["net.a"]);
    }
}
