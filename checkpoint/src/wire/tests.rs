use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use super::*;

const LIMITS: Limits = Limits {
    max_bytes: u64::MAX,
    keep_free: 0,
};

fn checkpoint_stream(dir: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    sender.send(&Message::Begin { name: "web".into() }).unwrap();
    let mut files = Vec::new();
    for path in ["checkpoint/pages-1.img", "spec.dump"] {
        files.push(
            sender
                .send_file("c", dir, path, &mut How::whole(Check::Sha256, &mut |_| {}))
                .unwrap(),
        );
    }
    let manifest = Manifest {
        name: "web".into(),
        created: 0,
        shared: Default::default(),
        containers: vec![Container {
            name: "c".into(),
            files,
            ..Container::default()
        }],
        ..Manifest::default()
    };
    sender
        .send(&Message::End {
            manifest: Box::new(manifest),
            signed: None,
        })
        .unwrap();
    stream
}

#[test]
fn only_messages_with_lists_may_be_long() {
    let receive = |json: String| {
        let mut stream = MAGIC.to_vec();
        stream.push(MESSAGE);
        stream.extend(u32::try_from(json.len()).unwrap().to_le_bytes());
        stream.extend(json.into_bytes());
        Receiver::new(&*stream).receive("a word")
    };
    let with = |message: &str, more: &str| {
        let zeros = vec!["0"; SHORT_MESSAGE / 2].join(",");
        receive(format!(
            r#"{{"x":[{zeros},0],"message":"{message}"{more}}}"#
        ))
    };
    let error = with("received", "").unwrap_err().to_string();
    assert!(error.contains("bytes"), "{error}");
    let manifest = serde_json::to_string(&Manifest::default()).unwrap();
    let end = with("end", &format!(r#","manifest":{manifest}"#)).unwrap();
    assert!(matches!(end, Message::End { signed: None, .. }), "{end:?}");
    assert_eq!(
        receive(r#"{"message":"received"}"#.into()).unwrap(),
        Message::Received
    );
}

fn source_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("checkpoint")).unwrap();
    let pages: Vec<u8> = (0..2_500_000u32).map(|i| i.to_le_bytes()[0]).collect();
    fs::write(dir.path().join("checkpoint/pages-1.img"), pages).unwrap();
    fs::write(dir.path().join("spec.dump"), b"{}").unwrap();
    dir
}

fn receive_all(
    receiver: &mut Receiver<&[u8]>,
    dir: &Path,
    limits: Limits,
) -> Result<Manifest, WireError> {
    let arriving = Arriving::into_dir(dir, limits, Check::Sha256);
    match receiver.receive_files(&arriving, &mut |_| {})? {
        Message::End { manifest, .. } => arriving.compare(&manifest),
        other => Err(unexpected("the end", &other)),
    }
}

fn receive(stream: &[u8]) -> (tempfile::TempDir, Result<Manifest, WireError>) {
    let target = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::new(stream);
    let received = receiver
        .receive("a checkpoint")
        .and_then(|_| receive_all(&mut receiver, target.path(), LIMITS));
    (target, received)
}

#[test]
fn a_checkpoint_survives_the_stream() {
    let source = source_dir();
    let (target, manifest) = receive(&checkpoint_stream(source.path()));
    assert_eq!(manifest.unwrap().containers[0].files.len(), 2);
    for path in ["checkpoint/pages-1.img", "spec.dump"] {
        let (a, b) = (source.path().join(path), target.path().join("c").join(path));
        assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
    }
}

#[test]
fn every_truncation_is_an_end_and_no_success() {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("checkpoint")).unwrap();
    fs::write(source.path().join("checkpoint/pages-1.img"), b"pages").unwrap();
    fs::write(source.path().join("spec.dump"), b"{}").unwrap();
    let stream = checkpoint_stream(source.path());
    for length in 0..stream.len() {
        let error = receive(&stream[..length]).1.unwrap_err();
        assert!(
            matches!(error, WireError::Ended { .. }),
            "{length}: {error}"
        );
    }
}

#[test]
fn a_flipped_byte_of_a_file_is_found() {
    let source = source_dir();
    let mut stream = checkpoint_stream(source.path());
    let middle = stream.len() / 2;
    stream[middle] ^= 1;
    let error = receive(&stream).1.unwrap_err();
    assert!(matches!(error, WireError::Damaged { .. }), "{error}");
}

