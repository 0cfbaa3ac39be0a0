//! Unix sockets that are bound to a path: as root CRIU removes what socket has the name, and binds its own there.
//!
//! So the user of the container may do both in the directory as it is now: in a volume the name may be that of a server
//! of others. And nobody may have that socket who runs: it would not be reached any more, also where the restore fails.

use std::fs::Metadata;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc::{S_IFMT, S_IFSOCK};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{Mode, fstat};
use transship_checkpoint::criu_images::mounts::Mount;

use super::allowance::Allowance;
use super::capabilities::{DAC_OVERRIDE, FOWNER};
use super::files::deepest;
use super::mount_ways::directory_of;
use super::{Admission, Refusal, Restored};

/// What CRIU calls a socket for a while, when one that has no name any more had its name.
const PARKED: &str = ".criu-sk-ghost";
const STICKY: u32 = 0o1000;

/// Compares each with the directory on this node.
pub(super) fn compare(
    restored: &Restored,
    allowed: &Allowance,
    rootfs: &Path,
    admission: &mut Admission,
) {
    let sockets = { restored.named_files.iter() }.filter(|it| it.is_socket && !it.is_external);
    for socket in sockets {
        let mounts = { restored.mounts.iter() }.filter_map(|table| deepest(table, &socket.path));
        let places = mounts.filter_map(|mount| place(mount, &socket.path, allowed, rootfs));
        let places: Vec<PathBuf> = places.collect();
        let mut refuse = |why| {
            let path = socket.path.clone();
            admission.refuse(Refusal::File { path, why });
        };
        if !allowed.any_user && places.iter().any(|place| !may_bind(place, allowed)) {
            refuse(
                "which is a socket that the new container's user could not bind or remove there",
            );
        }
        if places.iter().any(|place| is_somebodys(place)) {
            refuse("which is the socket of a program that runs here: end that first");
        }
    }
}

/// Whether a socket is bound to this name. Who has it does not hear of the question: of another kind of socket the kernel
/// says that it is there, and one of datagrams hears of no connection.
fn is_somebodys(place: &Path) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(file) = open(place, flags, Mode::empty()) else {
        return false;
    };
    if !fstat(&file).is_ok_and(|stat| stat.st_mode & S_IFMT == S_IFSOCK) {
        return false;
    }
    // Its own name may be too long for an address.
    let address = UnixAddr::new(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let asks = socket(AddressFamily::Unix, SockType::Datagram, flags, None);
    let (Ok(address), Ok(asks)) = (address, asks) else {
        return true;
    };
    connect(asks.as_raw_fd(), &address) != Err(Errno::ECONNREFUSED)
}

/// Where it is on this node; none in a file system that CRIU makes.
fn place(mount: &Mount, path: &Path, allowed: &Allowance, rootfs: &Path) -> Option<PathBuf> {
    let root = match mount.destination == "/" {
        true => rootfs.to_path_buf(),
        false => directory_of(mount, allowed)?,
    };
    Some(root.join(path.strip_prefix(&mount.destination).ok()?))
}

fn may_bind(place: &Path, allowed: &Allowance) -> bool {
    // CRIU makes directories for a name that it removes again.
    let mut dirs = place.ancestors().skip(1);
    let Some(dir) = dirs.find_map(|dir| dir.symlink_metadata().ok()) else {
        return false;
    };
    let user = User::of(allowed);
    let is_own = |it: &Metadata| user.is(it.uid());
    let keeps_others = dir.mode() & STICKY != 0 && !is_own(&dir) && !user.owns_all;
    let mut parked = place.as_os_str().to_owned();
    parked.push(PARKED);
    let mut names = [place, Path::new(&parked)].into_iter();
    let has_others = names.any(|name| name.symlink_metadata().is_ok_and(|it| !is_own(&it)));
    user.may_write(&dir) && !(keeps_others && has_others)
}

/// Who the container's user is for the files of this node.
struct User {
    /// Those of the container where a mount shifts ids, and those of the node where none does.
    ids: Vec<u32>,
    groups: Vec<u32>,
    /// Whether it writes where it may not: without a user namespace a root with its capabilities does.
    writes_all: bool,
    owns_all: bool,
}

