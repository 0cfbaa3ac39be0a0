//! The talk with the other node: blocking pipes, used from async code, and never waited for without
//! a bound.
//!
//! ```text
//!  sender   --> pipe     frames; signs of life from a thread of its own while there is nothing to say
//!  receiver <-- pipe     moves into a blocking task for each step and comes back
//!  direct   --> or <--   files through connections of their own (data_channel), where there are some
//! ```
//!
//! Bytes that have been written may lie in this node's buffers: while files go through connections of their own, each of
//! these is judged by its own writes, the kernel ends one whose other side acknowledges nothing, and the pipe is read.
//!
//! A step ends with its result, an interrupt, or because the link has stalled: a live side is heard
//! every few seconds, whatever it is doing, so silence for [`Conversation::watch`]'s patience means that
//! the link or the other node is gone. A step that is abandoned takes the conversation with it.

use std::io::{Read, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinHandle, JoinSet};
use transship_checkpoint::wire::{
    Compressed, Link, Message, Receiver, Sender, WireError, unexpected,
};

use crate::data_channel::{Connection, Connections, EndAtDrop};
use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;

mod activity;

use activity::Activity;
pub use activity::Watched;

/// How long a link may be silent unless somebody says otherwise.
pub const LINK_PATIENCE: Duration = Duration::from_secs(30);
/// Signs of life in the time of the patience.
const BEATS: u32 = 6;
/// How often a step that waits looks at the clock.
const LOOK: Duration = Duration::from_millis(200);
/// How long the other side may take to hear that this one gives up.
const FAREWELL: Duration = Duration::from_secs(2);
/// What a step that writes waits for.
const READER: &str = "the other node to read";

/// The sending half of a pipe or connection.
pub type Writing = Sender<Watched<Box<dyn Write + Send>>>;
/// The receiving half of one.
pub type Reading = Receiver<Watched<Box<dyn Read + Send>>>;

/// Says that this side is alive, as long as it is there.
#[derive(Debug)]
struct Heartbeat {
    stop: Arc<AtomicBool>,
    thread: Thread,
}

impl Heartbeat {
    fn start(sender: Writing, interval: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let beat = move || {
            while !stopped.load(Ordering::Acquire) {
                std::thread::park_timeout(interval);
                if stopped.load(Ordering::Acquire) || sender.alive().is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(beat)
            .map_err(|error| Error::failed("cannot start a thread").because(error))?
            .thread()
            .clone();
        Ok(Self { stop, thread })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // It may sit in a write that nobody reads; it is not waited for.
        self.thread.unpark();
    }
}

/// Both directions of the stream.
pub struct Conversation {
    sender: Option<Writing>,
    receiver: Option<Reading>,
    interrupt: Interrupt,
    written: Arc<Activity>,
    read: Arc<Activity>,
    patience: Option<Duration>,
    heartbeat: Option<Heartbeat>,
    direct: Option<Direct>,
    /// The next message, waited for while files are sent.
    hearing: Option<Hearing>,
    /// A connection for pages that come late, and what ends it.
    pages: Option<(Connection, EndAtDrop)>,
}

/// A message on its way, and the half of the pipe that it comes through.
type Hearing =
    Pin<Box<dyn Future<Output = Result<(Reading, Result<Message, WireError>), JoinError>> + Send>>;

/// The connections that files go through. Dropped, they end.
struct Direct {
    links: Links,
    /// Of each connection: signs of life on one say nothing of another.
    activities: Vec<Arc<Activity>>,
    _heartbeats: Vec<Heartbeat>,
    _end: EndAtDrop,
}

enum Links {
    Sending(Vec<Writing>),
    Receiving(Vec<Reading>),
}

impl Direct {
    fn mark(&self) {
        self.activities.iter().for_each(|it| it.mark());
    }

    /// How long the one that is stuck the longest has been in a write.
    fn stuck(&self) -> Duration {
        let stuck = self.activities.iter().map(|it| it.stuck());
        stuck.max().unwrap_or_default()
    }

    /// How long nothing has come through any.
    fn idle(&self) -> Duration {
        let idle = self.activities.iter().map(|it| it.idle());
        idle.min().unwrap_or_default()
    }
}

impl std::fmt::Debug for Conversation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversation").finish_non_exhaustive()
    }
}

