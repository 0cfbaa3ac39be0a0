//! Teardown on Ctrl-C and its kin.
//!
//! The nodes die with the process in any case; this thread exists for the directories and cgroups.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::TestbedError;
use crate::node::lock;

/// Set when a signal has come; the process ends soon.
static ENDING: AtomicBool = AtomicBool::new(false);

static LIVE: Mutex<Vec<Weak<dyn TearDown>>> = Mutex::new(Vec::new());

/// What has an end that must not be left out.
pub(crate) trait TearDown: Send + Sync {
    /// Ends all of it, the rest too when a part fails; idempotent.
    fn tear_down(&self) -> Result<(), TestbedError>;
}

/// Makes SIGINT, SIGTERM and SIGHUP tear this testbed down before they end the process.
pub(crate) fn register(bed: &Arc<impl TearDown + 'static>) {
    static THREAD: Once = Once::new();
    THREAD.call_once(|| match Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        Ok(mut signals) => {
            std::thread::spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    ENDING.store(true, Ordering::SeqCst);
                    tear_down_all();
                    // Ends the process in the way that the signal would have.
                    if let Err(error) = signal_hook::low_level::emulate_default_handler(signal) {
                        eprintln!("testbed: signal {signal}: {error}");
                        std::process::abort();
                    }
                }
            });
        }
        Err(error) => eprintln!("testbed: no teardown on signals: {error}"),
    });
    let mut live = lock(&LIVE);
    live.retain(|bed| bed.strong_count() > 0);
    let bed = Arc::downgrade(bed);
    live.push(bed);
}

/// Keeps the caller, whose testbed was taken from under it, from ending the process in its own way
/// while other testbeds are being torn down.
pub(crate) fn stay_if_ending() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

fn tear_down_all() {
    // Kept locked: no testbed may begin between the teardown and the end of the process.
    let live = lock(&LIVE);
    for bed in live.iter().filter_map(Weak::upgrade) {
        if let Err(error) = bed.tear_down() {
            eprintln!("testbed: {error}");
        }
    }
}
