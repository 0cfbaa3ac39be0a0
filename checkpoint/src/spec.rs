//! A bundle's `config.json`, edited without losing what this program does not know.
//!
//! The specs come from containerd, from runc's and crun's own extensions and from NRI plugins:
//! typed structs would drop every field that is younger than they are. So the JSON tree is edited
//! in place, and only the few parts that matter here are looked at:
//!
//! ```text
//! { "annotations": { KEY: VALUE },
//!   "hooks": { "createRuntime": [ { "path", "args", ... } ], "poststop": [ ... ] },
//!   "hostname": NAME,
//!   "mounts": [ { "destination", "source", ... } ],
//!   "linux": { "namespaces": [ { "type": "network", "path": "/proc/7/ns/net" }, ... ] } }
//! ```

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// File name of the spec in a bundle.
pub const CONFIG_FILE: &str = "config.json";

/// An OCI runtime spec.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec(Value);

/// The points of a container's life at which a hook runs that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPoint {
    /// The namespaces exist, the program does not run yet; in the runtime's mount namespace.
    CreateRuntime,
    /// The container has been deleted.
    Poststop,
}

impl HookPoint {
    /// The name in an OCI spec.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::CreateRuntime => "createRuntime",
            Self::Poststop => "poststop",
        }
    }
}

impl Spec {
    /// Parses a spec.
    ///
    /// # Errors
    /// Not a JSON object.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice::<Map<String, Value>>(json).map(|map| Self(Value::Object(map)))
    }

    /// The value at a JSON pointer (RFC 6901).
    #[must_use]
    pub fn get(&self, pointer: &str) -> Option<&Value> {
        self.0.pointer(pointer)
    }

    /// `linux.cgroupsPath`: a path, or `slice:prefix:name` for systemd.
    #[must_use]
    pub fn cgroups_path(&self) -> Option<&str> {
        self.0.pointer("/linux/cgroupsPath")?.as_str()
    }

    /// The spec as JSON.
    ///
    /// # Panics
    /// Never: it was parsed from JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.0).expect("a JSON value can always be written")
    }

    /// Its annotations.
    #[must_use]
    pub fn annotations(&self) -> HashMap<String, String> {
        self.0["annotations"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    }

    /// Destination and source of every bind mount.
    #[must_use]
    pub fn bind_mounts(&self) -> Vec<(PathBuf, PathBuf)> {
        let mounts = self.0["mounts"].as_array().into_iter().flatten();
        let bind = |mount: &&Value| {
            let options = mount["options"].as_array().into_iter().flatten();
            mount["type"] == "bind"
                || options
                    .filter_map(Value::as_str)
                    .any(|option| matches!(option, "bind" | "rbind"))
        };
        let path = |value: &Value| Some(PathBuf::from(value.as_str()?));
        mounts
            .filter(bind)
            .filter_map(|mount| Some((path(&mount["destination"])?, path(&mount["source"])?)))
            .collect()
    }

    /// Where it mounts the cgroups.
    #[must_use]
    pub fn cgroup_mount(&self) -> Option<&str> {
        let mut mounts = self.0["mounts"].as_array().into_iter().flatten();
        mounts.find(|mount| mount["type"] == "cgroup")?["destination"].as_str()
    }

    /// Where it mounts something.
    #[must_use]
    pub fn mount_destinations(&self) -> Vec<PathBuf> {
        let mounts = self.0["mounts"].as_array().into_iter().flatten();
        mounts
            .filter_map(|mount| mount["destination"].as_str().map(PathBuf::from))
            .collect()
    }

    /// Sets an annotation.
    pub fn set_annotation(&mut self, key: &str, value: &str) {
        self.object("annotations")
            .insert(key.to_owned(), json!(value));
    }

    /// Removes an annotation, and gives its value.
    pub fn remove_annotation(&mut self, key: &str) -> Option<String> {
        let value = self.0["annotations"].as_object_mut()?.remove(key)?;
        value.as_str().map(ToOwned::to_owned)
    }

    /// Sets what is at a JSON pointer whose parent is there.
    pub fn set(&mut self, pointer: &str, value: Value) {
        let (parent, key) = pointer.rsplit_once('/').unwrap_or(("", pointer));
        if let Some(parent) = self.0.pointer_mut(parent).and_then(Value::as_object_mut) {
            parent.insert(key.to_owned(), value);
        }
    }

    /// The sysctls of its namespaces, and their values.
    pub fn sysctls(&self) -> impl Iterator<Item = (&str, &str)> {
        let sysctls = self.get("/linux/sysctl").and_then(Value::as_object);
        let sysctls = sysctls.into_iter().flatten();
        sysctls.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)))
    }

    /// Sets a sysctl of its namespaces.
    pub fn set_sysctl(&mut self, name: &str, value: &str) {
        let linux = self.object("linux");
        let sysctls = linux.entry("sysctl").or_insert_with(|| json!({}));
        if !sysctls.is_object() {
            // Go writes an absent map as null.
            *sysctls = json!({});
        }
        sysctls[name] = json!(value);
    }

    /// Keeps those mounts whose destination is one of these.
    pub fn keep_mounts(&mut self, destinations: &[&str]) {
        let Some(mounts) = self.0["mounts"].as_array_mut() else {
            return;
        };
        mounts.retain(|mount| {
            let destination = mount["destination"].as_str();
            destination.is_some_and(|destination| destinations.contains(&destination))
        });
    }

    /// Removes all its hooks.
    pub fn remove_hooks(&mut self) {
        if let Some(spec) = self.0.as_object_mut() {
            spec.remove("hooks");
        }
    }

    /// Its mounts that have a source, as destination and source, in order.
    pub fn mounts(&self) -> impl Iterator<Item = (&str, &str)> {
        let mounts = self.0["mounts"].as_array().into_iter().flatten();
        mounts.filter_map(|mount| Some((mount["destination"].as_str()?, mount["source"].as_str()?)))
    }

    /// Whether all mounts at `destination` are read-only, as runc reads their options: the last word counts.
    #[must_use]
    pub fn is_read_only(&self, destination: &str) -> bool {
        let mounts = self.0["mounts"].as_array().into_iter().flatten();
        let mut there = mounts.filter(|mount| mount["destination"] == destination);
        there.all(|mount| {
            let options = mount["options"].as_array().into_iter().flatten();
            let mut words = options.filter_map(|option| option.as_str()).rev();
            let last = words.find(|word| ["ro", "rro", "rw", "rrw"].contains(word));
            last.is_some_and(|word| word.ends_with("ro"))
        })
    }

    /// Adds a hook, unless one with this path is there.
    pub fn add_hook(&mut self, point: HookPoint, path: &str, args: &[&str]) {
        let hooks = self
            .object("hooks")
            .entry(point.key())
            .or_insert_with(|| json!([]));
        if !hooks.is_array() {
            // Go writes an absent list as null.
            *hooks = json!([]);
        }
        let hooks = hooks.as_array_mut().expect("it was made an array above");
        if !hooks.iter().any(|hook| hook["path"] == path) {
            hooks.push(json!({ "path": path, "args": args }));
        }
    }

    pub(crate) fn namespaces_mut(&mut self) -> &mut [Value] {
        match self.0.pointer_mut("/linux/namespaces") {
            Some(Value::Array(namespaces)) => namespaces,
            _ => &mut [],
        }
    }

    pub(crate) fn namespaces(&self) -> &[Value] {
        match self.0.pointer("/linux/namespaces") {
            Some(Value::Array(namespaces)) => namespaces,
            _ => &[],
        }
    }

    fn object(&mut self, key: &str) -> &mut Map<String, Value> {
        let root = self.0.as_object_mut().expect("parse accepts objects only");
        let value = root.entry(key).or_insert_with(|| json!({}));
        if !value.is_object() {
            *value = json!({});
        }
        value.as_object_mut().expect("it was made an object above")
    }
}

