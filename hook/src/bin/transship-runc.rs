//! The OCI runtime front. containerd calls it by `BinaryName`; called as `transship-<runtime>` it
//! stands for the `<runtime>` on `PATH`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use transship_checkpoint::store::Store;
use transship_hook::argv::Invocation;
use transship_hook::front::{
    CREATE_ASIDE_ROLE, Environment, HOLD_WATCH_ROLE, MEMORY_FILL_ROLE, Outcome, serve, serve_aside,
    serve_memory_fill, serve_watch,
};
use transship_hook::runtime::{
    CRIU_CONFIG_VARIABLE, Runtime, RuntimeError, SUPERVISED, SUPERVISED_APART, exec_supervised,
};
use transship_hook::{hold_script, lazy_pages, one_line, restore_guard};
use transship_sandbox::DEFAULT_RUN_DIR;
use transship_sandbox::admission::node_config::NODE_CONFIG;
use transship_sandbox::consumed::DEFAULT_CONSUMED_DIR;
use transship_sandbox::moved::DEFAULT_MOVED_DIR;
use transship_sandbox::origins::DEFAULT_ORIGINS_DIR;

/// What execvp(3) searches when there is no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The file of this program, whatever has become of its name.
const OWN_FILE: &str = "/proc/self/exe";

fn main() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let program = if args.is_empty() {
        "transship-runc".into()
    } else {
        args.remove(0)
    };
    if hold_script::is_called(&program) {
        return hold(&program);
    }
    for (role, apart) in [(SUPERVISED, false), (SUPERVISED_APART, true)] {
        if args.first().is_some_and(|first| first == role) {
            return fail(&exec_supervised(&args[1..], apart));
        }
    }
    if args
        .first()
        .is_some_and(|first| first == restore_guard::ROLE)
    {
        return match restore_guard::serve(&args[1..]) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                eprintln!("{}", one_line(&error));
                ExitCode::FAILURE
            }
        };
    }
    if args.first().is_some_and(|first| first == lazy_pages::ROLE) {
        return match lazy_pages::serve(&args[1..]) {
            Ok(()) => ExitCode::SUCCESS,
            // Its front sees that it is gone.
            Err(_) => ExitCode::FAILURE,
        };
    }
    if args.first().is_some_and(|first| first == MEMORY_FILL_ROLE) {
        return match serve_memory_fill() {
            Ok(()) => ExitCode::SUCCESS,
            // The start of the container sees that it is gone.
            Err(_) => ExitCode::FAILURE,
        };
    }
    let env = match environment(&program) {
        Ok(env) => env,
        Err(error) => return fail(&error),
    };
    if args.first().is_some_and(|first| first == HOLD_WATCH_ROLE) {
        return match serve_watch(&env, args.split_off(1)) {
            Ok(()) => ExitCode::SUCCESS,
            // Nobody listens to it.
            Err(_) => ExitCode::FAILURE,
        };
    }
    let is_aside = args.first().is_some_and(|first| first == CREATE_ASIDE_ROLE);
    let outcome = match is_aside {
        true => serve_aside(&env, args.split_off(1)),
        false => serve(&env, Invocation::read(args)),
    };
    match outcome {
        Outcome::Exec(args) => fail(&env.runtime.exec(&args, None)),
        Outcome::ExecWithCriuConfig(args, config) => fail(&env.runtime.exec(&args, Some(&config))),
        Outcome::Exit(code) => ExitCode::from(code),
    }
}

/// As CRIU's action script.
fn hold(program: &OsStr) -> ExitCode {
    let action = std::env::var("CRTOOLS_SCRIPT_ACTION").unwrap_or_default();
    let root = std::env::var("CRTOOLS_INIT_PID").ok();
    let root = root.and_then(|pid| pid.parse().ok()).unwrap_or_default();
    match hold_script::serve(Path::new(program), &action, root) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn environment(program: &OsStr) -> Result<Environment, RuntimeError> {
    // Its path has the neighbours; what is started again is this very file, also when another one has
    // taken its name meanwhile.
    let beside = std::env::current_exe().map_err(|source| RuntimeError::Execute {
        path: program.into(),
        source,
    })?;
    let own = PathBuf::from(OWN_FILE);
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    Ok(Environment {
        runtime: Runtime::find(program, &own, &path)?,
        hook: beside.with_file_name("transship-hook"),
        tool: beside.with_file_name("transship"),
        own,
        run_dir: DEFAULT_RUN_DIR.into(),
        store: Store::of_node(),
        consumed: DEFAULT_CONSUMED_DIR.into(),
        moved: DEFAULT_MOVED_DIR.into(),
        containerd: containerd_socket(),
        node_config: NODE_CONFIG.into(),
        origins: DEFAULT_ORIGINS_DIR.into(),
        criu_config_named: std::env::var_os(CRIU_CONFIG_VARIABLE).is_some(),
    })
}

/// The shim's environment names the socket for shims, which lies beside the one for all others.
fn containerd_socket() -> Option<PathBuf> {
    if let Some(address) = std::env::var_os("GRPC_ADDRESS") {
        return Some(address.into());
    }
    let address = std::env::var("TTRPC_ADDRESS").ok()?;
    address.strip_suffix(".ttrpc").map(PathBuf::from)
}

fn fail(error: &RuntimeError) -> ExitCode {
    eprintln!("{}", one_line(error));
    ExitCode::FAILURE
}
