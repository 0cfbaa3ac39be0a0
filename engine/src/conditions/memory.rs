//! Properties of memory that CRIU does not restore: protection keys, seals, locks of what is touched, NUMA policies.
//!
//! ```text
//!  /proc/PID/smaps       7f1a..-7f1b.. rw-p ...
//!                        ProtectionKey:         1      pkey_mprotect(2), where the processor has keys
//!                        VmFlags: rd mr mw me sl       mseal(2), Linux 6.10 and later; the kernel may seal its own
//!                        VmFlags: rd mr mw me lo lf    mlock2(2) with MLOCK_ONFAULT
//!  /proc/PID/numa_maps   7f1a.. bind:0 anon=1 ...      mbind(2), set_mempolicy(2)
//! ```
//!
//! The kernel goes through all page tables for these files, some 20 ns a page, so no more than some seconds are spent,
//! before the freeze.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::time::{Duration, Instant};

use super::Hit;
use super::processes::{Processes, Seen};
use super::programs::threads;

/// What takes longer is not looked at to its end, and that is said.
const LONGEST: Duration = Duration::from_secs(10);
/// Of a thread only its own policy is of interest, which the first mapping without one of its own has.
const BEGINNING: u64 = 1024;
/// Memory of the kernel's: `CONFIG_MSEAL_SYSTEM_MAPPINGS` seals it.
const OF_THE_KERNEL: [&str; 7] = [
    "[vdso]",
    "[vvar]",
    "[vvar_vclock]",
    "[vsyscall]",
    "[uprobes]",
    "[vectors]",
    "[sigpage]",
];

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let until = Instant::now() + LONGEST;
    let mut hits = Vec::new();
    for seen in &processes.tree {
        let told = of_mappings(seen, until).into_iter();
        let told = told.chain(policy(seen, until));
        hits.extend(told.map(|name| (name, seen.called())));
        if Instant::now() > until {
            tracing::warn!(
                "the memory of {} and of what comes after it was not all looked at for protection keys, seals, \
                 locks and NUMA policies: it takes too long",
                seen.called()
            );
            break;
        }
    }
    hits
}

/// The lines of a file of `/proc`, until it takes too long.
fn lines(path: &str, until: Instant) -> impl Iterator<Item = String> + use<> {
    // Of one that has ended there is nothing.
    let file = File::open(path).ok().map(BufReader::new);
    let lines = file
        .into_iter()
        .flat_map(BufReader::lines)
        .map_while(Result::ok);
    lines.take_while(move |_| Instant::now() < until)
}

fn of_mappings(seen: &Seen, until: Instant) -> Vec<&'static str> {
    special(lines(&format!("/proc/{}/smaps", seen.pid), until))
}

fn special(lines: impl Iterator<Item = String>) -> Vec<&'static str> {
    let (mut keys, mut seals, mut locks) = (false, false, false);
    let (mut is_kernels, mut is_code_alone) = (false, false);
    for line in lines {
        if let Some(key) = line.strip_prefix("ProtectionKey:") {
            // Key 0 is that of all memory; code that cannot be read gets one of the kernel's, also from CRIU.
            keys |= !is_code_alone && key.trim() != "0";
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted| flags.split_ascii_whitespace().any(|flag| flag == wanted);
            seals |= !is_kernels && has("sl");
            locks |= has("lf");
        } else if !line
            .split_once(' ')
            .is_some_and(|(name, _)| name.ends_with(':'))
        {
            let mut words = line.split_ascii_whitespace();
            is_code_alone = words.nth(1).is_some_and(|access| access.starts_with("--x"));
            is_kernels = words
                .last()
                .is_some_and(|name| OF_THE_KERNEL.contains(&name));
        }
        if keys && seals && locks {
            break;
        }
    }
    let told = [
        (keys, "protection-key"),
        (seals, "sealed-memory"),
        (locks, "locked-on-fault"),
    ];
    told.into_iter()
        .filter_map(|(there, name)| there.then_some(name))
        .collect()
}

fn policy(seen: &Seen, until: Instant) -> Option<&'static str> {
    let mut mappings = lines(&format!("/proc/{}/numa_maps", seen.pid), until);
    let of_threads = || threads(seen).any(|thread| first_has_policy(&thread).unwrap_or_default());
    (mappings.any(|line| has_policy(&line)) || of_threads()).then_some("memory-policy")
}

fn first_has_policy(thread: &str) -> Option<bool> {
    let mut text = Vec::new();
    let file = File::open(format!("{thread}/numa_maps")).ok()?;
    file.take(BEGINNING).read_to_end(&mut text).ok()?;
    Some(has_policy(String::from_utf8_lossy(&text).lines().next()?))
}

fn has_policy(mapping: &str) -> bool {
    let policy = mapping.split_ascii_whitespace().nth(1);
    policy.is_some_and(|policy| policy != "default")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPPING: &str = "7f1a000-7f1b000 rw-p 00000000 00:00 0 \nSize: 4 kB\nRss: 4 kB\n";

    fn told(text: &str) -> Vec<&'static str> {
        special(text.lines().map(str::to_owned))
    }

    #[test]
    fn keys_and_seals_are_seen_in_what_is_not_the_kernels() {
        let keyed = format!("{MAPPING}ProtectionKey:         1\nVmFlags: rd wr mr\n");
        assert_eq!(told(&keyed), ["protection-key"]);
        let sealed = format!("{MAPPING}ProtectionKey:         0\nVmFlags: rd mr sl \n");
        assert_eq!(told(&sealed), ["sealed-memory"]);
        let vdso =
            "7fff000-7fff100 r-xp 00000000 00:00 0      [vdso]\nSize: 8 kB\nVmFlags: rd ex sl \n";
        assert!(told(vdso).is_empty());
        let code =
            "7f1a000-7f1b000 --xp 00000000 00:00 0 \nProtectionKey:         1\nVmFlags: ex mr\n";
        assert!(told(code).is_empty());
        let locked = format!("{MAPPING}ProtectionKey:         0\nVmFlags: rd wr lo lf \n");
        assert_eq!(told(&locked), ["locked-on-fault"]);
        assert_eq!(told(&format!("{vdso}{sealed}{keyed}{locked}")).len(), 3);
    }

    #[test]
    fn a_policy_is_the_second_word() {
        assert!(has_policy("7f1a000 bind:0 anon=1 dirty=1 N0=1"));
        assert!(has_policy("7f1a000 interleave:0-1"));
        assert!(!has_policy("7f1a000 default file=/usr/lib/x mapped=1") && !has_policy(""));
    }

    #[test]
    fn a_program_has_none_of_them() {
        let own = std::process::id();
        assert_eq!(hits(&Processes::read(own, &[own])), Vec::new());
    }
}
