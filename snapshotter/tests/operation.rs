//! The daemon as an operator meets it: starting twice, stopping, full disks, broken roots.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::error::Error;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::tonic::Code;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use transship_containerd::Containerd;
use transship_proto::snapshots_api::{CommitSnapshotRequest, SnapshotsClient};

use support::client;
use support::daemon::{Site, refusal, run};
use support::mounted::{Mounted, as_root, make_layer};

/// Whether the cause of an error is that a file is not there.
fn finds_nothing(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| io.kind() == ErrorKind::NotFound)
        || error.source().is_some_and(finds_nothing)
}

#[test]
fn root_one_daemon_per_root_and_per_socket() {
    as_root(async || {
        let (site, other) = (Site::new(), Site::new());
        let _daemon = site.start(&[]);
        let socket = site.socket();
        let elsewhere = other.socket();
        let error = refusal(&site, &["--address", elsewhere.to_str().unwrap()]);
        assert!(
            error.contains("another transship-snapshotter uses"),
            "{error}"
        );
        let error = refusal(&other, &["--address", socket.to_str().unwrap()]);
        assert!(error.contains("another daemon listens on"), "{error}");
        assert!(
            socket.try_exists().unwrap(),
            "the socket of the living one stays"
        );
    });
}

/// containerd 2.2 unpacks layers side by side for a snapshotter whose proxy plugin has the capability `rebase`, and
/// names the parent of each at its Commit. A layer that was unpacked so has lost its deletions: nothing that it could
/// delete was below it.
#[test]
fn root_a_layer_is_committed_on_what_it_was_prepared_on() {
    as_root(async || {
        let site = Site::new();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        make_layer(&client, "base", "").await;
        make_layer(&client, "other", "").await;
        client.prepare("on-nothing", "", &[]).await.unwrap();
        client.prepare("on-base", "base", &[]).await.unwrap();
        let socket = site.socket();
        let api = Containerd::connect(&socket, "conformance").await.unwrap();
        let mut api = SnapshotsClient::new(api.channel());
        let mut commit = async |key: &str, parent: &str| {
            let request = CommitSnapshotRequest {
                snapshotter: "transship".to_owned(),
                name: format!("{key}-done"),
                key: key.to_owned(),
                parent: parent.to_owned(),
                ..CommitSnapshotRequest::default()
            };
            api.commit(request).await
        };
        for (key, parent) in [
            ("on-nothing", "base"),
            ("on-nothing", "missing"),
            ("on-base", "other"),
        ] {
            let refused = commit(key, parent).await.unwrap_err();
            assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
            assert!(
                refused.message().contains("take \"rebase\" out"),
                "{refused}"
            );
            assert_eq!(client.stat(key).await.unwrap().kind(), Kind::Active);
        }
        for (key, named, parent) in [("on-base", "base", "base"), ("on-nothing", "", "")] {
            commit(key, named).await.unwrap();
            let done = client.stat(&format!("{key}-done")).await.unwrap();
            assert_eq!(
                (done.kind(), done.parent.as_str()),
                (Kind::Committed, parent)
            );
        }
    });
}

