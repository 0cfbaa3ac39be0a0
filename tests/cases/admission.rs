//! A checkpoint that is stronger than the pod that asks for it: each attack is refused with one line, and
//! what is as strong or weaker comes back.

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Cri, Node, PodContainer, PodNamespaces, PodSecurity, Testbed, Tree,
};

use crate::Case;
use crate::pods::{FIRST, start};

pub(crate) const CACHE: &[(&str, &str)] = &[("/var/lib/cache", "/cache")];
pub(crate) const RESTORE: (&str, &str) = ("dev.transship/restore", "web");

/// Nothing that a restricted pod may not have.
const RESTRICTED: PodSecurity<'static> = PodSecurity {
    user: Some(1000),
    group: None,
    added: &[],
    dropped: &["ALL"],
    no_new_privileges: true,
    default_seccomp: true,
    protected_paths: true,
};

pub(crate) const PLAIN: PodContainer<'static> = PodContainer {
    command: &["/usr/bin/counter", "--memory-mb", "1"],
    mounts: CACHE,
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("pod_admission_stronger", stronger_checkpoints_are_refused)
        .chain(Case::on_all_trees(
            "pod_admission_same",
            the_same_and_the_weaker_come_back,
        ))
        // crit is in this tree alone.
        .chain([Case {
            what: "pod_admission_forged",
            tree: Tree::Forky,
            run: forged_images_are_refused,
        }])
}

/// The pods are honest; the new one may do less than the one that was checkpointed.
fn stronger_checkpoints_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    checkpoint(&node, &cri, &PLAIN)?;
    let with = |security| PodContainer { security, ..PLAIN };
    let none = PodSecurity::NONE;
    for (what, container, said) in [
        (
            "capabilities",
            with(PodSecurity {
                dropped: &["NET_RAW"],
                ..none
            }),
            "CAP_NET_RAW",
        ),
        (
            "user",
            with(PodSecurity {
                user: Some(1000),
                ..none
            }),
            "user id 0",
        ),
        ("everything", with(RESTRICTED), "the new container's"),
        (
            "masked paths",
            with(PodSecurity {
                protected_paths: true,
                ..none
            }),
            "masked",
        ),
        (
            "read-only mount",
            PodContainer {
                mounts: &[],
                read_only_mounts: CACHE,
                ..PLAIN
            },
            "/cache",
        ),
    ] {
        refused(&node, &cri, &container, said).with_context(|| format!("weaker {what}"))?;
    }
    // What can be imposed is: the process comes back with it.
    let imposed = with(PodSecurity {
        no_new_privileges: true,
        default_seccomp: true,
        ..none
    });
    let status = restored(&cri, &imposed)?;
    ensure!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
        "{status}"
    );
    Ok(())
}

fn the_same_and_the_weaker_come_back(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let none = PodSecurity::NONE;
    let filtered = PodSecurity {
        default_seccomp: true,
        protected_paths: true,
        no_new_privileges: true,
        ..none
    };
    let stronger = PodSecurity {
        added: &["SYS_ADMIN", "NET_ADMIN"],
        ..none
    };
    for (what, was, is) in [
        ("the same", none, none),
        ("the same with seccomp", filtered, filtered),
        ("the same with more capabilities", stronger, stronger),
        ("a weaker one", filtered, stronger),
    ] {
        let with = |security: PodSecurity<'static>| PodContainer { security, ..PLAIN };
        checkpoint(&node, &cri, &with(was))?;
        let status = restored(&cri, &with(is)).context(what)?;
        let has = |line: &str| status.contains(line);
        ensure!(
            !is.default_seccomp || has("Seccomp:\t2"),
            "{what}: {status}"
        );
    }
    Ok(())
}

/// The images say what no dump of such a pod says.
fn forged_images_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = prepared(bed)?;
    let cri = node.cri()?;
    let container = PodContainer {
        security: PodSecurity {
            // With it a process may set securebits.
            dropped: &["SETPCAP"],
            no_new_privileges: true,
            default_seccomp: true,
            protected_paths: true,
            ..PodSecurity::NONE
        },
        ..PLAIN
    };
    checkpoint(&node, &cri, &container)?;
    keep_honest(&node)?;
    for (forgery, said) in FORGERIES {
        forge(&node, forgery)?;
        refused(&node, &cri, &container, said).with_context(|| (*forgery).to_owned())?;
    }
    // What is imposed cannot be forged away.
    forge(
        &node,
        "for e in edit('core-*.img'):
             e['thread_core']['creds']['no_new_privs'] = 0
             e['thread_core']['seccomp_mode'] = 'disabled'
             e['thread_core'].pop('seccomp_filter', None)
         for e in edit('seccomp.img'): e.pop('seccomp_filters')",
    )?;
    let status = restored(&cri, &container)?;
    ensure!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
        "{status}"
    );
    Ok(())
}

