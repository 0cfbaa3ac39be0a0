//! How the runtime front and the hook are called.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use transship_checkpoint::annotations::Annotations;
use transship_hook::argv::{Arguments, Command, Invocation};
use transship_hook::hook::{HookState, poststop};

use crate::scratch::Scratch;

/// The arguments of the front, with a NUL between them. What is handed on means the same.
pub(crate) fn argv(data: &[u8]) {
    let args: Vec<OsString> = { data.split(|byte| *byte == 0) }
        .map(|arg| OsString::from_vec(arg.to_vec()))
        .collect();
    let call = Invocation::read(args.clone());
    assert_eq!(call.args, args, "what is not understood goes on as it came");
    assert!(args.starts_with(&call.globals.args));
    let (name, arguments) = match &call.command {
        Command::Create(arguments) => ("create", arguments),
        Command::Restore(arguments) => ("restore", arguments),
        Command::Checkpoint(arguments) => ("checkpoint", arguments),
        _ => return,
    };
    let again = read(name, arguments);
    assert_eq!(again.as_ref(), Some(arguments));
    let restore = arguments.to_restore("/images".as_ref(), "/work".as_ref());
    assert_eq!(read("restore", &restore).as_ref(), Some(&restore));
}

fn read(name: &str, arguments: &Arguments) -> Option<Arguments> {
    let mut args = vec![name.into()];
    args.extend(arguments.to_args());
    match Invocation::read(args).command {
        Command::Create(arguments)
        | Command::Restore(arguments)
        | Command::Checkpoint(arguments) => Some(arguments),
        _ => None,
    }
}

/// The state on stdin of the hook, which takes away what is called as it says.
pub(crate) fn hook_state(data: &[u8]) {
    let Ok(state) = HookState::read(data) else {
        return;
    };
    let _annotations = Annotations::read(&state.id, Some(&state.annotations));
    let scratch = Scratch::new();
    let dir = scratch.dir();
    drop(poststop(&state, &dir.join("run"), &dir.join("consumed")));
    scratch.check();
}
