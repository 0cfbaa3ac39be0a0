//! Processes that have not executed their program yet and have the memory of their parent until then (vfork,
//! posix_spawn). CRIU dumps none of them ("Can't make VM id"), and a moment later they are processes like others.
//!
//! ```text
//!  /proc/CHILD/statm == /proc/PARENT/statm     one memory has one size; so have two, when one was just forked
//!  /proc/PARENT/task/TID/syscall   56 0x4111…  a thread waits in clone, with CLONE_VFORK
//! ```

use std::fs;

use nix::libc;
use procfs::process::Process;

/// Whether one of these frozen processes waits for a child to leave its memory.
pub(crate) fn is_going_on(pids: &[u32]) -> bool {
    let size = |pid: u32| fs::read(format!("/proc/{pid}/statm")).ok();
    pids.iter().any(|child| {
        let status = Process::new(child.cast_signed()).and_then(|child| child.stat());
        // One that has ended has no memory.
        let Ok(parent) = status.map(|status| status.ppid.cast_unsigned()) else {
            return false;
        };
        pids.contains(&parent) && size(*child) == size(parent) && waits(parent)
    })
}

fn waits(parent: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{parent}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let call = fs::read_to_string(thread.path().join("syscall"));
        call.is_ok_and(|call| is_vfork(&call))
    })
}

/// Numbers and arguments of a system call, as the kernel shows them.
fn is_vfork(call: &str) -> bool {
    let mut words = call.split_whitespace();
    let Some(Ok(number)) = words.next().map(str::parse::<libc::c_long>) else {
        // It is in none.
        return false;
    };
    let mut flags = || {
        let flags = words.next()?.strip_prefix("0x")?;
        u64::from_str_radix(flags, 16).ok()
    };
    #[cfg(target_arch = "x86_64")]
    if number == libc::SYS_vfork {
        return true;
    }
    match number {
        libc::SYS_clone => {
            let vfork = u64::from(libc::CLONE_VFORK.cast_unsigned());
            flags().is_some_and(|flags| flags & vfork != 0)
        }
        // Its flags lie in memory.
        libc::SYS_clone3 => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_a_child_is_known_by_the_system_call() {
        let call =
            |number: i64, flags: u64| format!("{number} {flags:#x} 0x0 0x0 0x0 0x0 0x0 0x1 0x2\n");
        assert!(is_vfork(&call(libc::SYS_clone, 0x4111)));
        assert!(is_vfork(&call(libc::SYS_clone3, 0x7f00)));
        assert!(!is_vfork(&call(libc::SYS_clone, 0x0011)));
        assert!(!is_vfork(&call(libc::SYS_read, 0x4111)));
        assert!(!is_vfork("running\n"));
        assert!(!is_vfork("-1 0x0 0x0\n"));
    }
}
