//! Checkpoints whose names lead out of the container: to files of the node, which CRIU opens, makes and removes as
//! root, and to directories of the node, which it mounts.

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, PodSecurity, Testbed, Tree};

use crate::Case;
use crate::admission::{CACHE, PLAIN, RESTORE, checkpoint, forge, keep_honest, prepared, refused};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let on_forky = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        // crit is in this tree alone.
        on_forky("pod_names_forged", forged_names_are_refused),
    ]
    .into_iter()
    .chain(Case::on_all_trees(
        "pod_names_swapped",
        swapped_names_are_refused,
    ))
}

/// What is forged, and what is said of it.
const FORGERIES: &[(&str, &str)] = &[
    // CRIU walks the part of a file system that is bind mounted in the tree of the node.
    (
        "part('mqueue', '/../../../../../../root', 0)",
        "\"/data/keep\", of which it shows what is no plain path",
    ),
    (
        "part('tmpfs', '/../../../../../../root', 1)",
        "\"/data/keep\", of which it shows what is no plain path",
    ),
    // A mount of the device of a volume is that volume, with flags of its own.
    (
        "table(lambda t: [e.update({k: one(t, '/cache')[k] for k in ('root_dev', 'root', 'options')}) or e
                          if e['mountpoint'] == '/dev/mqueue' else e for e in t])",
        "\"/dev/mqueue\", which is that of /cache",
    ),
    // By a flag mount(2) binds a directory of the node instead of making a file system.
    (
        "table(lambda t: [e.update(sb_flags='0x1000', source='/root') or e if e['mountpoint'] == '/dev/mqueue' else e for e in t])",
        "\"/dev/mqueue\", with the flags 0x1000 of mount(2)",
    ),
    // Through links in a file system that CRIU has filled: to what is mounted, and to where it is mounted.
    (
        "link_in_dev('evil', '/root')
         table(lambda t: t + [dict(one(t, '/dev'), mnt_id=9999, parent_mnt_id=one(t, '/dev')['mnt_id'], mountpoint='/dev/evil/x',
                                   root='/evil/x', flags=hex(int(str(one(t, '/dev')['flags']), 0) | 1))])",
        "\"/dev/evil/x\", to which or to whose place a symbolic link leads",
    ),
    (
        "link_in_dev('evil', '../../../../../root')
         table(lambda t: [e.update(mountpoint='/dev/evil') or e if e['mountpoint'] == '/dev/mqueue' else e for e in t])",
        "\"/dev/evil\", to which or to whose place a symbolic link leads",
    ),
    (
        "table(lambda t: [e.update(mountpoint='/proc/self/root/root') or e if e['mountpoint'] == '/dev/mqueue' else e for e in t])",
        "\"/proc/self/root/root\", ",
    ),
    // CRIU's descriptors: its images, and the node's /proc.
    (
        "opens('/proc/self/fd/126/../../../../../../../../../root/secret')",
        "whose name leads out of the container",
    ),
    (
        "opens('/dev/fd/126/../../../../../../../../../root/secret')",
        "whose name leads out of the container",
    ),
    (
        "opens('/proc/self/fd/121/1/root/root/secret')",
        "whose name leads out of the container",
    ),
    // Through links in a file system that CRIU makes. The last one is seen when it has been followed.
    (
        "opens('/dev/fd/121/1/root/root/secret')",
        "whose name leads through a symbolic link",
    ),
    (
        "link_in_dev('evil', '/proc/self/fd/121/1/root/root/secret'); opens('/dev/evil')",
        "\"/root/secret\" open, which is not in its mounts",
    ),
    // Of these the kernel asks who has opened them, and that would be CRIU.
    (
        "opens('/proc/kmsg')",
        "\"/proc/kmsg\" open, which takes CAP_SYSLOG",
    ),
    (
        "opens('/proc/1/pagemap')",
        "/pagemap\" open, which takes CAP_SYS_ADMIN",
    ),
    (
        "link_in_dev('evil', '/proc/kallsyms'); opens('/dev/evil')",
        "\"/proc/kallsyms\" open, which takes CAP_SYSLOG",
    ),
    (
        "opens('/data/keep/a', '0x200')",
        "which is to be made or emptied when it is opened",
    ),
    // A file that is found by the name of another one is removed by that name.
    (
        "removes('/', '/data/keep/a', '/../../../../../../root/secret')",
        "whose name leads out of the container",
    ),
    (
        "removes('/cache', '/cache/a', '/cache/precious')",
        "\"/cache/a\", to be removed from a mount that is read-only",
    ),
    // What only root may: memory that a pointer leads to which the kernel has not set.
    (
        "for e in edit('mm-1.img'):
             low = dict(e['vmas'][0], start='0x0', end='0x1000', pgoff=0, shmid=0, fd=-1, prot='PROT_READ | PROT_WRITE')
             low.update(flags='MAP_PRIVATE | MAP_ANON', status='VMA_AREA_REGULAR | VMA_ANON_PRIVATE')
             e['vmas'].insert(0, low)",
        "memory at the address 0x0",
    ),
];

