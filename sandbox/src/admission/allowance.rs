//! What the spec of a new container allows the processes in it.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;
use transship_checkpoint::criu_images::mounts::flags;
use transship_checkpoint::criu_images::user_namespace::{IdMappings, IdRange};
use transship_checkpoint::spec::Spec;

use super::capabilities::{Capabilities, SETGID, SETUID};

/// Names of the resource limits of an OCI spec, in the order of their numbers.
pub(super) const LIMITS: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

/// A mount of the spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecMount {
    /// Where, as the spec has it.
    pub name: PathBuf,
    /// Where, without symbolic links.
    pub destination: PathBuf,
    /// Its type; `bind` for every bind mount.
    pub kind: String,
    /// What is mounted, as the spec has it.
    pub source: PathBuf,
    /// `MS_RDONLY` and the like that it has.
    pub flags: u32,
}

/// What processes of a container may be and do.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Allowance {
    /// Id of the user that it starts as.
    pub user: u32,
    /// Its group, and the supplementary ones.
    pub groups: Vec<u32>,
    /// Whether processes may take any user id, and any group id.
    pub any_user: bool,
    /// Whether processes may take any group id.
    pub any_group: bool,
    /// What a process can have, now or after it has executed a file.
    pub capabilities: Capabilities,
    /// What it can gain by executing a file.
    pub bounding: Capabilities,
    /// Whether executing a file gains nothing.
    pub no_new_privileges: bool,
    /// Hard limits by their number.
    pub limits: BTreeMap<usize, u64>,
    /// `oom_score_adj`, if it says one.
    pub oom_score_adj: Option<i32>,
    /// Whether it says how processes are scheduled.
    pub has_scheduler: bool,
    /// The seccomp profile.
    pub seccomp: Option<Value>,
    /// `apparmor:NAME` or `selinux:LABEL`.
    pub lsm_profile: Option<String>,
    /// The namespaces that are not the node's, by their OCI names.
    pub namespaces: Vec<String>,
    /// Those of them that are joined, and where they are.
    pub joined: Vec<(String, PathBuf)>,
    /// The first port that everybody may bind, if it says so.
    pub first_free_port: Option<u32>,
    /// Mappings of the user namespace.
    pub id_mappings: IdMappings,
    /// Whether the root is read-only.
    pub read_only_root: bool,
    /// The mounts.
    pub mounts: Vec<SpecMount>,
    /// Paths whose content is hidden.
    pub masked: Vec<PathBuf>,
    /// Paths that are read-only.
    pub read_only: Vec<PathBuf>,
    /// Whether sockets of other programs may be connected to (`ext-unix-sk`).
    pub external_sockets: bool,
    /// Device nodes: path, type, major and minor number.
    pub devices: Vec<(PathBuf, String, i64, i64)>,
}

impl Allowance {
    /// Reads it out of a spec. `resolve` gives a path of the container without symbolic links.
    #[must_use]
    pub fn of(spec: &Spec, resolve: &dyn Fn(&Path) -> PathBuf) -> Self {
        let user = id(spec.get("/process/user/uid"));
        let no_new_privileges = spec.get("/process/noNewPrivileges") == Some(&Value::Bool(true));
        let set = |name: &str| capabilities(spec.get(&format!("/process/capabilities/{name}")));
        let bounding = set("bounding");
        // What an executed file lets through: root's has all of the bounding set, and so has a
        // set-user-id file, unless nothing can be gained. Then a user has what is ambient.
        let capabilities = match (user, no_new_privileges) {
            (0, _) => bounding.with(set("permitted")),
            (_, false) => bounding,
            (_, true) => set("ambient"),
        };
        let may = |capability: Capabilities| user == 0 && capabilities.has(capability);
        let mut groups = vec![id(spec.get("/process/user/gid"))];
        groups.extend(list(spec.get("/process/user/additionalGids")).map(|group| id(Some(group))));
        let paths = |pointer: &str| -> Vec<PathBuf> {
            list(spec.get(pointer))
                .filter_map(|path| Some(resolve(Path::new(path.as_str()?))))
                .collect()
        };
        Self {
            user,
            groups,
            any_user: may(SETUID) && may(SETGID),
            any_group: may(SETGID),
            capabilities,
            bounding,
            no_new_privileges,
            limits: limits(spec),
            oom_score_adj: spec
                .get("/process/oomScoreAdj")
                .and_then(Value::as_i64)
                .and_then(|score| i32::try_from(score).ok()),
            has_scheduler: spec.get("/process/scheduler").is_some_and(Value::is_object),
            seccomp: spec
                .get("/linux/seccomp")
                .filter(|it| it.is_object())
                .cloned(),
            lsm_profile: lsm_profile(spec),
            namespaces: list(spec.get("/linux/namespaces"))
                .filter_map(|it| Some(it["type"].as_str()?.to_owned()))
                .collect(),
            joined: list(spec.get("/linux/namespaces"))
                .filter_map(|it| {
                    Some((it["type"].as_str()?.to_owned(), it["path"].as_str()?.into()))
                })
                .collect(),
            first_free_port: spec
                .get("/linux/sysctl/net.ipv4.ip_unprivileged_port_start")
                .and_then(|port| port.as_str()?.trim().parse().ok()),
            id_mappings: IdMappings {
                uids: ranges(spec.get("/linux/uidMappings")),
                gids: ranges(spec.get("/linux/gidMappings")),
            },
            read_only_root: spec.get("/root/readonly") == Some(&Value::Bool(true)),
            mounts: list(spec.get("/mounts"))
                .filter_map(|mount| spec_mount(mount, resolve))
                .collect(),
            masked: paths("/linux/maskedPaths"),
            read_only: paths("/linux/readonlyPaths"),
            // No spec says so: it is an option of CRIU.
            external_sockets: false,
            devices: devices(spec),
        }
    }
}

