//! Checkpoints with open files, timers and memory that are what a process without capabilities cannot make of them: CRIU
//! has them all.

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Cri, Node, PodContainer, PodNamespaces, PodSecurity, Testbed, Tree,
};

use crate::Case;
use crate::admission::{PLAIN, RESTORE, checkpoint, forge, keep_honest, prepared};
use crate::forged_names::HELP;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    // crit is in this tree alone.
    [Case {
        what: "pod_files_forged",
        tree: Tree::Forky,
        run: forged_files_are_refused,
    }]
    .into_iter()
}

pub(crate) const SOCKETS: &str = r"
owner = {'uid': 0, 'euid': 0, 'signum': 0, 'pid_type': 0, 'pid': 0}
def open_as(kind, name, fields):
    add('files.img', 'FILES', [{'type': kind, 'id': 60, name: {'id': 60, **fields}}])
    table_of_files = os.path.basename(glob.glob(im + '/fdinfo-*.img')[0])
    add(table_of_files, 'FDINFO', [{'id': 60, 'flags': 0, 'type': kind, 'fd': 78}])
def options(**more):
    return {'so_sndbuf': 212992, 'so_rcvbuf': 212992, 'so_snd_tmo_sec': 0, 'so_snd_tmo_usec': 0,
            'so_rcv_tmo_sec': 0, 'so_rcv_tmo_usec': 0, **more}
def network(): return [e for e in edit('ids-*.img')][0]['net_ns_id']
def inet(kind='DGRAM', proto='UDP', state='CLOSE', port=0, ip_opts={}, **more):
    open_as('INETSK', 'isk', {'ino': 60, 'family': 'INET', 'type': kind, 'proto': proto, 'state': state,
            'src_port': port, 'dst_port': 0, 'flags': '0x2', 'backlog': 1 if state == 'LISTEN' else 0,
            'src_addr': ['0.0.0.0'], 'dst_addr': ['0.0.0.0'], 'fown': owner, 'opts': options(**more),
            'ns_id': network(), 'ip_opts': ip_opts})
def unix(**more):
    open_as('UNIXSK', 'usk', {'ino': 60, 'type': 'DGRAM', 'state': 'CLOSE', 'flags': '0x2', 'uflags': '0x0', 'backlog': 0,
            'peer': 0, 'fown': owner, 'opts': options(**more), 'name': '', 'ns_id': network()})
def counter(owner):
    open_as('EVENTFD', 'efd', {'flags': 2, 'fown': owner, 'counter': 0})
def timer(clock):
    for e in edit('core-*.img'):
        e['tc']['timers']['posix'] = [{'it_id': 0, 'clock_id': clock, 'si_signo': 14, 'it_sigev_notify': 1, 'sival_ptr': 0,
            'overrun': 0, 'isec': 0, 'insec': 0, 'vsec': 1000, 'vnsec': 0}]
def locked(length):
    for e in edit('mm-*.img'):
        e['vmas'].insert(0, {**e['vmas'][0], 'start': '0x7000000000', 'end': hex(0x7000000000 + length), 'pgoff': 0, 'shmid': 0,
            'prot': 'PROT_READ | PROT_WRITE', 'flags': 'MAP_PRIVATE | MAP_ANON | 0x2000',
            'status': 'VMA_AREA_REGULAR | VMA_ANON_PRIVATE'})
        e['vmas'].sort(key=lambda vma: int(str(vma['start']), 0))
def epoll(events):
    open_as('EVENTPOLL', 'epfd', {'flags': 2, 'fown': owner, 'tfd': [{'id': 60, 'tfd': 79, 'events': events, 'data': 0}]})
    add('files.img', 'FILES', [{'type': 'EVENTFD', 'id': 61, 'efd': {'id': 61, 'flags': 2, 'fown': owner, 'counter': 0}}])
    table_of_files = os.path.basename(glob.glob(im + '/fdinfo-*.img')[0])
    add(table_of_files, 'FDINFO', [{'id': 61, 'flags': 0, 'type': 'EVENTFD', 'fd': 79}])
def pipe(size):
    open_as('PIPE', 'pipe', {'pipe_id': 60, 'flags': '0x1', 'fown': owner})
    add('pipes-data.img', 'PIPES_DATA', [{'pipe_id': 60, 'bytes': 0, 'size': size, 'extra': ''}])
def login(uid):
    for e in edit('core-*.img'):
        e['tc']['loginuid'] = uid
";