/// Keeps the checkpoint as it is, for [`forge`].
pub(crate) fn keep_honest(node: &Node) -> anyhow::Result<()> {
    Ok(node
        .shell(&format!("cp -a {STORE}/web {STORE}/honest"))
        .run()?)
}

/// Puts a forged copy of the honest checkpoint in its place: as if its sender had written it so, with
/// lengths and digests that are right.
pub(crate) fn forge(node: &Node, statements: &str) -> anyhow::Result<()> {
    let statements = statements.replace("\n         ", "\n");
    node.write_file("/root/forge.py", format!("{FORGE}{statements}\n{SEAL}"))?;
    node.shell(&format!(
        "cd {STORE}; rm -rf web; cp -a honest web; python3 /root/forge.py"
    ))
    .run()
    .map_err(Into::into)
}

pub(crate) const STORE: &str = "/var/lib/transship/checkpoints";

/// `edit` gives the entries of images, and writes them back.
const FORGE: &str = r#"
import contextlib, glob, hashlib, json, os, subprocess
d = '/var/lib/transship/checkpoints/web'; im = d + '/first/checkpoint'
def edit(pattern):
    for f in glob.glob(im + '/' + pattern):
        j = json.loads(subprocess.run(['crit', 'decode', '-i', f], capture_output=True, check=True, text=True).stdout)
        yield from j['entries']
        save(f, j)
def table(change):
    f = glob.glob(im + '/mountpoints-*.img')[0]
    j = json.loads(subprocess.run(['crit', 'decode', '-i', f], capture_output=True, check=True, text=True).stdout)
    j['entries'] = change(j['entries'])
    save(f, j)
def save(f, j):
    json.dump(j, open('/root/forged.json', 'w'))
    os.remove(f)
    subprocess.run(['crit', 'encode', '-i', '/root/forged.json', '-o', f], check=True)
def seal_without(path):
    m = json.load(open(d + '/transship.json'))
    m['containers'][0]['files'] = [f for f in m['containers'][0]['files'] if f['path'] != path]
    json.dump(m, open(d + '/transship.json', 'w'))
def mount(entries, **more):
    root = [e for e in entries if e['mountpoint'] == '/'][0]
    new = {**root, 'mnt_id': 9999, 'parent_mnt_id': root['mnt_id'], 'root': '/', 'options': '', **more}
    new.pop('ext_key', None); new.pop('ext_mount', None)
    return entries + [new]
"#;
const SEAL: &str = r"
m = json.load(open(d + '/transship.json'))
for x in m['containers'][0]['files']:
    if os.path.isfile(d + '/first/' + x['path']) and not x['path'].startswith('checkpoint/pages'):
        b = open(d + '/first/' + x['path'], 'rb').read(); x['size'] = len(b); x['sha256'] = hashlib.sha256(b).hexdigest()
json.dump(m, open(d + '/transship.json', 'w'))
";

