//! Layers of images, and the tars of what the containers of a pod share.

use std::fs::{self, File};
use std::io::{self, Cursor, Write};
use std::os::unix::fs::symlink;

use transship_layer::{
    Compression, ExportError, ExportOptions, ImportOptions, LayerFormat, OverlayStack,
    RewriteError, decompress, export_upperdir, import_into_upperdir, remove_contents,
    rewrite_for_image,
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
        contents: None,
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
    for_registries(&packed, &options);
}

/// A checkpoint's layer as that of an image, which has nothing in it that an image cannot say.
fn for_registries(packed: &[u8], options: &ImportOptions) {
    let place = Scratch::new();
    let path = place.dir().join("layer");
    fs::write(&path, packed).expect("it is empty");
    let file = File::open(&path).expect("it was written");
    let mut tar = Short(Vec::new());
    if let Err(error) = rewrite_for_image(&file, &mut tar) {
        let is_long = matches!(&error, RewriteError::Write(ExportError::Write { .. }));
        assert!(is_long, "{error:?}");
        return;
    }
    let unpacked = Scratch::new();
    let stack = OverlayStack::new(unpacked.dir(), []);
    import_into_upperdir(tar.0.as_slice(), &stack, options).expect("it is a layer of an image");
    unpacked.check();
}

/// Takes no more than other tars have: holes become zeros.
struct Short(Vec<u8>);

impl Write for Short {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.0.len() + bytes.len()) as u64 > MAX_TAR {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