fn too_late(expected: &str, deadline: Duration) -> Error {
    let seconds = deadline.as_secs();
    let message = format!("{expected} has taken more than {seconds} s");
    Error::new(Kind::Target, message)
}

/// How a step ends before it is done.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// How long it goes on after an interrupt.
    grace: Duration,
    deadline: Option<Duration>,
    expected: &'static str,
}

impl Bounds {
    fn of(expected: &'static str) -> Self {
        Self {
            grace: Duration::ZERO,
            deadline: None,
            expected,
        }
    }
}

impl Conversation {
    /// Talks through these pipes.
    pub fn new(
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        interrupt: Interrupt,
    ) -> Self {
        let (output, written) = Watched::new(Box::new(output) as Box<dyn Write + Send>);
        let (input, read) = Watched::new(Box::new(input) as Box<dyn Read + Send>);
        Self {
            sender: Some(Sender::new(output)),
            receiver: Some(Receiver::new(input)),
            interrupt,
            written,
            read,
            patience: None,
            heartbeat: None,
            direct: None,
            hearing: None,
            pages: None,
        }
    }

    /// Keeps a connection for pages that come late.
    pub fn keep_for_pages(&mut self, connection: Option<(Connection, EndAtDrop)>) {
        self.pages = connection;
    }

    /// That connection. Dropped, what ends it does.
    pub fn take_for_pages(&mut self) -> Option<(Connection, EndAtDrop)> {
        self.pages.take()
    }

