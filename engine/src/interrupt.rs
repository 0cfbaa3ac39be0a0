//! Ctrl-C and its relatives: a request to give up in good order.
//!
//! A migration that is interrupted resumes its source and removes what the target has made; that
//! takes a moment, so the signals are taken from their default action for the whole of it.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Context as _, Result};

pub use crate::error::Interrupted;

/// Tells when somebody has asked to give up.
#[derive(Debug, Clone)]
pub struct Interrupt(watch::Receiver<Option<&'static str>>);

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP from their default action.
    ///
    /// # Errors
    /// The process may not handle signals.
    pub fn install() -> Result<Self> {
        let (sender, receiver) = watch::channel(None);
        for (kind, name) in [
            (SignalKind::interrupt(), "SIGINT"),
            (SignalKind::terminate(), "SIGTERM"),
            (SignalKind::hangup(), "SIGHUP"),
        ] {
            let mut signals = signal(kind).with_context(|| format!("cannot handle {name}"))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    sender.send_replace(Some(name));
                }
            });
        }
        Ok(Self(receiver))
    }

    /// Nobody can ask: for callers that have no signals of their own.
    pub fn never() -> Self {
        Self(watch::channel(None).1)
    }

    /// Whether somebody has asked already.
    pub fn check(&self) -> Result<(), Interrupted> {
        self.0
            .borrow()
            .map_or(Ok(()), |name| Err(Interrupted(name)))
    }

    /// Waits until somebody asks.
    pub async fn wait(&self) -> Interrupted {
        let mut receiver = self.0.clone();
        match receiver.wait_for(Option::is_some).await.map(|name| *name) {
            Ok(Some(name)) => Interrupted(name),
            // The senders live as long as the process.
            _ => std::future::pending().await,
        }
    }
}
