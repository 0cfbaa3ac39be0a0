//! The talk with the target, step by step, up to the word by which it lets its copy run; what follows is in `decision`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_client::types::v1::Status;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use transship_checkpoint::annotations::RECEIVE;
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::manifest::{File, Losses, Shared};
use transship_checkpoint::shared_dirs::SHARED_DIR;
use transship_checkpoint::store::{Draft, Store};
use transship_checkpoint::wire::{
    Check, Compressed, DataPlace, How, Message, Offer, OfferedContainer, OfferedPod, PROTOCOL,
    WireError, unexpected,
};
use transship_containerd::{Containerd, unique};
use transship_sandbox::opened::{Holds, InMemory};

use super::before_restore;
use super::commit_guard::CommitGuard;
use super::dump_files::Next;
use super::dump_parts::{BegunDumps, DumpParts, Dumping, KnownBefore, PartDump, ToDump};
use super::late_pages::{NOT_DIRECT, PageServer};
use super::moving::Moving;
use super::record::{Pending, Record};
use super::remote::refused_there;
use super::{Request, mark_of, network, resume_source, unmark_moved};
use crate::check::lacking;
use crate::check::node_facts::NodeFacts;
use crate::conversation::Conversation;
use crate::data_channel::{Connections, DataAddress, Identity, STREAMS};
use crate::error::{Context, Error, Kind, Result};
use crate::frozen::{Committed, Frozen, TaskToFreeze, at_most};
use crate::image_blobs::{self, offer_blobs};
use crate::interrupt::Interrupt;
use crate::machine::architecture;
use crate::memory_dir::MigrationFiles;
use crate::moved_mark::Mark;
use crate::node_id::is_node_id;
use crate::pod;
use crate::progress::Progress;
use crate::reasons::Reasons;
use crate::source::{self, Dumped};
use crate::stuck_dump;
use crate::thaw;
use crate::timeline::Timeline;

mod before_freeze;
mod decision;

/// How long the target may take to look at the offer, and then to unpack what it has been sent: signs of life alone keep
/// nobody waiting for ever.
const IMAGE_DEADLINE: Duration = Duration::from_secs(3600);
/// How long dump and transfer may take whatever the size, and how many bytes a second they have to manage: two megabits a
/// second are a slow link, and less is somebody who wants the source to stand still.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(120);
const TRANSFER_SPEED: u64 = 256 << 10;
/// How long the target may take to compare what it has with its manifest: it has read all digests
/// while it came.
const RECEIVED_DEADLINE: Duration = Duration::from_secs(120);
/// How long a restore may take whatever its size, and how many bytes a second it has to manage.
const RESTORE_DEADLINE: Duration = Duration::from_secs(120);
/// The same, where a kubelet starts one container after the other.
const POD_DEADLINE: Duration = Duration::from_secs(300);
const RESTORE_SPEED: u64 = 20 << 20;
/// What the steps share.
pub(super) struct Transaction<'a> {
    pub(super) node: &'a Containerd,
    pub(super) moving: &'a Arc<Moving>,
    /// What speaks against it here, until the other node has been asked.
    pub(super) reasons: Reasons,
    pub(super) store: &'a Store,
    pub(super) request: &'a Request,
    pub(super) record: &'a Record,
    /// What the record says.
    pub(super) pending: Pending,
    /// Whether the copy is known to be on the target's disk.
    pub(super) durable: bool,
    pub(super) conversation: Conversation,
    pub(super) timeline: Timeline,
    pub(super) progress: &'a dyn Progress,
    /// Heard until the copy runs.
    pub(super) interrupt: Interrupt,
    pub(super) bytes: u64,
    /// What of it has gone compressed.
    pub(super) compressed: Compressed,
    /// Connections to the target beside the command.
    pub(super) direct: usize,
    /// Bytes of memory and files, as far as they can be known before.
    pub(super) estimate: u64,
    /// What was sent before the freeze, by the names of the containers, for the manifest.
    pub(super) files_before: Vec<(String, File)>,
    /// Directories of the checkpoint for which the target takes contents of files before the freeze.
    pub(super) takes_contents: Vec<String>,
    /// Pages that come when the copy runs already.
    pub(super) late: Option<PageServer>,
    /// The plugins at work that take the source out of its networks; also when nobody waits for them any more.
    pub(super) giving_away: Option<JoinHandle<Result<()>>>,
    /// Asks the target which copy runs, should this process be killed.
    pub(super) guard: Option<CommitGuard>,
}