    /// From now on files are sent through these connections.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn send_files_through(&mut self, connections: Connections) -> Result<()> {
        let patience = self.patience.unwrap_or(LINK_PATIENCE);
        connections.end_unheard(patience)?;
        let (connections, end) = connections.split();
        let (mut senders, mut activities): (Vec<Writing>, _) = (Vec::new(), Vec::new());
        for connection in connections {
            let (pipe, activity) = Watched::new(Box::new(connection) as Box<dyn Write + Send>);
            senders.push(match senders.first() {
                Some(first) => first.beside(pipe),
                None => Sender::new(pipe),
            });
            activities.push(activity);
        }
        let interval = patience / BEATS;
        let beats = senders.iter().cloned();
        let heartbeats = beats.map(|sender| Heartbeat::start(sender, interval));
        self.direct = Some(Direct {
            _heartbeats: heartbeats.collect::<Result<_>>()?,
            links: Links::Sending(senders),
            activities,
            _end: end,
        });
        Ok(())
    }

    /// From now on files are received through these connections.
    pub fn receive_files_through(&mut self, connections: Connections) {
        let (connections, end) = connections.split();
        let (receivers, activities) = { connections.into_iter() }
            .map(|connection| {
                let (pipe, activity) = Watched::new(Box::new(connection) as Box<dyn Read + Send>);
                (Receiver::new(pipe), activity)
            })
            .unzip();
        self.direct = Some(Direct {
            links: Links::Receiving(receivers),
            activities,
            _heartbeats: Vec::new(),
            _end: end,
        });
    }

    /// Sends files: `step` is run for each connection, or once for the pipe.
    ///
    /// # Errors
    /// As [`Self::write`]; the other side's reason, where it has told one.
    pub async fn write_files<T: Send + 'static>(
        &mut self,
        step: impl Fn(&Writing) -> Result<T, WireError> + Clone + Send + 'static,
    ) -> Result<Vec<T>> {
        let Some(direct) = &self.direct else {
            return Ok(vec![self.write(move |sender| step(sender)).await?]);
        };
        let Links::Sending(senders) = &direct.links else {
            return Err(given_up());
        };
        let mut all = JoinSet::new();
        for sender in senders {
            let (step, sender) = (step.clone(), sender.clone());
            all.spawn_blocking(move || {
                let done = step(&sender)?;
                sender.send(&Message::FilesEnd)?;
                Ok(done)
            });
        }
        let all = tokio::spawn(join_all(all));
        self.while_heard(all).await
    }

    /// Runs a step that writes to one of the connections for files, or to the pipe.
    ///
    /// # Errors
    /// As [`Self::write_files`].
    pub async fn write_data<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&Writing) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        let Some(sender) = self.file_sender().cloned() else {
            return self.write(step).await;
        };
        let task = tokio::task::spawn_blocking(move || Ok(step(&sender)?));
        self.while_heard(task).await
    }

    /// What has gone compressed so far.
    pub fn compressed(&self) -> Compressed {
        let sender = self.file_sender().or(self.sender.as_ref());
        sender.map(Sender::compressed).unwrap_or_default()
    }

    /// The link of the connections for files.
    pub fn link(&self) -> Option<Link> {
        self.file_sender().map(Sender::link)
    }

    /// That of the first connection for files.
    fn file_sender(&self) -> Option<&Writing> {
        match &self.direct.as_ref()?.links {
            Links::Sending(senders) => senders.first(),
            Links::Receiving(_) => None,
        }
    }

    /// Waits for who writes to the connections for files. The other side is heard through the pipe meanwhile: what has
    /// been written may have come no further than this node's buffers.
    async fn while_heard<T>(&mut self, task: JoinHandle<Result<T>>) -> Result<T> {
        let mut hearing = self.hear()?;
        let has_heard = AtomicBool::new(false);
        let done = {
            let silence = || {
                let stuck = self.direct.as_ref().map_or(Duration::ZERO, Direct::stuck);
                match has_heard.load(Ordering::Relaxed) {
                    true => stuck,
                    false => stuck.max(self.read.idle()),
                }
            };
            let mut step = std::pin::pin!(self.wait(task, silence, Bounds::of(READER)));
            tokio::select! {
                done = &mut step => done,
                heard = &mut hearing => match heard? {
                    (receiver, Ok(message)) => {
                        has_heard.store(true, Ordering::Relaxed);
                        hearing = Box::pin(std::future::ready(Ok((receiver, Ok(message)))));
                        step.await
                    }
                    (_, Err(reason)) => return Err(reason.into()),
                },
            }
        };
        self.hearing = Some(hearing);
        match done {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) | Err(error) => Err(self.reason_for(error).await),
        }
    }

    /// The next message, as it comes.
    fn hear(&mut self) -> Result<Hearing> {
        self.interrupt.check()?;
        if let Some(hearing) = self.hearing.take() {
            return Ok(hearing);
        }
        let mut receiver = self.receiver.take().ok_or_else(given_up)?;
        self.read.mark();
        Ok(Box::pin(tokio::task::spawn_blocking(move || {
            let message = receiver.receive("the other node's word");
            (receiver, message)
        })))
    }

    /// Receives files: `step` is run for each connection, or once for the pipe. Gives the message that came
    /// after the files.
    ///
    /// # Errors
    /// As [`Self::read`]; the other side's reason, where it has told one.
    pub async fn read_files(
        &mut self,
        step: impl FnMut(&mut Reading) -> Result<Message, WireError> + Clone + Send + 'static,
    ) -> Result<Message> {
        let Some(mut direct) = self.direct.take() else {
            let mut step = step;
            return self.read(move |receiver| step(receiver)).await;
        };
        let Links::Receiving(receivers) = &mut direct.links else {
            return Err(given_up());
        };
        let receivers = std::mem::take(receivers);
        direct.mark();
        let mut all = JoinSet::new();
        for mut receiver in receivers {
            let mut step = step.clone();
            all.spawn_blocking(move || match step(&mut receiver)? {
                Message::FilesEnd => Ok(()),
                other => Err(unexpected("the end of the files", &other)),
            });
        }
        let mut all = tokio::spawn(join_all(all));
        let (end, files) = {
            let end = self.receive("the end of the checkpoint");
            tokio::pin!(end);
            tokio::select! {
                end = &mut end => (end?, Some(all)),
                // A file that cannot be taken is told at once: the source stands still, and waits for a reader.
                files = &mut all => match files? {
                    Ok(_) => (end.await?, None),
                    Err(error) if is_broken(&error) => {
                        // The pipe may say why.
                        let told = tokio::time::timeout(FAREWELL, end).await;
                        let told = told.ok().and_then(Result::err).filter(is_told);
                        return Err(told.unwrap_or(error));
                    }
                    Err(error) => return Err(error),
                },
            }
        };
        if let Some(files) = files {
            let files = self.wait(files, || direct.idle(), Bounds::of("files"));
            files.await??;
        }
        self.direct = Some(direct);
        Ok(end)
    }

    /// What the other side says about it, if it says something; else the error.
    async fn reason_for(&mut self, error: Error) -> Error {
        let said = self.receive_within("the other node's reason", FAREWELL, Duration::ZERO);
        match said.await {
            Err(reason) if is_told(&reason) => reason,
            _ => error,
        }
    }

    /// From now on both sides show that they are alive, and silence for `patience` ends a step.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn watch(&mut self, patience: Duration) -> Result<()> {
        self.patience = Some(patience);
        let sender = self.sender.clone().ok_or_else(given_up)?;
        self.heartbeat = Some(Heartbeat::start(sender, patience / BEATS)?);
        Ok(())
    }

    /// From now on silence of the other side for `patience` ends a step; nothing is said to it, which only sends.
    pub fn wait_at_most(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// Runs a step that writes.
    ///
    /// # Errors
    /// Those of the step, an interrupt, or a stalled link.
    pub async fn write<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&Writing) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        self.write_within(Bounds::of(READER), step).await
    }

    async fn write_within<T: Send + 'static>(
        &mut self,
        bounds: Bounds,
        step: impl FnOnce(&Writing) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        if bounds.grace.is_zero() {
            self.interrupt.check()?;
        }
        let sender = self.sender.clone().ok_or_else(given_up)?;
        self.written.mark();
        let task = tokio::task::spawn_blocking(move || step(&sender));
        match self.wait(task, || self.written.idle(), bounds).await {
            Ok(done) => Ok(done?),
            Err(error) => {
                self.sender = None;
                Err(error)
            }
        }
    }

    /// Runs a step that reads.
    ///
    /// # Errors
    /// Those of the step, an interrupt, or a stalled link.
    pub async fn read<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&mut Reading) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        self.read_within(Bounds::of("more of the stream"), step)
            .await
    }

    async fn read_within<T: Send + 'static>(
        &mut self,
        bounds: Bounds,
        step: impl FnOnce(&mut Reading) -> Result<T, WireError> + Send + 'static,
    ) -> Result<T> {
        if bounds.grace.is_zero() {
            self.interrupt.check()?;
        }
        let mut receiver = self.receiver.take().ok_or_else(given_up)?;
        self.read.mark();
        let task = tokio::task::spawn_blocking(move || {
            let result = step(&mut receiver);
            (receiver, result)
        });
        let (receiver, result) = self.wait(task, || self.read.idle(), bounds).await?;
        self.receiver = Some(receiver);
        Ok(result?)
    }

    /// Waits for a step within its bounds.
    async fn wait<T>(
        &self,
        mut task: impl Future<Output = Result<T, JoinError>> + Unpin,
        silence: impl Fn() -> Duration,
        bounds: Bounds,
    ) -> Result<T> {
        let began = Instant::now();
        let mut interrupted = None;
        loop {
            tokio::select! {
                done = &mut task => return Ok(done?),
                signal = self.interrupt.wait(), if interrupted.is_none() => {
                    interrupted = Some((Instant::now(), signal));
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            interrupted = match interrupted {
                Some((at, signal)) if at.elapsed() >= bounds.grace => return Err(signal.into()),
                waiting => waiting,
            };
            let expected = bounds.expected;
            if let Some(patience) = self.patience
                && silence() > patience
            {
                let seconds = patience.as_secs();
                return Err(Error::new(
                    Kind::Target,
                    format!("the link has been silent for {seconds} s, waiting for {expected}"),
                ));
            }
            if let Some(deadline) = bounds.deadline
                && began.elapsed() > deadline
            {
                return Err(too_late(expected, deadline));
            }
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn send(&mut self, message: Message) -> Result<()> {
        self.write(move |sender| sender.send(&message)).await
    }

    /// Sends one message; an interrupt is heard after `grace`.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn send_with_grace(&mut self, message: Message, grace: Duration) -> Result<()> {
        let bounds = Bounds {
            grace,
            ..Bounds::of(READER)
        };
        self.write_within(bounds, move |sender| sender.send(&message))
            .await
    }

    /// Receives one message. `expected` says what should come, for the error.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn receive(&mut self, expected: &'static str) -> Result<Message> {
        self.receive_bounded(Bounds::of(expected)).await
    }

    /// Receives one message that must come within `deadline`; an interrupt is heard after `grace`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn receive_within(
        &mut self,
        expected: &'static str,
        deadline: Duration,
        grace: Duration,
    ) -> Result<Message> {
        self.receive_bounded(Bounds {
            grace,
            deadline: Some(deadline),
            expected,
        })
        .await
    }

    /// The same, of a side that may ask meanwhile whether it is still waited for. However often it asks, it has so long.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn receive_from_waiting(
        &mut self,
        expected: &'static str,
        deadline: Duration,
    ) -> Result<Message> {
        let began = Instant::now();
        loop {
            let left = deadline.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(too_late(expected, deadline));
            }
            let found = self.receive_within(expected, left, Duration::ZERO);
            match found.await? {
                Message::Waiting => self.send(Message::GoOn).await?,
                found => return Ok(found),
            }
        }
    }

    async fn receive_bounded(&mut self, bounds: Bounds) -> Result<Message> {
        if let Some(hearing) = self.hearing.take() {
            if bounds.grace.is_zero() {
                self.interrupt.check()?;
            }
            self.read.mark();
            let (receiver, message) = self.wait(hearing, || self.read.idle(), bounds).await?;
            self.receiver = Some(receiver);
            return Ok(message?);
        }
        let expected = bounds.expected;
        self.read_within(bounds, move |receiver| receiver.receive(expected))
            .await
    }

    /// From now on nobody gives up: what was begun is brought to its end.
    pub fn hear_no_interrupt(&mut self) {
        self.interrupt = Interrupt::never();
    }

    /// Ends the conversation: nothing can be taken back after this, so nobody gives up any more.
    pub fn close(&mut self) {
        self.heartbeat = None;
        self.hearing = None;
        self.direct = None;
        self.pages = None;
        self.sender = None;
        self.receiver = None;
    }

    /// Tells the other side that this one gives up; whether it still listens does not matter.
    pub async fn give_up(&mut self, reason: String) {
        self.refuse(reason, String::new()).await;
    }

    /// The same of an offer; `facts` are what this node is like.
    pub async fn refuse(&mut self, reason: String, facts: String) {
        if let Some(sender) = self.sender.take() {
            let told = tokio::task::spawn_blocking(move || {
                drop(sender.send(&Message::Failed { reason, facts }));
            });
            // A pipe that nobody reads must not hold up the way back.
            drop(tokio::time::timeout(FAREWELL, told).await);
        }
        self.close();
    }
}

/// Whether the other side has told it.
fn is_told(error: &Error) -> bool {
    matches!(error.cause(), Some(WireError::Failed { .. }))
}

/// Whether it is the connection that has failed, and nothing else.
fn is_broken(error: &Error) -> bool {
    let cause = error.cause();
    matches!(
        cause,
        Some(WireError::Ended { .. } | WireError::Stream { .. })
    )
}

/// Waits for all of them, or for the first that fails.
async fn join_all<T: 'static>(mut all: JoinSet<Result<T, WireError>>) -> Result<Vec<T>> {
    let mut done = Vec::new();
    while let Some(one) = all.join_next().await {
        done.push(one??);
    }
    Ok(done)
}

fn given_up() -> Error {
    Error::new(Kind::Target, "the connection was given up before")
}

#[cfg(test)]
mod tests;
