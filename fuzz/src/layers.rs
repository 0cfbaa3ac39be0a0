//! Layers of images, and the tars of what the containers of a pod share.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::symlink;

use transship_layer::{
    Compression, ExportOptions, ImportOptions, LayerFormat, OverlayStack, decompress,
    export_upperdir, import_into_upperdir, remove_contents,
};

use crate::scratch::Scratch;

/// Most bytes of a tar, so that one that compresses well takes no time.
const MAX_TAR: u64 = 4 << 20;

/// The blob of an image's layer. What was unpacked is packed, and that comes back as it is.
pub(crate) fn layer(data: &[u8]) {
    let scratch = Scratch::new();
    let stack = OverlayStack::new(scratch.dir(), []);
    let Ok(tar) = decompress(Cursor::new(data)) else {
        return;
    };
    let options = ImportOptions {
        format: LayerFormat::Image,
        skip_unsupported_xattrs: true,
        max_bytes: MAX_TAR,
    };
    let imported = import_into_upperdir(tar, &stack, &options);
    scratch.check();
    if imported.is_err() {
        return;
    }
    // What no layer can say is refused.
    let Some(packed) = export(&stack) else { return };
    let again = Scratch::new();
    let copy = OverlayStack::new(again.dir(), []);
    import_into_upperdir(packed.as_slice(), &copy, &ImportOptions::default())
        .expect("what was exported can be imported");
    let repacked = export(&copy).expect("it was exported before");
    assert!(packed == repacked, "a layer does not come back as it was");
    again.check();
}

fn export(stack: &OverlayStack) -> Option<Vec<u8>> {
    let mut tar = Vec::new();
    export_upperdir(stack, &mut tar, &ExportOptions::default()).ok()?;
    Some(tar)
}

/// The tar of an emptyDir, into a directory in which a container makes links meanwhile.
pub(crate) fn shared_dir(data: &[u8]) {
    let scratch = Scratch::new();
    let dir = scratch.dir();
    remove_contents(&dir).expect("it is empty");
    symlink(scratch.guarded(), dir.join("a")).expect("it is empty");
    symlink("..", dir.join("b")).expect("it is empty");
    fs::create_dir(dir.join("c")).expect("it is empty");
    symlink("../../guarded", dir.join("c/d")).expect("it is empty");
    let options = ImportOptions::for_checkpoint(data.len() as u64, Compression::None);
    // Whether it is taken or refused, nothing beside the directory changes.
    drop(import_into_upperdir(
        data,
        &OverlayStack::new(&dir, []),
        &options,
    ));
    scratch.check();
    remove_contents(&dir).expect("what was made can be removed");
    scratch.check();
}
