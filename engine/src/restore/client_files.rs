//! What nerdctl makes for each of its containers on its own node, made anew on this one.
//!
//! ```text
//!  spec of the checkpoint                                             on this node
//!  mounts  <data root>/.../<id>/{hosts,resolv.conf,hostname}   ->     /var/lib/transship/containers/<namespace>:<id>/
//!  hooks   nerdctl internal oci-hook: network, hosts           ->     none: the runtime front asks CNI
//!  annotations and labels  nerdctl/...                         ->     those that lead to no path and no program
//! ```
//!
//! Nothing of this is taken from the checkpoint but names and addresses, so it needs no `--allow`. Where the operator
//! allows `hooks`, those of nerdctl and its annotations stay, and make the network.
//!
//! The files are there as long as the container's record: what is left without one is removed by the next restore.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value, json};
use transship_checkpoint::manifest::{Container, check_name};
use transship_containerd::Containerd;
use transship_sandbox::admission::foreign_spec::{Allow, Allowed};

use crate::error::{Context, Result};

/// Where the files of all containers are.
const FILES: &str = "/var/lib/transship/containers";
/// What nerdctl's annotations and labels begin with.
const PREFIX: &str = "nerdctl/";
/// Labels of nerdctl that lead to no path: <https://github.com/containerd/nerdctl/blob/main/pkg/labels/labels.go>.
/// `nerdctl rm` removes the directory that `nerdctl/state-dir` names.
const KEPT_LABELS: [&str; 6] = [
    "nerdctl/extraHosts",
    "nerdctl/hostname",
    "nerdctl/name",
    "nerdctl/namespace",
    "nerdctl/networks",
    "nerdctl/platform",
];
const EXTRA_HOSTS: &str = "nerdctl/extraHosts";
const STATE_DIR: &str = "nerdctl/state-dir";
/// Where the names of servers are that are not the node's own cache: systemd-resolved(8).
const RESOLV_CONFS: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The files that a client has made for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum File {
    Hosts,
    ResolvConf,
    Hostname,
}

impl File {
    const ALL: [Self; 3] = [Self::Hosts, Self::ResolvConf, Self::Hostname];

    fn name(self) -> &'static str {
        match self {
            Self::Hosts => "hosts",
            Self::ResolvConf => "resolv.conf",
            Self::Hostname => "hostname",
        }
    }

    fn mounted_on(self) -> PathBuf {
        Path::new("/etc").join(self.name())
    }
}

/// What is taken out of a spec, and the files that are made anew.
#[derive(Debug)]
pub(super) struct ClientFiles {
    dir: PathBuf,
    files: Vec<(File, usize, Value)>,
    /// Those that allowed hooks read.
    annotations: Map<String, Value>,
    hostname: String,
    extra_hosts: Vec<(String, IpAddr)>,
}

/// Takes out of a spec what is made anew for the container `id` of this node.
pub(super) fn take_out(
    spec: &mut Value,
    container: &Container,
    (namespace, id): (&str, &str),
    allowed: &Allowed,
) -> Option<ClientFiles> {
    // The names become directories.
    let plain = |name| check_name("the name", name).is_ok();
    if !plain(namespace) || !plain(id) {
        return None;
    }
    let mut annotations = take_out_annotations(spec);
    if !allowed.contains(&Allow::Hooks) {
        take_out_hooks(spec);
        annotations.clear();
    }
    let files = take_out_files(spec, container);
    (!files.is_empty() || !annotations.is_empty()).then(|| ClientFiles {
        dir: dir(namespace, id),
        files,
        annotations,
        hostname: spec["hostname"].as_str().unwrap_or_default().to_owned(),
        extra_hosts: extra_hosts(&container.labels),
    })
}

fn take_out_files(spec: &mut Value, container: &Container) -> Vec<(File, usize, Value)> {
    let mut files = Vec::new();
    let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) else {
        return files;
    };
    for (at, mount) in mounts.iter().enumerate() {
        files.extend(made_by_client(mount, container).map(|file| (file, at, mount.clone())));
    }
    for (_, at, _) in files.iter().rev() {
        mounts.remove(*at);
    }
    files
}

fn dir(namespace: &str, id: &str) -> PathBuf {
    Path::new(FILES).join(format!("{namespace}:{id}"))
}

