//! Checkpoints by which CRIU would change, as root, what others have: files and sockets in a volume, by terminals and
//! sockets of the images, and the node itself, by the rules of a network that it makes.

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, PodSecurity, Testbed, Tree};

use crate::Case;
use crate::admission::{PLAIN, RESTORE, STORE, checkpoint, forge, keep_honest, prepared, refused};
use crate::crun::node_with_crun;
use crate::forged_files::SOCKETS;
use crate::forged_names::HELP;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    // crit is in this tree alone.
    let on_forky = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        on_forky("pod_volumes_forged", forged_owners_are_refused),
        on_forky("rules_forged", forged_rules_are_refused),
    ]
    .into_iter()
}

/// A virtual terminal, of which CRIU knows nothing but the name.
const TERMINAL: &str = r"
modes = {'c_iflag': 0, 'c_oflag': 0, 'c_cflag': 0, 'c_lflag': 0, 'c_line': 0, 'c_ispeed': 0, 'c_ospeed': 0, 'c_cc': [0] * 19}
def terminal(name, mode, flags='0x2', mount='/cache', file=61):
    named = {'regf_id': file} if file != 60 else {}
    file = reg(file, name, flags, mount); file['reg']['mode'] = mode
    add('files.img', 'FILES', [file])
    add('tty-info.img', 'TTY_INFO', [{'id': 99, 'type': 'VT', 'locked': False, 'exclusive': False, 'packet_mode': False,
        'termios': modes, 'termios_locked': modes, 'winsize': {'ws_row': 24, 'ws_col': 80, 'ws_xpixel': 0, 'ws_ypixel': 0},
        'sid': 0, 'pgrp': 0, 'rdev': 0x405, 'dev': 5, 'uid': 0, 'gid': 0}])
    open_as('TTY', 'tty', {'tty_info_id': 99, 'flags': flags, 'fown': owner, **named})
def part_of_dev():
    def shown(t):
        dev, old = one(t, '/dev'), one(t, '/dev/shm')
        new = dict(dev, mnt_id=old['mnt_id'], parent_mnt_id=dev['mnt_id'], mountpoint='/dev/shm', root='/shm')
        new['flags'] = hex(int(str(dev['flags']), 0) | 0xe)
        return [e for e in t if e['mountpoint'] != '/dev/shm'] + [new]
    table(shown)
def link_for_all(name, target):
    import io, tarfile
    device = one(entries(glob.glob(im + '/mountpoints-*.img')[0])['entries'], '/dev')['root_dev']
    f = im + '/tmpfs-dev-%d.tar.gz.img' % device
    old = tarfile.open(f); members = [(m, old.extractfile(m).read() if m.isreg() else None) for m in old]
    link = tarfile.TarInfo('./harmless'); link.type = tarfile.SYMTYPE; link.linkname = target
    os.remove(f)
    with tarfile.open(f, 'w:gz', format=tarfile.PAX_FORMAT, pax_headers={'path': './' + name}) as new:
        new.addfile(link)
        new.fileobj.write(link.create_pax_global_header({'comment': 'x'})); new.offset = new.fileobj.tell()
        for m, data in members: new.addfile(m, io.BytesIO(data) if data is not None else None)
def hides_link(name, target):
    import io, tarfile
    device = one(entries(glob.glob(im + '/mountpoints-*.img')[0])['entries'], '/dev')['root_dev']
    f = im + '/tmpfs-dev-%d.tar.gz.img' % device
    old = tarfile.open(f); members = [(m, old.extractfile(m).read() if m.isreg() else None) for m in old]
    link = tarfile.TarInfo('./' + name); link.type = tarfile.SYMTYPE; link.linkname = target
    header = bytearray(link.tobuf(tarfile.GNU_FORMAT)); header[345:348] = b'zzz'; header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header[:512])
    os.remove(f)
    with tarfile.open(f, 'w:gz', format=tarfile.GNU_FORMAT) as new:
        for m, data in members: new.addfile(m, io.BytesIO(data) if data is not None else None)
        new.fileobj.write(header); new.offset += len(header)
def socket(name):
    unix(); [e['usk'].update(name=name + '\0', file_perms={'mode': 0o140777, 'uid': 0, 'gid': 0}) for e in edit('files.img')
             if e['type'] == 'UNIXSK' and e['id'] == 60]
";

/// What is forged, and what is said of it.
const FORGERIES: &[(&str, &str)] = &[
    // Who made it would have a program of root's with a set-user-id bit.
    (
        "terminal('/cache/theirs/tool', 0o104755)",
        "\"/cache/theirs/tool\", which would be a terminal",
    ),
    (
        "terminal('/cache/theirs/precious', 0o100666)",
        "\"/cache/theirs/precious\", which would be a terminal",
    ),
    (
        "terminal('/cache/theirs/precious', 0o100600, '0x202')",
        "\"/cache/theirs/precious\", which is to be made or emptied when it is opened",
    ),
    (
        "link_in_dev('evil', '/proc/self/fd/121/1/root/root/secret')
         terminal('/dev/evil', 0o100666, mount='/dev')",
        "\"/dev/evil\", whose name leads through a symbolic link",
    ),
    // The entry names no file: CRIU takes one of its own number.
    (
        "terminal('/cache/theirs/tool', 0o104755, file=60)",
        "\"/cache/theirs/tool\", which would be a terminal",
    ),
    // The link has another name in the archive than in the mount, of which a part is shown.
    (
        "part_of_dev(); link_in_dev('shm/evil', '/proc/self/fd/121/1/root/root/secret')
         terminal('/dev/shm/evil', 0o100666, mount='/dev/shm')",
        "\"/dev/shm/evil\", whose name leads through a symbolic link",
    ),
    // GNU tar gives every member the name that a header for all says.
    (
        "link_for_all('evil', '/proc/self/fd/121/1/root/root/secret')
         terminal('/dev/evil', 0o100666, mount='/dev')",
        "to which or to whose place a symbolic link leads",
    ),
    // tar follows a link that it has just made, and gives what is below it another name.
    (
        "link_in_dev('d', '.'); link_in_dev('d/evil', '/proc/self/fd/121/1/root/root/secret')
         terminal('/dev/evil', 0o100666, mount='/dev')",
        "to which or to whose place a symbolic link leads",
    ),
    // Without a prefix for GNU tar, and in another directory for readers of Go's kind.
    (
        "hides_link('evil', '/proc/self/fd/121/1/root/root/secret')
         terminal('/dev/evil', 0o100666, mount='/dev')",
        "to which or to whose place a symbolic link leads",
    ),
    (
        "socket('/cache/theirs/server')",
        "\"/cache/theirs/server\", which is a socket",
    ),
    (
        "socket('/cache/theirs/new')",
        "\"/cache/theirs/new\", which is a socket",
    ),
];

