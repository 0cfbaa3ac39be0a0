//! Keys in the keyring of the container: CRIU knows no keyrings, and what it restores has that of the runtime.
//!
//! ```text
//!  /proc/keys   08f55bac I--Q---     3 perm 3f1b0000     0     0 keyring   _ses.web: 1
//!                                                                          name, by runc (crun: web); how many
//! ```

use transship_sandbox::read_proc;

use super::{Hit, Subject};

pub(super) fn hits(subject: &Subject) -> Option<Hit> {
    // Of a kernel without keys there is no file.
    let keys = read_proc("/proc/keys").unwrap_or_default();
    let count = in_keyring(&keys, &subject.id)?;
    Some(("keyring", format!("{count}")))
}

fn in_keyring(keys: &str, id: &str) -> Option<u64> {
    let names = [format!(" _ses.{id}: "), format!(" {id}: ")];
    let mut rings = { keys.lines() }.filter(|line| line.contains(" keyring "));
    rings.find_map(|line| {
        let mut counts = names.iter().filter_map(|name| line.split_once(name));
        counts.next()?.1.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_counted_in_the_keyring_of_the_container() {
        let keys = "\
            04a7b886 I--Q---     3 perm 3f1b0000     0     0 keyring   _ses.web: empty\n\
            17bb73f8 I--Q---     1 perm 3f010000     0     0 user      secret: 1\n\
            08f55bac I--Q---     3 perm 3f1b0000     0     0 keyring   _ses.web2: 1\n";
        assert_eq!(in_keyring(keys, "web"), None);
        assert_eq!(in_keyring(keys, "web2"), Some(1));
        assert_eq!(in_keyring(keys, "_ses.web2"), Some(1));
        assert_eq!(in_keyring(keys, "other"), None);
    }
}
