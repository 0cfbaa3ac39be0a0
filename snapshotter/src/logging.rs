//! Log lines on stderr, with a level that can change while the daemon runs.

use tokio::signal::unix::Signal;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, reload};

use crate::config::LogFormat;

/// Changes the log level.
#[derive(Debug, Clone)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// Logs at `level` from now on.
    ///
    /// # Errors
    /// A level that is not understood; the old one stays.
    pub fn change(&self, level: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.reload(filter(level)?)?;
        Ok(())
    }

    /// At every `order` (a signal) logs at the level that `read` then says.
    pub async fn follow<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        self,
        mut order: Signal,
        read: impl Fn() -> Result<String, E>,
    ) {
        while order.recv().await.is_some() {
            let changed = read()
                .map_err(Into::into)
                .and_then(|level| self.change(&level).map(|()| level));
            match changed {
                Ok(level) => tracing::info!(level, "log level"),
                Err(error) => tracing::warn!(error, "the log level stays"),
            }
        }
    }
}

/// A bare level is about this daemon; its libraries speak up from `warn` on.
fn filter(level: &str) -> Result<EnvFilter, Box<dyn std::error::Error + Send + Sync>> {
    Ok(match level.parse::<LevelFilter>() {
        Ok(level) => EnvFilter::try_new(format!("warn,transship_snapshotter={level}"))?,
        Err(_) => EnvFilter::try_new(level)?,
    })
}

/// Starts logging to stderr, with colours if `colours` says so. To be called once, by `main`.
///
/// # Errors
/// A level that is not understood, or logging that was started before.
pub fn start(
    format: LogFormat,
    level: &str,
    colours: bool,
) -> Result<LogLevel, Box<dyn std::error::Error + Send + Sync>> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let lines = match format {
        LogFormat::Text => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(colours)
            .with_target(false)
            .boxed(),
        LogFormat::Json => fmt::layer()
            .with_writer(std::io::stderr)
            .json()
            .flatten_event(true)
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()?;
    Ok(LogLevel(handle))
}
