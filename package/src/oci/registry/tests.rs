//! Registries that are busy, break off, lie, stall and forget, by a small one over HTTP.

use std::fs;
use std::io::{self, Cursor, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use transship_checkpoint::store::{Checkpoint, Store};

use super::server::{Asked, Mood, Server};
use super::*;
use crate::oci::store;
use crate::package_tests::{checkpoint_of, from_blobs, one_line, quickly};

/// One that does not wait long, and takes no slow machine for a silent registry.
pub(crate) const PATIENCE: Patience = Patience {
    silence: Duration::from_secs(20),
    least: 64 << 10,
    first_wait: Duration::from_millis(1),
    attempts: 4,
    longest: Duration::from_secs(100),
};
/// One that finds out about silence soon.
const HASTY: Patience = Patience {
    silence: Duration::from_millis(300),
    // Far more than drips, and far less than a busy machine gives.
    least: 4096,
    ..PATIENCE
};
const BUSY: Mood = Mood::Status("429 Too Many Requests", "retry-after: 0\r\n");
const BROKEN: Mood = Mood::Status("500 Internal Server Error", "");

pub(crate) fn registry(
    of: &Server,
    patience: Patience,
    credentials: Option<Credentials>,
) -> Registry {
    registry_at(&of.host, patience, credentials)
}

fn registry_at(host: &str, patience: Patience, credentials: Option<Credentials>) -> Registry {
    let reference = format!("{host}/shop/web:1").parse().unwrap();
    let transport = Transport {
        plain_http: true,
        patience,
        ..Transport::default()
    };
    Registry::new(reference, transport, None, credentials).unwrap()
}

pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state: u64 = 7;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005);
        state = state.wrapping_add(1);
        state.to_le_bytes()[7]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// A checkpoint of some ten chunks, in a registry.
fn pushed(root: &Path) -> (Server, Checkpoint) {
    let checkpoint = checkpoint_of(root, &noise(4 << 20));
    let server = Server::start();
    let registry = registry(&server, PATIENCE, None);
    store(&checkpoint, &quickly(), &registry, "1", &mut |_| {}).unwrap();
    (server, checkpoint)
}

fn pull(of: &Server, patience: Patience, root: &Path) -> Result<Checkpoint, PackageError> {
    let target = Store::at(root.join("target"));
    from_blobs(&registry(of, patience, None), "1", &target)
}

fn left(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join("target")).into_iter().flatten();
    let names = entries.map(|it| it.unwrap().file_name());
    names.map(|it| it.to_string_lossy().into_owned()).collect()
}

fn remove(root: &Path) {
    Store::at(root.join("target")).remove("web").unwrap();
}

#[test]
fn whatever_fails_once_is_done_again() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let (server, checkpoint) = pushed(root);
    server.is_in(|_, _| Mood::Good);
    let whole = pull(&server, PATIENCE, root).unwrap();
    assert_eq!(whole.manifest, checkpoint.manifest);
    remove(root);
    let requests = server.asked().len();
    assert!(requests > 10, "{requests}");
    let moods = [
        BUSY,
        BROKEN,
        Mood::Cut(0),
        Mood::Cut(9),
        Mood::Lie,
        Mood::More,
    ];
    for mood in moods {
        for bad in 0..requests {
            server.is_in(move |_, nth| if nth == bad { mood } else { Mood::Good });
            let pulled = pull(&server, PATIENCE, root);
            // A tag may be anything: nobody knows that this is another one.
            if bad == 0 && [Mood::Lie, Mood::More].contains(&mood) {
                assert!(pulled.is_err(), "{mood:?}");
                assert!(left(root).is_empty());
                continue;
            }
            let pulled = pulled.unwrap_or_else(|error| panic!("{mood:?}, {bad}: {error}"));
            pulled.verify().unwrap();
            remove(root);
        }
    }
    for mood in [Mood::Silent, Mood::Stall(5), Mood::Drip] {
        for bad in [0, 1, 2, requests - 1] {
            server.is_in(move |_, nth| if nth == bad { mood } else { Mood::Good });
            let pulled = pull(&server, HASTY, root);
            let pulled = pulled.unwrap_or_else(|error| panic!("{mood:?}, {bad}: {error}"));
            pulled.verify().unwrap();
            remove(root);
        }
    }
}

