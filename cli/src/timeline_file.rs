//! `--timeline FILE`: the picture of what took how long.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use transship_engine::timeline::Timeline;
use transship_engine::{Context as _, Result};

/// The file, opened before anything is frozen: one that cannot be written costs nothing then.
pub(crate) struct TimelineFile(Option<(PathBuf, File)>);

impl TimelineFile {
    pub(crate) fn open(path: Option<PathBuf>) -> Result<Self> {
        let file = path.map(|path| {
            let failed = || format!("cannot write {}", path.display());
            let file = File::create(&path).with_context(failed)?;
            Ok((path, file))
        });
        file.transpose().map(Self)
    }

    pub(crate) fn write(self, timeline: &Timeline) -> Result<()> {
        let Some((path, mut file)) = self.0 else {
            return Ok(());
        };
        let failed = || format!("it is done, but cannot write {}", path.display());
        file.write_all(timeline.svg().as_bytes())
            .with_context(failed)
    }
}