/// Which of the files a mount is: one in a directory of the client's, which has the container's name or the
/// client's, or one that was made anew.
fn made_by_client(mount: &Value, container: &Container) -> Option<File> {
    let text = |field: &str| Path::new(mount[field].as_str().unwrap_or_default());
    let (source, destination) = (text("source"), text("destination"));
    let file = { File::ALL.into_iter() }.find(|file| file.mounted_on() == destination)?;
    let state_dir = container.labels.get(STATE_DIR);
    let in_state_dir = state_dir.is_some_and(|dir| source.starts_with(dir));
    let mut names = source.parent()?.components();
    let of_client = names.any(|name| match name {
        Component::Normal(name) => name == container.id.as_str() || name == "nerdctl",
        _ => false,
    });
    let named = source.file_name().is_some_and(|name| name == file.name());
    (named && (of_client || in_state_dir || source.starts_with(FILES))).then_some(file)
}

/// Whether a restore has a file of its own in place of a mount's.
pub(super) fn is_made_anew(mount: &Value, container: &Container) -> bool {
    made_by_client(mount, container).is_some()
}

/// Takes out the annotations by which the hooks of nerdctl know what to do.
fn take_out_annotations(spec: &mut Value) -> Map<String, Value> {
    let mut taken = Map::new();
    if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.retain(|name, value| {
            let of_nerdctl = name.starts_with(PREFIX);
            if of_nerdctl {
                taken.insert(name.clone(), value.take());
            }
            !of_nerdctl
        });
    }
    taken
}

/// Takes out the hooks of nerdctl.
fn take_out_hooks(spec: &mut Value) {
    let points = spec.get_mut("hooks").and_then(Value::as_object_mut);
    let lists = points
        .into_iter()
        .flatten()
        .filter_map(|(_, list)| list.as_array_mut());
    for list in lists {
        list.retain(|hook| !is_of_nerdctl(hook));
    }
}

/// Whether a spec still has hooks that put the container into its networks.
pub(super) fn hooks_make_network(spec: &Value) -> bool {
    let points = spec["hooks"].as_object().into_iter().flatten();
    let mut hooks = points.flat_map(|(_, list)| list.as_array().into_iter().flatten());
    hooks.any(is_of_nerdctl)
}

/// `nerdctl [FLAGS] internal oci-hook POINT`, whatever the program is called.
fn is_of_nerdctl(hook: &Value) -> bool {
    let words = hook["args"].as_array().into_iter().flatten();
    let words: Vec<&str> = words.filter_map(Value::as_str).collect();
    words
        .windows(2)
        .any(|pair| pair == ["internal", "oci-hook"])
}

/// Whether a label of nerdctl may come along.
pub(super) fn keeps_label(name: &str, allowed: &Allowed) -> bool {
    !name.starts_with(PREFIX) || KEPT_LABELS.contains(&name) || allowed.contains(&Allow::Hooks)
}

/// What `--add-host` has given: `["name:address", ...]`.
fn extra_hosts(labels: &BTreeMap<String, String>) -> Vec<(String, IpAddr)> {
    let listed = labels.get(EXTRA_HOSTS).map(String::as_str).unwrap_or("[]");
    let listed: Vec<String> = serde_json::from_str(listed).unwrap_or_default();
    let hosts = listed.iter().filter_map(|host| {
        let (name, address) = host.split_once(':')?;
        Some((name.to_owned(), address.parse().ok()?))
    });
    hosts.collect()
}

impl ClientFiles {
    /// Puts the mounts back into the spec, each with its file on this node, and what allowed hooks read.
    pub(super) fn put_back(&self, spec: &mut Value) {
        for (name, value) in &self.annotations {
            spec["annotations"][name] = value.clone();
        }
        let Some(mounts) = spec["mounts"].as_array_mut() else {
            return;
        };
        for (file, at, mount) in &self.files {
            mounts.insert(*at, self.made_anew(*file, mount));
        }
    }

    /// The rest of the spec has been looked at without this mount: of what the checkpoint says of it there is no more
    /// in this one than whether it can be written.
    fn made_anew(&self, file: File, mount: &Value) -> Value {
        let mut options = mount["options"].as_array().into_iter().flatten();
        let read_only = options.any(|option| option == "ro" || option == "rro");
        json!({
            "destination": file.mounted_on(),
            "type": "bind",
            "source": self.dir.join(file.name()).display().to_string(),
            "options": ["bind", "rprivate", if read_only { "ro" } else { "rw" }],
        })
    }

