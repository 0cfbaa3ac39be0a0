//! What a spec that comes out of a checkpoint may ask of this node.
//!
//! A restore outside of the CRI makes a container of the spec in the checkpoint. Whoever has made the
//! checkpoint has written that spec, so it gets what `ctr run` gives to every container, and what the
//! node's operator allows by name:
//!
//! ```text
//!  spec of the checkpoint --> each field that is known to be harmless, or harmless as it is here
//!                         `-> all others: a refusal, which names the field and how to allow it
//!  allowed: --allow KIND of `transship restore` and `receive`, [restore] and [receive] of node.toml
//! ```
//!
//! A field that this file does not know is refused, in the items of lists as well: a later version of the OCI
//! runtime specification must not add a way around it. Nor must another spelling: the runtimes that are written in Go
//! take `Path` and `path` for the same field, and `acceſſ` for `access`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde_json::Value;
use transship_checkpoint::annotations::PREFIX;
use transship_checkpoint::criu_options::{CriuOptions, CriuOverrides, OPTIONS};

use crate::device_rules::OF_EVERYBODY;

/// Something that a checkpoint may ask for and only the node's operator can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Allow {
    /// Programs of the node that run beside the container (OCI hooks).
    Hooks,
    /// CRIU's configuration, and options of the manifest that choose a security profile or cgroups.
    CriuOptions,
    /// Devices of the node.
    Devices,
    /// Files and directories of the node, and file systems other than those of every container.
    HostMounts,
    /// Capabilities beyond those that `ctr run` gives.
    Capabilities,
    /// Namespaces of the node itself.
    HostNamespaces,
    /// A cgroup whose path is not made of the container's namespace and id.
    CgroupPath,
    /// Paths of `/proc` and `/sys` that are masked or read-only in other containers.
    UnmaskedPaths,
    /// Fields of the spec that are not known to be harmless.
    OtherFields,
    /// The name that the sender gives to the image.
    ImageName,
    /// Ports of the node that lead to the container.
    HostPorts,
    /// The program or file that the output went to.
    LogUri,
}

impl Allow {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Hooks,
        Self::CriuOptions,
        Self::Devices,
        Self::HostMounts,
        Self::Capabilities,
        Self::HostNamespaces,
        Self::CgroupPath,
        Self::UnmaskedPaths,
        Self::OtherFields,
        Self::ImageName,
        Self::HostPorts,
        Self::LogUri,
    ];

    /// Its name in `--allow` and `node.toml`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hooks => "hooks",
            Self::CriuOptions => "criu-options",
            Self::Devices => "devices",
            Self::HostMounts => "host-mounts",
            Self::Capabilities => "capabilities",
            Self::HostNamespaces => "host-namespaces",
            Self::CgroupPath => "cgroup-path",
            Self::UnmaskedPaths => "unmasked-paths",
            Self::OtherFields => "other-fields",
            Self::ImageName => "image-name",
            Self::HostPorts => "host-ports",
            Self::LogUri => "log-uri",
        }
    }
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of [`Allow::ALL`].
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is none of {names}", names = Allow::ALL.map(Allow::name).join(", "))]
pub struct UnknownAllow(String);

impl FromStr for Allow {
    type Err = UnknownAllow;

    fn from_str(text: &str) -> Result<Self, UnknownAllow> {
        let found = Self::ALL.into_iter().find(|allow| allow.name() == text);
        found.ok_or_else(|| UnknownAllow(text.to_owned()))
    }
}

/// What the operator allows.
pub type Allowed = BTreeSet<Allow>;

/// Something that a checkpoint asks for and does not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What it asks for, as the end of "it ...".
    pub what: String,
    /// What would allow it.
    pub allow: Allow,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it {} (--allow {})", self.what, self.allow)
    }
}

/// The capabilities of a container that `ctr run` makes.
pub const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What containerd masks in every container since 1.6, without the paths that came later.
pub const MASKED: [&str; 5] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];

/// What is read-only in every container.
pub const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The namespaces that every container has for itself, or shares with a sandbox.
const NAMESPACES: [&str; 5] = ["ipc", "mount", "network", "pid", "uts"];

/// Files of the node that `ctr run --net-host` mounts read-only, on their own path.
const NETWORK_FILES: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];

