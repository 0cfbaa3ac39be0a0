//! Descriptors of another process: `pidfd_getfd(2)` gives ones of our own that mean the same.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Those of a process, which stays the same one for as long as this lives.
#[derive(Debug)]
pub struct DescriptorsOf(OwnedFd);

impl DescriptorsOf {
    /// Those of the process with this id.
    ///
    /// # Errors
    /// It has ended.
    pub fn process(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// One that means what `number` means there.
    ///
    /// # Errors
    /// It is closed, the process has ended, or the caller may not trace it.
    pub fn get(&self, number: i32) -> io::Result<OwnedFd> {
        // A number may come from a checkpoint, and rustix takes none that is negative.
        if number < 0 {
            return Err(Errno::BADF.into());
        }
        Ok(pidfd_getfd(&self.0, number, PidfdGetfdFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn they_mean_the_same() {
        let file = File::open("/dev/null").unwrap();
        let own = DescriptorsOf::process(std::process::id().cast_signed()).unwrap();
        let same = File::from(own.get(file.as_raw_fd()).unwrap());
        let identity = |file: &File| {
            use std::os::unix::fs::MetadataExt as _;
            let found = file.metadata().unwrap();
            (found.dev(), found.ino())
        };
        assert_eq!(identity(&same), identity(&file));
        assert!(own.get(-1).is_err());
        assert!(DescriptorsOf::process(0).is_err());
    }
}
