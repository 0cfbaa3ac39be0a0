//! `config.json` of a bundle: read, edited, compared.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use transship_checkpoint::annotations::{Annotations, MissingNamespaces};
use transship_checkpoint::criu_options::CriuOptions;
use transship_checkpoint::namespaces;
use transship_checkpoint::spec::{HookPoint, Spec};
use transship_sandbox::admission::Allowance;
use transship_sandbox::admission::foreign_spec::{Place, refusals};
use transship_sandbox::shared_dirs::shared_mounts;

const HOOK: &str = "/usr/local/bin/transship-hook";

/// What the front does to a spec that somebody else has written.
pub(crate) fn spec(data: &[u8]) {
    let Ok(original) = Spec::parse(data) else {
        return;
    };
    let again = Spec::parse(&original.to_json()).expect("what was parsed can be written");
    let value: Value = serde_json::from_slice(&original.to_json()).expect("it is JSON");
    // No field of a spec is one, and their last digit may be another whenever they are read.
    if !has_fraction(&value) {
        assert_eq!(again, original);
    }
    look_at(&original);
    let mut spec = original.clone();
    for point in [HookPoint::CreateRuntime, HookPoint::Poststop] {
        spec.add_hook(point, HOOK, &["transship-hook", point.key()]);
        let once = spec.clone();
        spec.add_hook(point, HOOK, &["transship-hook", point.key()]);
        assert_eq!(spec, once, "a hook is added once");
    }
    spec.set_annotation("dev.transship/restore", "web");
    assert_eq!(
        spec.annotations()
            .get("dev.transship/restore")
            .map(String::as_str),
        Some("web")
    );
    assert_eq!(
        spec.remove_annotation("dev.transship/restore").as_deref(),
        Some("web")
    );
    spec.set_sysctl("net.mptcp.enabled", "0");
    let joined = namespaces::joined(&spec);
    if let Ok(mut plan) = namespaces::replace_missing(&joined, |_| true, MissingNamespaces::New) {
        for namespace in plan.to_make().collect::<Vec<_>>() {
            plan.made(namespace, PathBuf::from("/run/transship/pods/x/ns/net"));
        }
        let _changes = namespaces::apply(&mut spec, &plan);
    }
    spec.keep_mounts(&["/proc"]);
    spec.remove_hooks();
    assert!(spec.get("/hooks").is_none(), "hooks are left");
    Spec::parse(&spec.to_json()).expect("what was edited can be written");
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(items) => items.iter().any(has_fraction),
        Value::Object(fields) => fields.values().any(has_fraction),
        _ => false,
    }
}

fn look_at(spec: &Spec) {
    if let Ok(annotations) = Annotations::read("x", Some(&spec.annotations())) {
        let options = annotations.criu.over(CriuOptions::default());
        let _flags = (options.dump_arguments(""), options.restore_flags());
        let config = options.restore_config("");
        let is_line = |line: &str| !line.contains(|it: char| it.is_control());
        assert!(config.lines().all(is_line), "{config:?}");
    }
    let _allowed = Allowance::of(spec, &Path::to_path_buf);
    let _mounts = (
        spec.bind_mounts(),
        spec.cgroup_mount(),
        shared_mounts(spec, "x"),
    );
    let value = serde_json::from_slice(&spec.to_json()).expect("it is JSON");
    let place = Place {
        old: ("default", "x"),
        joined: &BTreeSet::new(),
    };
    if refusals(&value, &place).is_empty() {
        for field in ["/hooks", "/linux/devices", "/linux/intelRdt", "/vm"] {
            let there = value.pointer(field).is_some_and(|it| !is_empty(it));
            assert!(!there, "{field} is taken from a checkpoint");
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        value => value.is_null(),
    }
}