/// What is forged, and what is said of it.
const FORGERIES: &[(&str, &str)] = &[
    (
        "for e in edit('core-*.img'):
             c = e['thread_core']['creds']
             for k in ('cap_prm', 'cap_eff', 'cap_bnd'): c[k] = [0xfeffffff, 0x1ff]",
        "CAP_SYS_ADMIN",
    ),
    (
        "for e in edit('core-*.img'): e['thread_core']['creds']['secbits'] = 4 | 8",
        "securebits",
    ),
    (
        "for e in edit('core-*.img'): e['thread_core']['sched_policy'] = 1; e['thread_core']['sched_prio'] = 5",
        "scheduling policy 1",
    ),
    (
        "table(lambda t: mount(t, fstype=16, fsname='overlay', source='overlay', options='lowerdir=/etc:/home', mountpoint='/data/keep'))",
        "/data/keep",
    ),
    (
        "table(lambda t: mount(t, fstype=4, source='binfmt_misc', mountpoint='/data/keep'))",
        "/data/keep",
    ),
    (
        "table(lambda t: mount(t, fstype=2, source='sysfs', mountpoint='/data/sys'))",
        "the checkpoint mounts sysfs on \"/data/sys\"",
    ),
    (
        "table(lambda t: [e for e in t if e['mountpoint'] != '/proc/keys'])",
        "\"/proc/keys\" is masked in the new container",
    ),
    (
        "table(lambda t: [e for e in t if e['mountpoint'] != '/proc/sys'])",
        "\"/proc/sys\" is read-only in the new container",
    ),
    (
        "ids = [e for e in edit('ids-*.img')][0]
         for e in edit('inventory.img'): e['root_ids']['mnt_ns_id'] = ids['mnt_ns_id']",
        "mount namespace",
    ),
    (
        "ids = [e for e in edit('ids-*.img')][0]
         for e in edit('inventory.img'): e['root_ids']['net_ns_id'] = ids['net_ns_id']",
        "network namespace",
    ),
    (
        "for e in edit('cgroup.img'): e['controllers'][0]['dirs'][0]['dir_name'] += '/../../up'",
        "which is not within the container's",
    ),
    (
        "json.dump(['/dev/null'] * 4, open(im + '/descriptors.json', 'w'))",
        "at most three descriptors",
    ),
    // Where there is no files.img CRIU reads one image for each kind of file.
    (
        "os.remove(im + '/files.img'); seal_without('checkpoint/files.img')",
        "files.img",
    ),
    (
        "open(im + '/packetsk.img', 'w')",
        "\"packetsk.img\" among the images",
    ),
    (
        "open(im + '/apparmor.img', 'w')",
        "\"apparmor.img\" among the images",
    ),
    // A message to nf_tables, in the network of the pod.
    (
        "n = [e for e in edit('ids-*.img')][0]['net_ns_id']
         open(f'{im}/netns-ct-{n}.img', 'ab').write(bytes([20, 0, 0, 0, 0, 10] + [0] * 14))",
        "something else than tracked connections",
    ),
    (
        "open(im + '/binfmt-misc.img', 'w')",
        "\"binfmt-misc.img\" among the images",
    ),
    (
        "os.symlink('/etc/shadow', im + '/pages-77.img')",
        "pages-77.img",
    ),
];

pub(crate) fn prepared(bed: &Testbed) -> anyhow::Result<Node> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    node.shell("mkdir -p /var/lib/cache").run()?;
    Ok(node)
}

/// A pod of the container, and its checkpoint `web`.
pub(crate) fn checkpoint(
    node: &Node,
    cri: &Cri,
    container: &PodContainer<'_>,
) -> anyhow::Result<()> {
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, container)?;
    cri.exec(&id, &["true"])?;
    node.shell(
        "transship rm web 2>/dev/null || true; transship checkpoint --pod shop/web --name web",
    )
    .run()?;
    Ok(cri.remove_pod(&pod)?)
}

pub(crate) fn refused(
    node: &Node,
    cri: &Cri,
    container: &PodContainer<'_>,
    said: &str,
) -> anyhow::Result<()> {
    let pod = cri.run_pod(("shop", "thief"), &[RESTORE], PodNamespaces::Usual)?;
    let answer = cri.run_container(&pod, container);
    let error = match answer {
        Err(error) => error.to_string().replace('\\', ""),
        Ok(id) => {
            let status = status(cri, &id)?;
            cri.remove_pod(&pod)?;
            anyhow::bail!("restored, and it should say {said:?}: {status}");
        }
    };
    cri.remove_pod(&pod)?;
    ensure!(error.contains(said), "{error:?} does not say {said:?}");
    transship_testbed::journey::check_no_pod_left(node)
}

/// Restores it and gives what the kernel says of its first process.
pub(crate) fn restored(cri: &Cri, container: &PodContainer<'_>) -> anyhow::Result<String> {
    let pod = cri.run_pod(("shop", "again"), &[RESTORE], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, container)?;
    ensure!(cri.runs(&id)?, "it runs");
    let status = status(cri, &id)?;
    cri.remove_pod(&pod)?;
    Ok(status)
}

fn status(cri: &Cri, id: &str) -> anyhow::Result<String> {
    let answer = cri.exec(id, &["cat", "/proc/1/status"])?;
    Ok(String::from_utf8(answer.stdout)?)
}