#[test]
fn hostile_paths_and_lengths_are_refused() {
    for path in ["../../etc/passwd", "/etc/passwd", "c/../../x", "c//x", ""] {
        let mut stream = Vec::new();
        let sender = Sender::new(&mut stream);
        sender.send(&Message::Begin { name: "x".into() }).unwrap();
        sender.send(&Message::File { path: path.into() }).unwrap();
        sender.send_blob(b"x").unwrap();
        let error = receive(&stream).1.unwrap_err();
        assert!(matches!(error, WireError::Name(_)), "{path:?}: {error}");
    }
    let mut stream = MAGIC.to_vec();
    stream.extend_from_slice(&[MESSAGE, 0xff, 0xff, 0xff, 0xff]);
    let error = receive(&stream).1.unwrap_err();
    assert!(matches!(error, WireError::Protocol { .. }), "{error}");
}

#[test]
fn directories_have_an_end_as_well() {
    let deep = ["d"; 1000].join("/");
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    sender.send(&Message::Begin { name: "x".into() }).unwrap();
    for n in 0..3 {
        let path = format!("{n}/{deep}/f");
        sender.send(&Message::File { path }).unwrap();
        sender.send(&Message::FileEnd { xxh3: None }).unwrap();
    }
    let target = tempfile::tempdir().unwrap();
    let limits = Limits {
        max_bytes: 1 << 20,
        keep_free: 0,
    };
    let mut receiver = Receiver::new(stream.as_slice());
    receiver.receive("a checkpoint").unwrap();
    let received = receive_all(&mut receiver, target.path(), limits);
    assert!(
        matches!(received, Err(WireError::TooLarge { .. })),
        "{received:?}"
    );
}

#[test]
fn the_same_file_twice_is_refused() {
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    sender.send(&Message::Begin { name: "x".into() }).unwrap();
    for _ in 0..2 {
        sender.send(&Message::File { path: "c/f".into() }).unwrap();
        sender.send_blob(b"x").unwrap();
        sender.send(&Message::FileEnd { xxh3: None }).unwrap();
    }
    let error = receive(&stream).1.unwrap_err();
    assert!(
        matches!(error, WireError::File { act: "make", .. }),
        "{error}"
    );
}

#[test]
fn a_failure_is_heard_even_where_data_should_come() {
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    sender.send(&Message::Begin { name: "x".into() }).unwrap();
    sender.send(&Message::File { path: "c/f".into() }).unwrap();
    sender
        .send(&Message::Failed {
            reason: "the dump failed".into(),
            facts: String::new(),
        })
        .unwrap();
    let error = receive(&stream).1.unwrap_err();
    assert_eq!(error.to_string(), "the other side failed: the dump failed");
}

#[test]
fn a_banner_before_the_stream_is_shown() {
    let error = receive(b"Welcome to node-b! Last login: today")
        .1
        .unwrap_err();
    assert!(error.to_string().contains("Welcome to node-b"), "{error}");
}

#[test]
fn a_file_that_still_grows_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages-1.img");
    fs::write(&path, b"begin ").unwrap();
    let looks = std::cell::Cell::new(0);
    let complete = || {
        looks.set(looks.get() + 1);
        if looks.get() == 5 {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(b"end").unwrap();
        }
        looks.get() >= 5
    };
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    let mut ignored = |_| {};
    let mut how = How {
        complete: &complete,
        ..How::whole(Check::Sha256, &mut ignored)
    };
    let file = sender
        .send_file("c", dir.path(), "pages-1.img", &mut how)
        .unwrap();
    assert_eq!(file.size, 9);
    assert_eq!(file.sha256, transship_digest::sha256_hex(b"begin end"));
}

#[test]
fn a_stream_ends_at_the_limits() {
    let source = source_dir();
    let stream = checkpoint_stream(source.path());
    let limits = |max_bytes, keep_free| Limits {
        max_bytes,
        keep_free,
    };
    let received = |limits: Limits| {
        let target = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(&stream[..]);
        receiver.receive("a checkpoint").unwrap();
        receive_all(&mut receiver, target.path(), limits)
    };
    assert!(received(limits(4 << 20, 0)).is_ok());
    let error = received(limits(1 << 20, 0)).unwrap_err();
    assert!(matches!(error, WireError::TooLarge { .. }), "{error}");
    let error = received(limits(4 << 20, u64::MAX)).unwrap_err();
    assert!(matches!(error, WireError::NoRoom { .. }), "{error}");
}