#[test]
fn a_push_gets_through_whatever_fails_once() {
    let root = tempfile::tempdir().unwrap();
    let (server, checkpoint) = pushed(root.path());
    let push = |patience| {
        let registry = registry(&server, patience, None);
        store(&checkpoint, &quickly(), &registry, "1", &mut |_| {})
    };
    server.forget_everything();
    server.is_in(|_, _| Mood::Good);
    push(PATIENCE).unwrap();
    let requests = server.asked().len();
    for (mood, patience) in [
        (BUSY, PATIENCE),
        (BROKEN, PATIENCE),
        (Mood::Cut(0), PATIENCE),
        (Mood::Silent, HASTY),
    ] {
        for bad in (0..requests).step_by(3) {
            server.forget_everything();
            server.is_in(move |_, nth| if nth == bad { mood } else { Mood::Good });
            push(patience).unwrap_or_else(|error| panic!("{mood:?}, {bad}: {error}"));
            server.is_in(|_, _| Mood::Good);
            pull(&server, PATIENCE, root.path()).unwrap();
            remove(root.path());
        }
    }
    // Whoever pushes again sends what is missing.
    server.is_in(|_, _| Mood::Good);
    push(PATIENCE).unwrap();
    let puts = |asked: &Asked| asked.method == "PUT" && asked.path.contains("/blobs/");
    assert!(!server.asked().iter().any(puts));
}

#[test]
fn what_breaks_off_goes_on_where_it_was() {
    let blob = noise(300_000);
    let descriptor = Descriptor::new("x", &blob);
    let server = Server::start();
    server.put_blob(&blob);
    let get = || registry(&server, PATIENCE, None).get(&descriptor, 1 << 20);
    // Each attempt brings some more: far more of them than those that may get nowhere.
    server.is_in(|_, nth| {
        if nth < 4 {
            Mood::Cut(70_000)
        } else {
            Mood::Good
        }
    });
    assert_eq!(get().unwrap(), blob);
    let ranges: Vec<_> = server
        .asked()
        .iter()
        .map(|it| it.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges[0], None);
    assert_eq!(ranges[1].as_deref(), Some("bytes=70000-"));
    assert_eq!(ranges[4].as_deref(), Some("bytes=280000-"));
    // A registry that knows no ranges, and one that gives another range.
    let no_ranges = |_: &Asked, nth| {
        if nth == 0 {
            Mood::Cut(1000)
        } else {
            Mood::NoRanges
        }
    };
    server.is_in(no_ranges);
    assert_eq!(get().unwrap(), blob);
    let other = Mood::Status("206 Partial Content", "content-range: bytes 5-8/9\r\n");
    for other in [other, Mood::Status("416 Range Not Satisfiable", "")] {
        server.is_in(move |_, nth| match nth {
            0 => Mood::Cut(1000),
            1 => other,
            _ => Mood::Good,
        });
        assert_eq!(get().unwrap(), blob);
    }
    // A byte at a time is no progress.
    server.is_in(|_, _| Mood::Cut(1));
    assert!(get().unwrap_err().is_passing());
    assert_eq!(server.asked().len(), 4);
}

