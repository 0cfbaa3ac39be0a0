//! `transship-snapshotter`: parses, builds, serves; see the library for the map.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use transship_snapshotter::cli::{Arguments, Command};
use transship_snapshotter::fault::Faults;
use transship_snapshotter::logging::{self, LogLevel};
use transship_snapshotter::metrics::Metrics;
use transship_snapshotter::{daemon, diff, fsck};

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let config = arguments.configuration()?;
    // The modes of snapshot directories are meant exactly as they are written.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let colours = std::io::stderr().is_terminal();
    let log_level = logging::start(config.log_format, &config.log_level, colours)
        .map_err(|error| anyhow!(error))?;
    if let Some(Command::Fsck { repair }) = arguments.command {
        return check_root(&config.root, repair);
    }
    let notify_socket = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from);
    let notify = |state: &str| match &notify_socket {
        Some(socket) => daemon::notify_systemd(socket, state).context("cannot notify systemd"),
        None => Ok(()),
    };
    #[cfg(debug_assertions)]
    let faults = Faults::kill_at(arguments.kill_at.clone());
    #[cfg(not(debug_assertions))]
    let faults = Faults::default();

    let metrics = Arc::new(Metrics::default());
    let (_lock, snapshots) = daemon::open_snapshots(&config, &metrics, faults)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let socket = daemon::Socket::listen(&config.address)?;
        let differ = if config.diff_address.as_os_str().is_empty() {
            None
        } else {
            let socket = daemon::Socket::listen(&config.diff_address)?;
            Some(diff::start(socket, config.containerd_address.clone()))
        };
        tokio::spawn(reload_log_level(
            arguments,
            log_level,
            signal(SignalKind::hangup())?,
        ));
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let stop = async {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("stopping");
            if let Err(error) = notify("STOPPING=1") {
                tracing::warn!("{error:#}");
            }
        };
        tracing::info!(address = %config.address.display(), "ready");
        notify("READY=1")?;
        let served = daemon::serve(snapshots, socket, metrics, &config, stop).await;
        if let Some(differ) = differ {
            differ.stop().await;
        }
        served.map_err(|error| anyhow!(error))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Exit codes as those of fsck(8): 0 clean, 1 mended, 4 something is left.
fn check_root(root: &Path, repair: bool) -> anyhow::Result<ExitCode> {
    let _lock = daemon::RootLock::take(root)?;
    let problems = fsck::check(&root.canonicalize()?, repair)?;
    for problem in &problems {
        println!(
            "{}: {}",
            if problem.mended { "mended" } else { "FOUND" },
            problem.what
        );
    }
    let left = problems.iter().filter(|problem| !problem.mended).count();
    println!("{} problems, {left} left", problems.len());
    Ok(ExitCode::from(if left > 0 {
        4
    } else {
        u8::from(!problems.is_empty())
    }))
}

async fn reload_log_level(
    arguments: Arguments,
    level: LogLevel,
    mut hangup: tokio::signal::unix::Signal,
) {
    while hangup.recv().await.is_some() {
        let changed = arguments
            .configuration()
            .map_err(Into::into)
            .and_then(|config| {
                level
                    .change(&config.log_level)
                    .map(|()| tracing::info!(config.log_level, "log level"))
            });
        if let Err(error) = changed {
            tracing::warn!(error, "the log level stays");
        }
    }
}