fn forged_owners_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    // A terminal of its own.
    let command = "exec 3<>/dev/ptmx; exec tail -f /dev/null";
    let container = PodContainer {
        command: &["/bin/sh", "-c", command],
        security: PodSecurity {
            dropped: &["ALL"],
            ..PodSecurity::NONE
        },
        ..PLAIN
    };
    let states = "cd /var/lib/cache/theirs; stat -c '%n %u %a %s' * /root/secret";
    node.shell(
        "echo secret >/root/secret; chmod 600 /root/secret; cd /var/lib/cache; mkdir own theirs; cd theirs
         echo precious >precious; echo tool >tool; chmod 700 *; chown -R 5:5 .
         python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"server\")'; chown 5 server",
    )
    .run()?;
    let before = node.shell(states).read()?;
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    let mut let_in = Vec::new();
    for (forgery, said) in FORGERIES {
        let forged = forge(&node, &format!("{HELP}{SOCKETS}{TERMINAL}{forgery}"));
        forged.with_context(|| (*forgery).to_owned())?;
        let answer = refused(&node, &cri, &container, said);
        let after = node.shell(states).read()?;
        if answer.is_err() || after != before {
            let said = answer
                .err()
                .map_or_else(String::new, |it| format!("{it:#}"));
            let_in.push(format!("{forgery}: {said} {after}"));
        }
    }
    ensure!(let_in.is_empty(), "{}", let_in.join("\n"));
    // Where it could bind one itself, and without a forgery.
    for statements in [
        format!("{HELP}{SOCKETS}{TERMINAL}socket('/cache/own/socket')"),
        String::new(),
    ] {
        forge(&node, &statements)?;
        let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
        let id = cri.run_container(&pod, &container)?;
        ensure!(cri.runs(&id)?, "it runs");
        cri.remove_pod(&pod)?;
    }
    let mut bound = node.shell("stat -c '%F %u' /var/lib/cache/own/socket");
    let bound = bound.read()?;
    ensure!(bound == "socket 0\n", "{bound}");
    Ok(())
}

/// A network that CRIU makes, as with crun: what its images say goes to the tools of the node.
fn forged_rules_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_crun(bed)?;
    node.shell(&format!(
        r#"mkdir -p /root/b/rootfs/bin {STORE}/honest/first; cd /root/b
           cp /bin/busybox rootfs/bin/; runc spec
           sed -i 's/"terminal": true/"terminal": false/; s/"readonly": true/"readonly": false/; s/"sh"/"\/bin\/busybox", "tail", "-f", "\/dev\/null"/' config.json
           python3 -c 'import json
c = json.load(open("config.json")); c["linux"].pop("maskedPaths"); c["linux"].pop("readonlyPaths"); json.dump(c, open("config.json", "w"))'
           crun run --detach web </dev/null >/dev/null 2>&1
           crun checkpoint --work-path /root --image-path {STORE}/honest/first/checkpoint web
           echo '{{"containers":[{{"files":[]}}]}}' >{STORE}/honest/transship.json"#
    ))
    .run()?;
    let restore = format!(
        "cd /root; rm -f said; transship-crun --log /root/said restore --detach --pid-file /root/pid \
         --image-path {STORE}/web/first/checkpoint --work-path /root --bundle /root/b web </dev/null >/dev/null 2>&1"
    );
    let rules = |tool: &str, text: &str| {
        let text = text.replace('\'', "\\'").replace('\n', "\\n");
        format!(
            "f = glob.glob(im + '/{tool}-*.img')[0]; os.remove(f); open(f, 'w').write('{text}')"
        )
    };
    let takes_the_network = "which take CAP_NET_ADMIN to set";
    let is_none = "something else than the rules that iptables and nft print";
    for (forgery, said) in [
        (
            rules(
                "nftables",
                "table ip x {\n\tchain y {\n\t\ttcp dport 77 drop\n\t}\n}\n",
            ),
            takes_the_network,
        ),
        (
            rules(
                "iptables",
                "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j DROP\nCOMMIT\n",
            ),
            takes_the_network,
        ),
        (rules("nftables", "include \"/etc/shadow\"\n"), is_none),
        (
            rules(
                "ip6tables",
                "*filter\n-A INPUT --modprobe=/root/evil -j DROP\nCOMMIT\n",
            ),
            is_none,
        ),
    ] {
        forge(&node, &forgery).with_context(|| forgery.clone())?;
        let answer = node.shell(&restore).output()?;
        let said_then = node.shell("cat /root/said").read()?;
        ensure!(
            !answer.status.success() && said_then.contains(said),
            "{forgery}: {said_then}"
        );
    }
    Ok(())
}
