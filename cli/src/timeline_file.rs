//! `--timeline FILE`: the picture of what took how long.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;

use transship_engine::timeline::Timeline;
use transship_engine::{Context as _, Error, Result};

/// The file, which has what it had until there is a picture. One that cannot be written is found before anything is frozen,
/// and costs nothing then.
pub(crate) struct TimelineFile(Option<Unfinished>);

/// A file beside the one that it becomes.
struct Unfinished {
    path: PathBuf,
    beside: PathBuf,
    file: fs::File,
}

impl TimelineFile {
    pub(crate) fn open(path: Option<PathBuf>) -> Result<Self> {
        path.map(Unfinished::begin).transpose().map(Self)
    }

    pub(crate) fn write(self, timeline: &Timeline) -> Result<()> {
        let Some(mut unfinished) = self.0 else {
            return Ok(());
        };
        let failed = format!("it is done, but cannot write {}", unfinished.path.display());
        let picture = timeline.svg();
        { unfinished.file.write_all(picture.as_bytes()) }
            .and_then(|()| match unfinished.beside == unfinished.path {
                true => Ok(()),
                false => fs::rename(&unfinished.beside, &unfinished.path),
            })
            .context(failed)
    }
}

impl Unfinished {
    fn begin(path: PathBuf) -> Result<Self> {
        let failed = || format!("cannot write {}", path.display());
        // Through a link, what it leads to is another picture.
        let path = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        let is_other = fs::metadata(&path).is_ok_and(|it| !it.is_file());
        let name = path.file_name();
        let name = name.ok_or_else(|| Error::failed(failed()))?;
        let beside = match is_other {
            // A pipe or a terminal is written to, and not replaced.
            true => path.clone(),
            false => {
                let mut unfinished = name.to_owned();
                unfinished.push(format!(".{}.unfinished", std::process::id()));
                path.with_file_name(unfinished)
            }
        };
        let mut options = OpenOptions::new();
        let options = options.write(true).create_new(!is_other);
        let file = options.open(&beside).with_context(failed)?;
        Ok(Self { path, beside, file })
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.beside != self.path {
            // When the picture is there it has another name.
            drop(fs::remove_file(&self.beside));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_picture_stays_until_there_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("moved.svg");
        std::fs::write(&path, "an earlier one").unwrap();
        let read = || std::fs::read_to_string(&path).unwrap();
        drop(TimelineFile::open(Some(path.clone())).unwrap());
        assert_eq!(read(), "an earlier one");
        let picture = TimelineFile::open(Some(path.clone())).unwrap();
        assert_eq!(read(), "an earlier one");
        picture.write(&Timeline::begin()).unwrap();
        assert!(read().starts_with("<svg"), "{}", read());
        let names = std::fs::read_dir(dir.path()).unwrap();
        let names: Vec<_> = names.map(|it| it.unwrap().file_name()).collect();
        assert_eq!(names, ["moved.svg"]);
        let nowhere = dir.path().join("nowhere/moved.svg");
        assert!(TimelineFile::open(Some(nowhere)).is_err());
    }
}
