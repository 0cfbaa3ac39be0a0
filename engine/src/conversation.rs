//! The talk with the other node: blocking pipes, used from async code.
//!
//! The two halves move into a blocking task for each step and come back, so that an interrupt can
//! be heard while a read waits: the step is abandoned then, and the conversation with it.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail};
use transship_checkpoint::wire::{Message, Receiver, Sender, WireError};

use crate::interrupt::Interrupt;

type Halves = (
    Sender<Box<dyn Write + Send>>,
    Receiver<Box<dyn Read + Send>>,
);

/// Both directions of the stream.
pub struct Conversation {
    halves: Option<Halves>,
    interrupt: Interrupt,
}

impl std::fmt::Debug for Conversation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversation").finish_non_exhaustive()
    }
}

impl Conversation {
    pub fn new(
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        interrupt: Interrupt,
    ) -> Self {
        let halves = (
            Sender::new(Box::new(output) as _),
            Receiver::new(Box::new(input) as _),
        );
        Self {
            halves: Some(halves),
            interrupt,
        }
    }

    /// Runs a step that reads or writes.
    pub async fn step<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&mut Halves) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        self.interrupt.check()?;
        let interrupt = self.interrupt.clone();
        tokio::select! {
            done = self.step_to_the_end(step) => done,
            interrupted = interrupt.wait() => Err(interrupted.into()),
        }
    }

    /// Runs a step that no interrupt ends.
    pub async fn step_to_the_end<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&mut Halves) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        let Some(mut halves) = self.halves.take() else {
            bail!("the connection was given up before");
        };
        let task = tokio::task::spawn_blocking(move || {
            let result = step(&mut halves);
            (halves, result)
        });
        let (halves, result) = task.await.context("the connection's task panicked")?;
        self.halves = Some(halves);
        Ok(result?)
    }

    /// Sends one message.
    pub async fn send(&mut self, message: Message) -> Result<()> {
        self.step(move |(sender, _)| sender.send(&message)).await
    }

    /// Receives one message. `expected` says what should come, for the error.
    pub async fn receive(&mut self, expected: &'static str) -> Result<Message> {
        self.step(move |(_, receiver)| receiver.receive(expected))
            .await
    }

    /// Ends the conversation: nothing can be taken back after this, so nobody gives up any more.
    pub fn close(&mut self) {
        self.halves = None;
    }

    /// Tells the other side that this one gives up; whether it still listens does not matter.
    pub async fn give_up(&mut self, reason: String) {
        if let Some((mut sender, receiver)) = self.halves.take() {
            let told = tokio::task::spawn_blocking(move || {
                drop(sender.send(&Message::Failed { reason }));
                drop(receiver);
            });
            // A pipe that nobody reads must not hold up the way back.
            drop(tokio::time::timeout(std::time::Duration::from_secs(2), told).await);
        }
    }
}