    /// Writes the files; `addresses` are the container's, as far as they are known.
    pub(super) fn write(&self, addresses: &[String]) -> Result<()> {
        let dir = &self.dir;
        if self.files.is_empty() {
            return Ok(());
        }
        fs::create_dir_all(dir)
            .and_then(|()| fs::set_permissions(dir, Permissions::from_mode(0o711)))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        for (file, _, _) in &self.files {
            let text = match file {
                File::Hosts => self.hosts(addresses),
                File::ResolvConf => resolv_conf(),
                File::Hostname => format!("{}\n", self.hostname),
            };
            let path = dir.join(file.name());
            // The same file: it may be mounted already.
            write_for_all(&path, &text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn hosts(&self, addresses: &[String]) -> String {
        let mut text =
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
        for address in addresses {
            // Without the length of its prefix.
            let address = address.split('/').next().unwrap_or_default();
            let _ = writeln!(text, "{address}\t{}", self.hostname);
        }
        for (name, address) in &self.extra_hosts {
            let _ = writeln!(text, "{address}\t{name}");
        }
        text
    }
}

/// Programs of any user read it, whatever the umask of who restores.
fn write_for_all(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())
}

/// The node's, without name servers that only the node itself reaches.
fn resolv_conf() -> String {
    let read = RESOLV_CONFS.map(|path| fs::read_to_string(path).unwrap_or_default());
    let reachable = read.each_ref().map(|text| without_loopback(text));
    let with_server = reachable.iter().find(|text| text.contains("nameserver"));
    with_server.unwrap_or(&reachable[0]).clone()
}

fn without_loopback(text: &str) -> String {
    let is_own = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = (words.next() == Some("nameserver"))
            .then(|| words.next()?.parse::<IpAddr>().ok())
            .flatten();
        address.is_some_and(|address| address.is_loopback())
    };
    let lines = text.lines().filter(|line| !is_own(line));
    lines.fold(String::new(), |text, line| text + line + "\n")
}

/// Removes the files of a container.
///
/// # Errors
/// They are there and stay.
pub(crate) fn remove(namespace: &str, id: &str) -> Result<()> {
    remove_dir(&dir(namespace, id))
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes the files of containers that are there no more.
///
/// # Errors
/// What containerd answers.
pub(super) async fn sweep(node: &Containerd) -> Result<()> {
    let entries = match fs::read_dir(FILES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("cannot list {FILES}"))?,
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {FILES}"))?;
        let name = entry.file_name();
        let named = name.to_str().and_then(|name| name.split_once(':'));
        let Some((_, id)) = named.filter(|(namespace, _)| *namespace == node.namespace()) else {
            continue;
        };
        match node.container(id).await {
            Err(error) if error.is_not_found() => remove_dir(&entry.path())?,
            found => drop(found?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_any_user_read_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        fs::write(&path, "longer than the new one").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        write_for_all(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o644
        );
    }

    fn mount(source: &str, destination: &str) -> Value {
        json!({"type": "bind", "source": source, "destination": destination, "options": ["bind"]})
    }

    fn nerdctl() -> (Value, Container) {
        let hook = |program: &str, words: &[&str]| json!({"path": program, "args": words});
        let own = [
            "nerdctl",
            "--data-root=/x",
            "internal",
            "oci-hook",
            "createRuntime",
        ];
        let spec = json!({
            "hostname": "web",
            "annotations": {"nerdctl/state-dir": "/etc", "other": "x"},
            "hooks": {
                "createRuntime": [hook("/opt/nerdctl.lima", &own), hook("/bin/gpu", &["gpu"])],
                "postStop": [hook("/opt/nerdctl.lima", &own)],
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                mount("/var/lib/nerdctl/1935/containers/default/abc/resolv.conf", "/etc/resolv.conf"),
                mount("/srv/etchosts/default/abc/hosts", "/etc/hosts"),
                mount("/srv/hostname", "/etc/hostname"),
            ],
        });
        let mut container = Container {
            id: "abc".into(),
            ..Container::default()
        };
        let hosts = r#"["db:10.0.0.9","six:::1","odd"]"#;
        container.labels.insert(EXTRA_HOSTS.into(), hosts.into());
        (spec, container)
    }

    #[test]
    fn files_and_hooks_of_nerdctl_are_made_anew() {
        let (mut spec, container) = nerdctl();
        let nobody = Allowed::new();
        let files = take_out(&mut spec, &container, ("moved", "web2"), &nobody).unwrap();
        assert_eq!(spec["hooks"]["createRuntime"].as_array().unwrap().len(), 1);
        assert_eq!(spec["hooks"]["postStop"], json!([]));
        assert_eq!(spec["annotations"], json!({"other": "x"}));
        assert!(!hooks_make_network(&spec));
        // A file that is the person's own stays one of the node.
        assert_eq!(spec["mounts"].as_array().unwrap().len(), 2);
        assert_eq!(spec["mounts"][1]["source"], "/srv/hostname");

        files.put_back(&mut spec);
        let sources: Vec<_> = { spec["mounts"].as_array().unwrap().iter() }
            .map(|mount| mount["source"].as_str().unwrap())
            .collect();
        let dir = "/var/lib/transship/containers/moved:web2";
        let expected = [
            "proc".to_owned(),
            format!("{dir}/resolv.conf"),
            format!("{dir}/hosts"),
            "/srv/hostname".to_owned(),
        ];
        assert_eq!(sources, expected);
        let hosts = files.hosts(&["10.4.0.7/24".to_owned()]);
        assert!(
            hosts.ends_with("10.4.0.7\tweb\n10.0.0.9\tdb\n::1\tsix\n"),
            "{hosts}"
        );
    }

    /// Started again, the runtime would mount what the checkpoint says.
    #[test]
    fn what_is_made_anew_is_mounted_as_a_file() {
        let (mut spec, container) = nerdctl();
        let options = json!(["lowerdir=/etc:/root", "rshared", "ro"]);
        spec["mounts"][2] = json!({
            "type": "overlay",
            "source": "/srv/etchosts/default/abc/hosts",
            "destination": "/etc/hosts",
            "options": options,
        });
        let taken = take_out(&mut spec, &container, ("moved", "web2"), &Allowed::new());
        taken.unwrap().put_back(&mut spec);
        let expected = json!({
            "type": "bind",
            "source": "/var/lib/transship/containers/moved:web2/hosts",
            "destination": "/etc/hosts",
            "options": ["bind", "rprivate", "ro"],
        });
        assert_eq!(spec["mounts"][2], expected);
    }

    #[test]
    fn allowed_hooks_stay_and_make_the_network() {
        let (mut spec, container) = nerdctl();
        let hooks = spec["hooks"].clone();
        let allowed = [Allow::Hooks].into();
        let taken = take_out(&mut spec, &container, ("moved", "web2"), &allowed).unwrap();
        assert_eq!(spec["hooks"], hooks);
        assert!(hooks_make_network(&spec));
        // Others may not have any: it is put back when the rest has been looked at.
        assert_eq!(spec["annotations"], json!({"other": "x"}));
        taken.put_back(&mut spec);
        assert!(spec["annotations"]["nerdctl/state-dir"].is_string());
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let (mut spec, container) = nerdctl();
        let before = spec["mounts"].clone();
        for name in ["..", "a/b", ""] {
            let taken = take_out(&mut spec, &container, ("moved", name), &Allowed::new());
            assert!(taken.is_none(), "{name}");
            assert_eq!(spec["mounts"], before);
        }
    }

    #[test]
    fn labels_that_lead_to_a_path_stay_behind() {
        for (name, kept) in [
            ("mine", true),
            ("nerdctl/name", true),
            ("nerdctl/state-dir", false),
            ("nerdctl/log-uri", false),
        ] {
            assert_eq!(keeps_label(name, &Allowed::new()), kept, "{name}");
            assert!(keeps_label(name, &[Allow::Hooks].into()));
        }
    }

    #[test]
    fn name_servers_of_the_node_itself_are_left_out() {
        let text = "search a\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 10.0.0.2\n";
        assert_eq!(without_loopback(text), "search a\nnameserver 10.0.0.2\n");
    }
}
