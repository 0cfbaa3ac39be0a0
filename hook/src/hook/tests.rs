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

#[test]
fn a_container_that_is_no_sandbox_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node {
        run_dir: dir.path().into(),
        store: Store::at(dir.path().join("checkpoints")),
        consumed: dir.path().join("consumed"),
        runs: dir.path().join("runs"),
        images: dir.path().join("images"),
        config: dir.path().join("node.toml"),
        log_dir: dir.path().join("log"),
        tool: "transship".into(),
    };
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
