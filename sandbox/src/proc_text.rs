//! Text of `/proc`, in which names are bytes.

use std::io;
use std::path::Path;

/// Reads a file of `/proc` as text. Names of threads, files, sockets and mount points in it are whatever a program has
/// given them, and the kernel cuts that of a thread at 15 bytes, also in the middle of a character: what is no UTF-8
/// becomes U+FFFD.
///
/// # Errors
/// The file cannot be read, for example because the process has ended.
pub fn read_proc(path: impl AsRef<Path>) -> io::Result<String> {
    let bytes = std::fs::read(path)?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_whatever_a_thread_calls_itself() {
        let own = "/proc/thread-self/comm";
        std::fs::write(own, b"m\xc3\xbcller \xff w\xc3").unwrap();
        assert_eq!(read_proc(own).unwrap(), "m\u{fc}ller \u{fffd} w\u{fffd}\n");
        let status = read_proc("/proc/thread-self/status").unwrap();
        assert!(status.contains("\nNSpid:"), "{status}");
        assert!(read_proc("/proc/thread-self/none").is_err());
    }
}
