//! Whether a container of this node can go on on another one.

use std::collections::BTreeSet;

use super::instructions::is_instruction;
use super::node_facts::{INOTIFY_INSTANCES, MAX_MAP_COUNT, NR_OPEN, NodeFacts, PID_MAX};
use super::{Finding, Version};
use crate::conditions::Needs;

/// What a container with these needs would come up against on the other node.
pub(super) fn findings(needs: &Needs, here: &NodeFacts, there: &NodeFacts) -> Vec<Finding> {
    let mut found = Vec::new();
    programs(&mut found, here, there);
    processor(&mut found, here, there);
    limits(&mut found, needs, there);
    room(&mut found, needs, there);
    profiles(&mut found, needs, there);
    if there.cgroups != here.cgroups {
        found.push(Finding::note(
            "cgroups",
            format!("v{} there, v{} here", there.cgroups, here.cgroups),
            "cgroups below its own are not restored: --manage-cgroups-mode ignore",
        ));
    }
    if there.clock > here.clock {
        let seconds = there.clock - here.clock;
        found.push(Finding::note(
            "clock",
            format!("that node's clock is {seconds} s ahead of this one's, at least"),
            "let both follow one time server",
        ));
    }
    found
}

fn programs(found: &mut Vec<Finding>, here: &NodeFacts, there: &NodeFacts) {
    if there.architecture != here.architecture || there.page_size != here.page_size {
        let of =
            |node: &NodeFacts| format!("{} with pages of {}", node.architecture, node.page_size);
        let text = format!("{} there, {} here", of(there), of(here));
        found.push(Finding::problem(
            "architecture",
            text,
            "a process stays on its architecture",
        ));
    }
    let version = |text: &Option<String>| Version::find(text.as_deref().unwrap_or_default());
    match (version(&here.criu), version(&there.criu)) {
        (_, None) => found.push(Finding::problem(
            "CRIU",
            "is not there",
            "install CRIU 4.2 or later",
        )),
        (Some(own), Some(other)) if other < own => {
            let text = format!(
                "{} there is older than {} here, whose images it may not read",
                there.criu.as_deref().unwrap_or_default(),
                here.criu.as_deref().unwrap_or_default()
            );
            let remedy = "install the same version there";
            // What an image has changes from one minor version to the next.
            found.push(match (other.0, other.1) < (own.0, own.1) {
                true => Finding::problem("CRIU version", text, remedy),
                false => Finding::note("CRIU", text, remedy),
            });
        }
        _ => {}
    }
    for (what, own, other) in [
        ("runc", &here.runc, &there.runc),
        ("crun", &here.crun, &there.crun),
        ("containerd", &here.containerd, &there.containerd),
    ] {
        if let (Some(own_version), Some(other_version)) = (version(own), version(other))
            && other_version < own_version
        {
            let shown = |text: &Option<String>| text.clone().unwrap_or_default();
            let text = format!("{} there is older than {} here", shown(other), shown(own));
            let remedy = "what the spec has of the later one is ignored or refused there";
            found.push(Finding::note(what, text, remedy));
        }
    }
    if there.runc.is_none() && there.crun.is_none() {
        found.push(Finding::problem(
            "runtime",
            "neither runc nor crun is there",
            "install runc",
        ));
    }
    if there.containerd.is_none() {
        found.push(Finding::problem(
            "containerd",
            "did not answer there",
            "start it",
        ));
    }
    let kernel = |node: &NodeFacts| Version::find(&node.kernel);
    if kernel(there) < kernel(here) {
        let text = format!("{} there is older than {} here", there.kernel, here.kernel);
        let remedy = "a program that has found out what its kernel can do may ask for more";
        found.push(Finding::note("kernel", text, remedy));
    }
}

fn processor(found: &mut Vec<Finding>, here: &NodeFacts, there: &NodeFacts) {
    let theirs: BTreeSet<&str> = there
        .processor
        .features
        .iter()
        .map(String::as_str)
        .collect();
    let lacking: Vec<&str> = here
        .processor
        .features
        .iter()
        .map(String::as_str)
        .filter(|feature| is_instruction(&here.architecture, feature))
        .filter(|feature| !theirs.contains(feature))
        .collect();
    if !lacking.is_empty() && here.architecture == there.architecture {
        found.push(Finding::problem(
            "processor",
            format!(
                "{} there lacks {}",
                there.processor.model,
                lacking.join(", ")
            ),
            "move to the same or a newer model, or give the virtual machines one model",
        ));
    }
}

