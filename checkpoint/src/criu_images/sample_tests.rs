//! Against images that CRIU 4.1.1, 4.2.1 and 4.3 wrote of one program: four processes, of which one was
//! stopped and one has a second thread, with a shared memory segment, a queue with two messages and
//! a set of three semaphores, in IPC and UTS namespaces of their own.

use std::fs;
use std::path::Path;

use super::ipc_sysctls::{IpcSysctls, first_entry_for_test, set_sysctls};
use super::ipcns::{IpcKind, IpcObject, objects, remove_objects};
use super::strict::{edit_submessage, set_varints};
use super::tasks::stopped;
use super::threads::{SECCOMP_FILTER_MODE, ThreadEdit, edit, threads};
use super::utsns::{UtsNames, names, set_names};
use super::{Image, ImageError, Kind, push_bytes};

/// Copies of the images of one CRIU version.
fn sample(version: &str) -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/criu_images/samples");
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from.join(format!("criu-{version}"))).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

const VERSIONS: [(&str, u32); 3] = [("4.1.1", 16742), ("4.2.1", 15655), ("4.3", 122)];

fn all_objects() -> [IpcObject; 3] {
    [
        (IpcKind::Shm, 0x1234),
        (IpcKind::Msg, 0x77),
        (IpcKind::Sem, 0x55),
    ]
    .map(|(kind, key)| IpcObject { kind, id: 0, key })
}

#[test]
fn the_stopped_task_is_found_and_no_other() {
    for (version, pid) in VERSIONS {
        assert_eq!(stopped(sample(version).path()).unwrap(), [pid], "{version}");
    }
}

#[test]
fn the_names_are_read_and_replaced() {
    for (version, _) in VERSIONS {
        let sample = sample(version);
        let old = UtsNames {
            node: "source-sandbox".into(),
            domain: "(none)".into(),
        };
        assert_eq!(
            names(sample.path()).unwrap(),
            Some(old.clone()),
            "{version}"
        );
        let path = sample.path().join("utsns-10.img");
        let written_by_criu = fs::read(&path).unwrap();
        set_names(sample.path(), &old).unwrap();
        assert_eq!(
            fs::read(&path).unwrap(),
            written_by_criu,
            "{version}: the same to the byte"
        );
        let new = UtsNames {
            node: "target".into(),
            domain: String::new(),
        };
        set_names(sample.path(), &new).unwrap();
        assert_eq!(names(sample.path()).unwrap(), Some(new), "{version}");
    }
}

#[test]
fn each_object_can_be_taken_out() {
    for (version, _) in VERSIONS {
        let whole = sample(version);
        assert_eq!(objects(whole.path()).unwrap(), all_objects(), "{version}");
        for (index, object) in all_objects().into_iter().enumerate() {
            let sample = sample(version);
            remove_objects(sample.path(), std::slice::from_ref(&object)).unwrap();
            let mut rest = all_objects().to_vec();
            rest.remove(index);
            assert_eq!(objects(sample.path()).unwrap(), rest, "{version}");
        }
        let other = IpcObject {
            key: 1,
            ..all_objects()[0].clone()
        };
        remove_objects(whole.path(), &[other]).unwrap();
        assert_eq!(
            objects(whole.path()).unwrap(),
            all_objects(),
            "another key, another object"
        );
    }
}

#[test]
fn cut_off_images_are_errors() {
    for (version, _) in VERSIONS {
        for name in ["ipcns-shm-9.img", "ipcns-msg-9.img", "ipcns-sem-9.img"] {
            let sample = sample(version);
            let path = sample.path().join(name);
            let bytes = fs::read(&path).unwrap();
            for len in 9..bytes.len() {
                fs::write(&path, &bytes[..len]).unwrap();
                assert!(
                    objects(sample.path()).is_err(),
                    "{version} {name} of {len} bytes"
                );
            }
        }
    }
}

#[test]
fn the_sandbox_keeps_its_limits() {
    for (version, _) in VERSIONS {
        let sample = sample(version);
        let (semaphores, _, shmmax) = first_entry_for_test(sample.path());
        let path = sample.path().join("ipcns-var-9.img");
        let live: IpcSysctls = [("kernel/msgmax", vec![7])].into();
        set_sysctls(sample.path(), &live).unwrap();
        assert_eq!(
            first_entry_for_test(sample.path()),
            (semaphores, 7, shmmax),
            "{version}"
        );
        let live: IpcSysctls = [
            ("kernel/sem", vec![1, 2, 3, 4]),
            ("kernel/shmmax", vec![u64::MAX]),
        ]
        .into();
        set_sysctls(sample.path(), &live).unwrap();
        assert_eq!(
            first_entry_for_test(sample.path()),
            (vec![1, 2, 3, 4], 7, u64::MAX),
            "{version}"
        );
        assert!(fs::read(path).unwrap().len() > 8);
    }
}

#[test]
fn threads_are_read_and_edited() {
    for (version, stopped_pid) in VERSIONS {
        let sample = sample(version);
        let before = threads(sample.path()).unwrap();
        assert_eq!(before.len(), 3, "{version}");
        for thread in &before {
            assert_eq!(thread.creds.uids, [0; 4], "{version}");
            assert!(thread.creds.effective & !thread.creds.bounding == 0);
            assert!(!thread.comm.is_empty(), "{version}");
        }
        let tasks: Vec<_> = before.iter().filter_map(|it| it.task.as_ref()).collect();
        assert_eq!(tasks.len(), 2, "{version}: the third is a thread");
        for task in tasks {
            assert_eq!(task.rlimits.len(), 16, "{version}");
        }
        for mut thread in before {
            let is_task = thread.task.is_some();
            let changes = ThreadEdit {
                no_new_privileges: true,
                bounding: Some(1 << 33 | 1),
                inheritable: Some(0),
                seccomp_filter: Some(300),
                lsm_profile: Some("web".into()),
                oom_score_adj: is_task.then_some(-7),
                rlimits: is_task.then(|| vec![(1, u64::MAX); 16]),
                no_login: is_task,
            };
            edit(sample.path(), thread.tid, &changes).unwrap();
            thread.creds.no_new_privileges = true;
            thread.creds.bounding = 1 << 33 | 1;
            thread.creds.inheritable = 0;
            thread.creds.lsm_profile = Some("web".into());
            thread.seccomp_mode = SECCOMP_FILTER_MODE;
            thread.seccomp_filter = Some(300);
            if let Some(task) = &mut thread.task {
                task.oom_score_adj = Some(-7);
                task.rlimits = vec![(1, u64::MAX); 16];
            }
            let after = threads(sample.path()).unwrap();
            assert!(after.contains(&thread), "{version}: {after:?}");
        }
        assert_eq!(stopped(sample.path()).unwrap(), [stopped_pid], "{version}");
    }
}

#[test]
fn a_thread_that_is_described_twice_is_an_error() {
    for (version, pid) in VERSIONS {
        for twice in [5, 3] {
            let sample = sample(version);
            let path = sample.path().join(format!("core-{pid}.img"));
            let image = Image::read(&path, Kind::Core).unwrap();
            let core = image.entries().next_bytes().unwrap().unwrap().to_vec();
            // A second one after it, as one decoder merges and another does not.
            let other = edit_submessage(&[], twice, |_| set_varints(&[], 1, &[1]));
            let mut body = Vec::new();
            push_bytes(&mut body, &[core, other].concat());
            image.with_body(body).replace(&path).unwrap();
            let error = threads(sample.path()).unwrap_err();
            assert!(matches!(error, ImageError::Ambiguous { .. }), "{error}");
        }
    }
}