/// Annotations that mean something to an OCI runtime or to CRIU. What others mean, to plugins of this node
/// (CDI gives devices by them) or to a runtime that is younger, is not known.
const RUNTIME_ANNOTATIONS: [&str; 4] =
    ["org.criu.", "org.systemd.property.", "run.oci.", "io.crun."];

/// Fields whose value gives nothing that the container would not have anyway.
const HARMLESS: [&str; 28] = [
    "/ociVersion",
    "/hostname",
    "/domainname",
    "/root/readonly",
    "/process/terminal",
    "/process/consoleSize",
    "/process/user",
    "/process/args",
    "/process/env",
    "/process/cwd",
    "/process/noNewPrivileges",
    "/process/apparmorProfile",
    "/linux/uidMappings",
    "/linux/gidMappings",
    "/linux/sysctl",
    "/linux/timeOffsets",
    "/linux/personality",
    "/linux/resources/memory",
    "/linux/resources/cpu",
    "/linux/resources/pids",
    "/linux/resources/blockIO",
    "/linux/resources/hugepageLimits",
    "/linux/resources/rdma",
    "/linux/seccomp/defaultAction",
    "/linux/seccomp/defaultErrnoRet",
    "/linux/seccomp/architectures",
    "/linux/seccomp/flags",
    "/linux/seccomp/syscalls",
];

/// Objects whose fields are looked at one by one.
const OBJECTS: [&str; 5] = [
    "/root",
    "/process",
    "/linux",
    "/linux/resources",
    "/linux/seccomp",
];

/// What is asked of the value of a field.
type Rule = fn(&Value, &Place<'_>, &mut Vec<Refusal>);

/// Fields with a rule of their own.
const RULES: [(&str, Rule); 16] = [
    // What is dangerous in these is what they leave out: `refusals` looks at them.
    ("/linux/namespaces", |_, _, _| {}),
    ("/linux/maskedPaths", |_, _, _| {}),
    ("/linux/readonlyPaths", |_, _, _| {}),
    ("/annotations", |value, _, found| annotations(value, found)),
    ("/hooks", |value, _, found| hooks(value, found)),
    ("/mounts", |value, _, found| mounts(value, found)),
    ("/process/capabilities", |value, _, found| {
        capabilities(value, found);
    }),
    ("/linux/devices", |value, _, found| devices(value, found)),
    ("/linux/resources/devices", |value, _, found| {
        device_rules(value, found);
    }),
    ("/linux/resources/unified", |value, _, found| {
        unified(value, found);
    }),
    ("/process/rlimits", |value, _, found| rlimits(value, found)),
    // What the node's rules for packets tell containers by.
    (PACKET_CLASS, |value, _, found| {
        if !is_empty(value) {
            other_field(PACKET_CLASS, found);
        }
    }),
    ("/linux/cgroupsPath", cgroups_path),
    ("/root/path", |value, _, found| {
        if value != "rootfs" {
            let what = format!("has its root at {value} of the node");
            refuse(found, Allow::HostMounts, what);
        }
    }),
    (OOM_SCORE_ADJ, |value, _, found| {
        let is_fine = value.as_i64().is_some_and(|score| score >= 0);
        if !is_fine && !is_empty(value) {
            other_field(OOM_SCORE_ADJ, found);
        }
    }),
    (PROPAGATION, |value, _, found| {
        let is_fine = value
            .as_str()
            .is_some_and(|it| OWN_PROPAGATION.contains(&it));
        if !is_fine && !is_empty(value) {
            other_field(PROPAGATION, found);
        }
    }),
];
const PACKET_CLASS: &str = "/linux/resources/network";
const OOM_SCORE_ADJ: &str = "/process/oomScoreAdj";
const PROPAGATION: &str = "/linux/rootfsPropagation";
/// Nothing that is mounted in the container is seen outside of it.
const OWN_PROPAGATION: [&str; 4] = ["private", "rprivate", "slave", "rslave"];

/// Lists, and the fields of their items that are looked at.
const ITEMS: [(&str, &[&str]); 4] = [
    ("/process/rlimits", &["type", "hard", "soft"]),
    ("/mounts", &["destination", "type", "source", "options"]),
    ("/linux/namespaces", &["type", "path"]),
    (
        "/linux/resources/devices",
        &["allow", "type", "major", "minor", "access"],
    ),
];

/// What of the spec is made anew for this node.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// containerd's namespace and the container's id where the spec comes from: its own cgroup path
    /// is made of them.
    pub old: (&'a str, &'a str),
    /// Kinds of namespaces whose path is replaced by one of this node.
    pub joined: &'a BTreeSet<String>,
}

