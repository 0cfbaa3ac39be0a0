use super::*;

#[test]
fn states_of_runc_are_read() {
    let json = r#"{"ociVersion":"1.2.1","id":"s","status":"creating","pid":7,"bundle":"/b",
        "annotations":{"dev.transship/sandbox":"s"}}"#;
    let state: HookState = serde_json::from_str(json).unwrap();
    assert_eq!((state.id.as_str(), state.pid), ("s", 7));
    assert_eq!(state.annotations["dev.transship/sandbox"], "s");
    let state: HookState = serde_json::from_str(r#"{"id":"s","status":"stopped"}"#).unwrap();
    assert!(state.annotations.is_empty());
}

#[test]
fn poststop_of_nothing_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let state = HookState {
        id: "s".into(),
        status: "stopped".into(),
        pid: 0,
        annotations: HashMap::new(),
    };
    poststop(&state, dir.path(), dir.path()).unwrap();
    assert!(
        poststop(
            &HookState {
                id: "../s".into(),
                ..state
            },
            dir.path(),
            dir.path()
        )
        .is_err()
    );
}

fn node(dir: &Path) -> Node {
    Node {
        run_dir: dir.into(),
        store: Store::at(dir.join("checkpoints")),
        consumed: dir.join("consumed"),
        runs: dir.join("runs"),
        images: dir.join("images"),
        config: dir.join("node.toml"),
        origins: dir.join("origins"),
        log_dir: dir.join("log"),
        tool: "transship".into(),
    }
}

#[test]
fn a_container_that_is_no_sandbox_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    for (status, annotations) in [
        ("creating", vec![("dev.transship/sandbox", "other")]),
        ("creating", vec![("dev.transship/restore", "web")]),
        ("stopped", vec![("dev.transship/sandbox", "s")]),
    ] {
        let annotations = annotations
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        let state = HookState {
            id: "s".into(),
            status: status.into(),
            pid: 1,
            annotations,
        };
        create_runtime(&state, &node).unwrap();
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}

/// Its record is asked before the registry, which may not be allowed any more, and before the pull, which is forgotten.
#[test]
fn a_pod_that_had_its_restore_needs_no_registry() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let digest = "0123456789abcdef".repeat(4);
    let annotations = [
        (
            "dev.transship/restore-image",
            format!("registry.example/web@sha256:{digest}"),
        ),
        ("io.kubernetes.cri.container-type", "sandbox".to_owned()),
        ("io.kubernetes.cri.sandbox-uid", "u".to_owned()),
    ];
    let annotations = annotations.map(|(key, value)| (key.to_owned(), value));
    let state = HookState {
        id: "s".into(),
        status: "creating".into(),
        pid: 1,
        annotations: annotations.into(),
    };
    let annotations = Annotations::read("s", Some(&state.annotations)).unwrap();
    let chosen = || {
        let consumed = Consumed::by(&node.consumed, &Owner::Pod("u".into())).unwrap();
        chosen(&state, &annotations, &node, Some(&consumed))
    };
    assert!(chosen().is_err(), "the registry is not allowed");
    let mut consumed = Consumed::by(&node.consumed, &Owner::Pod("u".into())).unwrap();
    consumed
        .add_container(("web", Some(1)), "app", "app")
        .unwrap();
    assert_eq!(chosen().unwrap().as_deref(), Some("web"));
    assert!(!node.images.try_exists().unwrap(), "nothing is asked for");
}
