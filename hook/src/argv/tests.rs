use super::*;

fn read(line: &str) -> Invocation {
    Invocation::read(line.split_whitespace().map(OsString::from).collect())
}

fn text(args: &[OsString]) -> String {
    args.iter()
        .map(|arg| arg.to_str().unwrap())
        .collect::<Vec<_>>()
        .join(" ")
}

const GLOBALS: &str = "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json";

/// What go-runc calls, version by version.
#[test]
fn calls_of_the_shim_are_understood() {
    for globals in [
        GLOBALS.to_owned(),
        format!("{GLOBALS} --systemd-cgroup"),
        format!("--debug {GLOBALS} --criu /usr/sbin/criu --rootless=auto"),
        "--root=/run/containerd/runc/k8s.io --log=/b/log.json -log-format=json".to_owned(),
    ] {
        let call = read(&format!(
            "{globals} create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot \
             --no-new-keyring web"
        ));
        assert_eq!(text(&call.globals.args), globals);
        assert_eq!(
            call.globals.root,
            Some("/run/containerd/runc/k8s.io".into())
        );
        assert_eq!(call.globals.log, Some("/b/log.json".into()));
        assert!(call.globals.json);
        assert_eq!(
            call.globals.systemd_cgroup,
            globals.contains("systemd-cgroup")
        );
        let Command::Create(create) = call.command else {
            panic!("{globals}")
        };
        assert_eq!(create.id, "web");
        assert_eq!(create.bundle(), Some("/b".into()));
        assert_eq!(create.value("pid-file"), Some(OsStr::new("/b/init.pid")));
        assert_eq!(create.value("console-socket"), Some(OsStr::new("/s")));
        assert!(create.switch("no-pivot") && !create.switch("detach"));
    }
}

#[test]
fn restore_has_one_dash_where_go_runc_writes_one() {
    let call = read(&format!(
        "{GLOBALS} restore --image-path /i --work-path /b/work --detach --pid-file /b/init.pid \
         -no-subreaper --bundle /b web"
    ));
    let Command::Restore(restore) = call.command else {
        panic!()
    };
    assert!(restore.switch("no-subreaper") && restore.switch("detach"));
    assert_eq!(
        text(&restore.with("image-path", "/other").to_args()),
        "--work-path /b/work --detach --pid-file /b/init.pid --no-subreaper --bundle /b \
         --image-path /other web"
    );
}

#[test]
fn create_becomes_restore() {
    let line = "create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot \
                --no-new-keyring --preserve-fds 2 web";
    let Command::Create(create) = read(line).command else {
        panic!()
    };
    let restore = create.to_restore(Path::new("/i"), Path::new("/b/work"));
    assert_eq!(
        text(&restore.to_args()),
        "--detach --no-subreaper --bundle /b --pid-file /b/init.pid --console-socket /s \
         --no-pivot --image-path /i --work-path /b/work web"
    );
    assert_eq!(
        text(&restore.without(&["no-subreaper", "no-pivot"]).to_args()),
        "--detach --bundle /b --pid-file /b/init.pid --console-socket /s --image-path /i \
         --work-path /b/work web"
    );
}

#[test]
fn a_container_that_is_run_at_once_is_seen() {
    let Command::Run(run) = read("--root /r run --detach --keep -b /b --pid-file /p web").command
    else {
        panic!()
    };
    assert_eq!((run.id.as_str(), run.bundle()), ("web", Some("/b".into())));
    assert_eq!(run.config(), None);
}

/// `crun run --help`: `-f, --config=FILE`.
#[test]
fn the_file_of_the_spec_is_no_id() {
    for line in [
        "run -f /c.json web",
        "run --config=/c.json web",
        "run --config /c.json web",
        "run web -f /c.json",
    ] {
        let Command::Run(run) = read(line).command else {
            panic!("{line}")
        };
        assert_eq!(run.id, "web", "{line}");
        assert_eq!(run.config(), Some("/c.json".into()), "{line}");
    }
    let Command::Create(create) = read("create -b /b -f /c.json web").command else {
        panic!()
    };
    assert_eq!(text(&create.to_args()), "-b /b -f /c.json web");
}

#[test]
fn flags_may_follow_the_id() {
    // urfave/cli 1.22 sorts the arguments of a command before it parses them.
    for line in [
        "delete --force web",
        "delete web --force",
        "delete -f web",
        "delete -force web",
    ] {
        assert_eq!(
            read(line).command,
            Command::Delete {
                id: "web".into(),
                force: true
            },
            "{line}"
        );
    }
    for line in ["delete web", "delete --force=false web", "delete -- web"] {
        assert_eq!(
            read(line).command,
            Command::Delete {
                id: "web".into(),
                force: false
            },
            "{line}"
        );
    }
    assert_eq!(
        read("start web").command,
        Command::Start { id: "web".into() }
    );
}

#[test]
fn a_dump_of_the_shim_is_understood() {
    let line = "checkpoint --image-path /i --work-path /w --tcp-established --empty-ns network \
                --leave-running web";
    let Command::Checkpoint(dump) = read(line).command else {
        panic!()
    };
    assert_eq!(dump.id, "web");
    assert!(dump.switch("leave-running") && dump.switch("tcp-established"));
    assert_eq!(
        text(&dump.with_flags(vec![("file-locks", None)]).to_args()),
        "--image-path /i --work-path /w --tcp-established --empty-ns network --leave-running \
         --file-locks web"
    );
}

#[test]
fn what_is_not_understood_is_left_alone() {
    for line in [
        "",
        "--version",
        "-v",
        "--help",
        "--unknown value create --bundle /b web",
        "create --help",
        "create",
        "create one two",
        "start",
        "--root",
        "create --bundle",
        "state web",
        "exec --process /p --detach --pid-file /f web",
        "ps --format json web",
        "update --resources - web",
        "update --resources=- web",
        "features",
        "pause web",
        "spec",
        "-- create web",
    ] {
        let call = read(line);
        assert_eq!(call.command, Command::Other, "{line}");
        assert_eq!(text(&call.args), line);
    }
}

#[test]
fn an_unknown_flag_of_create_is_a_switch() {
    let Command::Create(create) = read("create --bundle=/b --novel=1 --other web").command else {
        panic!()
    };
    assert_eq!(
        (create.id.as_str(), create.bundle()),
        ("web", Some("/b".into()))
    );
}

#[test]
fn bytes_that_are_no_text_pass() {
    use std::os::unix::ffi::OsStringExt;
    let args = vec![
        OsString::from("create"),
        OsString::from_vec(vec![b'-', 0xff]),
    ];
    assert_eq!(Invocation::read(args.clone()).args, args);
}

#[test]
fn signals_are_read_as_the_shim_sends_them() {
    let kill = |id: &str, signal: &str| Command::Kill {
        id: id.to_owned(),
        signal: signal.to_owned(),
    };
    for (line, wanted) in [
        ("kill --all web 9", kill("web", "9")),
        ("kill web KILL", kill("web", "KILL")),
        ("kill -a web", kill("web", "TERM")),
        ("kill --all", Command::Other),
    ] {
        assert_eq!(read(&format!("{GLOBALS} {line}")).command, wanted, "{line}");
    }
}
