//! The manifest of a checkpoint, and the stream that brings one.

use transship_checkpoint::manifest::Manifest;
use transship_checkpoint::shown_text::printable;
use transship_checkpoint::store::list_files;
use transship_checkpoint::wire::{Arriving, Check, Limits, Message, Receiver, WireError};

use crate::scratch::Scratch;

const LIMITS: Limits = Limits {
    max_bytes: 1 << 20,
    keep_free: 0,
};

/// `transship.json`.
pub(crate) fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::parse(data) else {
        return;
    };
    for (dir, files) in manifest.directories() {
        for name in [dir]
            .into_iter()
            .chain(files.iter().map(|file| file.path.as_str()))
        {
            let leads_out = name.split('/').any(|part| matches!(part, "" | "." | ".."));
            assert!(!leads_out, "{name:?} leads out of the checkpoint");
        }
    }
    let _size = manifest.size();
    let again = Manifest::parse(&manifest.to_json()).expect("what was parsed can be written");
    assert_eq!(again, manifest);
}

/// What `transship receive` reads.
pub(crate) fn stream(data: &[u8]) {
    if refers_to_what_comes(data) {
        return;
    }
    let mut receiver = Receiver::new(data);
    // Of a migration the files have no digests in the manifest, and pages of them may come before.
    let mut check = Check::Sha256;
    // Each frame takes at least five bytes, so this ends.
    while let Ok(message) = receiver.receive("a message") {
        match message {
            Message::Begin { .. } => {
                let scratch = Scratch::new();
                let arriving = Arriving::into_dir(scratch.dir(), LIMITS, check);
                let received = receiver.receive_files(&arriving, &mut |_| {});
                scratch.check();
                if let Ok(Message::End { manifest, .. }) = received
                    && let Ok(manifest) = arriving.compare(&manifest)
                {
                    check_files(&scratch, &manifest);
                }
            }
            Message::Offer(_) => check = Check::Xxh3,
            Message::Blob { size, .. } => {
                let mut taken = 0;
                let blob = receiver.receive_data(size, &mut |piece| {
                    taken += piece.len() as u64;
                    Ok::<_, WireError>(())
                });
                assert!(blob.is_err() || taken == size, "a blob of another length");
            }
            Message::Failed { reason, .. } => {
                assert!(
                    !printable(&reason).chars().any(char::is_control),
                    "{reason:?}"
                );
            }
            _ => {}
        }
    }
}

/// Whether a frame names pages that have not come: a receiver waits a minute for them, because they may come
/// through another connection.
fn refers_to_what_comes(data: &[u8]) -> bool {
    const PAGE: u64 = 4096;
    let start = data
        .iter()
        .position(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let (mut rest, mut pages) = (&data[start..], 0);
    while let Some(([kind, length @ ..], after)) = rest.split_first_chunk::<5>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (payload, after) = after.split_at(length.min(after.len()));
        rest = after;
        match kind {
            b'p' => pages += payload.len() as u64 / PAGE,
            b'r' => {
                let end = |run: &[u8; 8]| {
                    let [number, count] = [
                        [run[0], run[1], run[2], run[3]],
                        [run[4], run[5], run[6], run[7]],
                    ];
                    u64::from(u32::from_le_bytes(number)) + u64::from(u32::from_le_bytes(count))
                };
                if payload.as_chunks().0.iter().any(|run| end(run) > pages + 1) {
                    return true;
                }
            }
            _ => {}
        }
    }
    false
}

fn check_files(scratch: &Scratch, manifest: &Manifest) {
    let found = list_files(&scratch.dir()).expect("its names were plain");
    let mut listed: Vec<String> = { manifest.directories() }
        .flat_map(|(dir, files)| files.iter().map(move |file| format!("{dir}/{}", file.path)))
        .collect();
    listed.sort_unstable();
    assert_eq!(
        found, listed,
        "the files that are there and those of the manifest"
    );
}
