//! Puts the spec's filter in front of the filters of every thread. A further filter can only restrict:
//! whatever the images say, no system call is made that the new container's profile does not allow.
//!
//! ```text
//! seccomp.img   0: A -> 1   1: B         core-7.img  seccomp_filter 0      7 installs A, B
//!        then   0: A -> 1   1: B   2: S -> 0                        2      7 installs S, A, B
//! ```
//!
//! CRIU writes the filters of threads that all have the same ones to the first thread only, with
//! `SECCOMP_FILTER_FLAG_TSYNC`. If the kernel cannot give such a filter to another thread, because that
//! has filters of its own, it installs nothing and returns that thread's id, which CRIU takes for
//! success: such images are refused.

use std::collections::BTreeMap;

use transship_checkpoint::criu_images::seccomp::{ALL_THREADS, Filter};
use transship_checkpoint::criu_images::threads::{Process, SECCOMP_FILTER_MODE, TASK_DEAD, Thread};

use super::seccomp_program::Compiled;
use super::threads::name;
use super::{Admission, Refusal};

/// `SECCOMP_FILTER_FLAG_{TSYNC,LOG,SPEC_ALLOW}`: those that a filter of a container has.
const KNOWN_FLAGS: u32 = 7;

/// Plans the edits; the filters as they will be are in `admission` when something changes.
pub(super) fn impose(
    wanted: &Compiled,
    threads: &[Thread],
    processes: &[Process],
    filters: &[Filter],
    admission: &mut Admission,
) {
    let by_tid: BTreeMap<u32, &Thread> = threads.iter().map(|it| (it.tid, it)).collect();
    let mut chains = Chains {
        wanted,
        filters: filters.to_vec(),
        edits: BTreeMap::new(),
    };
    for process in processes {
        if let Err(refusal) = chains.add_to_process(process, &by_tid) {
            admission.refuse(refusal);
        }
    }
    if chains.filters.len() > filters.len() {
        for (tid, filter) in chains.edits {
            admission.edit(tid).seccomp_filter = Some(filter);
        }
        admission.filters = Some(chains.filters);
    }
}

struct Chains<'a> {
    wanted: &'a Compiled,
    filters: Vec<Filter>,
    edits: BTreeMap<u32, u32>,
}

