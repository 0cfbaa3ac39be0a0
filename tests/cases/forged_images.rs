//! Checkpoints whose images lead CRIU, which is root of the node, to files and sockets by other ways than the names of
//! open files: deleted files that it makes again, watches, what is on its way from one process to another.

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, PodSecurity, Testbed, Tree};

use crate::Case;
use crate::admission::{CACHE, PLAIN, RESTORE, checkpoint, forge, keep_honest, prepared};
use crate::forged_files::SOCKETS;
use crate::forged_names::HELP;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    // crit is in this tree alone.
    [Case {
        what: "pod_images_forged",
        tree: Tree::Forky,
        run: forged_images_are_refused,
    }]
    .into_iter()
}

const VOLUME: &[(&str, &str)] = &[("/var/lib/vol", "/vol")];

/// What a container may have itself: deleted files of all kinds, and a directory.
const DELETED: &str = "set -e; mkfifo /vol/f; exec 5<>/vol/f; rm /vol/f
    echo gone >/vol/r; exec 6<>/vol/r; rm /vol/r
    mkdir /vol/d; cd /vol/d; rmdir /vol/d; exec tail -f /dev/null";

const IMAGES: &str = r"
import ctypes, stat
def ghost(mount='/vol', name='/vol/gone', mode=0o100644, uid=0, gid=0, flags='0x0', **more):
    add('files.img', 'FILES', [reg(50, name, flags, mount=mount)])
    table_of_files = os.path.basename(glob.glob(im + '/fdinfo-*.img')[0])
    add(table_of_files, 'FDINFO', [{'id': 50, 'flags': 0, 'type': 'REG', 'fd': 77}])
    add('remap-fpath.img', 'REMAP_FPATH', [{'orig_id': 50, 'remap_id': 11, 'remap_type': 'GHOST'}])
    save(im + '/ghost-file-b.img', {'magic': 'GHOST_FILE', 'entries': [
        {'uid': uid, 'gid': gid, 'mode': mode, 'dev': 7, 'ino': 7, 'extra': '', **more}]})
def save(f, j):
    json.dump(j, open('/root/forged.json', 'w'))
    if os.path.exists(f): os.remove(f)
    subprocess.run(['crit', 'encode', '-i', '/root/forged.json', '-o', f], check=True)
def watches(mount='/vol', path=None, file='/var/lib/vol'):
    class Handle(ctypes.Structure): _fields_ = [('bytes', ctypes.c_uint), ('type', ctypes.c_int), ('data', ctypes.c_ubyte * 128)]
    handle, id = Handle(128), ctypes.c_int()
    if ctypes.CDLL(None, use_errno=True).name_to_handle_at(-100, file.encode(), ctypes.byref(handle), ctypes.byref(id), 0):
        handle.bytes, handle.type = 8, 1
    data = bytes(handle.data)
    words = [int.from_bytes(data[8 * n:8 * n + 8], 'little') for n in range(16)]
    f_handle = {'bytes': handle.bytes, 'type': handle.type, 'handle': words}
    table = entries(glob.glob(im + '/mountpoints-*.img')[0])['entries']
    if path: f_handle.update(path=path, mnt_id=one(table, mount)['mnt_id'])
    open_as('INOTIFY', 'ify', {'flags': '0x0', 'fown': owner, 'wd': [{'id': 60, 'i_ino': 2, 'mask': '0x2', 'ignored_mask': '0x0',
        's_dev': one(table, mount)['root_dev'], 'wd': 1, 'f_handle': f_handle}]})
def socket(id, ino, peer, fd, **more):
    fields = {'id': id, 'ino': ino, 'type': 'DGRAM', 'state': 'CLOSE', 'flags': '0x2', 'uflags': '0x0', 'backlog': 0,
              'peer': peer, 'fown': owner, 'opts': options(), 'name': '', 'ns_id': network(), **more}
    add('files.img', 'FILES', [{'type': 'UNIXSK', 'id': id, 'usk': fields}])
    table_of_files = os.path.basename(glob.glob(im + '/fdinfo-*.img')[0])
    if fd: add(table_of_files, 'FDINFO', [{'id': id, 'flags': 0, 'type': 'UNIXSK', 'fd': fd}])
def sends(name):
    add('files.img', 'FILES', [reg(50, name)])
    socket(60, 60, 61, 78); socket(61, 61, 60, 79)
    add('sk-queues.img', 'SK_QUEUES', [{'id_for': 61, 'length': 1, 'scm': [{'type': 1, 'rights': [50]}], 'extra': 'YQ==\n'}])
def own_network(messages):
    for e in edit('netns-*.img'):
        e.pop('ext_key')
    n = network()
    open(f'{im}/route-{n}.img', 'wb').write((0x45311224).to_bytes(4, 'little') + messages)
";