/// What is forged, and what is said of it.
const FORGERIES: &[(&str, &str)] = &[
    ("unix(so_mark=7)", "a socket with a mark"),
    ("inet(so_priority=7)", "a socket with a priority above 6"),
    (
        "inet('STREAM', 'TCP', 'LISTEN', 80)",
        "a socket at the port 80, which takes CAP_NET_BIND_SERVICE below 1024",
    ),
    (
        "counter({**owner, 'signum': 9, 'pid_type': 1, 'pid': 1, 'uid': 7, 'euid': 7})",
        "has the user id 7",
    ),
    (
        "timer(8)",
        "a timer that wakes the node (CLOCK_REALTIME_ALARM",
    ),
    (
        "timer(9)",
        "a timer that wakes the node (CLOCK_REALTIME_ALARM",
    ),
    (
        "epoll(1 << 29 | 1)",
        "an epoll that keeps the node awake (EPOLLWAKEUP) open, which takes CAP_BLOCK_SUSPEND",
    ),
    (
        "pipe(1 << 24)",
        "a pipe that is larger than this node allows (fs.pipe-max-size) open, which takes CAP_SYS_RESOURCE",
    ),
    (
        "locked(64 << 20)",
        "has locked 67108864 bytes of memory, of which",
    ),
];

/// The networks of pods, as those are whose ports are not free.
const LOW_PORTS: &str = "for it in /run/netns/*; do nsenter --net=$it sysctl -qw net.ipv4.ip_unprivileged_port_start=PORT; done";

fn forged_files_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let security = PodSecurity {
        dropped: &["ALL"],
        ..PodSecurity::NONE
    };
    let container = PodContainer {
        command: &["/bin/sh", "-c", "exec tail -f /dev/null"],
        security,
        ..PLAIN
    };
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    for (forgery, said) in FORGERIES {
        let what = || (*forgery).to_owned();
        forge(&node, &format!("{HELP}{SOCKETS}{forgery}")).with_context(what)?;
        let pod = cri.run_pod(("shop", "thief"), &[RESTORE], PodNamespaces::Usual)?;
        node.shell(&LOW_PORTS.replace("PORT", "1024")).run()?;
        let answer = cri.run_container(&pod, &container);
        cri.remove_pod(&pod)?;
        let Err(error) = answer else {
            anyhow::bail!("{forgery}: restored, and it should say {said:?}");
        };
        let error = error.to_string().replace('\\', "");
        ensure!(error.contains(said), "{error:?} does not say {said:?}");
        transship_testbed::journey::check_no_pod_left(&node).with_context(what)?;
    }
    // Where a port is free everybody may have it; buffers are what everybody gets, unless the container may have more.
    let large = "inet('STREAM', 'TCP', 'LISTEN', 80, so_rcvbuf=1 << 30)";
    forge(&node, &format!("{HELP}{SOCKETS}{large}"))?;
    for (added, is_whole) in [(&["NET_ADMIN"][..], true), (&[], false)] {
        let security = PodSecurity { added, ..security };
        let container = PodContainer {
            security,
            ..container
        };
        let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
        node.shell(&LOW_PORTS.replace("PORT", "80")).run()?;
        cri.run_container(&pod, &container)?;
        let shown = node
            .shell("for it in /run/netns/*; do nsenter --net=$it ss -Htlnm; done")
            .read()?;
        cri.remove_pod(&pod)?;
        ensure!(
            shown.contains(":80 ") && shown.contains("rb1073741824") == is_whole,
            "{added:?}: {shown}"
        );
    }
    nobody_has_logged_in(&node, &cri, &container)?;
    told_before_the_freeze(&node, &cri, security)
}

/// The audit log would say of what the container does that this user had done it.
fn nobody_has_logged_in(
    node: &Node,
    cri: &Cri,
    container: &PodContainer<'_>,
) -> anyhow::Result<()> {
    forge(node, &format!("{HELP}{SOCKETS}login(1000)"))?;
    let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, container)?;
    let own = cri.exec(&id, &["cat", "/proc/1/loginuid"])?;
    cri.remove_pod(&pod)?;
    let own = String::from_utf8_lossy(&own.stdout).into_owned();
    ensure!(own.trim() == "4294967295", "{own}");
    Ok(())
}

/// Everybody may open it, and sees less in it then than CRIU would.
fn told_before_the_freeze(
    node: &Node,
    cri: &Cri,
    security: PodSecurity<'static>,
) -> anyhow::Result<()> {
    let container = PodContainer {
        command: &[
            "/bin/sh",
            "-c",
            "exec 7</proc/self/pagemap; exec tail -f /dev/null",
        ],
        security,
        ..PLAIN
    };
    let pod = cri.run_pod(("shop", "pages"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &container)?;
    let said = "/proc/1/pagemap of";
    let refused = node
        .shell("transship checkpoint --pod shop/pages --name pages 2>&1 && exit 1; true")
        .read()?;
    ensure!(
        refused.contains(said) && refused.contains("CAP_SYS_ADMIN"),
        "{refused}"
    );
    ensure!(cri.runs(&id)?, "it runs on");
    cri.remove_pod(&pod).map_err(Into::into)
}
