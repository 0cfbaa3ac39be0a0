//! What tells a process from another one of the same number.

use std::io;

use transship_sandbox::read_proc;

/// When a process started, in clock ticks since boot. One that has ended is not found, although it
/// may not have been waited for.
pub(crate) fn start_time(pid: i32) -> io::Result<u64> {
    let stat = read_proc(format!("/proc/{pid}/stat"))?;
    start_time_of(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

fn start_time_of(stat: &str) -> Option<u64> {
    // The second field, the program's name in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    // Field 22.
    let start_time = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(start_time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_read_past_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 10";
        assert_eq!(start_time_of(stat), Some(4242));
        assert_eq!(start_time_of(&stat.replace(" S ", " Z ")), None);
        assert_eq!(start_time_of("7 (a"), None);
        assert!(start_time(std::process::id().try_into().unwrap()).unwrap() > 0);
    }
}