#[test]
fn signs_of_life_are_no_messages() {
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    let beat = sender.clone();
    beat.alive().unwrap();
    sender.send(&Message::GoOn).unwrap();
    beat.alive().unwrap();
    sender.send(&Message::Received).unwrap();
    drop((sender, beat));
    let mut receiver = Receiver::new(&stream[..]);
    assert_eq!(receiver.receive("x").unwrap(), Message::GoOn);
    assert_eq!(receiver.receive("x").unwrap(), Message::Received);
}

#[test]
fn an_offer_of_an_earlier_program_is_read_as_such() {
    let old = r#"{"message":"offer","container":{"name":"c","id":"c","namespace":"d","image":
        {"name":"","digest":"","chain_id":""},"snapshotter":"","runtime":"","files":[]},
        "spec":"{}","architecture":"x86_64","target":{"id":null},"blobs":[],"estimate":0}"#;
    let Message::Offer(offer) = serde_json::from_str(old).unwrap() else {
        panic!("no offer");
    };
    assert_eq!(offer.protocol, 0);
}

#[test]
fn a_file_of_a_migration_brings_its_own_check() {
    let source = source_dir();
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    let path = "checkpoint/pages-1.img";
    let sent = sender.send_file(
        "c",
        source.path(),
        path,
        &mut How::whole(Check::Xxh3, &mut |_| {}),
    );
    assert_eq!(sent.unwrap().sha256, "");
    sender.send(&Message::FilesEnd).unwrap();
    let receive = |stream: &[u8]| {
        let target = tempfile::tempdir().unwrap();
        let arriving = Arriving::into_dir(target.path(), LIMITS, Check::Xxh3);
        Receiver::new(stream).receive_files(&arriving, &mut |_| {})
    };
    assert_eq!(receive(&stream).unwrap(), Message::FilesEnd);
    let middle = stream.len() / 2;
    stream[middle] ^= 1;
    let error = receive(&stream).unwrap_err();
    assert!(matches!(error, WireError::Damaged { .. }), "{error}");
    // A sender that leaves it out is no migration's.
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    sender.send(&Message::File { path: "c/f".into() }).unwrap();
    sender.send(&Message::FileEnd { xxh3: None }).unwrap();
    let error = receive(&stream).unwrap_err();
    assert!(matches!(error, WireError::Damaged { .. }), "{error}");
}

#[test]
fn pages_of_zeros_are_not_sent() {
    let page = |byte: u8| vec![byte; 4096];
    let memory = [page(1), vec![0; 3 << 20], page(2), page(0)].concat();
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("pages-1.img"), &memory).unwrap();
    let mut stream = Vec::new();
    let sender = Sender::new(&mut stream);
    let mut ignored = |_| {};
    let mut how = How::whole(Check::Xxh3, &mut ignored);
    let sent = sender.send_file("c", source.path(), "pages-1.img", &mut how);
    assert_eq!((sent.unwrap().size, how.sent), (memory.len() as u64, 8192));
    let mut made = sender.begin_file("c", "made", Check::Xxh3).unwrap();
    made.write(&page(0)).unwrap();
    made.write(b"end").unwrap();
    let mut sent = 0;
    assert_eq!(made.end(&mut sent).unwrap().size, 4099);
    assert_eq!(sent, 3);
    sender.send(&Message::FilesEnd).unwrap();
    drop(sender);
    let receive = |check| {
        let target = tempfile::tempdir().unwrap();
        let arriving = Arriving::into_dir(target.path(), LIMITS, check);
        let end = Receiver::new(&stream[..]).receive_files(&arriving, &mut |_| {});
        (target, end)
    };
    let (target, end) = receive(Check::Xxh3);
    assert_eq!(end.unwrap(), Message::FilesEnd);
    let came = |name| fs::read(target.path().join("c").join(name)).unwrap();
    assert!(came("pages-1.img") == memory);
    assert_eq!(came("made"), [&page(0)[..], b"end"].concat());
    // The stream of a checkpoint has data alone.
    assert!(matches!(
        receive(Check::Sha256).1,
        Err(WireError::Protocol { .. })
    ));
}