#[test]
fn an_upload_that_breaks_off_goes_on_where_it_was() {
    const CUT: usize = 700_000;
    let blob = noise(3 << 20);
    let digest = digest_of(&blob);
    let server = Server::start();
    let open = || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(Cursor::new(blob.clone()))) };
    let put = || {
        server.forget_everything();
        registry(&server, PATIENCE, None).put_streamed(&Streamed {
            digest: &digest,
            size: blob.len() as u64,
            repositories: &[],
            open: &open,
        })
    };
    let ranges = || {
        let asked = server.asked().into_iter();
        let ranges = asked.filter_map(|it| it.headers.get("content-range").cloned());
        ranges.collect::<Vec<_>>()
    };
    let brings_some = |asked: &Asked| {
        asked
            .headers
            .get("content-length")
            .is_some_and(|it| it != "0")
    };
    // Each request brings some more: more of them than those that may get nowhere.
    server.is_in(move |asked, _| match brings_some(asked) {
        true => Mood::Reads(CUT),
        false => Mood::Good,
    });
    put().unwrap();
    assert!(server.blob(&digest) == Some(blob.clone()));
    let wanted: Vec<_> = (0..5)
        .map(|nth| format!("{}-{}", nth * CUT, blob.len() - 1))
        .collect();
    assert_eq!(ranges(), wanted);
    // Docker's registry has forgotten the upload then; another says what cannot be.
    let impossible = Mood::Status("204 No Content", "range: 0-99999999\r\n");
    for answer in [Mood::Status("404 Not Found", ""), impossible, BROKEN] {
        server.is_in(move |asked, nth| match asked.method.as_str() {
            "GET" if nth < 8 => answer,
            _ if brings_some(asked) && nth < 6 => Mood::Reads(CUT),
            _ => Mood::Good,
        });
        put().unwrap();
        assert!(server.blob(&digest) == Some(blob.clone()), "{answer:?}");
    }
    // What brings nothing ends.
    server.is_in(move |asked, _| match brings_some(asked) {
        true => Mood::Reads(100),
        false => Mood::Good,
    });
    assert!(put().unwrap_err().is_passing());
    assert_eq!(ranges().len(), 3);
}

#[test]
fn what_fails_for_ever_ends_with_one_error() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let (server, _) = pushed(root);
    for (mood, patience, said) in [
        (BUSY, PATIENCE, "it answers 429"),
        (BROKEN, PATIENCE, "it answers 500"),
        (Mood::Cut(0), PATIENCE, "cannot give a"),
        (Mood::Silent, HASTY, "timeout"),
        (Mood::Stall(5), HASTY, "timeout"),
        (Mood::Drip, HASTY, "bytes came in"),
        (
            Mood::Status("503 Service Unavailable", "retry-after: 3600\r\n"),
            PATIENCE,
            "asks for 3600 s",
        ),
    ] {
        server.is_in(move |_, _| mood);
        let line = one_line(&pull(&server, patience, root).unwrap_err());
        assert!(line.contains(said), "{mood:?}: {line}");
        assert!(left(root).is_empty(), "{mood:?}: {:?}", left(root));
        assert!(server.asked().len() <= 4, "{}", server.asked().len());
    }
    for (mood, said) in [
        (Mood::Lie, "digest differs"),
        (Mood::More, "length differs"),
        (Mood::Status("403 Forbidden", ""), "refuses to give a blob"),
        (Mood::Status("404 Not Found", ""), "has no sha256:"),
    ] {
        for first_bad in [1, 2, 5] {
            // The manifest and some blobs are as they should be.
            let bad = move |asked: &Asked, nth| match asked.is_for_blob() && nth >= first_bad {
                true => mood,
                false => Mood::Good,
            };
            server.is_in(bad);
            let line = one_line(&pull(&server, PATIENCE, root).unwrap_err());
            assert!(line.contains(said), "{mood:?}: {line}");
            assert!(left(root).is_empty(), "{mood:?}: {:?}", left(root));
        }
    }
}

/// One that takes a byte now and then is given up like one that gives so few.
#[test]
fn a_push_ends_that_gets_nowhere() {
    let server = Server::start();
    server.is_in(|asked, _| match asked.method.as_str() {
        "PUT" | "PATCH" => Mood::Sips,
        _ => Mood::Good,
    });
    // More than fits into the buffers of a connection.
    let bytes = noise(32 << 20);
    let begun = Instant::now();
    let error = registry(&server, HASTY, None).put(&digest_of(&bytes), &bytes);
    let error = error.unwrap_err();
    assert!(error.is_passing(), "{}", one_line(&error));
    assert!(begun.elapsed() < Duration::from_secs(60), "{begun:?}");
}