fn limits(found: &mut Vec<Finding>, needs: &Needs, there: &NodeFacts) {
    for (name, needed, what) in [
        (MAX_MAP_COUNT, needs.mappings, "mappings in one process"),
        (NR_OPEN, needs.open_files, "as a limit of open files"),
        (PID_MAX, needs.process_id, "as a process id"),
        (
            INOTIFY_INSTANCES,
            needs.inotify_instances,
            "inotify instances",
        ),
    ] {
        // pid_max itself is given to no process.
        let room = there.limits.get(name).copied().unwrap_or(u64::MAX);
        let fits = if name == PID_MAX {
            needed < room
        } else {
            needed <= room
        };
        if !fits {
            found.push(Finding::problem(
                "limit",
                format!("{name} is {room} there, and it has {needed} {what}"),
                format!("sysctl -w {name}={} there", needed + 1),
            ));
        }
    }
}

fn room(found: &mut Vec<Finding>, needs: &Needs, there: &NodeFacts) {
    if let Some(free) = there
        .free_huge_pages
        .filter(|free| needs.huge_pages > *free)
    {
        let needed = needs.huge_pages;
        found.push(Finding::problem(
            "huge pages",
            format!("it has {needed} bytes in huge pages, and {free} are free there"),
            "sysctl vm.nr_hugepages=MORE there",
        ));
    }
    for (what, needed, free, remedy) in [
        (
            "memory",
            needs.memory,
            there.free_memory,
            "make room, or choose another node",
        ),
        (
            "disk",
            needs.memory,
            there.free_disk,
            "make room below /var/lib/transship there",
        ),
    ] {
        if needed > free {
            let text = format!("it needs {needed} bytes, and {free} are free there");
            found.push(Finding::problem(what, text, remedy));
        }
    }
}

