//! The OCI hook of a sandbox: `transship-hook createRuntime|poststop`, state on stdin.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use transship_checkpoint::store::Store;
use transship_hook::hook::{HookState, Node, create_runtime, poststop};
use transship_hook::one_line;
use transship_hook::restore_log::LOG_DIR;
use transship_sandbox::DEFAULT_RUN_DIR;
use transship_sandbox::admission::node_config::NODE_CONFIG;
use transship_sandbox::consumed::DEFAULT_CONSUMED_DIR;
use transship_sandbox::last_run::DEFAULT_RUNS_DIR;
use transship_sandbox::origins::DEFAULT_ORIGINS_DIR;
use transship_sandbox::wanted_image::DEFAULT_IMAGES_DIR;

const USAGE: &str = "usage: transship-hook createRuntime|poststop < STATE (an OCI hook)";

/// The program of this name that lies beside this one.
fn beside(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name(name)
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result = match (args.next().as_deref(), args.next()) {
        (Some("createRuntime"), None) => HookState::read(io::stdin()).and_then(|state| {
            let node = Node {
                run_dir: DEFAULT_RUN_DIR.into(),
                store: Store::of_node(),
                consumed: DEFAULT_CONSUMED_DIR.into(),
                runs: DEFAULT_RUNS_DIR.into(),
                images: DEFAULT_IMAGES_DIR.into(),
                config: NODE_CONFIG.into(),
                origins: DEFAULT_ORIGINS_DIR.into(),
                log_dir: LOG_DIR.into(),
                tool: beside("transship"),
            };
            create_runtime(&state, &node)
        }),
        (Some("poststop"), None) => {
            let consumed = Path::new(DEFAULT_CONSUMED_DIR);
            HookState::read(io::stdin())
                .and_then(|state| poststop(&state, Path::new(DEFAULT_RUN_DIR), consumed))
        }
        (Some("--version"), None) => {
            println!("transship-hook {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transship-hook: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}