impl Chains<'_> {
    fn add_to_process(
        &mut self,
        process: &Process,
        by_tid: &BTreeMap<u32, &Thread>,
    ) -> Result<(), Refusal> {
        let damaged = |what: &str| Refusal::Damaged {
            what: format!("process {}: {what}", process.pid),
        };
        let thread = |tid: &u32| {
            by_tid
                .get(tid)
                .copied()
                .ok_or_else(|| damaged("a thread has no image"))
        };
        let first = thread(&process.pid)?;
        if first.task.as_ref().is_some_and(|it| it.state == TASK_DEAD) {
            return Ok(());
        }
        let others: Vec<&Thread> = process
            .threads
            .iter()
            .filter(|tid| **tid != process.pid)
            .map(thread)
            .collect::<Result<_, _>>()?;
        let chain = self.chain(first)?;
        let shared = chain.iter().any(|filter| filter.flags & ALL_THREADS != 0);
        if others.iter().all(|other| other.seccomp_mode == 0) {
            let flags = match others.is_empty() {
                true => 0,
                false => ALL_THREADS,
            };
            let has = chain.iter().any(|filter| {
                filter.program == self.wanted.program && filter.flags & flags == flags
            });
            if !has {
                self.add(first, flags);
            }
            return Ok(());
        }
        if shared {
            return Err(Refusal::Seccomp {
                who: name(first),
                why: "its filters are for all threads, of which some have others".to_owned(),
            });
        }
        for thread in others.into_iter().chain([first]) {
            let chain = self.chain(thread)?;
            if chain.iter().any(|it| it.flags & ALL_THREADS != 0) {
                return Err(damaged(
                    "a filter for all threads is not the first thread's",
                ));
            }
            if chain.iter().all(|it| it.program != self.wanted.program) {
                self.add(thread, 0);
            }
        }
        Ok(())
    }

    /// The filters of a thread, the first one first.
    fn chain(&self, thread: &Thread) -> Result<Vec<Filter>, Refusal> {
        let damaged = |what: &str| Refusal::Damaged {
            what: format!("{}: {what}", name(thread)),
        };
        let mut chain = Vec::new();
        let mut next = match (thread.seccomp_mode, thread.seccomp_filter) {
            (SECCOMP_FILTER_MODE, Some(index)) => Some(index),
            (SECCOMP_FILTER_MODE, None) => return Err(damaged("it has no filter")),
            (mode, _) if mode < SECCOMP_FILTER_MODE => None,
            _ => return Err(damaged("it has an unknown mode of seccomp")),
        };
        while let Some(index) = next {
            let filter = self.filters.get(index as usize);
            let filter = filter.ok_or_else(|| damaged("a filter is missing"))?;
            if filter.flags & !KNOWN_FLAGS != 0 {
                return Err(damaged("a filter has unknown flags"));
            }
            chain.push(filter.clone());
            if chain.len() > self.filters.len() {
                return Err(damaged("its filters are a circle"));
            }
            next = filter.next;
        }
        Ok(chain)
    }

    /// Only `read`, `write` and the end are left to a thread in strict mode: it needs no filter.
    fn add(&mut self, thread: &Thread, flags: u32) {
        let next = match thread.seccomp_mode {
            SECCOMP_FILTER_MODE => thread.seccomp_filter,
            0 => None,
            _ => return,
        };
        let index = u32::try_from(self.filters.len()).expect("an image holds fewer filters");
        let known = self.filters.iter().position(|filter| {
            filter.program == self.wanted.program
                && filter.next == next
                && filter.flags == self.wanted.flags | flags
        });
        let known = known.and_then(|index| u32::try_from(index).ok());
        if known.is_none() {
            self.filters.push(Filter {
                program: self.wanted.program.clone(),
                next,
                flags: self.wanted.flags | flags,
            });
        }
        self.edits.insert(thread.tid, known.unwrap_or(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transship_checkpoint::criu_images::threads::Task;

    fn thread(tid: u32, filter: Option<u32>, first: bool) -> Thread {
        Thread {
            tid,
            seccomp_mode: filter.map_or(0, |_| SECCOMP_FILTER_MODE),
            seccomp_filter: filter,
            task: first.then(Task::default),
            ..Thread::default()
        }
    }

    fn filter(program: u8, next: Option<u32>, flags: u32) -> Filter {
        Filter {
            program: vec![program; 8],
            next,
            flags,
        }
    }

    fn imposed(threads: &[Thread], pids: &[&[u32]], filters: &[Filter]) -> Admission {
        let wanted = Compiled {
            program: vec![9; 8],
            flags: 4,
        };
        let processes: Vec<Process> = pids
            .iter()
            .map(|threads| Process {
                pid: threads[0],
                parent: 0,
                threads: threads.to_vec(),
                ..Process::default()
            })
            .collect();
        let mut admission = Admission::default();
        impose(&wanted, threads, &processes, filters, &mut admission);
        admission
    }

    #[test]
    fn every_thread_gets_the_filter_first() {
        // Alone, with a chain of two, in a process of two threads without filters.
        let threads = [
            thread(1, None, true),
            thread(2, Some(0), true),
            thread(5, None, true),
            thread(6, None, false),
        ];
        let filters = [filter(1, Some(1), 0), filter(2, None, 0)];
        let admission = imposed(&threads, &[&[1], &[2], &[5, 6]], &filters);
        assert!(admission.refusals.is_empty());
        let new = admission.filters.unwrap();
        assert_eq!(new[..2], filters);
        assert_eq!(
            new[2..],
            [
                filter(9, None, 4),
                filter(9, Some(0), 4),
                filter(9, None, 5)
            ]
        );
        let edited = |tid| admission.edits[&tid].seccomp_filter;
        assert_eq!(
            [edited(1), edited(2), edited(5)],
            [Some(2), Some(3), Some(4)]
        );
        assert!(
            !admission.edits.contains_key(&6),
            "it gets it with the first one"
        );
    }

    #[test]
    fn who_has_it_gets_no_second_one() {
        let threads = [thread(1, Some(0), true)];
        let filters = [filter(1, Some(1), 0), filter(9, None, 0)];
        let admission = imposed(&threads, &[&[1]], &filters);
        assert_eq!(admission, Admission::default());
    }

    #[test]
    fn threads_of_different_filters_get_it_each() {
        let threads = [thread(1, Some(0), true), thread(2, Some(1), false)];
        let filters = [filter(1, None, 0), filter(2, None, 0)];
        let admission = imposed(&threads, &[&[1, 2]], &filters);
        assert_eq!(admission.edits.len(), 2);
        let new = admission.filters.unwrap();
        assert_eq!(new[2..], [filter(9, Some(1), 4), filter(9, Some(0), 4)]);
    }

    #[test]
    fn what_the_kernel_would_leave_out_is_refused() {
        let own = [thread(1, Some(0), true), thread(2, Some(1), false)];
        let circle = [thread(1, Some(0), true)];
        for (threads, pids, filters) in [
            (
                &own[..],
                &[&[1, 2][..]][..],
                vec![filter(1, None, ALL_THREADS), filter(2, None, 0)],
            ),
            (&circle[..], &[&[1][..]][..], vec![filter(1, Some(0), 0)]),
            (&circle[..], &[&[1][..]][..], vec![]),
            (&circle[..], &[&[1][..]][..], vec![filter(1, None, 8)]),
            (&circle[..], &[&[1, 3][..]][..], vec![filter(1, None, 0)]),
        ] {
            let admission = imposed(threads, pids, &filters);
            assert_eq!(admission.refusals.len(), 1, "{filters:?}");
        }
    }
}
