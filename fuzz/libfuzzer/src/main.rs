//! `TARGET=<name> transship-libfuzzer [-OPTION]... [CORPUS]...`: libFuzzer on one target.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use transship_fuzz::{target, Target, TARGETS};

static CHOSEN: OnceLock<Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let chosen = CHOSEN.get_or_init(|| {
        let name = std::env::var("TARGET").unwrap_or_default();
        target(&name).unwrap_or_else(|| {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            panic!("TARGET is one of {}", names.join(", "))
        })
    });
    chosen(data);
});
