//! Who reads what a command says on stderr may have gone, with the link or the terminal.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]

use std::io;
use std::process::{Command, Stdio};

fn exit_code(stderr: impl Into<Stdio>) -> io::Result<Option<i32>> {
    let transship = env!("CARGO_BIN_EXE_transship");
    let mut command = Command::new(transship);
    let ended = command.args(["inspect", "/nowhere/at-all"]).stderr(stderr);
    Ok(ended.status()?.code())
}

#[test]
fn the_exit_code_needs_no_reader() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let refused = exit_code(Stdio::null()).unwrap();
    assert!(refused.is_some_and(|code| code < 10), "{refused:?}");
    assert_eq!(exit_code(writer).unwrap(), refused);
}
