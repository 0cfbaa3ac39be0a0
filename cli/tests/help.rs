//! What `--help` prints, kept in `help/*.md`: a change of a word is seen where it is reviewed.
//!
//! `TRYCMD=overwrite cargo test -p transship --test help` writes the files anew.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]

#[test]
fn the_help_is_what_was_reviewed() {
    trycmd::TestCases::new()
        .env("COLUMNS", "100")
        .case("tests/help/*.md");
}
