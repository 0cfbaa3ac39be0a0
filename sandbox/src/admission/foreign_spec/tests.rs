use serde_json::json;
use transship_checkpoint::criu_options::CgroupsMode;

use super::*;

/// What `ctr run` of containerd 2.1 writes, shortened where only the length differs.
fn ordinary() -> Value {
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["/usr/bin/counter"],
            "env": ["PATH=/usr/bin"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_KILL"],
                             "permitted": ["CAP_SYS_CHROOT"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024},
                        {"type": "RLIMIT_NICE", "hard": 20, "soft": 0}],
            "noNewPrivileges": true,
            "oomScoreAdj": 0,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts",
             "options": ["rbind", "ro"]},
        ],
        "hooks": {},
        "annotations": {"dev.transship/tcp": "close"},
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"},
                            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                            {"allow": true, "type": "c", "major": 136, "access": "rwm"}],
                "cpu": {"shares": 2},
            },
            "cgroupsPath": "/default/web",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                           {"type": "network", "path": "/proc/1234/ns/net"}],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []},
        },
    })
}

fn refused(spec: &Value) -> Vec<(Allow, String)> {
    let joined = ["network".to_owned()].into();
    let place = Place {
        old: ("default", "web"),
        joined: &joined,
    };
    let all = refusals(spec, &place).into_iter();
    all.map(|refusal| (refusal.allow, refusal.what)).collect()
}

#[test]
fn an_ordinary_container_is_refused_nothing() {
    assert_eq!(refused(&ordinary()), []);
    let mut with_systemd = ordinary();
    with_systemd["linux"]["cgroupsPath"] = json!("system.slice:nerdctl:web");
    assert_eq!(refused(&with_systemd), []);
}

/// A runtime in Go reads these as what is refused in its own letters.
#[test]
fn another_spelling_is_no_way_around() {
    for (list, item) in [
        (
            "/mounts",
            json!({"destination": "/host", "type": "tmpfs", "source": "x", "Options": ["rbind"]}),
        ),
        (
            "/linux/namespaces",
            json!({"type": "cgroup", "Path": "/proc/1/ns/cgroup"}),
        ),
        (
            "/linux/resources/devices",
            json!({"allow": true, "access": "m", "acce\u{17f}\u{17f}": "rwm"}),
        ),
    ] {
        let mut spec = ordinary();
        let items = spec.pointer_mut(list).unwrap().as_array_mut().unwrap();
        items.push(item);
        let found = refused(&spec);
        assert_eq!(found.len(), 1, "{list}: {found:?}");
        assert_eq!(found[0].0, Allow::OtherFields);
    }
    for (object, name) in [
        ("/linux", "name\u{17f}paces"),
        ("/linux", "MaskedPaths"),
        ("/linux", "\u{17f}eccomp"),
        ("/linux", "RootfsPropagation"),
        ("/process", "NoNewPrivileges"),
        ("", "Linux"),
    ] {
        let mut spec = ordinary();
        spec.pointer_mut(object).unwrap()[name] = json!([]);
        assert_eq!(refused(&spec).len(), 1, "{object}/{name}");
        let object = spec.pointer_mut(object).unwrap().as_object_mut().unwrap();
        object.remove(name);
        object.insert("notKnown".to_owned(), json!([]));
        assert_eq!(refused(&spec).len(), 0);
    }
}

