//! CRIU 4.0 and 4.1 restore the root of a container writable.

use transship_checkpoint::spec::Spec;

use super::Hit;
use crate::version::Version;

const LOST_FROM: Version = Version(4, 0, 0);
const KEPT_FROM: Version = Version(4, 2, 0);

pub(super) fn hits(spec: &Spec) -> Vec<Hit> {
    let read_only = spec
        .get("/root/readonly")
        .and_then(serde_json::Value::as_bool);
    if read_only != Some(true) {
        return Vec::new();
    }
    // Without a CRIU of this name the dump fails, and says so.
    match Version::of_criu() {
        Some(version) if loses(version) => vec![("read-only-root", String::new())],
        _ => Vec::new(),
    }
}

fn loses(version: Version) -> bool {
    (LOST_FROM..KEPT_FROM).contains(&version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_versions_lose_it() {
        for (version, lost) in [
            (Version(3, 19, 0), false),
            (Version(4, 0, 0), true),
            (Version(4, 1, 1), true),
            (Version(4, 2, 0), false),
        ] {
            assert_eq!(loses(version), lost, "{version:?}");
        }
    }
}