#[test]
fn root_what_is_no_socket_is_left_alone() {
    as_root(async || {
        let site = Site::new();
        let file = site.path().join("file");
        fs::write(&file, "mine").unwrap();
        let error = refusal(&site, &["--address", file.to_str().unwrap()]);
        assert!(error.contains("is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
        // What a dead daemon left is replaced.
        fs::create_dir(site.path().join("run")).unwrap();
        drop(UnixListener::bind(site.socket()).unwrap());
        let _daemon = site.start(&[]);
    });
}

#[test]
fn root_files_are_private_and_the_socket_goes_at_stop() {
    as_root(async || {
        let site = Site::new();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        client.prepare("a", "", &[]).await.unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
        assert!(
            fs::symlink_metadata(site.socket())
                .unwrap()
                .file_type()
                .is_socket()
        );
        for (path, expected) in [
            (site.socket(), 0o600),
            (site.socket().parent().unwrap().to_path_buf(), 0o700),
            (site.root(), 0o700),
            (site.root().join("metadata.sqlite"), 0o600),
            (site.root().join("metadata.sqlite-wal"), 0o600),
            (site.snapshots(), 0o700),
            (site.snapshots().join("1"), 0o700),
            (site.snapshots().join("1/fs"), 0o755),
            (site.snapshots().join("1/work"), 0o711),
        ] {
            assert_eq!(mode(&path), expected, "{}", path.display());
        }
        assert!(daemon.stop().success());
        assert!(!site.socket().try_exists().unwrap());
        // A clean stop gives unused ids back.
        let daemon = site.start(&[]);
        daemon.client().await.prepare("b", "", &[]).await.unwrap();
        assert_eq!(site.directories(), ["1", "2"]);
    });
}

#[test]
fn root_the_log_has_each_call_and_its_level_changes() {
    as_root(async || {
        let site = Site::new();
        let config = site.path().join("config.toml");
        fs::write(&config, "log_format = \"json\"\n").unwrap();
        let mut command = site.command();
        command
            .arg("--address")
            .arg(site.socket())
            .arg("--config")
            .arg(&config);
        let mut child = command.spawn().unwrap();
        support::wait_until("it listens", || site.socket().try_exists().unwrap());
        let client = client::connect(&site.socket(), "transship").await.unwrap();
        client.prepare("quiet", "", &[]).await.unwrap();
        fs::write(&config, "log_format = \"json\"\nlog_level = \"debug\"\n").unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
        support::wait_until("the level changed", || site.log().contains("\"log level\""));
        client.stat("quiet").await.unwrap();
        client.stat("missing").await.unwrap_err();
        nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
        child.wait().unwrap();
        let log = site.log();
        let calls: Vec<serde_json::Value> = log
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|line: &serde_json::Value| line["rpc"] == "stat")
            .collect();
        assert_eq!(calls.len(), 2, "{log}");
        assert_eq!(
            (&calls[0]["key"], &calls[0]["message"]),
            (&"quiet".into(), &"ok".into())
        );
        assert!(calls[0]["took_us"].is_u64());
        assert_eq!(
            (&calls[1]["key"], &calls[1]["code"]),
            (&"missing".into(), &"NotFound".into())
        );
    });
}

#[test]
fn root_a_full_disk_is_said_and_survived() {
    as_root(async || {
        let site = Site::new();
        fs::create_dir(site.root()).unwrap();
        let none = None::<&str>;
        let size = Some("size=4m,mode=700");
        mount(
            Some("t"),
            &site.root(),
            Some("tmpfs"),
            MsFlags::empty(),
            size,
        )
        .unwrap();
        {
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            make_layer(&client, "base", "").await;
            let ballast = site.root().join("ballast");
            let mut made = 0;
            let status = loop {
                if made == 20 {
                    // All that is left, to the last page.
                    let mut file = fs::File::create(&ballast).unwrap();
                    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
                }
                match client.prepare(&format!("p{made}"), "base", &[]).await {
                    Ok(_) => made += 1,
                    Err(status) => break status,
                }
                assert!(made < 10_000, "the disk is never full");
            };
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            let said = status.source.to_string();
            assert!(
                said.contains("No space left") || said.contains("disk is full"),
                "{status:?}"
            );
            // What is there works, and nothing is half there.
            client.mounts("p0").await.unwrap();
            client.stat("base").await.unwrap();
            client.stat(&format!("p{made}")).await.unwrap_err();
            // What makes room works on a full disk, or there would never be room again.
            for n in 10..20 {
                client.remove(&format!("p{n}")).await.unwrap();
            }
            assert_eq!(client.list(&[]).await.unwrap().len(), made + 1 - 10);
            // A daemon that dies now comes back.
            daemon.kill();
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            client.remove("p9").await.unwrap();
            fs::remove_file(&ballast).unwrap();
            client
                .prepare(&format!("p{made}"), "base", &[])
                .await
                .unwrap();
            for n in (0..9).chain(20..=made) {
                client.remove(&format!("p{n}")).await.unwrap();
            }
            client.cleanup().await.unwrap();
            assert_eq!(site.directories().len(), 1);
            assert!(daemon.stop().success());
        }
        assert_eq!(run(&site, &["fsck"]).status.code(), Some(0));
        mount(
            none,
            &site.root(),
            none,
            MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
            none,
        )
        .unwrap();
        let error = refusal(&site, &[]);
        assert!(error.contains("Read-only file system"), "{error}");
        umount2(&site.root(), MntFlags::empty()).unwrap();
    });
}

#[test]
fn root_out_of_file_descriptors_is_survived() {
    as_root(async || {
        let site = Site::new();
        let daemon = site.start(&[]);
        let limit = |soft: u64| {
            let pid = daemon.pid().to_string();
            let status = std::process::Command::new("prlimit")
                .args(["--pid", &pid, &format!("--nofile={soft}:")])
                .status();
            assert!(status.unwrap().success());
        };
        let first = daemon.client().await;
        limit(24);
        let mut more = Vec::new();
        for _ in 0..40 {
            more.push(std::os::unix::net::UnixStream::connect(site.socket()).unwrap());
        }
        // The connection that is there goes on: what needs no descriptor works, the rest says so.
        first.prepare("a", "", &[]).await.unwrap();
        first.mounts("a").await.unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let status = loop {
            // Until the daemon has accepted as many as it can.
            match first.usage("a").await {
                Err(status) => break status,
                Ok(_) => assert!(
                    std::time::Instant::now() < deadline,
                    "never out of descriptors"
                ),
            }
        };
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        drop(more);
        limit(1024);
        daemon.client().await.usage("a").await.unwrap();
    });
}

#[test]
fn root_metrics_tell_what_happened() {
    as_root(async || {
        let site = Site::new();
        let config = site.path().join("config.toml");
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        fs::write(&config, format!("metrics_address = \"{free}\"\n")).unwrap();
        let daemon = site.start(&["--config", config.to_str().unwrap()]);
        let client = daemon.client().await;
        make_layer(&client, "base", "").await;
        client.prepare("a", "base", &[]).await.unwrap();
        client.view("v", "base", &[]).await.unwrap();
        client.stat("missing").await.unwrap_err();
        client.list(&[]).await.unwrap();
        let get = |path: &str| {
            use std::io::{Read, Write};
            let mut connection = std::net::TcpStream::connect(free).unwrap();
            write!(connection, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = String::new();
            connection.read_to_string(&mut answer).unwrap();
            answer
        };
        let answer = get("/metrics");
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        for line in [
            "transship_snapshotter_call_seconds_count{rpc=\"prepare\",code=\"ok\"} 2",
            "transship_snapshotter_call_seconds_count{rpc=\"commit\",code=\"ok\"} 1",
            "transship_snapshotter_call_seconds_count{rpc=\"stat\",code=\"not_found\"} 1",
            "transship_snapshotter_call_seconds_count{rpc=\"list\",code=\"ok\"} 1",
            "transship_snapshotter_snapshots{kind=\"committed\"} 1",
            "transship_snapshotter_snapshots{kind=\"active\"} 1",
            "transship_snapshotter_snapshots{kind=\"view\"} 1",
            "transship_snapshotter_layer_bytes 8192",
            "transship_snapshotter_background_tasks 0",
            "# EOF",
        ] {
            assert!(
                answer.lines().any(|found| found == line),
                "{line} is not in\n{answer}"
            );
        }
        assert!(get("/").starts_with("HTTP/1.1 404"));
    });
}

/// Whoever finds the socket gets an answer, at every moment of a restart; containerd's dialer waits for
/// a socket that is not there.
#[test]
fn root_no_connection_is_lost_at_a_restart() {
    as_root(async || {
        let site = Site::new();
        let mut daemon = site.start(&[]);
        daemon
            .client()
            .await
            .prepare("kept", "", &[])
            .await
            .unwrap();
        let restarting = AtomicBool::new(true);
        let ask = || {
            support::block_on(async {
                let mut answers = 0_usize;
                while restarting.load(Ordering::Relaxed) {
                    let client = match client::connect(&site.socket(), "transship").await {
                        Err(error) if finds_nothing(&error) => {
                            std::thread::sleep(Duration::from_millis(1));
                            continue;
                        }
                        connected => connected.unwrap(),
                    };
                    client.stat("kept").await.unwrap();
                    answers += 1;
                }
                answers
            })
        };
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
            for _ in 0..20 {
                assert!(daemon.stop().success());
                daemon = site.start(&[]);
            }
            restarting.store(false, Ordering::Relaxed);
            let answers = clients.into_iter().map(|client| client.join().unwrap());
            assert!(answers.sum::<usize>() > 20);
        });
    });
}

