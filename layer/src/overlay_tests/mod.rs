//! Tests on real overlay mounts. They need root.

mod concurrent_writer;
mod cross_images;
pub(crate) mod cross_read;
mod foreign_marks;
mod hostile_layers;
mod kernel_marks;
mod mounted_overlay;
mod mounted_stack;
mod odd_headers;
mod odd_layers;
mod random_operations;
mod round_trip;
mod tools_read;
mod tree_state;

/// Whether the test can run; when not, says why, or fails where CI says that it must run.
pub(crate) fn have_root() -> bool {
    if nix::unistd::Uid::effective().is_root() {
        return true;
    }
    let required = std::env::var("REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|need| need == "root"),
        "REQUIRE=root, but this is not root"
    );
    eprintln!("skipped: mounting an overlay needs root");
    false
}
