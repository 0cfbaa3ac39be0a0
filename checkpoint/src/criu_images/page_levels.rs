//! Images of memory that build on each other, and where a page is in them.
//!
//! ```text
//! pagemap-7.img                1000-3000 in the file    3000-9000 in the parent    9000-a000 in the process
//! parent/pagemap-7.img                                  3000-5000 in the file      5000-9000 in the parent
//! parent/parent/pagemap-7.img                                                      5000-9000 in the file
//!
//! together                     1000-3000 pages-3.img    3000-5000 parent/pages-3.img    5000-9000 parent/parent/...
//!                              9000-a000 where the dump has left them
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};

use super::file_names::PARENT_DIR;
use super::pagemap::{PagePlace, Pagemap};
use super::{ImageError, Kind};
use crate::beneath::{Links, open_regular};

/// The pagemaps of one process, that of the dump first, and their files of pages.
#[derive(Debug)]
pub(super) struct Levels {
    levels: Vec<Level>,
    files: Vec<File>,
}

/// A pagemap.
#[derive(Debug)]
struct Level {
    path: PathBuf,
    runs: Vec<Run>,
}

/// A run of it, by addresses, with its place in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
    place: PagePlace,
    pub(super) lazy: bool,
    offset: u64,
}

/// Pages that lie together wherever they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// How many images below the dump, and at which byte of the file.
    File { level: usize, offset: u64 },
    /// Where the dump has left them.
    Process,
}

impl Levels {
    /// Those of the process `pid` in the images in `dir`; none, if there are no pages of it. `page` is the size of one
    /// in bytes. With them comes the pagemap of the dump.
    ///
    /// # Errors
    /// An image cannot be read, or has its pages in no order.
    pub(super) fn open(
        dir: &Path,
        pid: u32,
        page: u64,
    ) -> Result<Option<(Self, Pagemap)>, ImageError> {
        let name = format!("{}{pid}.img", Kind::Pagemap.prefix());
        let (mut levels, mut files, mut dump) = (Vec::new(), Vec::new(), None);
        let mut dir = dir.to_path_buf();
        while dir.join(&name).symlink_metadata().is_ok() {
            let path = dir.join(&name);
            let pagemap = Pagemap::read(&path)?;
            let pages = PathBuf::from(format!("pages-{}.img", pagemap.pages_id));
            let opened = open_regular(&dir, &pages, Links::Refused);
            files.push(opened.map_err(|source| ImageError::Io {
                act: "open",
                path: dir.join(&pages),
                source,
            })?);
            levels.push(Level::of(path, &pagemap, page)?);
            dump.get_or_insert(pagemap);
            dir.push(PARENT_DIR);
        }
        Ok(dump.map(|dump| (Self { levels, files }, dump)))
    }

    /// The runs of the dump.
    pub(super) fn runs(&self) -> &[Run] {
        self.levels.first().map_or(&[], |dump| &dump.runs)
    }

    /// How many runs all of them have.
    pub(super) fn count(&self) -> usize {
        self.levels.iter().map(|level| level.runs.len()).sum()
    }

    /// Adds where the pages of a range are that the dump has.
    ///
    /// # Errors
    /// They are nowhere.
    pub(super) fn find(&self, range: (u64, u64), spans: &mut Vec<Span>) -> Result<(), ImageError> {
        self.find_from(0, range, spans)
    }

    fn find_from(
        &self,
        at: usize,
        (start, end): (u64, u64),
        spans: &mut Vec<Span>,
    ) -> Result<(), ImageError> {
        // The one that says so has one below it, or none of these pages is anywhere.
        let nowhere = || ImageError::Pages {
            path: self.levels[at.min(self.levels.len() - 1)].path.clone(),
        };
        let runs = &self.levels.get(at).ok_or_else(nowhere)?.runs;
        let mut next = start;
        let first = runs.partition_point(|run| run.end <= start);
        for run in &runs[first..] {
            if next >= end {
                break;
            }
            if run.start > next {
                return Err(nowhere());
            }
            let part = (next, end.min(run.end));
            let mut push = |place| {
                spans.push(Span {
                    start: part.0,
                    end: part.1,
                    place,
                });
            };
            match run.place {
                PagePlace::File => push(Place::File {
                    level: at,
                    offset: run.offset + (part.0 - run.start),
                }),
                PagePlace::Process if at == 0 => push(Place::Process),
                // Only a dump leaves pages where they are.
                PagePlace::Process => return Err(nowhere()),
                PagePlace::Parent => self.find_from(at + 1, part, spans)?,
            }
            next = part.1;
        }
        match next < end {
            true => Err(nowhere()),
            false => Ok(()),
        }
    }

    /// The files of pages, by levels.
    pub(super) fn into_files(self) -> Vec<File> {
        self.files
    }
}

impl Level {
    fn of(path: PathBuf, pagemap: &Pagemap, page: u64) -> Result<Self, ImageError> {
        let (mut runs, mut last, mut offset) = (Vec::new(), 0, 0_u64);
        for run in &pagemap.runs {
            let bytes = run.pages.checked_mul(page);
            let end = bytes.and_then(|bytes| run.start.checked_add(bytes));
            let Some(end) = end.filter(|_| run.start >= last && run.start % page == 0) else {
                return Err(ImageError::Pages { path });
            };
            last = end;
            runs.push(Run {
                start: run.start,
                end,
                place: run.place,
                lazy: run.lazy,
                offset,
            });
            if run.place == PagePlace::File {
                // No more than all addresses.
                offset += end - run.start;
            }
        }
        Ok(Self { path, runs })
    }
}
