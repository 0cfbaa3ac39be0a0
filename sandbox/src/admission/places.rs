//! Namespaces and cgroups of the images: no task is restored into one of the node, or beside those of
//! the container.

use std::path::{Component, Path};

use transship_checkpoint::criu_images::cgroups::Cgroups;
use transship_checkpoint::criu_images::inventory::Inventory;
use transship_checkpoint::criu_images::threads::Process;
use transship_checkpoint::criu_images::user_namespace::IdMappings;

use super::allowance::Allowance;
use super::capabilities::{NET_ADMIN, SYS_ADMIN};
use super::{Admission, Environment, Refusal, Restored};

const NETWORK: &str = "network";

/// Compares the namespaces of every process: CRIU makes one where the ids of a process and of CRIU at
/// the dump differ, and leaves the process in the node's where they are the same.
pub(super) fn compare_namespaces(
    processes: &[Process],
    inventory: &Inventory,
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    let first = processes.iter().find(|it| it.parent == 0);
    let Some(own) = first.and_then(|it| it.namespaces.as_ref()) else {
        admission.refuse(Refusal::Damaged {
            what: "the first process has no namespaces".to_owned(),
        });
        return;
    };
    for process in processes {
        let Some(namespaces) = &process.namespaces else {
            continue;
        };
        let who = || format!("process {}", process.pid);
        let not_the_nodes = |wanted: &&String| !here.node_namespaces.contains(*wanted);
        for wanted in allowed.namespaces.iter().filter(not_the_nodes) {
            let Some((&namespace, id)) = namespaces.get_key_value(wanted.as_str()) else {
                // CRIU before 3.14 knows no time namespaces, and kernels may lack some.
                if !matches!(wanted.as_str(), "time" | "cgroup") {
                    admission.refuse(Refusal::Damaged {
                        what: format!("{} has no {wanted} namespace", who()),
                    });
                }
                continue;
            };
            if inventory.criu_namespaces.get(namespace) == Some(id) {
                let who = who();
                admission.refuse(Refusal::Namespace { who, namespace });
            }
        }
        for (&namespace, id) in namespaces {
            let nested = own.get(namespace) != Some(id);
            if nested && !allowed.capabilities.has(SYS_ADMIN) {
                let who = who();
                admission.refuse(Refusal::Namespace { who, namespace });
            }
        }
        let users = namespaces.get("user");
        let own_users = users.is_some() && users != inventory.criu_namespaces.get("user");
        if own_users && !allowed.namespaces.iter().any(|it| it == "user") {
            let (who, namespace) = (who(), "user");
            admission.refuse(Refusal::Namespace { who, namespace });
        }
    }
}

/// Checks that a container that comes into a network of the node gets none of its own: what CRIU puts into that it
/// puts there as root, interfaces of the node included.
pub(super) fn compare_networks(
    restored: &Restored,
    allowed: &Allowance,
    admission: &mut Admission,
) {
    if restored.has_packet_rules && !allowed.capabilities.has(NET_ADMIN) {
        admission.refuse(Refusal::PacketRules);
    }
    let is_new = { allowed.namespaces.iter() }.any(|kind| kind == NETWORK)
        && !{ allowed.joined.iter() }.any(|(kind, _)| kind == NETWORK);
    if is_new {
        return;
    }
    for process in &restored.processes {
        let namespaces = process.namespaces.as_ref();
        let Some(id) = namespaces.and_then(|all| all.get(NETWORK)) else {
            continue;
        };
        let is_the_nodes = restored.inventory.criu_namespaces.get(NETWORK) == Some(id);
        if !is_the_nodes && !restored.external_networks.contains(id) {
            admission.refuse(Refusal::Namespace {
                who: format!("process {}", process.pid),
                namespace: NETWORK,
            });
        }
    }
}

/// Compares the id mappings of user namespaces: CRIU writes them as root of the node.
pub(super) fn compare_mappings(
    found: &[IdMappings],
    allowed: &Allowance,
    admission: &mut Admission,
) {
    if found.iter().any(|it| *it != allowed.id_mappings) {
        admission.refuse(Refusal::IdMappings);
    }
}

