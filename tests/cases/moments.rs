//! A migration that stops at a moment, until a test lets it go on.
//!
//! ```text
//!  /run/stop-at-MOMENT   whoever comes to it makes /run/at-MOMENT, and waits until this file is gone
//! ```

/// A script that ends in `--before-restore`: what runs while neither copy does stops at the moment "frozen", and
/// /run/moved has the exit code of the migration.
pub(crate) fn tells_how_it_ended(migrate: &str) -> String {
    format!(
        "{migrate}'
    [ -e /run/stop-at-frozen ] || exit 0
    touch /run/at-frozen
    while [ -e /run/stop-at-frozen ]; do sleep 0.02; done'
echo $? >/run/moved
"
    )
}

/// A runtime front that stops at moments: `cases` are those of the shell's `case`, by the arguments.
pub(crate) fn paced_front(cases: &str) -> String {
    format!(
        r#"#!/bin/sh
stop_at() {{
    [ -e /run/stop-at-$1 ] || return 0
    touch /run/at-$1
    while [ -e /run/stop-at-$1 ]; do sleep 0.02; done
}}
case " $* " in
{cases}
esac
exec /usr/local/bin/transship-runc "$@"
"#
    )
}
