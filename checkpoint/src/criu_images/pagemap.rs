//! `pagemap-<n>.img`: which pages a dump has of a process or of shared memory, and where their content is.
//!
//! ```text
//! pagemap_head    1 pages_id: the content is in pages-<pages_id>.img, one page after the other
//! pagemap_entry   1 vaddr   2, 5 pages (5 since CRIU 4.1)   3 in_parent   4 flags
//!   flags  4 PRESENT   in the file of pages, behind those of the entries before
//!          1 PARENT    what the image of this name in the directory "parent" says
//!          2 LAZY      may come after the restore has begun; without PRESENT it is in the dumped process alone
//! ```

use std::path::Path;

use super::{Image, ImageError, Kind, push_bytes};

const PARENT: u32 = 1;
const LAZY: u32 = 1 << 1;
const PRESENT: u32 = 1 << 2;

/// The pages of one process, or of one piece of shared memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pagemap {
    /// Number of the file that has their content.
    pub pages_id: u32,
    /// In the order of their addresses.
    pub runs: Vec<PageRun>,
}

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first one; in shared memory its offset.
    pub start: u64,
    /// How many there are.
    pub pages: u64,
    /// Where their content is.
    pub place: PagePlace,
    /// Whether a restore may begin without them.
    pub lazy: bool,
}

/// Where the content of a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagePlace {
    /// In the file of pages.
    File,
    /// In the images that these build on.
    Parent,
    /// In the process, which a lazy dump leaves it in.
    Process,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Head {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pages: Option<u64>,
}

impl Pagemap {
    /// Reads an image.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn read(path: &Path) -> Result<Self, ImageError> {
        let image = Image::read(path, Kind::Pagemap)?;
        let mut entries = image.entries();
        let head = entries.next::<Head>()?.unwrap_or_default();
        let mut pagemap = Self {
            pages_id: head.pages_id,
            runs: Vec::new(),
        };
        while let Some(entry) = entries.next::<Entry>()? {
            let flags = entry.flags.unwrap_or(PRESENT);
            let place = if flags & PARENT != 0 || entry.in_parent == Some(true) {
                PagePlace::Parent
            } else if flags & PRESENT != 0 || flags & LAZY == 0 {
                PagePlace::File
            } else {
                PagePlace::Process
            };
            pagemap.runs.push(PageRun {
                start: entry.vaddr,
                pages: entry.pages.unwrap_or(entry.compat_pages.into()),
                place,
                lazy: flags & LAZY != 0,
            });
        }
        Ok(pagemap)
    }

    /// Adds pages behind those that it has. `page` is the size of one in bytes.
    pub fn push(&mut self, run: PageRun, page: u64) {
        match self.runs.last_mut() {
            // CRIU before 4.1 counts the pages of a run in 32 bits.
            Some(last)
                if (last.place, last.lazy) == (run.place, run.lazy)
                    && last.start + last.pages * page == run.start
                    && u32::try_from(last.pages + run.pages).is_ok() =>
            {
                last.pages += run.pages;
            }
            _ => self.runs.push(run),
        }
    }

    /// Writes it in the place of the image at `path`.
    ///
    /// # Errors
    /// A system call failed.
    pub fn replace(&self, path: &Path) -> Result<(), ImageError> {
        self.image(path).replace(path)
    }

    /// The image.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.image(Path::new("")).to_bytes()
    }

    fn image(&self, path: &Path) -> Image {
        use prost::Message as _;
        let mut body = Vec::new();
        let head = Head {
            pages_id: self.pages_id,
        };
        push_bytes(&mut body, &head.encode_to_vec());
        for run in &self.runs {
            let place = match run.place {
                PagePlace::File => PRESENT,
                PagePlace::Parent => PARENT,
                PagePlace::Process => 0,
            };
            let entry = Entry {
                vaddr: run.start,
                compat_pages: u32::try_from(run.pages).unwrap_or(u32::MAX),
                in_parent: None,
                flags: Some(place | if run.lazy { LAZY } else { 0 }),
                pages: Some(run.pages),
            };
            push_bytes(&mut body, &entry.encode_to_vec());
        }
        Image::new(path, Kind::Pagemap, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let run = |start, pages, place, lazy| PageRun {
            start,
            pages,
            place,
            lazy,
        };
        let mut pagemap = Pagemap {
            pages_id: 7,
            runs: Vec::new(),
        };
        for added in [
            run(0x1000, 1, PagePlace::File, true),
            run(0x2000, 2, PagePlace::File, true),
            run(0x4000, 1, PagePlace::Parent, false),
            run(0x5000, 1, PagePlace::Process, true),
            run(0x9000, 1, PagePlace::Process, true),
        ] {
            pagemap.push(added, 0x1000);
        }
        assert_eq!(pagemap.runs.len(), 4);
        assert_eq!(pagemap.runs[0], run(0x1000, 3, PagePlace::File, true));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pagemap-1.img");
        std::fs::write(&path, pagemap.to_bytes()).unwrap();
        assert_eq!(Pagemap::read(&path).unwrap(), pagemap);
    }
}