/// The device nodes that a spec names.
fn devices(spec: &Spec) -> Vec<(PathBuf, String, i64, i64)> {
    list(spec.get("/linux/devices"))
        .filter_map(|device| {
            Some((
                clean(Path::new(device["path"].as_str()?)),
                device["type"].as_str()?.to_owned(),
                device["major"].as_i64().unwrap_or_default(),
                device["minor"].as_i64().unwrap_or_default(),
            ))
        })
        .collect()
}

fn spec_mount(mount: &Value, resolve: &dyn Fn(&Path) -> PathBuf) -> Option<SpecMount> {
    let name = clean(Path::new(mount["destination"].as_str()?));
    let destination = resolve(&name);
    let mut kind = mount["type"].as_str().unwrap_or("bind").to_owned();
    let mut set = 0;
    for option in list(Some(&mount["options"])).filter_map(Value::as_str) {
        match option {
            "bind" | "rbind" => kind = "bind".to_owned(),
            "ro" | "rro" => set |= flags::READ_ONLY,
            "rw" | "rrw" => set &= !flags::READ_ONLY,
            "nosuid" | "rnosuid" => set |= flags::NO_SUID,
            "suid" | "rsuid" => set &= !flags::NO_SUID,
            "nodev" | "rnodev" => set |= flags::NO_DEV,
            "dev" | "rdev" => set &= !flags::NO_DEV,
            "noexec" | "rnoexec" => set |= flags::NO_EXEC,
            "exec" | "rexec" => set &= !flags::NO_EXEC,
            _ => {}
        }
    }
    Some(SpecMount {
        name,
        destination,
        kind,
        source: mount["source"].as_str().unwrap_or_default().into(),
        flags: set,
    })
}

fn limits(spec: &Spec) -> BTreeMap<usize, u64> {
    list(spec.get("/process/rlimits"))
        .filter_map(|limit| {
            let name = limit["type"].as_str()?;
            let number = LIMITS.iter().position(|known| *known == name)?;
            Some((number, limit["hard"].as_u64()?))
        })
        .collect()
}

fn lsm_profile(spec: &Spec) -> Option<String> {
    let named = |pointer, lsm| {
        let name = spec.get(pointer)?.as_str()?;
        (!name.is_empty()).then(|| format!("{lsm}:{name}"))
    };
    named("/process/apparmorProfile", "apparmor")
        .or_else(|| named("/process/selinuxLabel", "selinux"))
}

fn capabilities(names: Option<&Value>) -> Capabilities {
    list(names)
        .filter_map(|name| Capabilities::named(name.as_str()?))
        .fold(Capabilities::default(), Capabilities::with)
}

fn ranges(mappings: Option<&Value>) -> Vec<IdRange> {
    list(mappings)
        .map(|it| {
            (
                id(it.get("containerID")),
                id(it.get("hostID")),
                id(it.get("size")),
            )
        })
        .collect()
}

fn id(value: Option<&Value>) -> u32 {
    value
        .and_then(Value::as_u64)
        .and_then(|id| u32::try_from(id).ok())
        .unwrap_or_default()
}

pub(super) fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

/// A path as if it began at the root, without `.` and `..`.
pub(super) fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}
