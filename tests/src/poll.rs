//! Waiting for something, with a deadline.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::TestbedError;

/// How long between two looks: short against the acts that are waited for (tens of milliseconds),
/// long enough not to take a processor from them.
const INTERVAL: Duration = Duration::from_millis(20);

/// By how much every deadline is longer.
static STRETCH: AtomicU32 = AtomicU32::new(1);

/// Makes all deadlines of [`poll_until`] `factor` times as long: for a machine that is emulated.
pub fn stretch_deadlines(factor: u32) {
    STRETCH.store(factor.max(1), Ordering::Relaxed);
}

/// Tries `look` until it gives a value or `deadline` has passed.
///
/// `look` answers with `Err(what it saw)` as long as the thing has not come about; the last such
/// text becomes part of the error.
///
/// # Errors
/// [`TestbedError::Deadline`] with the last sight.
pub fn poll_until<T>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T, TestbedError> {
    let start = Instant::now();
    let deadline = deadline * STRETCH.load(Ordering::Relaxed);
    loop {
        let last = match look() {
            Ok(value) => return Ok(value),
            Err(last) => last,
        };
        if start.elapsed() >= deadline {
            return Err(TestbedError::Deadline {
                what: what.to_owned(),
                waited: deadline,
                last,
            });
        }
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_value_or_the_last_sight() {
        let mut looks = 0;
        let value = poll_until("third look", Duration::from_secs(5), || {
            looks += 1;
            if looks == 3 {
                Ok(looks)
            } else {
                Err("not yet".to_owned())
            }
        });
        assert_eq!(value.unwrap(), 3);
        let error =
            poll_until::<()>("nothing", Duration::ZERO, || Err("seen".to_owned())).unwrap_err();
        assert!(error.to_string().contains("nothing"));
        assert!(error.to_string().contains("seen"));
    }
}