impl User {
    fn of(allowed: &Allowance) -> Self {
        let mappings = &allowed.id_mappings;
        let shifted = |id: u32, ranges: &[(u32, u32, u32)]| {
            let mut ranges = ranges.iter();
            ranges.find_map(|(first, there, count)| {
                let at = id.checked_sub(*first).filter(|at| at < count)?;
                there.checked_add(at)
            })
        };
        let all = |ids: &[u32], ranges| {
            let shifted: Vec<u32> = { ids.iter() }
                .filter_map(|id| shifted(*id, ranges))
                .collect();
            [ids.to_vec(), shifted].concat()
        };
        let is_root = allowed.user == 0 && mappings.uids.is_empty();
        let has = |capability| is_root && allowed.capabilities.has(capability);
        Self {
            ids: all(&[allowed.user], &mappings.uids),
            groups: all(&allowed.groups, &mappings.gids),
            writes_all: has(DAC_OVERRIDE),
            owns_all: has(FOWNER),
        }
    }

    fn is(&self, uid: u32) -> bool {
        self.ids.contains(&uid)
    }

    /// As the kernel decides: of the first that it is.
    fn may_write(&self, dir: &Metadata) -> bool {
        let class = match (self.is(dir.uid()), self.groups.contains(&dir.gid())) {
            (true, _) => 6,
            (false, true) => 3,
            (false, false) => 0,
        };
        self.writes_all || (dir.mode() >> class) & 0o3 == 0o3
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn user(user: u32, groups: &[u32]) -> Allowance {
        Allowance {
            user,
            groups: groups.to_vec(),
            ..Allowance::default()
        }
    }

    #[test]
    fn a_name_is_bound_by_who_could() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().metadata().unwrap();
        let (uid, gid) = (own.uid(), own.gid());
        let name = dir.path().join("sock");
        let mode = |mode: u32| {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o755);
        assert!(may_bind(&name, &user(uid, &[])));
        assert!(!may_bind(&name, &user(uid + 1, &[gid])));
        assert!(!may_bind(&name.join("below"), &user(uid + 1, &[])));
        mode(0o770);
        assert!(may_bind(&name, &user(uid + 1, &[gid])));
        assert!(!may_bind(&name, &user(uid + 1, &[gid + 1])));
        // Of others than the owner the kernel asks no more.
        mode(0o077);
        assert!(!may_bind(&name, &user(uid, &[gid])));
        mode(0o1777);
        assert!(may_bind(&name, &user(uid + 1, &[])));
        fs::write(dir.path().join(format!("sock{PARKED}")), "").unwrap();
        assert!(!may_bind(&name, &user(uid + 1, &[])));
        assert!(may_bind(&name, &user(uid, &[])));
        mode(0o777);
        assert!(may_bind(&name, &user(uid + 1, &[])));
    }

    #[test]
    fn a_socket_is_somebodys_as_long_as_he_has_it() {
        use std::os::unix::net::{UnixDatagram, UnixListener};
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(200));
        fs::create_dir(&long).unwrap();
        let [stream, datagram, file] = ["stream", "datagram", "file"].map(|it| dir.path().join(it));
        assert!(!is_somebodys(&stream));
        let listens = UnixListener::bind(&stream).unwrap();
        listens.set_nonblocking(true).unwrap();
        let hears = UnixDatagram::bind(&datagram).unwrap();
        fs::write(&file, "").unwrap();
        fs::rename(&stream, long.join("stream")).unwrap();
        let stream = long.join("stream");
        std::os::unix::fs::symlink(&stream, dir.path().join("link")).unwrap();
        assert!(is_somebodys(&stream) && is_somebodys(&datagram));
        assert!(!is_somebodys(&file) && !is_somebodys(&dir.path().join("link")));
        assert!(listens.accept().is_err(), "it has heard of it");
        drop((listens, hears));
        assert!(!is_somebodys(&stream) && !is_somebodys(&datagram));
    }

    #[test]
    fn root_user_takes_what_its_capabilities_let_it() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("sock");
        fs::write(&name, "").unwrap();
        std::os::unix::fs::chown(dir.path(), Some(5), Some(5)).unwrap();
        std::os::unix::fs::chown(&name, Some(6), Some(6)).unwrap();
        let with = |capabilities| Allowance {
            capabilities,
            ..user(0, &[0])
        };
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(!may_bind(&name, &with(FOWNER)));
        assert!(may_bind(&name, &with(DAC_OVERRIDE)));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1755)).unwrap();
        assert!(!may_bind(&name, &with(DAC_OVERRIDE)));
        assert!(may_bind(&name, &with(DAC_OVERRIDE.with(FOWNER))));
    }

    #[test]
    fn ids_are_those_of_the_user_namespace_too() {
        let mut shifted = user(0, &[0]);
        shifted.id_mappings.uids = vec![(0, 100_000, 65536)];
        let of = User::of(&shifted);
        assert!(of.is(0) && of.is(100_000) && !of.is(1000));
    }
}