/// What is forged, and what is said of it.
const FORGERIES: &[(&str, &str)] = &[
    // CRIU sees what is before the NUL.
    (
        "opens('/vol/kept\\0x')",
        "files.img has a name with a NUL",
    ),
    (
        "for e in edit('cgroup.img'):
             for c in e['controllers']: c['dirs'][0]['properties'] = [{'name': 'x\\0', 'value': ''}]",
        "cgroup.img has a name with a NUL",
    ),
    (
        "table(lambda t: [e.update(source='x\\0y') or e for e in t])",
        "has a name with a NUL",
    ),
    // It makes a file that was deleted again, on a mount that it makes writable for that.
    (
        "ghost('/cache', '/cache/gone')",
        "\"/cache/gone\", to be made again on a mount that is read-only",
    ),
    (
        "ghost(mode=stat.S_IFCHR | 0o666, rdev=259)",
        "\"/vol/gone\", to be made again as a device",
    ),
    (
        "ghost(mode=0o104755)",
        "\"/vol/gone\", to be made again with a set-user-id or set-group-id bit",
    ),
    (
        "ghost(uid=7)",
        "has the user id 7",
    ),
    (
        "ghost(gid=7)",
        "has the group id 7",
    ),
    (
        "ghost(mode=stat.S_IFLNK | 0o777, symlnk_target='/vol/kept')",
        "\"/vol/gone\", to be made again as a symbolic link that is followed",
    ),
    // What is sent and not yet received shows in no process.
    (
        "sends('/vol/kept')",
        "\"/vol/kept\", which is sent to a socket and which no process has open",
    ),
    // A table of open files that no process has says nothing.
    (
        "link_in_dev('evil', '/proc/self/fd/121/1/root/root/secret'); sends('/dev/evil')
add('fdinfo-999.img', 'FDINFO', [{'id': 50, 'flags': 0, 'type': 'REG', 'fd': 77}])",
        "\"/dev/evil\", which is sent to a socket and which no process has open",
    ),
    // The name by which CRIU finds a file it removes.
    (
        "removes('/vol', '/vol/gone', '/vol/kept')",
        "\"/vol/kept\", to be removed, and it is no link that CRIU has made",
    ),
    // Watches of files that are no mount's.
    (
        "watches(file='/var/lib/cache')",
        "watches a file that has no name",
    ),
    (
        "watches(path='/proc/self/fd/121/1/root/root/secret')",
        "whose name leads out of the container",
    ),
    (
        "link_in_dev('evil', '/proc/self/fd/121/1/root/var/lib'); watches(mount='/dev', path='/dev/evil')",
        "\"/dev/evil\", whose name leads through a symbolic link",
    ),
    // Sockets of other programs.
    (
        "socket(60, 60, 0, 78, uflags='0x1')",
        "a unix socket that is of another program",
    ),
    (
        "socket(60, 60, 0, 78, uflags='0x2')",
        "a unix socket that is of another program",
    ),
    (
        "socket(60, 60, 61, 78); socket(61, 61, 0, None, name='/vol/listens\\0', state='CLOSE')",
        "a unix socket that is of another program",
    ),
    (
        "socket(60, 60, 0, 78, name='/vol/made\\0', file_perms={'mode': stat.S_IFSOCK | 0o666, 'uid': 7, 'gid': 0})",
        "has the user id 7",
    ),
    // In a network of its own CRIU would send whatever it is given to the kernel.
    (
        "own_network(b'')",
        "is not in the container's network namespace",
    ),
    (
        "n = network(); open(f'{im}/rule-{n}.img', 'wb').write((0x71706986).to_bytes(4, 'little') + bytes([20, 0, 0, 0, 16] + [0] * 15))",
        "has something else than addresses, routes and rules",
    ),
];

fn forged_images_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        command: &["/bin/sh", "-c", DELETED],
        mounts: VOLUME,
        read_only_mounts: CACHE,
        security: PodSecurity {
            dropped: &["ALL"],
            ..PodSecurity::NONE
        },
        ..PLAIN
    };
    node.shell(
        "mkdir -p /var/lib/vol; echo kept >/var/lib/vol/kept; echo secret >/root/secret
         python3 -c 'import socket, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(\"/var/lib/vol/listens\"); time.sleep(3600)' >/dev/null 2>&1 &
         while [ ! -S /var/lib/vol/listens ]; do sleep 0.1; done",
    )
    .run()?;
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    let mut wrong = Vec::new();
    for (forgery, said) in FORGERIES {
        let what = || (*forgery).to_owned();
        forge(&node, &format!("{HELP}{SOCKETS}{IMAGES}{forgery}")).with_context(what)?;
        let pod = cri.run_pod(("shop", "thief"), &[RESTORE], PodNamespaces::Usual)?;
        let answer = cri.run_container(&pod, &container);
        cri.remove_pod(&pod)?;
        match answer {
            Ok(_) => wrong.push(format!("{forgery}: restored, and it should say {said:?}")),
            Err(error) => {
                let error = error.to_string().replace('\\', "");
                if !error.contains(said) {
                    wrong.push(format!("{forgery}: {error:?} does not say {said:?}"));
                }
            }
        }
        transship_testbed::journey::check_no_pod_left(&node).with_context(what)?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let left = node
        .shell("cat /var/lib/vol/kept; ls /var/lib/vol")
        .read()?;
    ensure!(left == "kept\nkept\nlistens\n", "{left}");
    // What a container may do itself is no forgery.
    for honest in [
        "",
        "ghost()",
        "watches(path='/vol/kept')",
        "socket(60, 60, 0, 78, name='/vol/made\\0', file_perms={'mode': stat.S_IFSOCK | 0o666, 'uid': 0, 'gid': 0})",
    ] {
        forge(&node, &format!("{HELP}{SOCKETS}{IMAGES}{honest}"))?;
        let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
        cri.run_container(&pod, &container).context(honest)?;
        cri.remove_pod(&pod)?;
    }
    Ok(())
}
