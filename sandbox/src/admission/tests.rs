//! The comparison as a table: a container as containerd and runc make it, each row with one thing that
//! is other than it was.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use transship_checkpoint::criu_images::addresses::Addresses;
use transship_checkpoint::criu_images::cgroups::{Cgroups, Hierarchy, Member};
use transship_checkpoint::criu_images::inventory::Inventory;
use transship_checkpoint::criu_images::mounts::{FsType, Mount, flags};
use transship_checkpoint::criu_images::named_files::{NamedFile, Remap};
use transship_checkpoint::criu_images::open_files::{Buffers, PrivilegedFile};
use transship_checkpoint::criu_images::seccomp::Filter;
use transship_checkpoint::criu_images::threads::{Creds, NamespaceIds, Process, Task, Thread};
use transship_checkpoint::criu_images::user_namespace::IdMappings;
use transship_checkpoint::spec::Spec;

use super::image_tests::ghost;
use super::*;

/// CHOWN, SETGID, SETUID, NET_RAW.
const CAPS: u64 = 1 | 1 << 6 | 1 << 7 | 1 << 13;
const NAMESPACES: [&str; 5] = ["pid", "network", "ipc", "uts", "mount"];

pub(super) fn spec() -> Value {
    let caps = ["CAP_CHOWN", "CAP_SETGID", "CAP_SETUID", "CAP_NET_RAW"];
    json!({
        "process": {
            "user": { "uid": 0, "gid": 0, "additionalGids": [10] },
            "capabilities": { "bounding": caps, "effective": caps, "permitted": caps },
            "oomScoreAdj": 100,
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 10, "hard": 20 }],
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"] },
            { "destination": "/cache", "type": "bind", "source": "/srv", "options": ["rbind", "ro"] },
            { "destination": "/rw", "type": "bind", "source": "/srv/rw", "options": ["rbind", "rw"] },
        ],
        "linux": {
            "maskedPaths": ["/proc/kcore", "/proc/absent"],
            "readonlyPaths": ["/proc/sys"],
            "namespaces": NAMESPACES.map(|kind| json!({ "type": kind })),
        },
    })
}

fn thread() -> Thread {
    Thread {
        tid: 1,
        comm: "web".into(),
        creds: Creds {
            permitted: CAPS,
            effective: CAPS,
            bounding: CAPS,
            groups: vec![10],
            ..Creds::default()
        },
        task: Some(Task {
            state: 1,
            rlimits: vec![(5, 20); 16],
            oom_score_adj: Some(100),
            ..Task::default()
        }),
        ..Thread::default()
    }
}

pub(super) fn mount(id: u32, parent: u32, destination: &str, fs_type: FsType) -> Mount {
    Mount {
        fs_type,
        id,
        parent,
        device: parent,
        flags: flags::NO_SUID | flags::NO_DEV | flags::NO_EXEC,
        fs_flags: 0,
        root: "/".into(),
        source: "source".into(),
        options: String::new(),
        destination: destination.into(),
        external: None,
        is_foreign: false,
        is_removed: false,
    }
}

fn null(id: u32, parent: u32, destination: &str) -> Mount {
    Mount {
        root: "/null".into(),
        external: Some("/dev/null".into()),
        flags: flags::NO_SUID,
        ..mount(id, parent, destination, FsType::Tmpfs)
    }
}

fn external(id: u32, destination: &str, read_only: bool) -> Mount {
    Mount {
        external: Some(destination.into()),
        device: 100 + id,
        flags: if read_only { flags::READ_ONLY } else { 0 },
        ..mount(id, 1, destination, FsType::Unsupported)
    }
}

pub(super) fn file(path: &str) -> NamedFile {
    NamedFile {
        id: 9,
        path: path.into(),
        mount: Some(1),
        ..NamedFile::default()
    }
}

