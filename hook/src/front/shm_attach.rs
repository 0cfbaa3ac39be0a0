//! System V shared memory that an earlier restore has made, attached by the held tasks.
//!
//! ```text
//! CRIU restores private memory there (see criu_images/shm_mappings)
//!   held task: ptrace --> shmat(id, address, SHM_REMAP), mprotect of the pieces --> as it was
//! ```
//!
//! Only a task itself can attach to its memory, so it makes the system call: its registers are set
//! to a `syscall` instruction of its own (the vDSO has one), one step is made, and they are put
//! back. The kernel counts the attachment, `shmdt` and the next dump find it as they would have.
//!
//! The registers are those of x86-64; on other machines such a restore is refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use transship_checkpoint::criu_images::shm_mappings::Attachment;
use transship_sandbox::read_proc;

use super::held::pid_in_container;
use crate::descendants::tree;

/// x86-64.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Bytes of a mapping that are searched for it; a vDSO has two pages.
const SEARCHED: usize = 1 << 16;

/// Attaches all of them in the tasks below `root` and itself, which are stopped and stay so.
///
/// # Errors
/// A task that cannot be traced, or what its system call answered.
pub(super) fn attach(root: i32, attachments: &[Attachment]) -> io::Result<()> {
    if attachments.is_empty() {
        return Ok(());
    }
    let tasks = tree(root)?;
    for pid in attachments
        .iter()
        .map(|it| it.pid)
        .collect::<std::collections::BTreeSet<_>>()
    {
        let task = tasks
            .iter()
            .find(|task| pid_in_container(**task) == Some(pid));
        let task = task.ok_or_else(|| io::Error::other(format!("there is no process {pid}")))?;
        let own = attachments.iter().filter(|it| it.pid == pid);
        attach_in(Pid::from_raw(*task), own)
            .map_err(|error| io::Error::new(error.kind(), format!("process {pid}: {error}")))?;
    }
    Ok(())
}

fn attach_in<'a>(pid: Pid, attachments: impl Iterator<Item = &'a Attachment>) -> io::Result<()> {
    let mut task = Traced::seize(pid)?;
    for it in attachments {
        let access = if it.writable { 0 } else { libc::SHM_RDONLY };
        let flags = (libc::SHM_REMAP | access).unsigned_abs().into();
        let (start, shm) = (it.range.start, u64::from(it.shm));
        let at = task.call(libc::SYS_shmat, [shm, start, flags])?;
        if at != start {
            return Err(io::Error::other(format!(
                "attached at {at:#x}, not {start:#x}"
            )));
        }
        let all = libc::PROT_READ | if it.writable { libc::PROT_WRITE } else { 0 };
        for (range, protection) in &it.protections {
            if *protection != all.unsigned_abs() {
                let len = range.end - range.start;
                task.call(libc::SYS_mprotect, [range.start, len, (*protection).into()])?;
            }
        }
    }
    Ok(())
}

/// A stopped task under ptrace; it is let go when this is dropped, and stays stopped.
struct Traced {
    pid: Pid,
    registers: libc::user_regs_struct,
    instruction: u64,
}

impl Traced {
    fn seize(pid: Pid) -> io::Result<Self> {
        let instruction = find_syscall(pid)?;
        // The container's seccomp filter is for the program, not for this; where the kernel does
        // not allow that, it decides.
        let unfiltered = Options::from_bits_retain(libc::PTRACE_O_SUSPEND_SECCOMP);
        ptrace::seize(pid, unfiltered).or_else(|_| ptrace::seize(pid, Options::empty()))?;
        let trace = || {
            // A stopped task goes over into the tracer's stop by itself.
            wait(pid)?;
            io::Result::Ok(ptrace::getregs(pid)?)
        };
        match trace() {
            Ok(registers) => Ok(Self {
                pid,
                registers,
                instruction,
            }),
            Err(error) => {
                let _ = ptrace::detach(pid, None);
                Err(error)
            }
        }
    }

    fn call(&mut self, number: i64, arguments: [u64; 3]) -> io::Result<u64> {
        let mut registers = self.registers;
        registers.rip = self.instruction;
        registers.rax = number.unsigned_abs();
        // No system call that the kernel would start again.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        ptrace::setregs(self.pid, registers)?;
        ptrace::step(self.pid, None)?;
        wait(self.pid)?;
        let result = ptrace::getregs(self.pid)?.rax;
        match i32::try_from(result.cast_signed()) {
            Ok(errno @ -4095..=-1) => Err(io::Error::from_raw_os_error(-errno)),
            _ => Ok(result),
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // Both fail only for a task that has been killed.
        let _ = ptrace::setregs(self.pid, self.registers);
        let _ = ptrace::detach(self.pid, None);
    }
}

fn wait(pid: Pid) -> io::Result<()> {
    match waitpid(pid, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => Ok(()),
        other => Err(io::Error::other(format!("it does not stop: {other:?}"))),
    }
}

/// Address of a system call instruction in the memory of a task.
fn find_syscall(pid: Pid) -> io::Result<u64> {
    let maps = read_proc(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let executable = |line: &&str| line.split(' ').nth(1).is_some_and(|it| it.contains('x'));
    let mut lines: Vec<&str> = maps.lines().filter(executable).collect();
    lines.sort_by_key(|line| !line.ends_with("[vdso]"));
    for line in lines {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let Some((start, end)) = range else { continue };
        let number = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
        let (start, end) = (number(start)?, number(end)?);
        let mut code = vec![0; SEARCHED.min(usize::try_from(end - start).unwrap_or(SEARCHED))];
        // Some mappings (vsyscall) cannot be read.
        let Ok(read) = memory.read_at(&mut code, start) else {
            continue;
        };
        if let Some(at) = code[..read].windows(2).position(|bytes| bytes == SYSCALL) {
            return Ok(start + at as u64);
        }
    }
    Err(io::Error::other("it has no system call instruction"))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, kill};

    use super::*;

    struct Shell(Child);

    impl Drop for Shell {
        fn drop(&mut self) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }

    /// A real process makes a system call in the middle of its own, and goes on as if nothing had
    /// been.
    #[test]
    fn a_stopped_task_makes_a_call_and_goes_on() {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "read line; exit 7"])
            .stdin(Stdio::piped());
        let mut shell = Shell(shell.spawn().unwrap());
        let pid = Pid::from_raw(shell.0.id().try_into().unwrap());
        let stat = || read_proc(format!("/proc/{pid}/stat")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let until = |state: &str| {
            while !stat().contains(state) {
                assert!(Instant::now() < deadline, "{}", stat());
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        until(" S ");
        kill(pid, Signal::SIGSTOP).unwrap();
        until(" T ");
        let mut task = Traced::seize(pid).unwrap();
        let answer = task.call(libc::SYS_getpid, [0; 3]).unwrap();
        assert_eq!(answer, u64::try_from(pid.as_raw()).unwrap());
        let error = task
            .call(libc::SYS_shmat, [u64::from(u32::MAX), 0, 0])
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        drop(task);
        until(" T ");
        kill(pid, Signal::SIGCONT).unwrap();
        drop(shell.0.stdin.take());
        assert_eq!(shell.0.wait().unwrap().code(), Some(7));
    }
}