async fn check_no_other_runs(node: &Containerd, moving: &Moving) -> Result<()> {
    let Some(pod) = &moving.pod else {
        return Ok(());
    };
    let found = { moving.containers.iter() }.map(|it| it.id().to_owned());
    let node = node.in_namespace(CRI_NAMESPACE)?;
    pod::check_no_other_runs(&node, &pod.sandbox, &found.collect()).await
}

impl Transaction<'_> {
    /// Everything up to the moment when the copy runs; gives the source, which still stands still. On
    /// failure the source runs, unless nobody can know which does.
    pub(super) async fn carry_out(&mut self) -> Result<(Option<u32>, Committed)> {
        self.offer().await?;
        let name = format!("migration-{}-{}", self.moving.id(), unique());
        let (place, why_on_disk) =
            MigrationFiles::choose(self.store, (self.estimate, Holds::Dump), InMemory::for_dump);
        if let Some(why) = why_on_disk {
            let why = why.one_line();
            self.progress
                .tell(&format!("the dump goes to the disk: {why}"));
        }
        let draft = place.store.draft(&name)?;
        self.conversation
            .send(Message::Begin {
                name: draft.name().to_owned(),
            })
            .await?;
        let known = self.send_before().await.map_err(|error| {
            // Nothing has been frozen yet.
            Error::failed(format!("{} runs on here as before", self.moving.called())).because(error)
        })?;
        self.interrupt.check()?;
        check_no_other_runs(self.node, self.moving).await?;
        let begun = self.begin_dumps(&draft, &known).await.map_err(|error| {
            Error::failed(format!("{} runs on here as before", self.moving.called())).because(error)
        })?;
        // It looks for a record, which is not there before `Commit`.
        self.guard = Some(CommitGuard::start(self.node, self.store, &self.pending)?);
        let frozen = match self.freeze(&draft).await {
            Ok(frozen) => frozen,
            Err(error) => {
                let error = resume_source(self.node, self.moving, Ok(()), error).await;
                unmark_moved(&self.pending)?;
                return Err(error);
            }
        };
        let most = self.request.max_freeze;
        let since = frozen.since();
        self.timeline.freeze(since.into_std());
        let to_dump = ToDump {
            known,
            begun,
            pids: frozen.pids().clone(),
        };
        if let Err(error) = at_most(most, since, self.move_and_record(&draft, to_dump)).await {
            self.end_late_pages(true).await;
            frozen.wait_for_dump().await;
            let error = self.take_back_network(error).await;
            let thawed = frozen.thaw().await;
            let error = resume_source(self.node, self.moving, thawed, error).await;
            // Nobody else would know of the mark.
            unmark_moved(&self.pending)?;
            self.record.clear()?;
            return Err(error);
        }
        // From here on nobody else may decide that the source runs.
        self.commit(frozen.commit()).await
    }

    /// Starts the runtimes and CRIU, which wait for the freeze.
    async fn begin_dumps(&self, draft: &Draft, known: &KnownBefore) -> Result<BegunDumps> {
        let patience = self.request.dump_patience;
        let begun = BegunDumps::begin(self.node, self.moving, known, draft.dir(), patience);
        let begun = tokio::select! {
            begun = begun => begun,
            signal = self.interrupt.wait() => Err(signal.into()),
        };
        let Err(error) = begun else {
            return begun;
        };
        // They write to the draft, which goes.
        let roots = self.moving.containers.iter().map(|it| it.pid).collect();
        stuck_dump::wait_for_end(draft.dir(), roots).await;
        // Ctrl-C ends the runtimes as well.
        Err(self.interrupt.check().err().map_or(error, Error::from))
    }

    async fn freeze(&self, draft: &Draft) -> Result<Frozen> {
        let mark = mark_of(self.moving, &self.pending)?;
        let tasks = self.moving.containers.iter().map(|source| TaskToFreeze {
            marked: mark.as_ref().and_then(Mark::new_for),
            network_is_locked: network::is_locked(&self.pending, source.container.criu.tcp),
            given_away: network::given_away(&self.pending),
            hides_policy: true,
            ..source.to_freeze()
        });
        let bounds = (self.request.max_freeze, &self.interrupt);
        let (tasks, draft) = (tasks.collect(), Some(draft.dir()));
        Frozen::freeze_marked(self.node, tasks, draft, bounds, mark.as_ref()).await
    }

    async fn move_and_record(&mut self, draft: &Draft, to_dump: ToDump) -> Result<()> {
        self.move_frozen(draft, to_dump).await?;
        if let Some(late) = &mut self.late {
            late.freeze_again(self.moving).await?;
        }
        self.interrupt.check()?;
        // The runtime takes as long as the disk.
        let looks = self.look_at_sources();
        self.pending.since = transship_containerd::rfc3339(std::time::SystemTime::now());
        self.record.write(&self.pending)?;
        for looked in looks.join_all().await {
            looked?;
        }
        Ok(())
    }

    /// Whether each still stands still. A kubelet, whose probes a pod does not answer, may have ended what is dumped, and
    /// somebody may have let it go, past containerd, too: then it is not moved, because what runs here would run beside the
    /// copy. Nor is a pod of which another container runs now.
    fn look_at_sources(&self) -> JoinSet<Result<()>> {
        let mut looks = JoinSet::new();
        for container in &self.moving.containers {
            let (node, id) = (self.node.clone(), container.id().to_owned());
            let (runtime, called) = (container.runtime.clone(), container.called.clone());
            looks.spawn(async move {
                let task = timeout(thaw::ANSWER, source::running_task(&node, &id)).await;
                // Where containerd does not answer, the runtime knows it as well.
                let may_be_paused = task
                    .ok()
                    .and_then(Result::ok)
                    .is_none_or(|task| task.is_ok_and(|task| task.status() == Status::Paused));
                match may_be_paused && runtime.has_paused(&id).await {
                    true => Ok(()),
                    false => Err(Error::failed(format!(
                        "{called} does not stand still any more: it was ended, or let go"
                    ))),
                }
            });
        }
        let (node, moving) = (self.node.clone(), Arc::clone(self.moving));
        looks.spawn(async move { check_no_other_runs(&node, &moving).await });
        looks
    }

    /// Says what will come, and sends the parts of the image that the target lacks.
    async fn offer(&mut self) -> Result<()> {
        self.progress.step("image");
        let from = self.timeline.now();
        let mut containers = Vec::new();
        for (at, source) in self.moving.containers.iter().enumerate() {
            let blobs = match &source.image {
                Some((_, image)) => offer_blobs(self.node, image).await?,
                None => Vec::new(),
            };
            let spec = String::from_utf8(source.spec.clone());
            let pod = self.moving.pod.as_ref();
            containers.push(OfferedContainer {
                container: source.container.clone(),
                spec: spec.context("the spec is not text")?,
                blobs,
                config: pod.and_then(|pod| pod.containers_made_of.get(at).cloned()),
            });
        }
        let blobs: BTreeMap<String, u64> = { containers.iter().flat_map(|it| &it.blobs) }
            .map(|blob| (blob.digest.clone(), blob.size))
            .collect();
        self.estimate = self.moving.estimate(self.node).await?;
        let identity = Arc::new(Identity::new()?);
        let offer = Offer {
            key: identity.public().to_owned(),
            protocol: PROTOCOL,
            migration: self.pending.migration.clone(),
            node: self.node.server_id().await?,
            architecture: architecture()?,
            containers,
            pod: self.moving.pod.as_ref().map(|pod| {
                Box::new(OfferedPod {
                    pod: pod.pod.clone(),
                    config: pod.made_of.config.clone(),
                    runtime_handler: pod.made_of.runtime_handler.clone(),
                    not_running: pod.not_running.clone(),
                })
            }),
            estimate: self.estimate,
            // What is refused here already need not be there.
            lazy: self.request.is_lazy && self.request.data_address != Some(DataAddress::Nowhere),
            at_once: self.request.precopy.rounds == 0 && !self.request.is_lazy,
        };
        let (needed, place) = self.ask_target(offer).await?;
        // Before the blobs, which may take minutes: the target does not listen that long.
        let connections = self.connect(identity, place).await?;
        let blobs = blobs.iter().filter(|(digest, _)| needed.contains(*digest));
        let bytes = self.send_blobs(blobs.collect()).await?;
        if self.request.pod.is_some_and(|pod| pod.wait) {
            let migration = &self.pending.migration;
            self.progress.tell(&format!(
                "waits for a pod on the other node with the annotation {RECEIVE}: {migration}"
            ));
        }
        self.direct = connections.as_ref().map_or(0, Connections::count);
        if let Some(connections) = connections {
            self.conversation.send_files_through(connections)?;
        }
        let direct = self.direct;
        self.conversation.send(Message::ImageEnd { direct }).await?;
        let what = "the target to have the image";
        match self
            .conversation
            .receive_from_waiting(what, IMAGE_DEADLINE)
            .await?
        {
            Message::Ready { contents, node } => {
                if !is_node_id(&node) {
                    return Err(Error::failed("what the other node calls itself is no id"));
                }
                self.takes_contents = contents;
                self.pending.node = node;
            }
            other => return Err(unexpected(what, &other).into()),
        }
        self.timeline.step("image", from, Some(bytes));
        if needed.is_empty() {
            self.timeline.note("the target has it");
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Has the target look at the offer; gives the blobs that it lacks, and where it can be reached directly.
    ///
    /// # Errors
    /// All that speaks against the migration, on both nodes.
    async fn ask_target(&mut self, offer: Offer) -> Result<(BTreeSet<String>, Option<DataPlace>)> {
        let expected = "the target's answer";
        let mut reasons = std::mem::take(&mut self.reasons);
        let (conversation, patience) = (&mut self.conversation, self.request.link_patience);
        let answer = async {
            conversation.send(Message::Offer(Box::new(offer))).await?;
            conversation.watch(patience)?;
            let answer = conversation.receive_within(expected, IMAGE_DEADLINE, Duration::ZERO);
            answer.await
        };
        let (answer, here) = tokio::join!(answer, NodeFacts::of_this(Some(self.node)));
        let told = answer.as_ref().map_err(Error::cause::<WireError>);
        let there = match told {
            Ok(Message::Need { facts, .. }) => facts.as_str(),
            Err(Some(WireError::Failed { facts, .. })) => facts,
            _ => "",
        };
        let there = match (there, &answer) {
            ("", _) => None,
            (facts, Ok(_)) => Some((here?, NodeFacts::parse(facts.as_bytes())?)),
            // Of a refusal they are extra: another version writes them in another way.
            (facts, Err(_)) => here.ok().zip(NodeFacts::parse(facts.as_bytes()).ok()),
        };
        if let Some((here, there)) = there {
            let needs: Vec<_> = self.moving.containers.iter().map(|it| &it.needs).collect();
            let (called, may_lack) = (self.moving.called(), &self.request.may_lack);
            let compared = lacking::check(&called, &needs, (&here, &there), may_lack);
            for note in reasons.keep(compared)?.into_iter().flatten() {
                tracing::info!("the other node: {}: {}", note.what, note.text());
            }
        }
        let answer = match answer {
            Ok(Message::Need {
                digests, direct, ..
            }) => Some((digests.into_iter().collect(), direct)),
            Ok(other) => return Err(unexpected(expected, &other).into()),
            // Somebody has ended it: no reason against it.
            Err(error) if self.interrupt.check().is_err() => return Err(error),
            Err(error) => {
                reasons.add(refused_there(error));
                None
            }
        };
        reasons.or(answer)
    }

    /// Connects directly, if the target can be reached so; gives the connections for files.
    async fn connect(
        &mut self,
        identity: Arc<Identity>,
        place: Option<DataPlace>,
    ) -> Result<Option<Connections>> {
        let is_lazy = self.request.is_lazy;
        let late = NOT_DIRECT;
        let Some(DataPlace { addresses, key }) = place else {
            return match is_lazy {
                true => Err(Error::refused(late).hint("--data-address names where it listens")),
                false => Ok(None),
            };
        };
        let streams = STREAMS + usize::from(is_lazy);
        let connecting = move || identity.connect(&addresses, &key, streams);
        match tokio::task::spawn_blocking(connecting).await? {
            Err(error) if is_lazy => Err(Error::refused(late).because(error)),
            Ok(mut connections) => {
                if is_lazy {
                    self.conversation.keep_for_pages(connections.take_last());
                }
                Ok(Some(connections))
            }
            Err(error) => {
                tracing::info!(
                    "no direct connection, all goes through the command: {}",
                    error.one_line()
                );
                Ok(None)
            }
        }
    }

    /// Sends blobs, which stay here until that is done, whoever removes their image; gives their bytes.
    async fn send_blobs(&mut self, blobs: Vec<(&String, &u64)>) -> Result<u64> {
        if blobs.is_empty() {
            return Ok(0);
        }
        let digests = blobs.iter().map(|(digest, _)| digest.as_str());
        let leased = image_blobs::keep(self.node, digests).await?;
        let send_all = async {
            let mut bytes = 0;
            for (digest, size) in blobs {
                self.send_blob(digest, *size).await?;
                bytes += size;
            }
            Ok(bytes)
        };
        let sent = send_all.await;
        // It ends by itself.
        drop(leased.end_lease().await);
        sent
    }

    async fn send_blob(&mut self, digest: &str, size: u64) -> Result<()> {
        self.conversation
            .send(Message::Blob {
                digest: digest.to_owned(),
                size,
            })
            .await?;
        let mut stream = self.node.read_blob(digest).await?;
        while let Some(piece) = stream.next().await? {
            self.conversation
                .write(move |sender| sender.send_blob(&piece))
                .await?;
        }
        Ok(())
    }

    /// Everything that happens while the source stands still and can still go on.
    async fn move_frozen(&mut self, draft: &Draft, to_dump: ToDump) -> Result<()> {
        let from = self.timeline.now();
        let (node, moving) = (self.node, self.moving);
        self.progress.bytes("dump and transfer", self.estimate);
        let is_late = self.request.is_lazy;
        let parts = DumpParts::of(moving, to_dump, draft.dir(), is_late)?;
        let parts = Arc::new(parts);
        let patience = self.request.dump_patience;
        let mut dumps = Dumping::begin(node, moving, draft.dir(), &parts, patience);
        let deadline = TRANSFER_DEADLINE + Duration::from_secs(self.estimate / TRANSFER_SPEED);
        let sent = timeout(deadline, self.send_dump(Arc::clone(&parts))).await;
        let sent = sent.unwrap_or_else(|_| {
            let seconds = deadline.as_secs();
            let message = format!("dump and transfer have taken more than {seconds} s");
            Err(Error::new(Kind::Target, message))
        });
        let known = parts.known_before_end();
        let interrupted = self.interrupt.check();
        let dumped = match (dumps.ended(), &sent, &interrupted) {
            (Some(ended), ..) => Some(ended?),
            (None, Ok(_), Ok(())) if known.is_some() => None,
            (None, Ok(_), Ok(())) => Some(dumps.wait().await?),
            // CRIU, whose code is in the tasks until its end, is waited for before they are let go. What has not begun, and
            // the files, nobody needs any more.
            (None, ..) => {
                parts.release_holds();
                drop(dumps);
                return sent.map(drop).and(interrupted.map_err(Error::from));
            }
        };
        let (files, bytes) = sent?;
        self.interrupt.check()?;
        self.timeline.step("transfer", from, Some(bytes));
        self.bytes += bytes;
        self.compressed = self.conversation.compressed();
        let (losses, shared) = match &dumped {
            Some((all, shared)) => {
                let losses = all.iter().map(|it| it.dumped.upperdir.losses.clone());
                (losses.collect(), shared.clone())
            }
            None => known.unwrap_or_default(),
        };
        if is_late {
            let connection = self.conversation.take_for_pages();
            let link = (connection, self.conversation.link());
            self.late = Some(PageServer::serve(link, dumps, parts, from)?);
            return self.hand_over(draft, files, losses, shared).await;
        }
        let ended = async {
            match dumped {
                Some((dumped, _)) => Ok(dumped),
                None => dumps.wait().await.map(|(dumped, _)| dumped),
            }
        };
        let dumped = {
            let handed = self.hand_over(draft, files, losses, shared);
            tokio::pin!(ended, handed);
            tokio::select! {
                // Nobody waits for the copy of what could not be dumped to its end.
                dumped = &mut ended => match dumped {
                    Ok(dumped) => handed.await.map(|()| dumped),
                    Err(error) => Err(error),
                },
                // CRIU is waited for, whatever the other node says, and what it says is told.
                handed = &mut handed => {
                    let dumped = ended.await;
                    handed.and(dumped)
                }
            }
        };
        // Ctrl-C ends the runtimes as well.
        let dumped =
            dumped.map_err(|error| self.interrupt.check().err().map_or(error, Error::from));
        self.tell_dumps(from, dumped?);
        Ok(())
    }

    /// Has the copy made of what was sent.
    async fn hand_over(
        &mut self,
        draft: &Draft,
        mut files: BTreeMap<String, Vec<File>>,
        losses: Vec<Losses>,
        mut shared: Shared,
    ) -> Result<()> {
        shared.files = files.remove(SHARED_DIR).unwrap_or_default();
        let mut containers = Vec::new();
        for (source, losses) in self.moving.containers.iter().zip(losses) {
            let mut container = source.container.clone();
            container.files = files.remove(&container.name).unwrap_or_default();
            container.losses = losses;
            containers.push(container);
        }
        let pod = self.moving.pod.as_ref();
        let manifest = source::manifest(
            self.node,
            draft.name(),
            pod.map(|pod| pod.pod.clone()),
            containers,
            pod.map(|pod| pod.not_running.clone()).unwrap_or_default(),
            shared,
        )
        .await?;
        self.conversation
            .send(Message::End {
                manifest: Box::new(manifest),
                signed: None,
            })
            .await?;
        self.expect(
            &Message::Received,
            "the target to have the checkpoint",
            RECEIVED_DEADLINE,
        )
        .await?;
        self.timeline.end_step();

        if let Some(command) = &self.request.before_restore {
            self.progress.step("before-restore command");
            let from = self.timeline.now();
            before_restore::run(command, &self.interrupt).await?;
            self.timeline.step("command", from, None);
        }
        self.progress.step("restore");
        let from = self.timeline.now();
        if let Some(giving_away) = network::give_away(&self.pending, self.first_pid()) {
            let given = self.giving_away.insert(giving_away).await;
            self.giving_away = None;
            given.map_err(Error::from).flatten()?;
        }
        self.conversation.send(Message::Restore).await?;
        let deadline = match self.request.pod {
            Some(pod) if pod.wait => POD_DEADLINE,
            _ => RESTORE_DEADLINE,
        };
        let deadline = deadline + Duration::from_secs(self.bytes / RESTORE_SPEED);
        self.expect(&Message::Restored, "the restore on the target", deadline)
            .await?;
        self.timeline.step("restore", from, None);
        Ok(())
    }

    /// Tells of the dumps.
    fn tell_dumps(&mut self, from: Duration, dumps: Vec<PartDump>) {
        for (source, PartDump { after, dumped }) in self.moving.containers.iter().zip(dumps) {
            let (began, Dumped { criu, upperdir }) = (from + after, dumped);
            // The dump, its layer, the transfer of both: from the last one to the first.
            let bytes = Some(upperdir.bytes);
            self.timeline
                .step_of("upperdir", began, upperdir.took, bytes);
            self.timeline.step_of("dump", began, criu, None);
            if self.moving.pod.is_some() {
                self.timeline.note(&source.container.name);
            }
        }
        self.timeline.sort();
    }

    async fn expect(
        &mut self,
        message: &Message,
        what: &'static str,
        deadline: Duration,
    ) -> Result<()> {
        let found = self.conversation.receive_from_waiting(what, deadline);
        match found.await? {
            found if found == *message => Ok(()),
            found => Err(unexpected(what, &found).into()),
        }
    }

    /// Of the container, whose networks are its own. A pod has those of its sandbox, which stay here.
    fn first_pid(&self) -> u32 {
        self.moving.containers.first().map_or(0, |it| it.pid)
    }

    /// Sends what the dumps write, memory while CRIU still writes it; gives the files of each part, and the bytes that
    /// were sent.
    async fn send_dump(
        &mut self,
        parts: Arc<DumpParts>,
    ) -> Result<(BTreeMap<String, Vec<File>>, u64)> {
        let count = Arc::new(Mutex::new(self.progress.counter()));
        let follow = self.conversation.write_files(move |sender| {
            let (mut sent, mut bytes) = (Vec::new(), 0);
            let mut progress = |bytes| {
                if let Ok(mut count) = count.lock() {
                    count(bytes);
                }
            };
            let mut left: Vec<_> = parts.all().iter().collect();
            while let Some((part, next)) = parts.next(&mut left) {
                let from = (&*part.name, &*part.dir);
                let of_memory = match (&next, &part.memory) {
                    (Next::Memory(path), Some(memory)) => {
                        let image = memory.send_image(sender, from, path, &mut progress)?;
                        part.files.memory_sent();
                        Some(image)
                    }
                    (Next::Share(share), Some(memory)) => {
                        Some(memory.send_share(*share, sender, from.0, &mut progress)?)
                    }
                    _ => None,
                };
                if let Some(memory) = of_memory {
                    let files = memory.files.into_iter();
                    sent.extend(files.map(|file| (part.name.clone(), file)));
                    bytes += memory.bytes;
                    continue;
                }
                match next {
                    // Only memory has any.
                    Next::Share(_) => {}
                    Next::File(path) | Next::Memory(path) => {
                        let mut how = How {
                            check: Check::Xxh3,
                            complete: &|| part.files.is_whole(&path),
                            progress: &mut progress,
                            sent: 0,
                        };
                        let file = sender.send_file(from.0, from.1, &path, &mut how)?;
                        sent.push((part.name.clone(), file));
                        bytes += how.sent;
                    }
                }
            }
            Ok((sent, bytes))
        });
        let (sent, bytes): (Vec<_>, Vec<u64>) = follow.await?.into_iter().unzip();
        let mut files: BTreeMap<String, Vec<File>> = BTreeMap::new();
        let before = std::mem::take(&mut self.files_before).into_iter();
        for (name, file) in before.chain(sent.into_iter().flatten()) {
            files.entry(name).or_default().push(file);
        }
        Ok((files, bytes.iter().sum()))
    }
}