#[test]
fn a_pull_goes_on_with_what_an_earlier_one_has_brought() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let (server, checkpoint) = pushed(root);
    server.is_in(|asked, nth| match asked.is_for_blob() && nth > 6 {
        true => BROKEN,
        false => Mood::Good,
    });
    let error = pull(&server, PATIENCE, root).unwrap_err();
    assert!(error.is_passing(), "{error}");
    assert_eq!(left(root), [".pulls"]);
    let target = Store::at(root.join("target"));
    assert!(target.list().unwrap().is_empty());
    // It is no draft that the next writer removes, and no day old.
    drop(target.draft("other").unwrap());
    crate::oci::remove_abandoned(&target).unwrap();
    let brought: Vec<_> = server.asked().into_iter().take(7).collect();
    server.is_in(|_, _| Mood::Good);
    let pulled = pull(&server, PATIENCE, root).unwrap();
    assert_eq!(pulled.manifest, checkpoint.manifest);
    pulled.verify().unwrap();
    assert_eq!(left(root), ["web"]);
    // The manifest, its config, and chunks that the first one had not: none twice.
    let again = server.asked();
    for asked in brought.iter().skip(2).filter(|it| it.is_for_blob()) {
        let times = again.iter().filter(|it| it.path == asked.path).count();
        assert_eq!(times, 0, "{}", asked.path);
    }
    assert!(!fs::exists(pulled.dir.join(".done")).unwrap());
}

#[test]
fn what_was_spoilt_meanwhile_is_found() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let (server, _) = pushed(root);
    server.is_in(|asked, nth| match asked.is_for_blob() && nth > 8 {
        true => BROKEN,
        false => Mood::Good,
    });
    pull(&server, PATIENCE, root).unwrap_err();
    let pulls = root.join("target/.pulls");
    let partial = fs::read_dir(&pulls)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let spec = partial.join("c/spec.dump");
    fs::write(&spec, b"[]").unwrap();
    server.is_in(|_, _| Mood::Good);
    let line = one_line(&pull(&server, PATIENCE, root).unwrap_err());
    assert!(line.contains("spec.dump"), "{line}");
    assert!(left(root).is_empty(), "{:?}", left(root));
    pull(&server, PATIENCE, root).unwrap();
    // A day later nobody goes on with it.
    remove(root);
    server.is_in(|asked, nth| match asked.is_for_blob() && nth > 8 {
        true => BROKEN,
        false => Mood::Good,
    });
    pull(&server, PATIENCE, root).unwrap_err();
    let journal = fs::File::options().append(true).open(partial.join(".done"));
    let yesterday = std::time::SystemTime::now() - Duration::from_secs(90_000);
    journal.unwrap().set_modified(yesterday).unwrap();
    crate::oci::remove_abandoned(&Store::at(root.join("target"))).unwrap();
    assert!(left(root).is_empty(), "{:?}", left(root));
}

#[test]
fn credentials_stay_with_the_host_that_they_are_for() {
    let (server, other) = (Server::start(), Server::start());
    let challenge = Mood::Status(
        "401 Unauthorized",
        "www-authenticate: Basic realm=\"x\"\r\n",
    );
    let needs_password = move |asked: &Asked, _: usize| match asked.headers.get("authorization") {
        None => challenge,
        Some(_) => Mood::Good,
    };
    server.is_in(needs_password);
    server.sends_uploads_to(format!("http://{}", other.host));
    let credentials = || {
        Some(Credentials {
            user: "me".into(),
            secret: "secret".into(),
            ..Credentials::default()
        })
    };
    let patient = registry(&server, PATIENCE, credentials());
    patient.put(&digest_of(b"content"), b"content").unwrap();
    let put = other.asked();
    assert_eq!((put.len(), put[0].method.as_str()), (1, "PUT"));
    assert!(!put[0].headers.contains_key("authorization"), "{put:?}");
    // Nor does another host get them by asking.
    other.is_in(move |_, _| challenge);
    let error = patient.put(&digest_of(b"more"), b"more").unwrap_err();
    assert!(error.to_string().contains("401"), "{error}");
    let asked = other.asked();
    assert!(
        !asked
            .iter()
            .any(|it| it.headers.contains_key("authorization"))
    );
}

