//! Deleted files, files of sockets and networks, each in several containers.

use std::collections::BTreeSet;
use std::rc::Rc;

use serde_json::json;
use transship_checkpoint::criu_images::ghost_files::Ghost;
use transship_checkpoint::criu_images::mounts::{FsType, Mount};
use transship_checkpoint::criu_images::named_files::Remap;

use super::tests::{admission, file, mount, restored, spec, with};
use super::*;

/// A file without a name, which is watched.
pub(super) fn ghost(restored: &mut Restored, path: &str, mode: u32) {
    restored.named_files.push(file(path));
    restored.watched_inodes.push((7, 8));
    restored.remaps.push(Remap {
        file: 9,
        linked: None,
        ghost: Some(Ghost {
            mode,
            identity: Some((7, 8)),
            ..Ghost::default()
        }),
    });
}

#[test]
fn what_a_container_could_have_made_may_be_made_again() {
    let user = |uid: u32, capabilities: &[&str]| {
        let mut spec = with("/process/user/uid", uid.into());
        spec["process"]["capabilities"] = json!({ "bounding": capabilities });
        spec
    };
    let root = spec();
    let (nobody, weak) = (user(1000, &[]), user(0, &[]));
    // The mode, its owner and group, in which container, and what is said of it.
    for (mode, uid, gid, spec, said) in [
        (0o100_644, 0, 0, &root, None),
        (0o104_755, 33, 33, &root, None),
        (0o010_600, 0, 10, &weak, None),
        (0o042_775, 0, 10, &weak, None),
        (0o104_755, 0, 0, &weak, Some("set-user-id")),
        (0o102_755, 0, 10, &weak, Some("set-user-id")),
        (0o100_644, 33, 0, &weak, Some("the user id 33")),
        (0o100_644, 0, 33, &weak, Some("the group id 33")),
        (0o100_644, 0, 0, &nobody, Some("the user id 0")),
    ] {
        let mut images = restored();
        ghost(&mut images, "/rw/x", mode);
        images.named_files[0].mount = Some(5);
        let made = images.remaps[0].ghost.as_mut().unwrap();
        (made.uid, made.gid) = (uid, gid);
        images.queued_files.socket_files.push((mode, uid, gid));
        let mut found = admission(&images, spec).refusals;
        found.retain(|it| {
            it.to_string().contains("the deleted file \"/rw/x\"") || {
                matches!(it, Refusal::File { .. })
            }
        });
        let all: Vec<String> = found.iter().map(ToString::to_string).collect();
        match said {
            None => assert!(all.is_empty(), "{mode:o}: {all:?}"),
            Some(said) => assert!(all.iter().any(|it| it.contains(said)), "{said}: {all:?}"),
        }
    }
}

#[test]
fn the_proc_of_the_node_has_strangers_alone() {
    let mut spec = spec();
    spec["mounts"][3]["source"] = "/proc".into();
    let destination = spec["mounts"][3]["destination"]
        .as_str()
        .unwrap()
        .to_owned();
    for (name, is_refused) in [
        ("1/mem", true),
        ("1/fd/3", true),
        ("7/task/7/ns/mnt", true),
        ("self/maps", true),
        ("1/status", false),
        ("self/mountinfo", false),
        ("sys/mem", false),
    ] {
        let mut images = restored();
        images
            .named_files
            .push(file(&format!("{destination}/{name}")));
        let refusals = admission(&images, &spec).refusals;
        let found = refusals.iter().any(|it| it.to_string().contains(name));
        assert_eq!(found, is_refused, "{name}: {refusals:?}");
    }
}

#[test]
fn a_joined_network_is_none_that_criu_makes() {
    let mut joined = spec();
    joined["linux"]["namespaces"][1]["path"] = "/run/netns/x".into();
    let mut nodes = spec();
    nodes["linux"]["namespaces"][1]["type"] = "time".into();
    for (spec, is_external, is_the_nodes, is_admitted) in [
        (&spec(), false, false, true),
        (&joined, true, false, true),
        (&joined, false, false, false),
        (&nodes, false, true, true),
        (&nodes, false, false, false),
    ] {
        let mut images = restored();
        let id = images.processes[0].namespaces.as_ref().unwrap()["network"];
        images.external_networks.extend(is_external.then_some(id));
        if is_the_nodes {
            images.inventory.criu_namespaces.insert("network", id);
        }
        let found = admission(&images, spec).refusals;
        let is_network = |it: &Refusal| {
            matches!(
                it,
                Refusal::Namespace {
                    namespace: "network",
                    ..
                }
            )
        };
        assert_eq!(!found.iter().any(is_network), is_admitted, "{found:?}");
    }
}

