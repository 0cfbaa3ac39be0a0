//! `cgroup.img`: the cgroups of the tasks, and the directories and files that CRIU makes and writes.
//!
//! ```text
//! cgroup_entry          1 sets   2 controllers
//!   cg_set_entry        1 id   2 ctls: cg_member_entry 1 name  2 path
//!   cg_controller_entry 1 cnames   2 dirs
//!     cgroup_dir_entry  1 dir_name   2 children   3 properties: cgroup_prop_entry 1 name  3 perms
//!                       4 dir_perms: cgroup_perms 1 mode  2 uid  3 gid
//! ```
//!
//! The state of a freezer (v1) CRIU writes last of all, when the tasks have been let go; it dumps that of uppermost
//! directories alone, which is then the container's own.

use std::path::Path;

use super::{Image, ImageError, Kind};

const FREEZER: &str = "freezer.state";

#[derive(Clone, PartialEq, prost::Message)]
struct CgroupEntry {
    #[prost(message, repeated, tag = "1")]
    sets: Vec<CgSetEntry>,
    #[prost(message, repeated, tag = "2")]
    controllers: Vec<CgControllerEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CgSetEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(message, repeated, tag = "2")]
    ctls: Vec<CgMemberEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CgMemberEntry {
    #[prost(string, required, tag = "1")]
    name: String,
    #[prost(string, required, tag = "2")]
    path: String,
    #[prost(uint32, optional, tag = "3")]
    cgns_prefix: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CgControllerEntry {
    #[prost(string, repeated, tag = "1")]
    cnames: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    dirs: Vec<CgroupDirEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CgroupDirEntry {
    #[prost(string, required, tag = "1")]
    dir_name: String,
    #[prost(message, repeated, tag = "2")]
    children: Vec<CgroupDirEntry>,
    #[prost(message, repeated, tag = "3")]
    properties: Vec<CgroupPropEntry>,
    #[prost(message, optional, tag = "4")]
    perms: Option<CgroupPerms>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CgroupPropEntry {
    #[prost(string, required, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "3")]
    perms: Option<CgroupPerms>,
}

/// CRIU gives them also to directories and files that are there.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct CgroupPerms {
    #[prost(uint32, required, tag = "1")]
    mode: u32,
    #[prost(uint32, required, tag = "2")]
    uid: u32,
    #[prost(uint32, required, tag = "3")]
    gid: u32,
}

impl CgroupPerms {
    /// Whether others than root may write.
    fn is_open(self) -> bool {
        const WRITE_OF_OTHERS: u32 = 0o022;
        self.uid != 0 || self.gid != 0 || self.mode & WRITE_OF_OTHERS != 0
    }
}

impl CgroupDirEntry {
    fn has_open(&self) -> bool {
        let mut properties = self.properties.iter().filter_map(|it| it.perms);
        self.perms.is_some_and(CgroupPerms::is_open)
            || properties.any(CgroupPerms::is_open)
            || self.children.iter().any(Self::has_open)
    }
}

/// The cgroup of a task in one hierarchy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// Name of the hierarchy, or of one of its controllers; empty for cgroup v2.
    pub controller: String,
    /// The cgroup.
    pub path: String,
    /// How many bytes of it are above the cgroup namespace.
    pub namespace_prefix: u32,
}

/// The directories of a hierarchy that CRIU makes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchy {
    /// The names of its controllers.
    pub controllers: Vec<String>,
    /// The uppermost directories, without a leading slash.
    pub tops: Vec<String>,
    /// Names of directories below them, and of files that are written.
    pub names: Vec<String>,
    /// Directories below them of which a freezer is to be set.
    pub frozen: Vec<String>,
    /// Whether others than root get to write in one of them.
    pub opens: bool,
}

/// What CRIU does with cgroups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Where tasks are.
    pub members: Vec<Member>,
    /// What is made for them.
    pub hierarchies: Vec<Hierarchy>,
}

/// Reads it; empty when the dump has no such image.
///
/// # Errors
/// The image cannot be read.
pub fn read(dir: &Path) -> Result<Cgroups, ImageError> {
    let path = dir.join("cgroup.img");
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(Cgroups::default());
    }
    let image = Image::read(&path, Kind::Cgroup)?;
    let mut entries = image.entries();
    let Some(entry) = entries.next::<CgroupEntry>()? else {
        return Ok(Cgroups::default());
    };
    if entries.next_bytes()?.is_some() {
        return Err(image.ambiguous());
    }
    let members = entry.sets.into_iter().flat_map(|set| set.ctls);
    let hierarchies = entry.controllers.into_iter().map(|controller| {
        let mut hierarchy = Hierarchy {
            controllers: controller.cnames,
            ..Hierarchy::default()
        };
        for dir in controller.dirs {
            let is_open = dir.has_open();
            let properties = dir.properties.into_iter().map(|property| property.name);
            hierarchy.opens |= is_open;
            hierarchy.names.extend(properties);
            add_below(dir.children, &mut hierarchy);
            hierarchy.tops.push(dir.dir_name);
        }
        hierarchy
    });
    Ok(Cgroups {
        members: members
            .map(|member| Member {
                controller: member.name,
                path: member.path,
                namespace_prefix: member.cgns_prefix.unwrap_or_default(),
            })
            .collect(),
        hierarchies: hierarchies.collect(),
    })
}

// A message nests no deeper than prost decodes, which is a hundred levels.
fn add_below(dirs: Vec<CgroupDirEntry>, hierarchy: &mut Hierarchy) {
    for dir in dirs {
        let properties = dir.properties.into_iter().map(|property| property.name);
        let (states, others): (Vec<_>, Vec<_>) = properties.partition(|name| name == FREEZER);
        hierarchy.names.extend(others);
        hierarchy.names.push(dir.dir_name.clone());
        add_below(dir.children, hierarchy);
        hierarchy
            .frozen
            .extend(states.first().map(|_| dir.dir_name));
    }
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    #[test]
    fn what_others_get_to_write_is_seen() {
        let perms = |mode, uid, gid| Some(CgroupPerms { mode, uid, gid });
        let opens = |of_dir, of_child, of_file| {
            let child = CgroupDirEntry {
                dir_name: "child".into(),
                perms: of_child,
                ..CgroupDirEntry::default()
            };
            let property = CgroupPropEntry {
                name: "tasks".into(),
                perms: of_file,
            };
            let controller = CgControllerEntry {
                cnames: vec!["misc".into()],
                dirs: vec![CgroupDirEntry {
                    dir_name: String::new(),
                    children: vec![child],
                    properties: vec![property],
                    perms: of_dir,
                }],
            };
            let mut body = Vec::new();
            let entry = CgroupEntry {
                controllers: vec![controller],
                ..CgroupEntry::default()
            };
            push_entry(&mut body, &entry);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("cgroup.img");
            let image = Image::new(&path, Kind::Cgroup, body);
            image.replace(&path).unwrap();
            read(dir.path()).unwrap().hierarchies[0].opens
        };
        assert!(!opens(None, None, None));
        assert!(!opens(
            perms(0o755, 0, 0),
            perms(0o555, 0, 0),
            perms(0o644, 0, 0)
        ));
        assert!(opens(perms(0o757, 0, 0), None, None));
        assert!(opens(None, perms(0o755, 7, 0), None));
        assert!(opens(None, None, perms(0o644, 0, 7)));
    }
}