/// Everything that the spec asks for and only the operator can give.
#[must_use]
pub fn refusals(spec: &Value, place: &Place<'_>) -> Vec<Refusal> {
    let mut found = Vec::new();
    walk_fields(spec, "", place, &mut found);
    for (list, known) in ITEMS {
        items(spec, list, known, &mut found);
    }
    // What is dangerous by being absent.
    namespaces(spec, place, &mut found);
    open_devices(spec, &mut found);
    for (field, required, how) in [
        ("/linux/maskedPaths", &MASKED, "hidden"),
        ("/linux/readonlyPaths", &READ_ONLY, "read-only"),
    ] {
        let there: BTreeSet<_> = strings(spec.pointer(field)).collect();
        let missing: Vec<_> = required
            .iter()
            .copied()
            .filter(|path| !there.contains(path))
            .collect();
        if !missing.is_empty() {
            let what = format!("wants {} not to be {how}", missing.join(", "));
            refuse(&mut found, Allow::UnmaskedPaths, what);
        }
    }
    found
}

/// The options of the manifest that choose confinement, unless `given` by the operator.
#[must_use]
pub fn option_refusals(options: &CriuOptions, given: &CriuOverrides) -> Vec<Refusal> {
    let mut found = Vec::new();
    for option in &OPTIONS {
        let given = given.chosen().any(|(name, _)| name == option.name);
        if let Some(value) = option.closed_value(options)
            && !given
        {
            let what = format!("asks for {} of CRIU ({value:?})", option.name);
            refuse(&mut found, Allow::CriuOptions, what);
        }
    }
    found
}

fn refuse(found: &mut Vec<Refusal>, allow: Allow, what: impl Into<String>) {
    found.push(Refusal {
        what: what.into(),
        allow,
    });
}

fn strings(value: Option<&Value>) -> impl Iterator<Item = &str> {
    let list = value.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Each field has its rule here, or is refused.
fn walk_fields(value: &Value, path: &str, place: &Place<'_>, found: &mut Vec<Refusal>) {
    let Some(fields) = value.as_object() else {
        if !is_empty(value) {
            let what = format!("has a {path} that is no object");
            refuse(found, Allow::OtherFields, what);
        }
        return;
    };
    for (name, value) in fields {
        let path = format!("{path}/{name}");
        if HARMLESS.contains(&path.as_str()) {
            continue;
        }
        if OBJECTS.contains(&path.as_str()) {
            walk_fields(value, &path, place, found);
        } else if let Some((_, rule)) = RULES.iter().find(|(known, _)| *known == path) {
            rule(value, place, found);
        } else if !is_empty(value) || is_spelling_of_known(&path) {
            // A runtime in Go takes other spellings for a field that is known, and an empty one takes that away.
            other_field(&path, found);
        }
    }
}

fn other_field(path: &str, found: &mut Vec<Refusal>) {
    let field = path[1..].replace('/', ".");
    let what = format!("has {field} in its spec, which other containers do not have");
    refuse(found, Allow::OtherFields, what);
}

/// As Go's encoding/json compares names: without case, and with `ſ` for `s` and the sign of Kelvin for `k`.
fn is_spelling_of_known(path: &str) -> bool {
    let folded = |text: &str| -> String {
        let one = |letter: char| match letter {
            '\u{17f}' => 's',
            '\u{212a}' => 'k',
            other => other.to_ascii_lowercase(),
        };
        text.chars().map(one).collect()
    };
    let rules = RULES.iter().map(|(known, _)| known);
    let mut known = HARMLESS.iter().chain(&OBJECTS).chain(rules);
    known.any(|known| *known != path && folded(known) == folded(path))
}

fn items(spec: &Value, list: &str, known: &[&str], found: &mut Vec<Refusal>) {
    let items = spec.pointer(list).and_then(Value::as_array);
    let fields = items.into_iter().flatten().filter_map(Value::as_object);
    let unknown: BTreeSet<_> = fields
        .flat_map(|item| item.keys())
        .filter(|name| !known.contains(&name.as_str()))
        .collect();
    for name in unknown {
        let list = list[1..].replace('/', ".");
        let what = format!("has {name:?} in its {list}, which other containers do not have");
        refuse(found, Allow::OtherFields, what);
    }
}

/// Limits above those of every process without CAP_SYS_NICE give what that capability is for: real-time priority, and
/// nice values below 0 (`getrlimit(2)`: 20 stands for 0).
fn rlimits(value: &Value, found: &mut Vec<Refusal>) {
    for limit in value.as_array().into_iter().flatten() {
        let kind = limit["type"].as_str().unwrap_or_default();
        let most = match kind.to_uppercase().trim_start_matches("RLIMIT_") {
            "RTPRIO" => 0,
            "NICE" => 20,
            _ => continue,
        };
        let is_fine = |value: &Value| value.as_u64().is_some_and(|it| it <= most);
        if !is_fine(&limit["hard"]) || !is_fine(&limit["soft"]) {
            let what = format!("may raise its priority ({kind})");
            refuse(found, Allow::Capabilities, what);
        }
    }
}

fn annotations(value: &Value, found: &mut Vec<Refusal>) {
    for name in value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, _)| name)
    {
        if RUNTIME_ANNOTATIONS
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            let what = format!("has the annotation {name:?}, which configures CRIU or the runtime");
            refuse(found, Allow::CriuOptions, what);
        } else if !name.starts_with(PREFIX) {
            let what = format!("has the annotation {name:?}, which a part of this node may act on");
            refuse(found, Allow::OtherFields, what);
        }
    }
}