/// Replaces `path` by the spec, in one step, with the mode and owner that the file has.
///
/// # Errors
/// A system call failed; the file is as it was.
pub fn replace_file(path: &Path, spec: &Spec) -> io::Result<()> {
    let old = fs::metadata(path)?;
    let new = path.with_extension("json.transship");
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&spec.to_json())?;
        fchown(&file, Some(old.uid()), Some(old.gid()))?;
        file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
        fs::rename(&new, path)
    };
    write().inspect_err(|_| {
        // The first error is the one to tell; a leftover has a name that nobody reads.
        drop(fs::remove_file(&new));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_survive() {
        let json = br#"{"ociVersion":"1.2.1","linux":{"netDevices":{"eth0":{"name":"e"}},"x":18446744073709551615},"hooks":null}"#;
        let mut spec = Spec::parse(json).unwrap();
        spec.set_annotation("a", "b");
        spec.add_hook(HookPoint::Poststop, "/bin/h", &["h", "poststop"]);
        let value: Value = serde_json::from_slice(&spec.to_json()).unwrap();
        assert_eq!(
            value,
            json!({
                "ociVersion": "1.2.1",
                "linux": { "netDevices": { "eth0": { "name": "e" } }, "x": u64::MAX },
                "hooks": { "poststop": [{ "path": "/bin/h", "args": ["h", "poststop"] }] },
                "annotations": { "a": "b" },
            })
        );
    }

    #[test]
    fn an_annotation_can_be_removed() {
        let mut spec = Spec::parse(br#"{"annotations":{"a":"b","c":"d"}}"#).unwrap();
        assert_eq!(spec.remove_annotation("a").as_deref(), Some("b"));
        assert_eq!(spec.remove_annotation("a"), None);
        assert_eq!(spec.to_json(), br#"{"annotations":{"c":"d"}}"#);
        let mut none = Spec::parse(b"{}").unwrap();
        assert_eq!(none.remove_annotation("a"), None);
    }

    #[test]
    fn a_hook_is_added_once_and_last() {
        let mut spec = Spec::parse(br#"{"hooks":{"createRuntime":[{"path":"/other"}]}}"#).unwrap();
        for _ in 0..2 {
            spec.add_hook(HookPoint::CreateRuntime, "/h", &["h"]);
        }
        let hooks = &spec.0["hooks"]["createRuntime"];
        assert_eq!(
            hooks,
            &json!([{ "path": "/other" }, { "path": "/h", "args": ["h"] }])
        );
    }

    #[test]
    fn replacing_keeps_the_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONFIG_FILE);
        fs::write(&path, "{}").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
        let mut spec = Spec::parse(b"{}").unwrap();
        spec.set_annotation("a", "b");
        replace_file(&path, &spec).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o604);
        assert_eq!(Spec::parse(&fs::read(&path).unwrap()).unwrap(), spec);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