#[test]
fn root_idle_clients_do_not_hold_up_the_stop() {
    as_root(async || {
        let site = Site::new();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        client.prepare("a", "", &[]).await.unwrap();
        // This thread drives the client's connection, and while it waits here the client is frozen.
        assert!(daemon.stop().success());
        drop(client);
    });
}

#[test]
fn root_a_lost_directory_of_an_active_snapshot_is_made_again() {
    as_root(async || {
        for half_made in [false, true] {
            let site = Site::new();
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            make_layer(&client, "base", "").await;
            std::os::unix::fs::chown(site.snapshots().join("1/fs"), Some(5), Some(6)).unwrap();
            client.prepare("active", "base", &[]).await.unwrap();
            daemon.stop();
            if half_made {
                // As a power failure can leave it: recorded, but the rename is undone.
                fs::rename(site.snapshots().join("2"), site.snapshots().join("new-2")).unwrap();
            } else {
                fs::remove_dir_all(site.snapshots().join("2")).unwrap();
            }
            let daemon = site.start(&[]);
            let client = daemon.client().await;
            let mounted = Mounted::new(&client.mounts("active").await.unwrap());
            assert_eq!(fs::read_to_string(mounted.join("base")).unwrap(), "base");
            let top = fs::metadata(mounted.path()).unwrap();
            assert_eq!((top.uid(), top.gid(), top.mode() & 0o777), (5, 6, 0o755));
            client.cleanup().await.unwrap();
            daemon.stop();
            assert_eq!(site.directories(), ["1", "2"]);
            drop(mounted);
            assert_eq!(run(&site, &["fsck"]).status.code(), Some(0));
        }
    });
}

