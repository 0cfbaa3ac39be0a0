//! The daemon under systemd: what it tells, and sockets that it is handed.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use support::client;
use support::daemon::Site;

/// Runs a test if it can be run.
fn as_root(test: impl AsyncFnOnce()) {
    if support::is_root() {
        support::block_on(test());
    }
}

fn terminate(child: &mut Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
}

/// The daemon as systemd starts it for a socket unit: the listener is descriptor 3.
fn start_on(site: &Site, listener: &UnixListener) -> Child {
    let daemon = site.command();
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 0</dev/null";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, "sh"])
        .arg(daemon.get_program())
        .args(daemon.get_args())
        .arg("--address")
        .arg(site.socket())
        .stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())))
        .stdout(Stdio::null())
        .stderr(site.open_log());
    command.spawn().unwrap()
}

/// Who calls while no daemon runs waits for the next one.
#[test]
fn root_a_call_to_a_socket_of_systemd_waits_for_the_daemon() {
    as_root(async || {
        let site = Site::new();
        std::fs::create_dir(site.socket().parent().unwrap()).unwrap();
        let listener = UnixListener::bind(site.socket()).unwrap();
        let mut daemon = start_on(&site, &listener);
        let client = client::connect(&site.socket(), "transship").await.unwrap();
        client.prepare("kept", "", &[]).await.unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();

        // Connects and asks while there is only the socket.
        let socket = site.socket();
        let asked = tokio::spawn(async move {
            let client = client::connect(&socket, "transship").await.unwrap();
            client.stat("kept").await
        });
        tokio::task::yield_now().await;
        let mut daemon = start_on(&site, &listener);
        assert_eq!(asked.await.unwrap().unwrap().name, "kept");
        terminate(&mut daemon);
        assert!(
            site.socket().try_exists().unwrap(),
            "the socket is systemd's"
        );
    });
}

#[test]
fn root_a_socket_that_nobody_would_answer_is_refused() {
    as_root(async || {
        let site = Site::new();
        let listener = UnixListener::bind(site.path().join("other.sock")).unwrap();
        let mut daemon = start_on(&site, &listener);
        assert!(!daemon.wait().unwrap().success());
        assert!(site.log().contains("other.sock"), "{}", site.log());
    });
}

#[test]
fn root_systemd_is_told() {
    as_root(async || {
        for abstract_name in [false, true] {
            let site = Site::new();
            let path = site.path().join("notify");
            let name = format!("@transship-test-{}", std::process::id());
            let socket = if abstract_name {
                use std::os::linux::net::SocketAddrExt;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(&name[1..]);
                UnixDatagram::bind_addr(&address.unwrap()).unwrap()
            } else {
                UnixDatagram::bind(&path).unwrap()
            };
            let value = if abstract_name {
                name.clone()
            } else {
                path.display().to_string()
            };
            let mut command = site.command();
            command
                .arg("--address")
                .arg(site.socket())
                .env("NOTIFY_SOCKET", value);
            let mut child = command.spawn().unwrap();
            let mut message = [0; 64];
            let length = socket.recv(&mut message).unwrap();
            assert_eq!(&message[..length], b"READY=1");
            assert!(
                site.socket().try_exists().unwrap(),
                "ready means that it listens"
            );
            terminate(&mut child);
            let length = socket.recv(&mut message).unwrap();
            assert_eq!(&message[..length], b"STOPPING=1");
        }
    });
}
