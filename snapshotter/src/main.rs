//! `transship-snapshotter`: parses, builds, serves; see the library for the map.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::anyhow;
use clap::Parser;
use listenfd::ListenFd;
use tokio::signal::unix::{SignalKind, signal};
use transship_snapshotter::cli::{Arguments, Command};
use transship_snapshotter::daemon::{self, Systemd};
use transship_snapshotter::fault::Faults;
use transship_snapshotter::metrics::Metrics;
use transship_snapshotter::socket::Inherited;
use transship_snapshotter::{diff, fsck, logging};

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let config = arguments.configuration()?;
    // The modes of snapshot directories are meant exactly as they are written.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let colours = std::io::stderr().is_terminal();
    let log_level = logging::start(config.log_format, &config.log_level, colours)
        .map_err(|error| anyhow!(error))?;
    if let Some(Command::Fsck { repair }) = arguments.command {
        let checked = daemon::check_root(&config.root, repair);
        match &checked {
            Ok(problems) => print!("{}", fsck::report(problems)),
            Err(error) => eprintln!("Error: {error:#}"),
        }
        return Ok(fsck::exit_code(checked.ok().as_deref()).into());
    }
    let mut handed_over = ListenFd::from_env();
    let listeners = (0..handed_over.len()).map(|n| handed_over.take_unix_listener(n));
    let listeners = listeners
        .filter_map(Result::transpose)
        .collect::<Result<_, _>>()?;
    let systemd = Systemd::at(std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from));
    #[cfg(debug_assertions)]
    let faults = Faults::kill_at(arguments.kill_at.clone());
    #[cfg(not(debug_assertions))]
    let faults = Faults::default();

    let metrics = Arc::new(Metrics::default());
    let (_lock, snapshots) = daemon::open_snapshots(&config, &metrics, faults)?;
    // One thread for all sockets: with several each call would wake a second one. Calls that may wait
    // for the disk have threads of their own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Before the sockets: who finds one must not be dropped by an order to stop that comes early.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut inherited = Inherited::new(listeners);
        let socket = inherited.take_or_listen(&config.address)?;
        let differ = if config.diff_address.as_os_str().is_empty() {
            None
        } else {
            let socket = inherited.take_or_listen(&config.diff_address)?;
            let containerd = config.containerd_address.clone();
            let durable_below = snapshots.durable_below().map(Path::to_owned);
            let metrics = Arc::clone(&metrics);
            Some(diff::start(socket, containerd, durable_below, metrics))
        };
        inherited.require_none_left()?;
        let read_level = move || arguments.configuration().map(|config| config.log_level);
        tokio::spawn(log_level.follow(signal(SignalKind::hangup())?, read_level));
        let stop = async {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("stopping");
            if let Err(error) = systemd.notify("STOPPING=1") {
                tracing::warn!("{:#}", anyhow::Error::from(error));
            }
        };
        tracing::info!(address = %config.address.display(), "ready");
        systemd.notify("READY=1")?;
        let served = daemon::serve(snapshots, socket, metrics, &config, stop).await;
        if let Some(differ) = differ {
            differ.stop().await;
        }
        served.map_err(|error| anyhow!(error))
    })?;
    Ok(ExitCode::SUCCESS)
}
