use super::*;
use transship_checkpoint::manifest::Manifest;

fn checkpoint(root: &Path) -> Checkpoint {
    let images = root.join("web/counter/checkpoint");
    fs::create_dir_all(&images).unwrap();
    fs::write(images.join("core-1.img"), "core").unwrap();
    fs::write(images.join("descriptors.json"), "[]").unwrap();
    let manifest = Manifest::parse(
        br#"{"format":{"version":1},"name":"web","created":1,
            "source":{"hostname":"","architecture":"","kernel":"","containerd":""},
            "containers":[{"name":"counter","id":"c1","namespace":"default",
                "image":{"name":"","digest":"","chain_id":""},
                "snapshotter":"transship","runtime":"io.containerd.runc.v2","files":[]}]}"#,
    )
    .unwrap();
    Checkpoint {
        dir: root.join("web"),
        manifest,
        sealed: None,
    }
}

fn staged(root: &Path) -> (PodDir, Staged) {
    let checkpoint = checkpoint(root);
    let pod = PodDir::at(&root.join("run"), "sandbox").unwrap();
    let staged = pod
        .stage("counter", &checkpoint, &checkpoint.manifest.containers[0])
        .unwrap();
    (pod, staged)
}

#[test]
fn a_staged_restore_is_found_again() {
    let root = tempfile::tempdir().unwrap();
    let (pod, staged) = staged(root.path());
    assert_eq!(pod.staged("counter").unwrap(), Some(staged.clone()));
    assert_eq!(pod.staged("other").unwrap(), None);
    assert_eq!(staged.state().unwrap(), State::Staged);
    assert_eq!(staged.request().unwrap().checkpoint, "web");
    let images = staged.request().unwrap().images;
    assert_eq!(fs::read(images.join("core-1.img")).unwrap(), b"core");
    let names: Vec<_> = fs::read_dir(pod.path().join("restore")).unwrap().collect();
    assert_eq!(names.len(), 1, "no draft is left: {names:?}");
}

#[test]
fn states_survive_a_round_trip() {
    let root = tempfile::tempdir().unwrap();
    let (_, staged) = staged(root.path());
    for state in [
        State::Failed("no such file".into()),
        State::Held("/run/b".into()),
        State::Staged,
    ] {
        staged.set_state(&state).unwrap();
        assert_eq!(staged.state().unwrap(), state);
    }
    fs::write(staged.path().join("state"), "odd").unwrap();
    assert!(matches!(staged.state(), Err(SandboxError::Damaged { .. })));
}

#[test]
fn a_holder_is_known_while_it_holds() {
    let root = tempfile::tempdir().unwrap();
    let (pod, staged) = staged(root.path());
    staged.set_holder(7, 123).unwrap();
    assert!(pod.holders().is_empty());
    staged.set_state(&State::Held("/run/b".into())).unwrap();
    assert_eq!(pod.holders(), [(7, 123)]);
    staged.set_state(&State::Staged).unwrap();
    assert_eq!(staged.holder(), None);
}

#[test]
fn only_one_process_restores() {
    let root = tempfile::tempdir().unwrap();
    let (_, staged) = staged(root.path());
    let claim = staged.claim().unwrap();
    assert!(matches!(staged.claim(), Err(SandboxError::Busy { .. })));
    drop(claim);
    drop(staged.claim().unwrap());
}

#[test]
fn a_failed_stage_leaves_the_old_one() {
    let root = tempfile::tempdir().unwrap();
    let (pod, old) = staged(root.path());
    old.set_state(&State::Failed("x".into())).unwrap();
    fs::remove_dir_all(root.path().join("web/counter/checkpoint")).unwrap();
    let mut other = checkpoint(&root.path().join("elsewhere"));
    other.dir = root.path().join("web");
    assert!(
        pod.stage("counter", &other, &other.manifest.containers[0])
            .is_err()
    );
    assert_eq!(
        pod.staged("counter").unwrap().unwrap().state().unwrap(),
        State::Failed("x".into())
    );
    assert_eq!(fs::read_dir(pod.path().join("restore")).unwrap().count(), 1);
}

#[test]
fn names_cannot_lead_out() {
    let root = tempfile::tempdir().unwrap();
    for name in ["..", "a/b", "", "/etc"] {
        assert!(PodDir::at(root.path(), name).is_err(), "{name}");
        let pod = PodDir::at(root.path(), "s").unwrap();
        assert!(pod.staged(name).is_err(), "{name}");
    }
}

#[test]
fn removing_is_idempotent() {
    let root = tempfile::tempdir().unwrap();
    let (pod, staged) = staged(root.path());
    pod.remove_if_empty().unwrap();
    assert!(staged.path().try_exists().unwrap(), "it was not empty");
    staged.remove().unwrap();
    drop(pod.lock().unwrap());
    pod.remove_if_empty().unwrap();
    assert!(!pod.path().try_exists().unwrap());
    pod.remove().unwrap();
}

#[test]
fn what_is_held_for_a_container_that_is_gone_goes() {
    let root = tempfile::tempdir().unwrap();
    let (pod, in_pod) = staged(root.path());
    let checkpoint = checkpoint(&root.path().join("alone"));
    let alone = PodDir::at(root.path(), "counter").unwrap();
    let staged = { alone.stage("counter", &checkpoint, &checkpoint.manifest.containers[0]) };
    let staged = staged.unwrap();
    let gone = State::Held(root.path().join("gone"));
    in_pod.set_state(&gone).unwrap();
    let is_left = |pod: &PodDir| {
        remove_forgotten(root.path());
        pod.path().try_exists().unwrap()
    };
    assert!(is_left(&alone), "it waits");
    staged.set_state(&State::Held(root.path().into())).unwrap();
    assert!(is_left(&alone), "its bundle is there");
    staged.set_state(&gone).unwrap();
    staged
        .set_holder(std::process::id().cast_signed(), 1)
        .unwrap();
    assert!(is_left(&alone), "its process is there");
    staged.set_holder(i32::MAX, 1).unwrap();
    let claim = staged.claim().unwrap();
    assert!(is_left(&alone), "somebody is at it");
    drop(claim);
    assert!(!is_left(&alone));
    assert!(is_left(&pod), "the next container of a pod may want it");
}

#[test]
fn what_somebody_restores_is_not_removed() {
    let root = tempfile::tempdir().unwrap();
    let (pod, staged) = staged(root.path());
    let claim = staged.claim().unwrap();
    assert!(!pod.remove_unless_restored().unwrap());
    assert!(staged.path().try_exists().unwrap());
    drop(claim);
    assert!(pod.remove_unless_restored().unwrap());
    assert!(!pod.path().try_exists().unwrap());
    assert!(pod.remove_unless_restored().unwrap());
}