pub(super) fn restored() -> Restored {
    let sys = Mount {
        root: "/sys".into(),
        device: 1,
        flags: flags::READ_ONLY,
        ..mount(7, 2, "/proc/sys", FsType::Proc)
    };
    let member = |path: &str| Member {
        controller: "memory".into(),
        path: path.into(),
        namespace_prefix: 0,
    };
    Restored {
        inventory: Inventory {
            criu_namespaces: NAMESPACES.into_iter().zip(1..).collect(),
        },
        processes: vec![Process {
            pid: 1,
            parent: 0,
            threads: vec![1],
            namespaces: Some(NAMESPACES.into_iter().zip(11..).collect()),
            files: Some(1),
        }],
        threads: vec![thread()],
        privileged_files: vec![PrivilegedFile::Pipe(8192)],
        addresses: vec![Addresses {
            pid: 1,
            lowest: Some(4096),
            locked: 20,
            ..Addresses::default()
        }],
        mounts: vec![vec![
            mount(1, 0, "/", FsType::Overlay),
            mount(2, 1, "/proc", FsType::Proc),
            mount(3, 1, "/dev", FsType::Tmpfs),
            external(4, "/cache", true),
            external(5, "/rw", false),
            null(6, 2, "/proc/kcore"),
            sys,
        ]],
        cgroups: Cgroups {
            members: vec![member("/pods/web"), member("/pods/web/child")],
            hierarchies: vec![Hierarchy {
                controllers: vec!["memory".into()],
                tops: vec!["pods/web".into()],
                names: vec!["child".into(), "memory.limit_in_bytes".into()],
                ..Hierarchy::default()
            }],
        },
        ..Restored::default()
    }
}

fn here() -> Environment {
    Environment {
        machine: "x86_64".into(),
        hard_limits: vec![20; 16],
        lowest_address: 4096,
        largest_pipe: 8192,
        present: ["/proc/kcore", "/proc/sys"].map(PathBuf::from).into(),
        network: Network {
            first_free_port: 80,
            buffers: BufferLimits::default(),
        },
        ..Environment::default()
    }
}

pub(super) fn admission(restored: &Restored, spec: &Value) -> Admission {
    let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
    let allowed = Allowance::of(&spec, &Path::to_path_buf);
    compare(restored, None, &allowed, &here())
}

/// A part of the spec, replaced.
pub(super) fn with(pointer: &str, value: Value) -> Value {
    let mut spec = spec();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[key] = value;
    spec
}

#[test]
fn the_same_is_admitted_as_it_is() {
    assert_eq!(admission(&restored(), &spec()), Admission::default());
    // SCHED_BATCH with SCHED_RESET_ON_FORK takes no capability.
    let mut batch = restored();
    batch.threads[0].policy = 0x4000_0003;
    assert_eq!(admission(&batch, &spec()), Admission::default());
}