/// Checks the cgroups. The runtime tells CRIU the cgroup of the new container; CRIU puts it in the place
/// of the uppermost directories of the image, in the paths of the tasks that begin with one. So a task
/// whose path begins with none, and a directory in which no task is, would stay where the image says:
/// anywhere in the node's hierarchies.
pub(super) fn compare_cgroups(cgroups: &Cgroups, admission: &mut Admission) {
    let mut refuse = |path: &str| {
        let path = path.to_owned();
        admission.refuse(Refusal::Cgroup { path });
    };
    // Controllers of one hierarchy are told apart here, and together of a task: `cpu,cpuacct`.
    let of_hierarchies: Vec<String> = { cgroups.hierarchies.iter() }
        .map(|it| sorted(it.controllers.iter().map(String::as_str)))
        .collect();
    let of_members: Vec<String> = { cgroups.members.iter() }
        .map(|it| sorted(it.controller.split(',')))
        .collect();
    for (member, controllers) in cgroups.members.iter().zip(&of_members) {
        let at = of_hierarchies.iter().position(|it| it == controllers);
        let within = at.is_some_and(|at| {
            let mut tops = cgroups.hierarchies[at].tops.iter();
            tops.any(|top| begins_with(&member.path, top))
        });
        let prefix = member.namespace_prefix as usize;
        if !within || !is_plain(&member.path) || prefix > member.path.len() {
            refuse(&member.path);
        }
    }
    for (number, hierarchy) in cgroups.hierarchies.iter().enumerate() {
        let twice = hierarchy.controllers.iter().find(|name| {
            let mut before = cgroups.hierarchies[..number].iter();
            before.any(|other| other.controllers.contains(name))
        });
        if let Some(name) = twice {
            refuse(name);
        }
        for (at, top) in hierarchy.tops.iter().enumerate() {
            let others = hierarchy.tops.iter().enumerate();
            let nested = others
                .filter(|(other, _)| *other != at)
                .any(|(_, other)| begins_with(top, other));
            let mut members = cgroups.members.iter().zip(&of_members);
            let used = members.any(|(member, controllers)| {
                *controllers == of_hierarchies[number] && begins_with(&member.path, top)
            });
            // The node's own root, in a hierarchy in which runtimes make a cgroup for each container.
            let managed = |name: &String| is_managed(name, cgroups.hierarchies.len() == 1);
            // In one in which they make none CRIU still gives the node's directories an owner.
            let whole = top.trim_matches('/').is_empty()
                && (hierarchy.opens || hierarchy.controllers.iter().any(managed));
            if nested || !used || whole || !is_plain(top) {
                refuse(top);
            }
        }
        let strange = |name: &&String| {
            name.is_empty() || name.contains('/') || matches!(name.as_str(), "." | "..")
        };
        // They become options of mount(2): each is one, and none sets anything.
        let is_option =
            |name: &&String| name.contains(',') || name.contains('=') && !name.starts_with("name=");
        if let Some(name) = hierarchy.controllers.iter().find(is_option) {
            refuse(name);
        }
        // It would let tasks go that are held until they have been looked at, or hold them for ever.
        if let Some(dir) = hierarchy.frozen.first() {
            refuse(&format!("{dir}/freezer.state"));
        }
        let controllers = hierarchy.controllers.iter().filter(|name| !name.is_empty());
        if let Some(name) = controllers.chain(&hierarchy.names).find(strange) {
            refuse(name);
        }
    }
}

fn sorted<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.join(",")
}

/// The hierarchies in which runc and crun make a cgroup for each container: cgroup v2 where it is the
/// only one, and those of v1 that limit something.
fn is_managed(controller: &str, only_one: bool) -> bool {
    match controller {
        "" => only_one,
        "blkio" | "cpu" | "cpuacct" | "cpuset" | "devices" | "freezer" | "memory" | "pids" => true,
        _ => false,
    }
}

/// Whether a path of a task is in the directory `top`, by whole names.
fn begins_with(path: &str, top: &str) -> bool {
    let relative = |path: &str| Path::new("/").join(path.trim_start_matches('/'));
    relative(path).starts_with(relative(top))
}

fn is_plain(path: &str) -> bool {
    Path::new(path)
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}