#[test]
fn names_that_lead_through_links_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let volume = tempfile::tempdir().unwrap();
    for dir in [root.path(), volume.path()] {
        std::fs::create_dir(dir.join("dir")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.join("link")).unwrap();
    }
    let mut spec = spec();
    spec["mounts"][3]["source"] = volume.path().to_str().unwrap().into();
    let allowed = Spec::parse(spec.to_string().as_bytes()).unwrap();
    let allowed = Allowance::of(&allowed, &Path::to_path_buf);
    let destination = spec["mounts"][3]["destination"].as_str().unwrap();
    assert_eq!(destination, "/rw");
    // The path, its mount, whether it is a ghost, and whether it is refused.
    for (path, mount, is_ghost, is_refused) in [
        ("/dir/x", 1, false, false),
        ("/dir/x", 1, true, false),
        ("/link/x", 1, false, true),
        ("/link/x", 1, true, true),
        ("/link", 1, false, true),
        ("/rw", 5, false, false),
        ("/rw/dir/x", 5, true, false),
        ("/rw/link/x", 5, false, true),
        ("/rw/link/x", 5, true, true),
        // The mount that a ghost is made in is what the image says.
        ("/link/x", 5, true, true),
        ("/dev/x", 3, true, false),
        ("/dev/dir/x", 3, true, false),
        ("/dev/fd/x", 3, true, true),
        ("/dev/fd/1/x", 3, false, true),
        ("/dev/fd", 3, false, false),
        ("/dir/x", 77, true, true),
    ] {
        let mut images = restored();
        let mut named = file(path);
        named.mount = Some(mount);
        images.named_files.push(named);
        let remap = Remap {
            file: 9,
            linked: None,
            ghost: None,
        };
        images.remaps.extend(is_ghost.then_some(remap));
        let mut found = Admission::default();
        let made = |_: &Mount| Some(Rc::new(BTreeSet::from(["fd".into()])));
        compare_names(&images, &allowed, root.path(), &made, &mut found);
        assert_eq!(!found.refusals.is_empty(), is_refused, "{path} in {mount}");
    }
}

/// A process with `CAP_SYS_ADMIN` may mount what it could mount itself, and no directories of the node.
#[test]
fn another_overlay_is_not_the_roots() {
    let all = ["SYS_ADMIN", "CHOWN", "SETGID", "SETUID", "NET_RAW"];
    let all = all.map(|name| format!("CAP_{name}"));
    let spec = with(
        "/process/capabilities",
        json!({ "bounding": all, "permitted": all }),
    );
    for (options, source, is_admitted) in [
        ("lowerdir=/l", "overlay", true),
        ("lowerdir=/etc", "overlay", false),
        ("lowerdir=/l", "other", false),
    ] {
        let mut images = restored();
        images.mounts[0][0].options = "lowerdir=/l".to_owned();
        images.mounts[0][0].source = "overlay".to_owned();
        let device = images.mounts[0][0].device;
        images.mounts[0].push(Mount {
            options: options.to_owned(),
            source: source.to_owned(),
            device,
            ..mount(20, 1, "/again", FsType::Overlay)
        });
        let found = admission(&images, &spec);
        assert_eq!(found.check().is_ok(), is_admitted, "{options}: {found:?}");
    }
}

/// As most nodes with cgroup v1 have them.
#[test]
fn controllers_may_share_a_hierarchy() {
    let with = |cnames: &[&str], member: &str| {
        let mut images = restored();
        for it in &mut images.cgroups.members {
            member.clone_into(&mut it.controller);
        }
        let names = cnames.iter().map(|name| (*name).to_owned());
        images.cgroups.hierarchies[0].controllers = names.collect();
        admission(&images, &spec()).check()
    };
    for (cnames, member) in [
        (&["cpu", "cpuacct"][..], "cpu,cpuacct"),
        (&["net_prio", "net_cls"], "net_cls,net_prio"),
        (&["name=systemd"], "name=systemd"),
        (&[""], ""),
    ] {
        with(cnames, member).unwrap();
    }
    for (cnames, member) in [
        (&["cpu", "cpuacct"][..], "cpu"),
        (&["cpu"], "cpu,cpuacct"),
        (&["cpu"], "xcpu"),
        // What CRIU would tell mount(2).
        (&["memory,name=x"], "memory,name=x"),
        (&["release_agent=x"], "release_agent=x"),
    ] {
        assert!(with(cnames, member).is_err(), "{cnames:?} {member}");
    }
}

/// CRIU writes it when the tasks have been let go.
#[test]
fn a_freezer_below_the_containers_own_is_left_alone() {
    let mut images = restored();
    admission(&images, &spec()).check().unwrap();
    images.cgroups.hierarchies[0]
        .frozen
        .push("child".to_owned());
    let found = admission(&images, &spec()).check().unwrap_err();
    assert!(found.to_string().contains("child/freezer.state"), "{found}");
}

#[test]
fn rules_for_packets_take_who_administers_the_network() {
    let mut images = restored();
    images.has_packet_rules = true;
    assert!(
        admission(&images, &spec())
            .refusals
            .contains(&Refusal::PacketRules)
    );
    let all = json!({ "bounding": ["CAP_NET_ADMIN"], "permitted": ["CAP_NET_ADMIN"] });
    let found = admission(&images, &with("/process/capabilities", all));
    assert!(!found.refusals.contains(&Refusal::PacketRules));
}