fn hooks(value: &Value, found: &mut Vec<Refusal>) {
    let points = value.as_object().into_iter().flatten();
    let programs: BTreeSet<String> = points
        .flat_map(|(_, hooks)| hooks.as_array().into_iter().flatten())
        .map(|hook| hook["path"].to_string())
        .collect();
    if !programs.is_empty() || !(value.is_object() || value.is_null()) {
        let programs = programs.into_iter().collect::<Vec<_>>().join(", ");
        let what = format!("has hooks, which run programs of the node as root: {programs}");
        refuse(found, Allow::Hooks, what);
    }
}

fn mounts(value: &Value, found: &mut Vec<Refusal>) {
    for mount in value.as_array().into_iter().flatten() {
        let text = |field: &str| mount[field].as_str().unwrap_or_default();
        let (kind, source, destination) = (text("type"), text("source"), text("destination"));
        let has = |option: &str| strings(mount.get("options")).any(|found| found == option);
        let bind = has("bind") || has("rbind");
        // Of several the runtimes take the last one, and what is said of all below it after that.
        let read_only = has("ro") && !has("rw") && !has("rrw");
        let harmless = match kind {
            _ if bind => read_only && source == destination && NETWORK_FILES.contains(&source),
            "tmpfs" | "devpts" | "mqueue" => true,
            "proc" => destination == "/proc",
            "sysfs" => destination == "/sys" && read_only,
            "cgroup" | "cgroup2" => destination == "/sys/fs/cgroup" && read_only,
            _ => false,
        };
        // Of what is there already, by whatever type: a /sys that can be written.
        if !harmless || has("remount") {
            let what = match bind {
                true => format!("mounts {source} on {destination}"),
                false => format!("mounts the {kind} {source} on {destination}"),
            };
            refuse(found, Allow::HostMounts, what);
        }
    }
}

fn capabilities(value: &Value, found: &mut Vec<Refusal>) {
    let sets = value.as_object().into_iter().flatten();
    let more: BTreeSet<&str> = sets
        .flat_map(|(_, set)| strings(Some(set)))
        .filter(|name| !CAPABILITIES.contains(name))
        .collect();
    if !more.is_empty() {
        let what = format!("has {}", more.into_iter().collect::<Vec<_>>().join(", "));
        refuse(found, Allow::Capabilities, what);
    }
}