#[test]
fn contents_go_to_their_directories_and_nowhere_else() {
    let (target, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let volume = work.path().join("contents");
    let receive_with = |path: &str, contents: ContentsDir| {
        let mut stream = Vec::new();
        let sender = Sender::new(&mut stream);
        let (dir, file) = path.split_once('/').unwrap();
        let mut content = sender.begin_file(dir, file, Check::Xxh3).unwrap();
        content.write(b"content").unwrap();
        content.end(&mut 0).unwrap();
        sender.send(&Message::FilesEnd).unwrap();
        drop(sender);
        let known = (".shared/contents/work".to_owned(), contents);
        let arriving = Arriving::into_dir(target.path(), LIMITS, Check::Xxh3);
        let arriving = arriving.with_contents([known].into());
        Receiver::new(&stream[..]).receive_files(&arriving, &mut |_| {})
    };
    let made = || ContentsDir::make(work.path(), "contents").unwrap();
    let receive = |path: &str| {
        drop(fs::remove_dir_all(&volume));
        receive_with(path, made())
    };
    let names = |dir: &Path| -> Vec<_> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    receive(".shared/contents/work/7").unwrap();
    assert_eq!(names(&volume), ["7"]);
    ContentsDir::make(work.path(), "contents").unwrap_err();
    // Never over one that has come before, nor through a link.
    for make in [
        |at: &Path| fs::write(at, "before"),
        |at: &Path| std::os::unix::fs::symlink(at.with_file_name("made"), at),
    ] {
        fs::remove_dir_all(&volume).unwrap();
        let contents = made();
        make(&volume.join("7")).unwrap();
        receive_with(".shared/contents/work/7", contents).unwrap_err();
        assert_eq!(names(&volume), ["7"]);
    }
    // Nor into what somebody has put in the place of its name.
    fs::remove_dir_all(&volume).unwrap();
    let contents = made();
    fs::rename(&volume, work.path().join("moved")).unwrap();
    std::os::unix::fs::symlink(target.path(), &volume).unwrap();
    receive_with(".shared/contents/work/7", contents).unwrap();
    assert_eq!(names(&work.path().join("moved")), ["7"]);
    assert!(names(target.path()).is_empty());
    fs::remove_file(&volume).unwrap();
    for path in [
        ".shared/contents/work/",
        ".shared/contents/work/../7",
        ".shared/contents/work//7",
    ] {
        receive(path).unwrap_err();
    }
    // Whatever else it is called is a file of the checkpoint.
    for path in [
        ".shared/contents/work/x",
        ".shared/contents/other/9",
        "web/contents/9",
        ".shared/contents/work/9/9",
    ] {
        receive(path).unwrap();
        assert!(target.path().join(path).is_file(), "{path}");
    }
    assert!(names(&volume).is_empty());
}

/// A link that takes so many bytes a second.
struct Link {
    bytes_per_second: usize,
    taken: Vec<u8>,
}

impl Write for &mut Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let micros = bytes.len() * 1_000_000 / self.bytes_per_second;
        std::thread::sleep(std::time::Duration::from_micros(micros as u64));
        self.taken.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends a file over such a link, with a page of zeros and many small pieces in it; gives what went, and whether it came
/// as it was.
fn send_over(bytes_per_second: usize, check: Check, file: &[u8]) -> (usize, Compressed, bool) {
    let mut link = Link {
        bytes_per_second,
        taken: Vec::with_capacity(file.len() + (1 << 20)),
    };
    let sender = Sender::new(&mut link);
    let mut sending = sender.begin_file("c", "pages-1.img", check).unwrap();
    let (zeros, mut sent) = ([0; 8192], 0);
    let (large, small) = file.split_at(file.len() / 2);
    sending.write(large).unwrap();
    sending.write(&zeros).unwrap();
    for piece in small.chunks(4096) {
        sending.write(piece).unwrap();
    }
    sending.end(&mut sent).unwrap();
    sender.send(&Message::FilesEnd).unwrap();
    let compressed = sender.compressed();
    drop(sender);
    let target = tempfile::tempdir().unwrap();
    let arriving = Arriving::into_dir(target.path(), LIMITS, check);
    let end = Receiver::new(&link.taken[..]).receive_files(&arriving, &mut |_| {});
    assert_eq!(end.unwrap(), Message::FilesEnd);
    let came = fs::read(target.path().join("c/pages-1.img")).unwrap();
    let is_same = came == [large, &zeros, small].concat();
    assert!(sent <= link.taken.len() as u64);
    (link.taken.len(), compressed, is_same)
}

fn text(bytes: usize) -> Vec<u8> {
    let lines = (0..).map(|line: u64| format!("line {line} of what is much like the next one\n"));
    let mut text: Vec<u8> = lines.flat_map(String::into_bytes).take(bytes).collect();
    text.shrink_to_fit();
    text
}

#[test]
fn less_goes_over_a_slow_link() {
    const FILE: usize = 12 << 20;
    // So slow that zstd is quicker on a machine with much other work, too.
    const SLOW: usize = 4_000_000;
    let (went, compressed, is_same) = send_over(SLOW, Check::Xxh3, &text(FILE));
    assert!(is_same);
    assert!(went < FILE / 2, "{went} {compressed:?}");
    assert!(compressed.bytes > FILE as u64 / 2 && compressed.sent < compressed.bytes / 2);
    // What does not get smaller goes as it is.
    let mut state = 1_u64;
    let random = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()
    });
    let random: Vec<u8> = random
        .flat_map(|word| [word[0], word[1]])
        .take(FILE / 4)
        .collect();
    let (_, compressed, is_same) = send_over(SLOW, Check::Xxh3, &random);
    assert!(
        is_same && compressed == Compressed::default(),
        "{compressed:?}"
    );
}