fn profiles(found: &mut Vec<Finding>, needs: &Needs, there: &NodeFacts) {
    for (module, profile) in [("apparmor", &needs.apparmor), ("selinux", &needs.selinux)] {
        let Some(profile) = profile else {
            continue;
        };
        if !there.security_modules.iter().any(|it| it == module) {
            found.push(Finding::problem(
                "security module",
                format!(
                    "it has the profile {profile:?} of {module}, which that node does not have"
                ),
                "choose a node with it, or run the container without",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::node_facts::Processor;
    use super::*;

    fn node() -> NodeFacts {
        NodeFacts {
            format: 1,
            transship: String::new(),
            architecture: "x86_64".into(),
            page_size: 4096,
            kernel: "6.12.1".into(),
            criu: Some("4.2.1".into()),
            runc: Some("1.3.6".into()),
            crun: None,
            containerd: Some("2.1.9".into()),
            cgroups: 2,
            security_modules: vec!["apparmor".into()],
            processor: Processor {
                model: "new".into(),
                features: ["avx2", "avx512f", "pti", "sse2"].map(String::from).into(),
            },
            limits: [
                (MAX_MAP_COUNT, 65530),
                (NR_OPEN, 1024),
                (PID_MAX, 32768),
                (INOTIFY_INSTANCES, 128),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
            free_memory: 1 << 30,
            free_huge_pages: Some(4 << 20),
            free_disk: 1 << 30,
            clock: 1000,
        }
    }

    fn found(needs: &Needs, there: &NodeFacts, verdict: Verdict) -> Vec<&'static str> {
        let all = findings(needs, &node(), there);
        let all = all.into_iter().filter(|finding| finding.verdict == verdict);
        all.map(|finding| finding.what).collect()
    }

    #[test]
    fn the_same_node_has_all() {
        let needs = Needs {
            mappings: 65530,
            process_id: 32767,
            inotify_instances: 128,
            memory: 1 << 30,
            huge_pages: 4 << 20,
            apparmor: Some("docker-default".into()),
            ..Needs::default()
        };
        assert_eq!(findings(&needs, &node(), &node()), []);
        let more = Needs {
            huge_pages: 6 << 20,
            ..needs
        };
        assert_eq!(found(&more, &node(), Verdict::Problem), ["huge pages"]);
        let silent = NodeFacts {
            free_huge_pages: None,
            ..node()
        };
        assert_eq!(findings(&more, &node(), &silent), []);
    }

    #[test]
    fn a_lesser_node_is_told_of_in_all_points() {
        let there = NodeFacts {
            architecture: "aarch64".into(),
            criu: None,
            runc: None,
            containerd: None,
            security_modules: Vec::new(),
            ..node()
        };
        let needs = Needs {
            apparmor: Some("p".into()),
            process_id: 32768,
            memory: 2 << 30,
            ..Needs::default()
        };
        let all = [
            "architecture",
            "CRIU",
            "runtime",
            "containerd",
            "limit",
            "memory",
            "disk",
        ];
        let all = [&all[..], &["security module"]].concat();
        assert_eq!(found(&needs, &there, Verdict::Problem), all);

        let older = NodeFacts {
            criu: Some("4.2.0".into()),
            runc: Some("1.1.15".into()),
            containerd: Some("1.7.24".into()),
            kernel: "6.1.0".into(),
            cgroups: 1,
            clock: 1005,
            ..node()
        };
        let notes = found(&Needs::default(), &older, Verdict::Note);
        let all = ["CRIU", "runc", "containerd", "kernel", "cgroups", "clock"];
        assert_eq!(notes, all);
    }

    #[test]
    fn an_older_criu_may_not_read_the_images() {
        let with = |version: &str| NodeFacts {
            criu: Some(version.into()),
            ..node()
        };
        for (version, verdict) in [
            ("4.1.1", Verdict::Problem),
            ("3.17.1", Verdict::Problem),
            ("4.2.0", Verdict::Note),
        ] {
            let all = findings(&Needs::default(), &node(), &with(version));
            assert_eq!(all.len(), 1, "{all:?}");
            assert_eq!(all[0].verdict, verdict, "{version}");
            assert!(all[0].found.contains("older than 4.2.1 here"), "{all:?}");
        }
        for version in ["4.2.1", "4.2.7", "4.10", "5.0"] {
            assert_eq!(findings(&Needs::default(), &node(), &with(version)), []);
        }
    }

    /// What the second lacks, of these flags of the first.
    fn lacks(architecture: &str, here: &str, there: &str) -> String {
        let with = |flags: &str| NodeFacts {
            architecture: architecture.into(),
            processor: Processor {
                model: "old".into(),
                features: flags.split_whitespace().map(String::from).collect(),
            },
            ..node()
        };
        let all = findings(&Needs::default(), &with(here), &with(there));
        assert!(all.len() < 2, "{all:?}");
        all.first().map_or(String::new(), |it| it.found.clone())
    }

    #[test]
    fn instructions_count_and_mitigations_do_not() {
        let instructions = "avx512f movbe movdiri pni serialize syscall vaes";
        // Of what the kernel does with it, and of virtual machines.
        let others = "arch_capabilities arch_perfmon constant_tsc cpuid_fault hypervisor ibpb ibrs ibrs_enhanced \
                      nonstop_tsc pti rep_good ssbd stibp tsc_adjust tsc_deadline_timer vmx x2apic";
        let here = format!("{instructions} {others} sse2");
        assert_eq!(
            lacks(
                "x86_64",
                &here,
                "sse2 avx512f movbe movdiri pni serialize syscall vaes"
            ),
            ""
        );
        assert_eq!(
            lacks("x86_64", &here, "sse2"),
            format!("old there lacks {}", instructions.replace(' ', ", "))
        );
        assert_eq!(lacks("x86_64", "sse2", &here), "");
    }

    #[test]
    fn instructions_of_arm_count() {
        let here = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc \
                    dcpop sm4 sve2 paca pacg i8mm bf16 dgh rng bti mte";
        let there = "fp asimd aes sha1 sha2 crc32 atomics asimdhp asimdrdm";
        assert_eq!(
            lacks("aarch64", here, there),
            "old there lacks pmull, fphp, jscvt, fcma, lrcpc, dcpop, sm4, sve2, paca, pacg, i8mm, bf16, dgh, rng, \
             bti, mte"
        );
        assert_eq!(lacks("aarch64", here, here), "");
    }
}