fn devices(value: &Value, found: &mut Vec<Refusal>) {
    for device in value.as_array().into_iter().flatten() {
        let what = format!("has the device {}", device["path"].as_str().unwrap_or("?"));
        refuse(found, Allow::Devices, what);
    }
}

fn device_rules(value: &Value, found: &mut Vec<Refusal>) {
    let harmless = |rule: &Value| {
        let number = |field: &str| rule[field].as_i64();
        let known = OF_EVERYBODY.iter().any(|(major, minor)| {
            number("major") == Some(*major) && (minor.is_none() || number("minor") == *minor)
        });
        rule["allow"] == false
            // Devices can be made and not opened.
            || rule["access"] == "m"
            || rule["type"] == "c" && known
    };
    for rule in value.as_array().into_iter().flatten() {
        if !harmless(rule) {
            let number = |field: &str| {
                rule[field]
                    .as_i64()
                    .map_or("*".to_owned(), |n| n.to_string())
            };
            let what = format!(
                "may open devices of the node ({} {}:{})",
                rule["type"].as_str().unwrap_or("a"),
                number("major"),
                number("minor")
            );
            refuse(found, Allow::Devices, what);
        }
    }
}

/// runc begins with no device, and crun on cgroup v1 with those of the cgroup above: there they are closed by a rule.
fn open_devices(spec: &Value, found: &mut Vec<Refusal>) {
    let rules = spec.pointer("/linux/resources/devices");
    let mut rules = rules.and_then(Value::as_array).into_iter().flatten();
    let is_any = |number: &Value| number.is_null() || number == -1;
    let is_closed = rules.any(|rule| {
        rule["allow"] == false
            && (rule["type"].is_null() || rule["type"] == "a")
            && is_any(&rule["major"])
            && is_any(&rule["minor"])
            && rule["access"] == "rwm"
    });
    if !is_closed && found.iter().all(|refusal| refusal.allow != Allow::Devices) {
        let what = "has no rule that closes the devices of the node";
        refuse(found, Allow::Devices, what);
    }
}

/// Files of a cgroup of v2 that are written: limits of controllers, and no file that moves processes of the
/// node into the cgroup, or acts on it.
fn unified(value: &Value, found: &mut Vec<Refusal>) {
    let files = value.as_object().into_iter().flatten();
    for (name, _) in files.filter(|(name, _)| name.starts_with("cgroup.") || name.contains('/')) {
        let what = format!("writes to {name} of its cgroup");
        refuse(found, Allow::CgroupPath, what);
    }
}

/// containerd's clients write `/<namespace>/<id>`, with systemd `<slice>:<prefix>:<id>`.
fn cgroups_path(value: &Value, place: &Place<'_>, found: &mut Vec<Refusal>) {
    let path = value.as_str().unwrap_or_default();
    let (namespace, id) = place.old;
    let with_systemd = path.split(':').collect::<Vec<_>>().try_into().is_ok_and(
        |[slice, prefix, name]: [&str; 3]| {
            ["", "system.slice"].contains(&slice)
                && !prefix.is_empty()
                && !prefix.contains(['/', '.'])
                && name == id
        },
    );
    if !with_systemd && path != format!("/{namespace}/{id}") && !path.is_empty() {
        let what = format!("wants the cgroup {path}");
        refuse(found, Allow::CgroupPath, what);
    }
}

fn namespaces(spec: &Value, place: &Place<'_>, found: &mut Vec<Refusal>) {
    let list = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    let mut own = BTreeSet::new();
    for namespace in list.into_iter().flatten() {
        let kind = namespace["type"].as_str().unwrap_or_default();
        own.insert(kind);
        let path = namespace["path"].as_str().unwrap_or_default();
        if !path.is_empty() && !place.joined.contains(kind) {
            let what = format!("joins the {kind} namespace {path}");
            refuse(found, Allow::HostNamespaces, what);
        }
    }
    let of_node: Vec<_> = NAMESPACES
        .iter()
        .copied()
        .filter(|kind| !own.contains(kind))
        .collect();
    if !of_node.is_empty() {
        let what = format!(
            "shares namespaces with the node itself: {}",
            of_node.join(", ")
        );
        refuse(found, Allow::HostNamespaces, what);
    }
}

#[cfg(test)]
mod tests;
