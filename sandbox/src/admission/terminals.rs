//! Terminals: CRIU opens each by its name, as root, and gives what it has opened the mode and the owner that the images
//! have, before anybody can look at it.
//!
//! So the name is in a file system that CRIU makes for the container itself, where there is nothing of others: devpts,
//! and the tmpfs of `/dev`. A terminal from outside has no name; the runtime has it open.

use nix::fcntl::OFlag;
use transship_checkpoint::criu_images::mounts::{FsType, Mount};

use super::files::{LINK, deepest, makes_or_empties, with_id, within};
use super::{Admission, MadeLinks, Refusal, Restored};

/// Compares what the images alone say.
pub(super) fn compare(restored: &Restored, admission: &mut Admission) {
    for terminal in &restored.terminals {
        let id = terminal.file;
        let Some(file) = with_id(restored, id) else {
            if terminal.is_named {
                admission.refuse(Refusal::Damaged {
                    what: format!("there is no file {id}, by which a terminal is opened"),
                });
            }
            continue;
        };
        let mut refuse = |why| {
            let path = file.path.clone();
            admission.refuse(Refusal::File { path, why });
        };
        if makes_or_empties(terminal.flags) || terminal.flags & nameless() != 0 {
            refuse("which is to be made or emptied when it is opened as a terminal");
        }
        if restored.remaps.iter().any(|remap| remap.file == id) {
            refuse("which is a terminal, and to be made again");
        }
        if !{ restored.mounts.iter() }.all(|table| deepest(table, &file.path).is_some_and(is_made))
        {
            refuse(
                "which would be a terminal, and is neither in a devpts nor in a tmpfs of its own",
            );
        }
    }
}

/// Refuses those that are links in what CRIU fills from the images.
pub(super) fn refuse_links(
    restored: &Restored,
    made: &dyn Fn(&Mount) -> MadeLinks,
    admission: &mut Admission,
) {
    let files = { restored.terminals.iter() }.filter_map(|it| with_id(restored, it.file));
    for file in files {
        let is_link = |mount: &Mount| {
            mount.fs_type == FsType::Tmpfs
                && within(mount, &file.path)
                    .is_some_and(|below| made(mount).is_none_or(|links| links.contains(&below)))
        };
        let mut mounts = { restored.mounts.iter() }.filter_map(|table| deepest(table, &file.path));
        if mounts.any(is_link) {
            let (path, why) = (file.path.clone(), LINK);
            admission.refuse(Refusal::File { path, why });
        }
    }
}

fn is_made(mount: &Mount) -> bool {
    mount.external.is_none()
        && mount.destination != "/"
        && matches!(mount.fs_type, FsType::Devpts | FsType::Tmpfs)
}

/// What makes a file in a directory. That is opened with a bit of it, too.
fn nameless() -> u32 {
    let nameless = OFlag::O_TMPFILE.difference(OFlag::O_DIRECTORY);
    nameless.bits().cast_unsigned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::rc::Rc;

    use transship_checkpoint::criu_images::named_files::Remap;
    use transship_checkpoint::criu_images::terminals::Terminal;

    use super::super::tests::{admission, file, restored, spec};
    use super::*;

    #[test]
    fn terminals_are_where_the_container_has_its_own() {
        let truncates = OFlag::O_TRUNC.bits().cast_unsigned();
        // Its name, the flags, whether it is a file without a name, and whether it is refused.
        for (path, flags, is_ghost, is_refused) in [
            ("/dev/tty", 0o2, false, false),
            ("/dev/tty", truncates, false, true),
            ("/dev/tty", nameless(), false, true),
            ("/dev/tty", 0o2, true, true),
            ("/dev/link", 0o2, false, true),
            ("/rw/x", 0o2, false, true),
            ("/x", 0o2, false, true),
        ] {
            let mut images = restored();
            images.named_files.push(file(path));
            for is_named in [true, false] {
                images.terminals.push(Terminal {
                    flags,
                    file: 9,
                    is_named,
                });
            }
            let remap = Remap {
                file: 9,
                ..Remap::default()
            };
            images.remaps.extend(is_ghost.then_some(remap));
            let mut found = admission(&images, &spec());
            let links = |_: &Mount| Some(Rc::new(BTreeSet::from(["link".into()])));
            refuse_links(&images, &links, &mut found);
            assert_eq!(
                found.check().is_err(),
                is_refused,
                "{path} {flags:#x} {found:?}"
            );
        }
        let mut images = restored();
        // One from outside has no name; one that is not there is none.
        images.terminals = vec![Terminal::default()];
        admission(&images, &spec()).check().unwrap();
        images.terminals[0].is_named = true;
        admission(&images, &spec()).check().unwrap_err();
    }
}