/// A registry may keep its blobs elsewhere, as in a store of a cloud, and leads there by a redirection.
#[test]
fn where_a_redirection_leads_nobody_gets_credentials_by_asking() {
    let (server, store, tokens) = (Server::start(), Server::start(), Server::start());
    tokens.gives(br#"{"token": "T"}"#);
    let blob = Descriptor::new("x", b"content");
    let to_store = format!("location: http://{}/v2/web/blobs/x\r\n", store.host);
    let to_store: &'static str = to_store.leak();
    server.is_in(move |_, _| Mood::Status("307 Temporary Redirect", to_store));
    let credentials = || {
        Some(Credentials {
            user: "me".into(),
            secret: "secret".into(),
            ..Credentials::default()
        })
    };
    let bearer = format!("Bearer realm=\"http://{}/token\"", tokens.host);
    for challenge in [&bearer[..], "Basic realm=\"x\""] {
        let challenge = format!("www-authenticate: {challenge}\r\n");
        let challenge: &'static str = challenge.leak();
        store.is_in(move |_, _| Mood::Status("401 Unauthorized", challenge));
        let registry = registry(&server, PATIENCE, credentials());
        let error = registry.get(&blob, 100).unwrap_err().to_string();
        assert!(error.contains("401"), "{error}");
        assert_eq!(tokens.asked(), []);
        assert_eq!(server.asked().len(), 1, "asked again, with the credentials");
        assert!(!store.asked()[0].headers.contains_key("authorization"));
        server.is_in(move |_, _| Mood::Status("307 Temporary Redirect", to_store));
    }
}

/// What is neither a blob nor a manifest, but a token, or the words of a refusal.
#[test]
fn no_short_answer_comes_for_ever() {
    let (server, tokens) = (Server::start(), Server::start());
    let long = vec![b'x'; 60_000];
    let since = Instant::now();
    let realm = format!(
        "www-authenticate: Bearer realm=\"http://{}/token\"\r\n",
        tokens.host
    );
    let realm: &'static str = realm.leak();
    server.is_in(move |_, _| Mood::Status("401 Unauthorized", realm));
    tokens.gives(&long);
    tokens.is_in(|_, _| Mood::Drip);
    let blob = Descriptor::new("x", b"content");
    let hasty = registry(&server, HASTY, None);
    let error = hasty.get(&blob, 100).unwrap_err().to_string();
    assert!(error.contains("bytes came in"), "{error}");
    // It answers 200 where 201 or 202 are answers.
    server.gives(&long);
    server.is_in(|_, _| Mood::Drip);
    let error = hasty.put(&digest_of(b"x"), b"x").unwrap_err().to_string();
    assert!(error.contains("200 OK xxx"), "{error}");
    assert!(
        since.elapsed() < HASTY.silence * 20,
        "{:?}",
        since.elapsed()
    );
}

/// Lets the registry be good to who has the token `T` of that server.
fn wants_token_of(server: &Server, tokens: &Server) {
    let realm = format!(
        "www-authenticate: Bearer realm=\"http://{}/token\",service=\"s\",scope=\"repository:web:pull\"\r\n",
        tokens.host
    );
    let realm: &'static str = realm.leak();
    server.is_in(move |asked, _| match asked.headers.get("authorization") {
        Some(token) if token == "Bearer T" => Mood::Good,
        _ => Mood::Status("401 Unauthorized", realm),
    });
}

#[test]
fn a_token_is_fetched_with_the_credentials() {
    let (server, tokens) = (Server::start(), Server::start());
    let blob = Descriptor::new("x", b"content");
    server.put_blob(b"content");
    wants_token_of(&server, &tokens);
    tokens.gives(br#"{"token": "T"}"#);
    let credentials = Credentials {
        user: "me".into(),
        secret: "secret".into(),
        ..Credentials::default()
    };
    let got = registry(&server, PATIENCE, Some(credentials)).get(&blob, 100);
    assert_eq!(got.unwrap(), b"content");
    let asked = tokens.asked();
    assert_eq!(asked[0].path, "/token?service=s&scope=repository:web:pull");
    assert_eq!(asked[0].headers["authorization"], "Basic bWU6c2VjcmV0");
}

/// `docker login` keeps one for registries that give it, and their tokens have two names.
#[test]
fn an_identity_token_is_exchanged() {
    let (server, tokens) = (Server::start(), Server::start());
    let blob = Descriptor::new("x", b"content");
    server.put_blob(b"content");
    wants_token_of(&server, &tokens);
    tokens.gives(br#"{"access_token": "T", "token": "T"}"#);
    let credentials = Credentials {
        identity_token: "a+b".into(),
        ..Credentials::default()
    };
    let got = registry(&server, PATIENCE, Some(credentials)).get(&blob, 100);
    assert_eq!(got.unwrap(), b"content");
    let asked = tokens.asked();
    assert_eq!(
        (asked[0].method.as_str(), asked[0].path.as_str()),
        ("POST", "/token")
    );
    assert!(!asked[0].headers.contains_key("authorization"));
    let form = "grant_type=refresh_token&client_id=transship&refresh_token=a%2Bb&service=s&scope=repository:web:pull";
    let length = asked[0].headers["content-length"].as_str();
    assert_eq!(length, form.len().to_string());
}

#[test]
fn docker_s_registry_is_at_another_place() {
    for (text, place) in [
        ("docker.io/web:1", ("registry-1.docker.io", "library/web")),
        ("docker.io/shop/web:1", ("registry-1.docker.io", "shop/web")),
        ("localhost:5000/web:1", ("localhost:5000", "web")),
    ] {
        let reference: Reference = text.parse().unwrap();
        let (host, name) = place_of(&reference);
        assert_eq!((host, name.as_str()), place);
    }
    let reference: Reference = "a/web:1".parse().unwrap();
    let error = Registry::new(reference, Transport::default(), Some(b"no PEM"), None).unwrap_err();
    assert!(error.to_string().contains("no certificate"), "{error}");
}

#[test]
fn a_refusal_is_told_in_its_words() {
    let server = Server::start();
    server.is_in(|_, _| Mood::Status("403 Forbidden", ""));
    let patient = registry(&server, PATIENCE, None);
    let error = patient.put(&digest_of(b"x"), b"x").unwrap_err().to_string();
    assert!(
        error.contains("refuses to take a blob") && error.contains("in a bad mood"),
        "{error}"
    );
    assert_eq!(server.asked().len(), 1);
    let large = Descriptor {
        size: 10 << 40,
        ..Descriptor::new("x", b"content")
    };
    let error = patient.get(&large, 100).unwrap_err().to_string();
    assert!(error.contains("100 are taken at most"), "{error}");
}

#[test]
fn nobody_is_waited_for_who_was_never_there() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = closed.local_addr().unwrap().to_string();
    drop(closed);
    // One that waited would not come back.
    let patience = Patience {
        first_wait: Duration::from_secs(3600),
        longest: Duration::from_secs(7200),
        ..PATIENCE
    };
    let dir = tempfile::tempdir().unwrap();
    let target = Store::at(dir.path().join("target"));
    let error = from_blobs(&registry_at(&host, patience, None), "1", &target).unwrap_err();
    assert!(error.is_passing(), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}