#[test]
fn each_field_that_is_more_has_its_refusal() {
    let cases = [
        (
            "/hooks",
            json!({"prestart": [{"path": "/x"}]}),
            Allow::Hooks,
            "/x",
        ),
        ("/hooks", json!("x"), Allow::Hooks, "hooks"),
        (
            "/annotations",
            json!({"org.criu.config": "/x"}),
            Allow::CriuOptions,
            "org.criu.config",
        ),
        (
            "/annotations",
            json!({"run.oci.handler": "krun"}),
            Allow::CriuOptions,
            "run.oci.handler",
        ),
        (
            "/annotations",
            json!({"cdi.k8s.io/gpu": "vendor.example/gpu=all"}),
            Allow::OtherFields,
            "cdi.k8s.io/gpu",
        ),
        (
            "/linux/resources/unified",
            json!({"memory.high": "max", "cgroup.procs": "1"}),
            Allow::CgroupPath,
            "cgroup.procs",
        ),
        (
            "/linux/devices",
            json!([{"path": "/dev/vda"}]),
            Allow::Devices,
            "/dev/vda",
        ),
        (
            "/linux/resources/devices",
            json!([{"allow": true, "type": "b", "major": 8, "access": "r"}]),
            Allow::Devices,
            "b 8:*",
        ),
        (
            "/linux/resources/devices",
            json!([{"allow": true, "access": "rwm"}]),
            Allow::Devices,
            "a *:*",
        ),
        (
            "/linux/resources/devices",
            json!([]),
            Allow::Devices,
            "no rule that closes the devices",
        ),
        (
            "/linux/resources/devices",
            json!([{"allow": false, "type": "b", "access": "rwm"}]),
            Allow::Devices,
            "no rule that closes the devices",
        ),
        (
            "/linux/resources",
            json!({"cpu": {}}),
            Allow::Devices,
            "no rule that closes the devices",
        ),
        ("/root/path", json!("/"), Allow::HostMounts, "\"/\""),
        (
            "/linux/rootfsPropagation",
            json!("shared"),
            Allow::OtherFields,
            "rootfsPropagation",
        ),
        (
            "/process/oomScoreAdj",
            json!(-999),
            Allow::OtherFields,
            "oomScoreAdj",
        ),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_RTPRIO", "hard": 99, "soft": 99}]),
            Allow::Capabilities,
            "RTPRIO",
        ),
        (
            "/process/rlimits",
            json!([{"type": "rlimit_nice", "hard": 21, "soft": 20}]),
            Allow::Capabilities,
            "rlimit_nice",
        ),
        (
            "/linux/resources/network",
            json!({"classID": 1048577}),
            Allow::OtherFields,
            "linux.resources.network",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO"}),
            Allow::OtherFields,
            "process.scheduler",
        ),
        (
            "/linux/seccomp/listenerPath",
            json!("/run/x.sock"),
            Allow::OtherFields,
            "listenerPath",
        ),
        (
            "/linux/netDevices",
            json!({"eth0": {}}),
            Allow::OtherFields,
            "netDevices",
        ),
        (
            "/process/capabilities",
            json!({"ambient": ["CAP_SYS_ADMIN"]}),
            Allow::Capabilities,
            "CAP_SYS_ADMIN",
        ),
        (
            "/linux/cgroupsPath",
            json!("/default/../web"),
            Allow::CgroupPath,
            "/default/../web",
        ),
        (
            "/linux/cgroupsPath",
            json!("-.slice:x:web"),
            Allow::CgroupPath,
            "-.slice",
        ),
        (
            "/linux/readonlyPaths",
            json!(["/proc/bus"]),
            Allow::UnmaskedPaths,
            "/proc/sys",
        ),
        (
            "/linux/maskedPaths",
            json!(null),
            Allow::UnmaskedPaths,
            "/proc/kcore",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "mount"}]),
            Allow::HostNamespaces,
            "ipc, network, uts",
        ),
    ];
    for (field, value, allow, said) in cases {
        let mut spec = ordinary();
        let (parent, name) = field.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let found = refused(&spec);
        assert!(
            found.len() == 1 && found[0].0 == allow && found[0].1.contains(said),
            "{field}: {found:?}"
        );
    }
}

#[test]
fn only_the_file_systems_of_every_container_are_mounted() {
    for mount in [
        json!({"destination": "/h", "type": "bind", "source": "/", "options": ["rbind", "ro"]}),
        json!({"destination": "/h", "type": "tmpfs", "source": "/", "options": ["bind"]}),
        json!({"destination": "/h", "type": "ext4", "source": "/dev/vda"}),
        json!({"destination": "/h", "type": "overlay", "source": "x", "options": ["lowerdir=/etc"]}),
        json!({"destination": "/p", "type": "proc", "source": "proc"}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["rw"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "rw"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rrw", "ro"]}),
        json!({"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts",
               "options": ["rbind", "ro", "rw"]}),
        json!({"destination": "/sys", "type": "tmpfs", "source": "x", "options": ["remount", "rw"]}),
        json!({"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts",
               "options": ["bind"]}),
        json!({"destination": "/h", "source": "/etc/hosts", "options": ["bind", "ro"]}),
        json!({"destination": "/h"}),
        json!(7),
    ] {
        let mut spec = ordinary();
        spec["mounts"] = json!([mount]);
        let found = refused(&spec);
        assert!(
            found.len() == 1 && found[0].0 == Allow::HostMounts,
            "{mount}: {found:?}"
        );
    }
}

#[test]
fn a_spec_of_other_types_is_refused() {
    for (field, value) in [
        ("linux", json!("x")),
        ("process", json!([1])),
        ("root", json!(true)),
    ] {
        let mut spec = ordinary();
        spec[field] = value;
        assert!(!refused(&spec).is_empty(), "{field}");
    }
}

#[test]
fn options_that_choose_confinement_are_the_operators() {
    let asked = CriuOptions {
        lsm_profile: Some("apparmor:unconfined".into()),
        manage_cgroups_mode: Some(CgroupsMode::Full),
        ..CriuOptions::default()
    };
    let nobody = CriuOverrides::default();
    assert_eq!(option_refusals(&asked, &nobody).len(), 2);
    let mut given = nobody;
    given.set("lsm-profile", "apparmor:mine").unwrap();
    let found = option_refusals(&asked, &given);
    assert!(found.len() == 1 && found[0].what.contains("manage-cgroups-mode"));
    let soft = CriuOptions {
        manage_cgroups_mode: Some(CgroupsMode::Soft),
        ..CriuOptions::default()
    };
    assert_eq!(option_refusals(&soft, &CriuOverrides::default()), []);
}

#[test]
fn names_are_read_as_they_are_written() {
    for allow in Allow::ALL {
        assert_eq!(allow.name().parse::<Allow>().unwrap(), allow);
        assert_eq!(
            serde_json::from_value::<Allow>(json!(allow.name())).unwrap(),
            allow
        );
    }
    let error = "all".parse::<Allow>().unwrap_err().to_string();
    assert!(error.contains("host-mounts"), "{error}");
}