#[test]
fn nothing_is_compressed_in_a_checkpoint() {
    let (_, compressed, is_same) = send_over(8_000_000, Check::Sha256, &text(6 << 20));
    assert!(
        is_same && compressed == Compressed::default(),
        "{compressed:?}"
    );
}

#[test]
fn compressed_data_that_lies_or_is_misplaced_is_refused() {
    let stream = |frame: &[u8]| {
        let mut stream = MAGIC.to_vec();
        let file = Message::File { path: "c/f".into() };
        for (kind, payload) in [
            (MESSAGE, &*serde_json::to_vec(&file).unwrap()),
            (COMPRESSED, frame),
        ] {
            stream.push(kind);
            stream.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
            stream.extend(payload);
        }
        stream
    };
    let receive = |frame: &[u8], check| {
        let target = tempfile::tempdir().unwrap();
        let arriving = Arriving::into_dir(target.path(), LIMITS, check);
        let received = Receiver::new(&stream(frame)[..]).receive_files(&arriving, &mut |_| {});
        received.unwrap_err()
    };
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let frame = |size: u32, data: &[u8]| [&size.to_le_bytes(), data].concat();
    let is_lie = |error: WireError| error.to_string().contains("not what it says");
    assert!(is_lie(receive(&frame(64 << 20, &bomb), Check::Xxh3)));
    assert!(is_lie(receive(&frame(1 << 20, &bomb), Check::Xxh3)));
    let good = frame(4, &zstd::bulk::compress(b"good", 1).unwrap());
    assert!(matches!(
        receive(&good, Check::Xxh3),
        WireError::Ended { .. }
    ));
    assert!(matches!(
        receive(&good, Check::Sha256),
        WireError::Protocol { .. }
    ));
    let blob = |frame: &[u8], announced| {
        let (stream, mut found) = (stream(frame), Vec::new());
        let mut receiver = Receiver::new(&stream[..]);
        receiver.receive("a blob").unwrap();
        let received = receiver.receive_data(announced, &mut |piece| {
            found.extend(piece);
            Ok(())
        });
        received.map(|()| found)
    };
    assert_eq!(blob(&good, 4).unwrap(), b"good");
    assert!(blob(&good, 3).is_err(), "more than announced");
    assert!(is_lie(blob(&frame(64 << 20, &bomb), 64 << 20).unwrap_err()));
}

#[test]
fn a_blob_goes_compressed_where_the_link_is_slow() {
    let text = b"a line of a layer that nobody has compressed\n".repeat(60_000);
    for (rate, is_less) in [(10_000_000, true), (10_000_000_000, false)] {
        let mut stream = Vec::new();
        let sender = Sender::new(&mut stream);
        sender.send(&Message::Restore).unwrap();
        sender.link().set_rate(rate);
        sender.send_blob(&text).unwrap();
        drop(sender);
        assert_eq!(stream.len() < text.len() / 2, is_less, "{}", stream.len());
        let (mut receiver, mut found) = (Receiver::new(&stream[..]), Vec::new());
        receiver.receive("a blob").unwrap();
        let received = receiver.receive_data(text.len() as u64, &mut |piece| {
            found.extend(piece);
            Ok(())
        });
        received.unwrap();
        assert!(found == text);
    }
}
