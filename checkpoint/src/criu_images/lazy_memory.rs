//! Where each page of a process is that may come after the restore has begun; through images that build on each other,
//! see `page_levels`.
//!
//! `criu lazy-pages` does not copy pages of images that others build on (CRIU 3.17 to 4.2: the reader of a parent tells
//! nobody that a page is there). So whoever serves pages to it looks them up here, and gives it images in which all
//! such pages are elsewhere.

use std::fs::File;
use std::path::Path;

use super::ImageError;
use super::page_levels::{Levels, Place, Span};
use super::pagemap::{PagePlace, PageRun, Pagemap};

/// The pages of one process that may come late.
#[derive(Debug)]
pub struct LazyMemory {
    /// In the order of their addresses.
    spans: Vec<Span>,
    /// Files of pages: those of the dump, those of its parent, and so on.
    files: Vec<File>,
    /// Bytes of a page.
    page: u64,
}

/// Where pages are.
#[derive(Debug)]
pub enum Found<'a> {
    /// In a file, at this byte.
    File {
        /// The file.
        file: &'a File,
        /// Where the first one begins, in bytes.
        offset: u64,
        /// How many follow each other there.
        pages: u64,
    },
    /// In the process that was dumped.
    Process {
        /// How many follow each other there.
        pages: u64,
    },
}

impl LazyMemory {
    /// That of the process `pid` in the images in `dir`; none, if there are no pages of it. `page` is the size of one in
    /// bytes. With it comes the pagemap that CRIU is to be given.
    ///
    /// # Errors
    /// An image cannot be read, or names pages that are nowhere.
    pub fn open(dir: &Path, pid: u32, page: u64) -> Result<Option<(Self, Pagemap)>, ImageError> {
        let Some((levels, dump)) = Levels::open(dir, pid, page)? else {
            return Ok(None);
        };
        let mut spans = Vec::new();
        for run in levels.runs().iter().filter(|run| run.lazy) {
            levels.find((run.start, run.end), &mut spans)?;
        }
        let files = levels.into_files();
        Ok(Some((Self { spans, files, page }, for_server(&dump, page))))
    }

    /// Whether all of them are in files.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.spans.iter().all(|span| span.place != Place::Process)
    }

    /// Where the page at this address is, and those behind it.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<Found<'_>> {
        let at = self.spans.partition_point(|span| span.end <= address);
        let span = self.spans.get(at).filter(|span| span.start <= address)?;
        let pages = (span.end - address) / self.page;
        Some(match span.place {
            Place::File { level, offset } => Found::File {
                file: self.files.get(level)?,
                offset: offset + (address - span.start),
                pages,
            },
            Place::Process => Found::Process { pages },
        })
    }
}

/// The same pages, but that of those which may come late none is said to be in the parent: whoever reads this asks a
/// server for them.
fn for_server(pagemap: &Pagemap, page: u64) -> Pagemap {
    let mut served = Pagemap {
        pages_id: pagemap.pages_id,
        runs: Vec::new(),
    };
    for run in &pagemap.runs {
        let place = match run.place {
            PagePlace::Parent if run.lazy => PagePlace::Process,
            place => place,
        };
        served.push(PageRun { place, ..*run }, page);
    }
    served
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::file_names::PARENT_DIR;
    use super::*;

    const PAGE: u64 = 4096;

    fn run(start: u64, pages: u64, place: PagePlace, lazy: bool) -> PageRun {
        PageRun {
            start: start * PAGE,
            pages,
            place,
            lazy,
        }
    }

    fn write(dir: &Path, runs: Vec<PageRun>) {
        fs::create_dir_all(dir).unwrap();
        let pagemap = Pagemap { pages_id: 3, runs };
        fs::write(dir.join("pagemap-7.img"), pagemap.to_bytes()).unwrap();
        fs::write(dir.join("pages-3.img"), b"").unwrap();
    }

    #[test]
    fn pages_are_found_through_all_images() {
        use PagePlace::{File, Parent, Process};
        let dir = tempfile::tempdir().unwrap();
        assert!(LazyMemory::open(dir.path(), 7, PAGE).unwrap().is_none());
        let top = vec![
            run(1, 2, File, true),
            run(3, 1, File, false),
            run(4, 6, Parent, true),
            run(10, 1, Process, true),
        ];
        write(dir.path(), top.clone());
        let below = dir.path().join(PARENT_DIR);
        write(&below, vec![run(3, 3, File, true), run(6, 9, Parent, true)]);
        let last = vec![run(1, 1, File, true), run(5, 20, File, true)];
        write(&below.join(PARENT_DIR), last);

        let (memory, given) = LazyMemory::open(dir.path(), 7, PAGE).unwrap().unwrap();
        let place = |page: u64| match memory.find(page * PAGE) {
            Some(Found::File { offset, pages, .. }) => Some((Some(offset / PAGE), pages)),
            Some(Found::Process { pages }) => Some((None, pages)),
            None => None,
        };
        assert_eq!(place(0), None);
        assert_eq!(place(2), Some((Some(1), 1)));
        assert_eq!(place(3), None, "it may not come late");
        assert_eq!(place(4), Some((Some(1), 2)));
        assert_eq!(place(7), Some((Some(3), 3)));
        assert_eq!(place(10), Some((None, 1)));
        assert_eq!(place(11), None);
        assert!(!memory.is_whole());

        let pagemap = Pagemap {
            pages_id: 3,
            runs: top,
        };
        let served = given.runs;
        assert_eq!(served[2..], [run(4, 7, Process, true)]);
        assert_eq!(served[..2], pagemap.runs[..2]);
    }

    #[test]
    fn pages_that_are_nowhere_are_refused() {
        use PagePlace::{File, Parent, Process};
        let all_ways = [
            vec![run(1, 2, Parent, true)],
            vec![run(5, 1, File, true), run(5, 1, File, true)],
            vec![run(1, u64::MAX / 2, File, true)],
            vec![run(1, 1, File, true), run(0, 1, File, true)],
        ];
        for runs in all_ways {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), runs);
            let refused = LazyMemory::open(dir.path(), 7, PAGE);
            assert!(matches!(refused, Err(ImageError::Pages { .. })));
        }
        for below in [vec![run(1, 1, File, true)], vec![run(1, 2, Process, true)]] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), vec![run(1, 2, Parent, true)]);
            write(&dir.path().join(PARENT_DIR), below);
            let refused = LazyMemory::open(dir.path(), 7, PAGE);
            assert!(matches!(refused, Err(ImageError::Pages { .. })));
        }
    }
}