#[test]
fn root_large_layers_are_counted_after_the_answer() {
    as_root(async || {
        let site = Site::new();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        {
            let mounted = Mounted::new(&client.prepare("big-active", "", &[]).await.unwrap());
            for n in 0..2500 {
                fs::write(mounted.join(&n.to_string()), "").unwrap();
            }
        }
        let before = client.usage("big-active").await.unwrap();
        assert_eq!(before.inodes, 2501);
        client.commit("big", "big-active", &[]).await.unwrap();
        assert_eq!(client.usage("big").await.unwrap(), before);
        // Stored, not counted anew: changing the directory does not change the answer.
        fs::write(site.snapshots().join("1/fs/later"), "").unwrap();
        assert_eq!(client.usage("big").await.unwrap(), before);
    });
}

/// Whatever the mode of the socket, only root is served.
#[test]
fn root_another_user_is_not_served() {
    as_root(async || {
        let site = Site::new();
        let _daemon = site.start(&[]);
        let socket = site.socket();
        for dir in socket.ancestors().skip(1).take(2) {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let answer_to = |uid: u32| {
            let socket = socket.clone();
            let ask = move || {
                let uid = rustix::thread::Uid::from_raw(uid);
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
                let mut stream = UnixStream::connect(socket).unwrap();
                stream
                    .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                    .ok();
                stream.read(&mut [0; 9]).unwrap_or(0)
            };
            // The uid is that of the thread alone.
            std::thread::spawn(ask).join().unwrap()
        };
        assert_eq!(answer_to(0), 9, "root gets a frame of HTTP/2");
        assert_eq!(answer_to(65534), 0);
    });
}

/// containerd passes the annotations of a layer in an image's manifest to Prepare, so their author is whoever
/// built the image.
#[test]
fn root_no_label_fills_a_new_snapshot() {
    as_root(async || {
        let site = Site::new();
        let daemon = site.start(&[]);
        let client = daemon.client().await;
        // A directory where a checkpoint's writable layer lies, the default place of checkpoints.
        let checkpoints = Path::new("/var/lib/transship/checkpoints");
        fs::create_dir_all(checkpoints).unwrap();
        let checkpoint = tempfile::tempdir_in(checkpoints).unwrap();
        fs::write(checkpoint.path().join("secret"), "of another tenant").unwrap();
        let status = std::process::Command::new("tar")
            .arg("-cf")
            .arg(checkpoint.path().join("rootfs-diff.tar"))
            .arg("-C")
            .arg(checkpoint.path())
            .arg("secret")
            .status();
        assert!(status.unwrap().success());
        let path = checkpoint.path().display().to_string();
        let label = "containerd.io/snapshot/transship.import";
        let mounts = client.prepare("new", "", &[(label, &path)]).await.unwrap();
        let content: Vec<_> = fs::read_dir(&mounts[0].source).unwrap().collect();
        assert!(content.is_empty(), "{content:?}");
    });
}