pub(crate) const HELP: &str = r#"
def entries(f):
    return json.loads(subprocess.run(['crit', 'decode', '-i', f], capture_output=True, check=True, text=True).stdout)
def add(f, magic, more):
    f = im + '/' + f
    if not os.path.exists(f): open(f, 'w').close(); j = {'magic': magic, 'entries': []}
    else: j = entries(f)
    j['entries'] += more
    save(f, j)
def one(t, mountpoint):
    return [e for e in t if e['mountpoint'] == mountpoint][0]
def part(of, root, read_only):
    def change(t):
        new = dict(one(t, {'mqueue': '/dev/mqueue', 'tmpfs': '/dev'}[of]))
        new.update(mnt_id=9999, parent_mnt_id=one(t, '/')['mnt_id'], mountpoint='/data/keep', root=root)
        new['flags'] = hex(int(str(new['flags']), 0) | read_only)
        return t + [new]
    table(change)
def reg(id, name, flags='0x0', mount='/'):
    mount = one(entries(glob.glob(im + '/mountpoints-*.img')[0])['entries'], mount)['mnt_id']
    owner = {'uid': 0, 'euid': 0, 'signum': 0, 'pid_type': 0, 'pid': 0}
    return {'type': 'REG', 'id': id, 'reg': {'id': id, 'flags': flags, 'pos': 0, 'fown': owner, 'name': name, 'mnt_id': mount}}
def opens(name, flags='0x0'):
    add('files.img', 'FILES', [reg(50, name, flags)])
    table_of_files = os.path.basename(glob.glob(im + '/fdinfo-*.img')[0])
    add(table_of_files, 'FDINFO', [{'id': 50, 'flags': 0, 'type': 'REG', 'fd': 77}])
def link_in_dev(name, target):
    import io, tarfile
    device = one(entries(glob.glob(im + '/mountpoints-*.img')[0])['entries'], '/dev')['root_dev']
    f = im + '/tmpfs-dev-%d.tar.gz.img' % device
    old = tarfile.open(f); members = [(m, old.extractfile(m).read() if m.isreg() else None) for m in old]
    link = tarfile.TarInfo('./' + name); link.type = tarfile.SYMTYPE; link.linkname = target
    os.remove(f)
    with tarfile.open(f, 'w:gz', format=tarfile.GNU_FORMAT) as new:
        for m, data in members + [(link, None)]: new.addfile(m, io.BytesIO(data) if data is not None else None)
def removes(mount, name, by):
    add('files.img', 'FILES', [reg(50, name, mount=mount), reg(51, by, mount=mount)])
    add('remap-fpath.img', 'REMAP_FPATH', [{'orig_id': 50, 'remap_id': 51, 'remap_type': 'LINKED'}])
"#;

fn forged_names_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        mounts: &[],
        read_only_mounts: CACHE,
        ..PLAIN
    };
    node.shell("echo secret >/root/secret; echo precious >/var/lib/cache/precious")
        .run()?;
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    for (forgery, said) in FORGERIES {
        let forged = forge(&node, &format!("{HELP}{forgery}"));
        forged.with_context(|| (*forgery).to_owned())?;
        refused(&node, &cri, &container, said).with_context(|| (*forgery).to_owned())?;
    }
    let mut left = node.shell("cat /root/secret /var/lib/cache/precious; ls /var/lib/cache");
    let left = left.read()?;
    ensure!(left == "secret\nprecious\nprecious\n", "{left}");
    // The same without a forgery.
    forge(&node, "")?;
    let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
    cri.run_container(&pod, &container)?;
    Ok(cri.remove_pod(&pod)?)
}

/// Nothing is forged: a process has changed a directory of a file that it has open, or a volume is changed before
/// the restore.
fn swapped_names_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    node.shell("mkdir -p /srv/trap; echo hi >/srv/trap/kept; touch -d @1 /srv/trap")
        .run()?;
    let volume = "mkdir /cache/d; echo hi >/cache/d/kept; exec 5</cache/d/kept; tail -f /dev/null";
    let ghost = "mkdir /data/d; echo hi >/data/d/x; exec 5</data/d/x; rm -r /data/d
                 ln -s /srv/trap /data/d; tail -f /dev/null";
    for (what, command, swap) in [
        (
            "a volume",
            volume,
            "rm -r /var/lib/cache/d; ln -s /srv/trap /var/lib/cache/d",
        ),
        ("a ghost", ghost, "true"),
    ] {
        let container = PodContainer {
            command: &["/bin/sh", "-c", command],
            security: PodSecurity::NONE,
            ..PLAIN
        };
        checkpoint(&node, &cri, &container).context(what)?;
        node.shell(swap).run()?;
        let said = "whose name leads through a symbolic link";
        refused(&node, &cri, &container, said).context(what)?;
    }
    let changed = node.shell("stat -c %Y /srv/trap").read()?;
    ensure!(changed == "1\n", "{changed}");
    Ok(())
}