/// What changes in the images, and what is said of it.
type Change = (&'static str, fn(&mut Restored));

#[test]
fn what_is_stronger_than_the_spec_is_refused() {
    fn creds(restored: &mut Restored) -> &mut Creds {
        &mut restored.threads[0].creds
    }
    fn table(restored: &mut Restored) -> &mut Vec<Mount> {
        &mut restored.mounts[0]
    }
    fn namespaces(restored: &mut Restored) -> &mut NamespaceIds {
        restored.processes[0].namespaces.as_mut().unwrap()
    }
    fn tops(restored: &mut Restored) -> &mut Vec<String> {
        &mut restored.cgroups.hierarchies[0].tops
    }
    let rows: &[Change] = &[
        ("CAP_SYS_ADMIN in its effective set", |r| {
            creds(r).effective |= 1 << 21;
        }),
        ("CAP_SYS_ADMIN in its permitted set", |r| {
            creds(r).permitted |= 1 << 21;
        }),
        ("CAP_KILL in its ambient set", |r| {
            creds(r).ambient |= 1 << 5;
        }),
        ("process 7", |r| {
            let mut second = thread();
            second.tid = 7;
            second.task = None;
            second.creds.effective = u64::MAX;
            r.threads.push(second);
        }),
        ("securebits 0x4", |r| creds(r).securebits = 4),
        ("RLIMIT_NOFILE 21", |r| {
            r.threads[0].task.as_mut().unwrap().rlimits[7].1 = 21;
        }),
        ("scheduling policy 1", |r| r.threads[0].policy = 1),
        ("nice value -1", |r| r.threads[0].nice = -1),
        ("SHM_HUGETLB) open, which takes CAP_IPC_LOCK", |r| {
            r.privileged_files.push(PrivilegedFile::HugePages);
        }),
        ("a TUN device", |r| {
            r.privileged_files.push(PrivilegedFile::Tun);
        }),
        ("the audit log open, which takes CAP_AUDIT_READ", |r| {
            r.privileged_files.push(PrivilegedFile::AuditLog);
        }),
        ("open, which takes CAP_BLOCK_SUSPEND", |r| {
            r.privileged_files.push(PrivilegedFile::KeepsAwake);
        }),
        (
            "(fs.pipe-max-size) open, which takes CAP_SYS_RESOURCE",
            |r| {
                r.privileged_files.push(PrivilegedFile::Pipe(8193));
            },
        ),
        ("a BPF map", |r| {
            r.privileged_files.push(PrivilegedFile::BpfMap);
        }),
        (
            "a socket at the port 79, which takes CAP_NET_BIND_SERVICE below 80",
            |r| r.privileged_files.push(PrivilegedFile::Port(79)),
        ),
        ("\"/cache\", not read-only", |r| table(r)[3].flags = 0),
        ("\"/proc\", not nodev", |r| {
            table(r)[1].flags = flags::NO_SUID;
        }),
        ("\"/host\", where the new container has no mount", |r| {
            table(r).push(external(9, "/host", true));
        }),
        ("in the place of /rw", |r| {
            table(r)[3].external = Some("/rw".into());
        }),
        ("sysfs on \"/s\"", |r| {
            table(r).push(mount(9, 1, "/s", FsType::Sysfs));
        }),
        ("cgroup2 on \"/s\"", |r| {
            table(r).push(mount(9, 1, "/s", FsType::Cgroup2));
        }),
        ("tmpfs on \"/s\"", |r| {
            table(r).push(mount(9, 1, "/s", FsType::Tmpfs));
        }),
        ("type that no container has", |r| {
            table(r).push(mount(9, 1, "/s", FsType::Other(16)));
        }),
        ("CRIU's type 11", |r| {
            table(r).push(mount(9, 1, "/s", FsType::Other(11)));
        }),
        ("by a plugin", |r| table(r)[1].is_foreign = true),
        (
            "tmpfs on \"/dev\", with the flags 0x1000 of mount(2)",
            |r| {
                table(r)[2].fs_flags = 0x1000;
            },
        ),
        ("mqueue on \"/s\", with the flags 0x4000 of mount(2)", |r| {
            let mut queues = mount(9, 1, "/s", FsType::Mqueue);
            queues.flags |= 0x4000 | flags::PROPAGATION;
            table(r).push(queues);
        }),
        (
            "tmpfs on \"/dev\", with the flags 0x80000 of mount(2)",
            |r| {
                table(r)[2].fs_flags = 1 << 19;
            },
        ),
        ("tmpfs on \"/dev\", which was removed", |r| {
            table(r)[2].is_removed = true;
        }),
        (
            "mqueue on \"/s\", of which it shows what is no plain path",
            |r| {
                let mut queues = mount(9, 1, "/s", FsType::Mqueue);
                queues.root = "/../../etc".into();
                table(r).push(queues);
            },
        ),
        ("tmpfs on \"/s\", of which it shows another part", |r| {
            let mut part = mount(9, 1, "/s", FsType::Tmpfs);
            (part.root, part.flags) = ("/link/etc".into(), flags::READ_ONLY);
            table(r).push(part);
        }),
        ("mqueue on \"/s\", which is that of /cache", |r| {
            let mut other = mount(9, 1, "/s", FsType::Mqueue);
            other.device = table(r)[3].device;
            table(r).push(other);
        }),
        ("overlay on \"/proc/sys\"", |r| {
            let mut other = mount(7, 2, "/proc/sys", FsType::Overlay);
            (other.device, other.flags) = (0, flags::READ_ONLY);
            table(r)[6] = other;
        }),
        ("memory at the address 0x0", |r| {
            r.addresses[0].lowest = Some(0);
        }),
        ("process 1 has locked 21 bytes of memory", |r| {
            r.addresses[0].locked = 21;
        }),
        (
            "process 1 has mapped a file that would be made or emptied",
            |r| {
                r.addresses[0].open_flags = 0o1002;
            },
        ),
        (
            "a timerfd that wakes the node open, which takes CAP_WAKE_ALARM",
            |r| {
                r.privileged_files.push(PrivilegedFile::Alarm);
            },
        ),
        ("a timer that wakes the node", |r| {
            r.threads[0].task.as_mut().unwrap().has_alarm = true;
        }),
        ("\"/a/../b\", whose name leads out", |r| {
            r.named_files.push(file("/a/../b"));
        }),
        ("\"/proc/self/fd/3/x\", whose name leads out", |r| {
            r.named_files.push(file("/proc/self/fd/3/x"));
        }),
        ("\"/proc/7/task/8/mem\", whose name leads out", |r| {
            r.named_files.push(file("/proc/1/mem"));
            r.named_files.push(file("/proc/7/task/8/mem"));
        }),
        ("\"/proc/1/task/1/root\", whose name leads out", |r| {
            r.named_files.push(file("/proc/1/task/1/root"));
        }),
        ("which is to be made or emptied", |r| {
            let mut emptied = file("/a");
            emptied.flags = 0o1000;
            r.named_files.push(emptied);
        }),
        (
            "\"/cache/x\", to be removed from a mount that is read-only",
            |r| {
                let mut removed = file("/cache/x");
                removed.mount = Some(4);
                r.named_files.push(removed);
                r.remaps.push(Remap {
                    file: 9,
                    linked: Some(9),
                    ghost: None,
                });
            },
        ),
        (
            "\"/cache/x\", to be made again on a mount that is read-only",
            |r| {
                ghost(r, "/cache/x", 0o100_644);
                r.named_files[0].mount = Some(4);
            },
        ),
        ("\"/x\", to be made again as a device", |r| {
            ghost(r, "/x", 0o020_666);
        }),
        ("\"/x\", to be made again as a symbolic link", |r| {
            ghost(r, "/x", 0o120_777);
        }),
        ("\"/x\", to be removed, and it is no link", |r| {
            ghost(r, "/x", 0);
            (r.remaps[0].ghost, r.remaps[0].linked) = (None, Some(9));
        }),
        ("with the number of another one", |r| {
            r.named_files.extend([file("/a"), file("/b")]);
        }),
        ("there is no file 9", |r| {
            ghost(r, "/x", 0o100_644);
            r.named_files.clear();
        }),
        ("\"/proc/self/fd/3/x\", whose name leads out", |r| {
            r.watched_files.push(file("/proc/self/fd/3/x"));
        }),
        ("watches a file that has no name", |r| {
            ghost(r, "/x", 0o100_644);
            r.watched_inodes.extend([(7, 8), (7, 9)]);
        }),
        ("\"/x\", which is sent to a socket", |r| {
            r.named_files.push(file("/x"));
            r.queued_files.sent.insert(9);
        }),
        ("a unix socket that is of another program", |r| {
            r.queued_files.has_external_socket = true;
        }),
        ("no plain path", |r| {
            table(r).push(mount(9, 1, "/a/../s", FsType::Tmpfs));
        }),
        ("where there is another mount", |r| {
            table(r).push(mount(9, 1, "/proc", FsType::Proc));
        }),
        ("another mount hides", |r| table(r)[5].parent = 1),
        ("\"/proc/kcore\" is masked", |r| drop(table(r).remove(5))),
        ("\"/proc/sys\" is read-only", |r| drop(table(r).remove(6))),
        ("proc on \"/proc/sys\"", |r| table(r)[6].root = "/".into()),
        ("not one root", |r| table(r)[0].destination = "/x".into()),
        ("not in the container's mount namespace", |r| {
            r.mounts.push(r.mounts[0].clone());
        }),
        ("no mount namespace", |r| r.mounts.clear()),
        ("not in the container's network namespace", |r| {
            r.inventory.criu_namespaces.insert("network", 12);
        }),
        ("has no mount namespace", |r| {
            namespaces(r).remove("mount");
        }),
        ("not in the container's user namespace", |r| {
            namespaces(r).insert("user", 99);
        }),
        ("other id mappings", |r| {
            r.id_mappings.push(IdMappings {
                uids: vec![(0, 0, 10)],
                gids: vec![],
            });
        }),
        ("cgroup \"/\"", |r| r.cgroups.members[1].path = "/".into()),
        ("cgroup \"/pods/web2\"", |r| {
            r.cgroups.members[1].path = "/pods/web2".into();
        }),
        ("cgroup \"/pods/web/../x\"", |r| {
            r.cgroups.members[1].path = "/pods/web/../x".into();
        }),
        ("cgroup \"/pods/web\"", |r| {
            r.cgroups.members[0].namespace_prefix = 99;
        }),
        ("cgroup \"other\"", |r| tops(r).push("other".into())),
        ("cgroup \"pods/web/child\"", |r| {
            tops(r).push("pods/web/child".into());
        }),
        ("cgroup \"\"", |r| tops(r)[0] = String::new()),
        // The root of a hierarchy in which no runtime makes a cgroup, of which all would be given write access.
        ("cgroup \"\"", |r| {
            r.cgroups.hierarchies.push(Hierarchy {
                controllers: vec!["misc".into()],
                tops: vec![String::new()],
                opens: true,
                ..Hierarchy::default()
            });
            r.cgroups.members.push(Member {
                controller: "misc".into(),
                path: "/".into(),
                namespace_prefix: 0,
            });
        }),
        ("cgroup \"memory\"", |r| {
            r.cgroups.hierarchies.push(r.cgroups.hierarchies[0].clone());
        }),
        ("cgroup \"../x\"", |r| {
            r.cgroups.hierarchies[0].names.push("../x".into());
        }),
        ("\"binfmt-misc.img\" among", |r| {
            r.strangers.push("binfmt-misc.img".into());
        }),
        ("process 1 has no image", |r| r.threads.clear()),
        ("process has no namespaces", |r| {
            r.processes[0].namespaces = None;
        }),
    ];
    for (said, change) in rows {
        let mut images = restored();
        change(&mut images);
        let found = admission(&images, &spec());
        let error = found.check().expect_err(said).to_string();
        let all: Vec<String> = found.refusals.iter().map(ToString::to_string).collect();
        assert!(all.iter().any(|it| it.contains(said)), "{said}: {all:?}");
        assert!(error.starts_with("it is stronger than this container may be: "));
    }
}

#[test]
fn what_is_stronger_than_a_weaker_spec_is_refused() {
    let no_user_change = json!({ "bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] });
    for (pointer, value, said) in [
        ("/process/user/uid", json!(1000), "user id 0"),
        ("/process/user/uid", json!(1000), "group id 10"),
        (
            "/process/capabilities",
            no_user_change.clone(),
            "CAP_SETGID, CAP_SETUID, CAP_NET_RAW",
        ),
        ("/process/capabilities", Value::Null, "CAP_CHOWN"),
        ("/root/readonly", json!(true), "root is read-only"),
        (
            "/linux/seccomp",
            json!({ "defaultAction": "SCMP_ACT_NOTIFY" }),
            "listener",
        ),
        (
            "/linux/namespaces",
            json!([{ "type": "user" }]),
            "user namespace",
        ),
        ("/mounts/3", json!({}), "\"/rw\""),
    ] {
        let mut spec = with("/process/user/additionalGids", json!([]));
        if pointer != "/process/user/uid" {
            spec = self::spec();
        }
        match pointer.rsplit_once('/').unwrap() {
            ("/mounts", at) => spec["mounts"][at.parse::<usize>().unwrap()] = value,
            (parent, key) => spec.pointer_mut(parent).unwrap()[key] = value,
        }
        let found = admission(&restored(), &spec);
        let all: Vec<String> = found.refusals.iter().map(ToString::to_string).collect();
        assert!(all.iter().any(|it| it.contains(said)), "{said}: {all:?}");
    }
}

#[test]
fn what_hides_more_than_the_spec_is_no_privilege() {
    let mut spec = with("/linux/maskedPaths", json!([]));
    spec["linux"]["readonlyPaths"] = Value::Null;
    let mut images = restored();
    let empty = Mount {
        flags: flags::READ_ONLY,
        ..mount(9, 2, "/proc/acpi", FsType::Tmpfs)
    };
    images.mounts[0].push(empty);
    assert_eq!(admission(&images, &spec), Admission::default());
}

#[test]
fn hierarchies_of_cgroup_v1_are_read_only_where_the_spec_says_so() {
    let mut spec = spec();
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/cg", "type": "cgroup", "options": ["nosuid", "ro"] }));
    let hierarchy = |flags| Mount {
        parent: 20,
        flags,
        ..external(21, "/cg/memory", true)
    };
    let mut images = restored();
    images.mounts[0].push(mount(20, 1, "/cg", FsType::Tmpfs));
    images.mounts[0].push(hierarchy(flags::READ_ONLY | flags::NO_SUID));
    assert_eq!(admission(&images, &spec), Admission::default());
    images.mounts[0].pop();
    images.mounts[0].push(hierarchy(flags::NO_SUID));
    let found = admission(&images, &spec);
    assert!(matches!(found.refusals[..], [Refusal::Mount { .. }]));
}

#[test]
fn workers_of_root_may_be_anybody() {
    let mut images = restored();
    images.threads[0].creds = Creds {
        uids: [33; 4],
        gids: [33; 4],
        groups: vec![33, 44],
        bounding: CAPS,
        ..Creds::default()
    };
    assert_eq!(admission(&images, &spec()), Admission::default());
    // Without SETGID only the groups of the spec.
    let caps = json!({ "bounding": ["CAP_SETUID"], "permitted": ["CAP_SETUID"] });
    let found = admission(&images, &with("/process/capabilities", caps));
    let all = format!("{:?}", found.refusals);
    assert!(all.contains("User") && all.contains("Group"), "{all}");
}

#[test]
fn a_user_has_no_capabilities_where_nothing_can_be_gained() {
    let mut spec = with("/process/noNewPrivileges", json!(true));
    spec["process"]["user"]["uid"] = json!(1000);
    let mut images = restored();
    images.threads[0].creds.uids = [1000; 4];
    let found = admission(&images, &spec);
    assert!(matches!(found.refusals[0], Refusal::Capabilities { .. }));
    images.threads[0].creds.effective = 0;
    images.threads[0].creds.permitted = 0;
    assert_eq!(admission(&images, &spec).refusals, []);
}

#[test]
fn what_can_be_imposed_is() {
    let mut spec = with("/process/noNewPrivileges", json!(true));
    let caps = json!({ "bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] });
    spec["process"]["capabilities"] = caps;
    spec["process"]["oomScoreAdj"] = json!(500);
    spec["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }] });
    let mut images = restored();
    let creds = &mut images.threads[0].creds;
    (creds.effective, creds.permitted, creds.inheritable) = (1, 1, CAPS);
    let task = images.threads[0].task.as_mut().unwrap();
    (task.rlimits[0].1, task.login) = (1000, Some(1000));
    images.filters = vec![Filter::default()];
    let found = admission(&images, &spec);
    assert_eq!(found.refusals, []);
    let edit = &found.edits[&1];
    assert!(edit.no_new_privileges && edit.no_login);
    assert_eq!((edit.bounding, edit.inheritable), (Some(1), Some(1)));
    assert_eq!(edit.oom_score_adj, Some(500));
    assert_eq!(edit.rlimits.as_ref().unwrap()[0], (5, 20));
    assert_eq!(edit.seccomp_filter, Some(1));
    assert_eq!(found.filters.unwrap().len(), 2);
}

#[test]
fn devices_of_the_dump_are_those_of_the_spec() {
    let old = with(
        "/linux/devices",
        json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]),
    );
    let old = Spec::parse(old.to_string().as_bytes()).unwrap();
    let new = Spec::parse(spec().to_string().as_bytes()).unwrap();
    for (allowed, refusals) in [(&new, 1), (&old, 0)] {
        let allowed = Allowance::of(allowed, &Path::to_path_buf);
        let found = compare(&restored(), Some(&old), &allowed, &here());
        assert_eq!(found.refusals.len(), refusals, "{found:?}");
    }
}

#[test]
fn an_lsm_profile_is_imposed_where_there_is_the_lsm() {
    let spec = with("/process/apparmorProfile", json!("web"));
    assert_eq!(admission(&restored(), &spec), Admission::default());
    let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
    let here = Environment {
        lsm: Some("apparmor"),
        ..here()
    };
    let found = compare(
        &restored(),
        None,
        &Allowance::of(&spec, &Path::to_path_buf),
        &here,
    );
    assert_eq!(found.lsm_profile.as_deref(), Some("apparmor:web"));
    assert_eq!(found.edits[&1].lsm_profile.as_deref(), Some("web"));
}

#[test]
fn sockets_and_owners_are_what_the_container_could_make() {
    let with_file = |file| Restored {
        privileged_files: vec![file],
        ..restored()
    };
    let weak = with("/process/capabilities/bounding", json!(["CAP_CHOWN"]));
    let weak = {
        let mut weak = weak;
        weak["process"]["capabilities"]["permitted"] = json!(["CAP_CHOWN"]);
        weak
    };
    let of = |file, spec: &Value| {
        let mut images = with_file(file);
        let creds = &mut images.threads[0].creds;
        (creds.permitted, creds.effective, creds.bounding) = (1, 1, 1);
        admission(&images, spec)
    };
    let one = |file| {
        PrivilegedFile::Buffers(Buffers {
            send: file,
            ..Buffers::default()
        })
    };
    for (file, is_of_the_weak) in [
        (PrivilegedFile::Port(80), true),
        (PrivilegedFile::Owner(0), true),
        (one(0), true),
        (PrivilegedFile::Mark, false),
        (PrivilegedFile::Priority, false),
        (PrivilegedFile::Owner(7), false),
    ] {
        assert_eq!(
            of(file, &weak).refusals.is_empty(),
            is_of_the_weak,
            "{file:?}"
        );
        // With CAP_NET_RAW, and with CAP_SETUID for root.
        assert_eq!(of(file, &spec()).refusals, [], "{file:?}");
    }
    assert_eq!(of(one(0), &spec()).buffers, None);
    let cut = of(one(1), &spec());
    assert!(cut.has_edits() && cut.buffers.is_some());
}

#[test]
fn a_zombie_has_an_image_and_no_thread() {
    let mut images = restored();
    images.processes.push(Process {
        pid: 25,
        parent: 1,
        threads: vec![0],
        ..Process::default()
    });
    let error = admission(&images, &spec()).check().unwrap_err();
    assert!(error.to_string().contains("process 25 has no image"));
    images.threads.push(Thread {
        tid: 25,
        task: Some(Task {
            state: TASK_DEAD,
            rlimits: Vec::new(),
            oom_score_adj: None,
            ..Task::default()
        }),
        ..Thread::default()
    });
    admission(&images, &spec()).check().unwrap();
    images.threads[1].task.as_mut().unwrap().state = 1;
    assert!(admission(&images, &spec()).check().is_err());
}

#[test]
fn a_joined_namespace_of_the_node_is_no_way_out() {
    let mut images = restored();
    let own = &mut images.processes[0].namespaces;
    let uts = images.inventory.criu_namespaces["uts"];
    own.as_mut().unwrap().insert("uts", uts);
    let compare_on = |here: &Environment| {
        let spec = Spec::parse(spec().to_string().as_bytes()).unwrap();
        let allowed = Allowance::of(&spec, &Path::to_path_buf);
        compare(&images, None, &allowed, here).check()
    };
    assert!(compare_on(&here()).is_err());
    let node_namespaces = ["uts".to_owned()].into();
    compare_on(&Environment {
        node_namespaces,
        ..here()
    })
    .unwrap();
}

/// CRIU would leave the process its own, which are those of a service of the node.
#[test]
fn limits_that_the_image_leaves_out_are_imposed() {
    let mut images = restored();
    let task = images.threads[0].task.as_mut().unwrap();
    task.rlimits.truncate(3);
    let found = admission(&images, &spec());
    assert_eq!(found.refusals, []);
    let limits = found.edits[&images.threads[0].tid].rlimits.clone().unwrap();
    assert_eq!(limits, [vec![(5, 20); 3], vec![(20, 20); 13]].concat());
}

/// A hierarchy that a mount makes has what its options say: a program that the kernel starts.
#[test]
fn a_mount_makes_no_hierarchy_of_cgroups() {
    let mut spec = spec();
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/cg", "type": "cgroup" }));
    for (options, is_admitted) in [
        ("cpu,cpuacct", true),
        ("xattr,name=systemd", true),
        ("none,name=x", false),
        ("cpu,release_agent=/cache/run", false),
    ] {
        let mut images = restored();
        let mut hierarchy = mount(20, 1, "/cg", FsType::Cgroup);
        hierarchy.options = options.into();
        images.mounts[0].push(hierarchy);
        let found = admission(&images, &spec);
        assert_eq!(found.check().is_ok(), is_admitted, "{options}");
    }
}
