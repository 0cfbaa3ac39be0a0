//! What the tests of the running daemon share: the daemon as a process, a client, real mounts.
//!
//! Each test file uses its own part of this.
#![allow(dead_code, unreachable_pub, reason = "no test file uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub mod client;
pub mod daemon;
pub mod mounted;

use std::future::Future;
use std::time::{Duration, Instant};

/// Whether the test can run as it must (root); if not, says why it is skipped, or fails when the
/// variable REQUIRE lists `root`.
pub fn is_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let required = std::env::var("REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|need| need == "root"),
        "REQUIRE lists root, but this is not"
    );
    eprintln!("skipped: needs root");
    false
}

/// Runs a test on this thread.
pub fn block_on<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test)
}

/// Asks `condition` again and again until it holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
