//! The two calls of the diff service: what is planned, run and answered, in which order.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use containerd_client::tonic::metadata::MetadataMap;
use containerd_client::tonic::{self, Code, Request, Response, Status};
use containerd_client::types::Descriptor;
use nix::unistd::{AccessFlags, access};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use transship_containerd::labels::{GC_ROOT, UNCOMPRESSED};
use transship_containerd::{Containerd, Upload, namespace_of};
use transship_layer::{
    Compression, ExportError, ImportError, LargeWindows, OverlayStack, remove_contents,
};

use super::blob_file::{BlobFile, Stop};
use super::chunks::{ChunkReader, QUEUED_CHUNKS, gone};
use super::error::DiffError;
use super::handed_on::HandedOn;
use super::leases::{Lease, Leases};
use super::media_type;
use super::namespace;
use super::pack::{PackError, Packed, pack_layer};
use super::plan::{LayerSource, NotOurs, plan_apply, plan_diff};
use super::store::Connection;
use super::unpack::{Bounds, Unpacked, unpack_layer};
use crate::error::one_line;
use crate::metrics::{Metrics, NEXT_DIFFER, THIS_DIFFER};

/// Calls that are worked on at a time; each holds some MiB and some threads.
const JOBS: usize = 8;
/// Layers with a large zstd window that are worked on at a time: each takes up to 128 MiB, of the gigabyte that the unit may
/// have.
const LARGE_WINDOWS: usize = 2;
/// How often a layer is exported anew when the snapshot changed meanwhile. A container that writes now
/// and then lets one through; one that never stops has to be paused.
const ATTEMPTS: usize = 3;

/// What all calls share.
#[derive(Debug)]
pub(super) struct DiffService {
    connection: Connection,
    /// Where layers are on the disk before Apply answers. Commit would sync them, too, but containerd makes no other
    /// change to its database while it waits for a Commit.
    durable_below: Option<PathBuf>,
    jobs: Semaphore,
    windows: Arc<LargeWindows>,
    /// Turns true when the daemon can wait no longer.
    give_up: watch::Receiver<bool>,
    names: Names,
    leases: Leases,
    /// Namespaces that have been cleared of what a killed differ left.
    swept: Mutex<HashSet<String>>,
    handed_on: HandedOn,
    metrics: Arc<Metrics>,
}

/// References and lease ids: `transship-diff-<which differ>-<which process>-<number>`. The first two
/// parts tell what a killed process of the same differ has left, from what another one is writing.
#[derive(Debug)]
struct Names {
    differ: String,
    process: String,
    count: AtomicU64,
}

impl Names {
    fn new(socket: &Path) -> Self {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let mut hasher = DefaultHasher::new();
        socket.hash(&mut hasher);
        let differ = format!("transship-diff-{:016x}-", hasher.finish());
        let started = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos());
        Self {
            process: format!("{differ}{started:x}-"),
            differ,
            count: AtomicU64::new(0),
        }
    }

    fn next(&self) -> String {
        format!(
            "{}{}",
            self.process,
            self.count.fetch_add(1, Ordering::Relaxed)
        )
    }
}

/// Ends when nobody waits for the answer, or when the daemon gives up.
struct GivenUp {
    caller: oneshot::Receiver<()>,
    daemon: watch::Receiver<bool>,
}

impl GivenUp {
    async fn wait(&mut self) {
        let Self { caller, daemon } = self;
        tokio::select! {
            _ = caller => {}
            _ = daemon.wait_for(|give_up| *give_up) => {}
        }
    }
}

impl DiffService {
    pub(super) fn new(
        socket: &Path,
        connection: Connection,
        durable_below: Option<PathBuf>,
        give_up: watch::Receiver<bool>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            connection,
            durable_below,
            jobs: Semaphore::new(JOBS),
            windows: Arc::new(LargeWindows::new(LARGE_WINDOWS)),
            give_up,
            names: Names::new(socket),
            leases: Leases::default(),
            swept: Mutex::default(),
            handed_on: HandedOn::default(),
            metrics,
        })
    }

    /// containerd in the request's namespace, cleared of leftovers at its first use.
    async fn containerd(&self, namespace: String) -> Result<Containerd, DiffError> {
        let containerd = self.connection.in_namespace(&namespace).await?;
        let first = self
            .swept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(namespace);
        if first {
            let (differ, process) = (self.names.differ.clone(), self.names.process.clone());
            let containerd = containerd.clone();
            tokio::spawn(async move { sweep(&containerd, &differ, &process).await });
        }
        Ok(containerd)
    }

    /// Waits for a turn, as long as somebody waits for the answer.
    async fn turn(&self, given_up: &mut GivenUp) -> Result<Option<SemaphorePermit<'_>>, DiffError> {
        tokio::select! {
            // Nobody closes it.
            turn = self.jobs.acquire() => Ok(turn.ok()),
            () = given_up.wait() => Err(DiffError::GivenUp),
        }
    }

    async fn write_diff(
        &self,
        namespace: Option<String>,
        request: DiffRequest,
        mut given_up: GivenUp,
    ) -> Result<Descriptor, DiffError> {
        let source = plan_diff(&request.left, &request.right)?;
        let (media_type, compression) = media_type::written(&request.media_type)
            .ok_or_else(|| NotOurs::because(format!("media type {:?}", request.media_type)))?;
        let job = LayerJob {
            source,
            compression,
            source_date_epoch: request
                .source_date_epoch
                .map(|epoch| u64::try_from(epoch.seconds))
                .transpose()
                .map_err(|_| DiffError::Invalid("the source date epoch lies before 1970"))?,
        };
        let _turn = self.turn(&mut given_up).await?;
        let namespace = match namespace {
            Some(namespace) => namespace,
            None => namespace::with_mounts(&self.connection, &request.right).await?,
        };
        let containerd = self.containerd(namespace).await?;
        let name = self.names.next();
        let mut writing = Writing {
            lease: None,
            upload: None,
        };
        let written = tokio::select! {
            written = writing.run(&job, &containerd, &self.leases, &name, &request) => written,
            () = given_up.wait() => Err(DiffError::GivenUp),
        };
        if written.is_err() {
            writing.undo().await;
        }
        if let Some(lease) = writing.lease {
            self.leases.keep(lease);
        }
        let packed = written?;
        tracing::debug!(
            dir = %job.source.stack.top.display(),
            entries = packed.stats.entries,
            bytes = packed.blob.size,
            "layer written"
        );
        if !packed.stats.noted_paths.is_empty() {
            tracing::info!(
                dir = %job.source.stack.top.display(),
                links = packed.stats.broken_lower_links,
                flags = packed.stats.lost_inode_flags,
                xattrs = packed.stats.lost_xattrs,
                paths = ?packed.stats.noted_paths,
                "not everything fits into a layer"
            );
        }
        Ok(Descriptor {
            media_type: media_type.to_owned(),
            digest: packed.blob.digest,
            size: i64::try_from(packed.blob.size).unwrap_or(i64::MAX),
            ..Descriptor::default()
        })
    }

    /// Applies a layer, or has containerd's next differ do it.
    async fn apply_layer(
        &self,
        namespace: Option<String>,
        request: ApplyRequest,
        mut given_up: GivenUp,
    ) -> Result<Descriptor, DiffError> {
        let layer = request
            .diff
            .clone()
            .ok_or(DiffError::Invalid("the request names no layer"))?;
        if self.handed_on.contains(&request) {
            return Err(NotOurs::because("this differ has handed it on").into());
        }
        let namespace = match namespace {
            Some(namespace) => namespace,
            None => namespace::with_blob(&self.connection, &layer.digest).await?,
        };
        let containerd = self.containerd(namespace).await?;
        let applied = self
            .apply_here(&containerd, &layer, &request, &mut given_up)
            .await;
        let reason = match applied {
            Err(error) if error.code() == Code::Unimplemented => error,
            applied => {
                if applied.is_ok() {
                    self.metrics.note_applied(THIS_DIFFER);
                }
                return applied;
            }
        };
        tracing::debug!(
            layer = layer.digest,
            reason = one_line(&reason),
            "handed on to the next differ"
        );
        let _mark = self.handed_on.begin(&request);
        let applied = tokio::select! {
            applied = containerd.apply_as_asked(request) => applied,
            () = given_up.wait() => return Err(DiffError::GivenUp),
        };
        match applied {
            Ok(applied) => {
                self.metrics.note_applied(NEXT_DIFFER);
                Ok(applied)
            }
            // There is no other, or it does not know this either.
            Err(error) if error.code() == Code::Unimplemented => Err(reason),
            Err(error) => Err(DiffError::NextDiffer(error)),
        }
    }

    async fn apply_here(
        &self,
        containerd: &Containerd,
        layer: &Descriptor,
        request: &ApplyRequest,
        given_up: &mut GivenUp,
    ) -> Result<Descriptor, DiffError> {
        let target = plan_apply(&request.mounts)?;
        // Payloads are for containerd's stream processors, which layers of these types do not pass. The
        // CRI sends them with each layer, in case that it is encrypted.
        if !media_type::is_layer(&layer.media_type) {
            return Err(NotOurs::because(format!("media type {:?}", layer.media_type)).into());
        }
        let _turn = self.turn(given_up).await?;
        let durable_below = self.durable_below.as_deref();
        let is_durable = durable_below.is_some_and(|dir| target.top.starts_with(dir));
        let sync = request.sync_fs || is_durable;
        let digest = layer.digest.clone();
        let stop = Stop::default();
        let bounds = Bounds {
            windows: Arc::clone(&self.windows),
            stop: stop.clone(),
        };
        let unpack = move |blob: &mut (dyn BufRead + Send)| {
            check_target(&target)?;
            let unpacked = unpack_layer(blob, &target, &bounds)
                .map_err(|source| left_or_failed(source, digest, &target.top))?;
            if sync {
                sync_file_system(&target.top)?;
            }
            Ok((target, unpacked))
        };
        let unpacked = match self.connection.open_blob(containerd, layer).await? {
            Some(file) => {
                let mut blob = BlobFile::new(file, stop.clone());
                let unpacking = tokio::task::spawn_blocking(move || unpack(&mut blob));
                joined_unless(unpacking, &stop, given_up).await
            }
            None => {
                let (pieces, queue) = mpsc::channel(QUEUED_CHUNKS);
                let unpacking =
                    tokio::task::spawn_blocking(move || unpack(&mut ChunkReader::new(queue)));
                let read = tokio::select! {
                    read = read_into(&pieces, containerd, layer) => read,
                    () = given_up.wait() => {
                        stop.now();
                        Err(DiffError::GivenUp)
                    }
                };
                if read.is_err() {
                    // Else the end of the queue would look like the end of the blob.
                    drop(pieces.send(Err(io::Error::other("given up"))).await);
                }
                drop(pieces);
                match read {
                    Ok(()) => joined_unless(unpacking, &stop, given_up).await,
                    Err(error) => {
                        drop(unpacking.await);
                        Err(error)
                    }
                }
            }
        };
        let (target, Unpacked { tar, stats }) = unpacked?;
        tracing::debug!(
            dir = %target.top.display(),
            layer = layer.digest,
            entries = stats.entries,
            bytes = tar.size,
            "layer applied"
        );
        Ok(Descriptor {
            media_type: media_type::PLAIN_LAYER.to_owned(),
            digest: tar.digest,
            size: i64::try_from(tar.size).unwrap_or(i64::MAX),
            ..Descriptor::default()
        })
    }
}

/// What is exported, and how.
#[derive(Debug, Clone)]
struct LayerJob {
    source: LayerSource,
    compression: Compression,
    source_date_epoch: Option<u64>,
}

/// What a Diff has made so far, for the case that it must be undone.
struct Writing {
    lease: Option<Arc<Lease>>,
    upload: Option<Upload>,
}

impl Writing {
    async fn run(
        &mut self,
        job: &LayerJob,
        containerd: &Containerd,
        leases: &Leases,
        name: &str,
        request: &DiffRequest,
    ) -> Result<Packed, DiffError> {
        for attempt in 1.. {
            match self.attempt(job, containerd, leases, name, request).await {
                Err(DiffError::Pack(PackError::Export(ExportError::Changed { path })))
                    if attempt < ATTEMPTS =>
                {
                    tracing::debug!(?path, attempt, "changed while it was exported");
                    if let Some(mut upload) = self.upload.take() {
                        upload.abort().await?;
                    }
                }
                // Somebody has removed the lease that was there.
                Err(DiffError::Call(error))
                    if error.code() == Code::NotFound && self.lease.is_some() && attempt == 1 =>
                {
                    self.upload = None;
                    if let Some(lease) = self.lease.take() {
                        leases.forget(&lease);
                    }
                }
                other => return other,
            }
        }
        unreachable!("the last attempt returns")
    }

    async fn attempt(
        &mut self,
        job: &LayerJob,
        containerd: &Containerd,
        leases: &Leases,
        name: &str,
        request: &DiffRequest,
    ) -> Result<Packed, DiffError> {
        let (sink, mut chunks) = mpsc::channel::<Vec<u8>>(QUEUED_CHUNKS);
        let (fit, is_fit) = oneshot::channel();
        let job = job.clone();
        let packing = tokio::task::spawn_blocking(move || {
            check_source(&job.source)?;
            // Nobody waits when the call was given up.
            fit.send(()).ok();
            let sink = |chunk| sink.blocking_send(chunk).map_err(gone);
            Ok::<_, DiffError>(pack_layer(
                &job.source,
                job.compression,
                job.source_date_epoch,
                sink,
            )?)
        });
        if is_fit.await.is_err() {
            // For another differ: no trace in containerd.
            return joined(packing).await;
        }
        // The export goes on while the lease is made and the upload begins.
        if self.lease.is_none() && !request.labels.contains_key(GC_ROOT) {
            self.lease = Some(leases.current(containerd, name).await?);
        }
        let reference = match request.r#ref.as_str() {
            "" => name,
            reference => reference,
        };
        let lease = self.lease.as_ref();
        let containerd = lease.map_or(containerd, |lease| lease.containerd());
        let upload = Upload::begin(containerd.clone(), reference.to_owned()).await?;
        let upload = self.upload.insert(upload);
        while let Some(chunk) = chunks.recv().await {
            upload.write(chunk).await?;
        }
        let packed = joined(packing).await?;
        let mut labels: HashMap<String, String> = request.labels.clone();
        labels.insert(UNCOMPRESSED.to_owned(), packed.tar.digest.clone());
        let blob = &packed.blob;
        upload.commit(&blob.digest, blob.size, &labels).await?;
        Ok(packed)
    }

    /// Leaves nothing behind that is half written; what fails here is collected with the lease.
    async fn undo(&mut self) {
        if let Some(upload) = &mut self.upload
            && let Err(error) = upload.abort().await
        {
            tracing::warn!(error = one_line(&error), "unfinished content stays");
        }
    }
}

async fn joined<T>(mut task: JoinHandle<Result<T, DiffError>>) -> Result<T, DiffError> {
    joined_with(&mut task).await
}

async fn joined_with<T>(task: &mut JoinHandle<Result<T, DiffError>>) -> Result<T, DiffError> {
    task.await
        .unwrap_or_else(|error| Err(DiffError::Internal(error.to_string())))
}

/// The same of what is told to stop when nobody waits for it any more.
async fn joined_unless<T>(
    mut task: JoinHandle<Result<T, DiffError>>,
    stop: &Stop,
    given_up: &mut GivenUp,
) -> Result<T, DiffError> {
    tokio::select! {
        done = joined_with(&mut task) => done,
        () = given_up.wait() => {
            stop.now();
            // The target is nobody's before the last thread has left it.
            drop(task.await);
            Err(DiffError::GivenUp)
        }
    }
}

/// Removes what killed processes of this differ have left unfinished.
async fn sweep(containerd: &Containerd, differ: &str, process: &str) {
    let swept = async {
        for reference in containerd.unfinished_uploads(differ).await? {
            if !reference.starts_with(process) {
                tracing::info!(reference, "removing what a killed differ left");
                containerd.abort_upload(&reference).await?;
            }
        }
        Ok::<_, transship_containerd::ContainerdError>(())
    };
    if let Err(error) = swept.await {
        tracing::warn!(error = one_line(&error), "cannot look for leftovers");
    }
}

/// Reads the whole blob into the queue. When the other end leaves, it has an error of its own.
async fn read_into(
    pieces: &mpsc::Sender<io::Result<Vec<u8>>>,
    containerd: &Containerd,
    layer: &Descriptor,
) -> Result<(), DiffError> {
    let mut blob = containerd.read_blob(&layer.digest).await?;
    let mut left = layer.size;
    while let Some(piece) = blob.next().await? {
        left -= i64::try_from(piece.len()).unwrap_or(i64::MAX);
        if pieces.send(Ok(piece)).await.is_err() {
            return Ok(());
        }
    }
    if left == 0 {
        Ok(())
    } else {
        Err(DiffError::Invalid(
            "the blob is not as long as its descriptor says",
        ))
    }
}

/// The mounts may name directories that this daemon does not see (in another mount namespace, or
/// hidden by systemd's ProtectHome), and what is not empty is a tree to be compared.
fn check_source(source: &LayerSource) -> Result<(), DiffError> {
    is_empty(&source.stack.top)?;
    match &source.must_be_empty {
        Some(base) if !is_empty(base)? => {
            Err(NotOurs::because(format!("{} is not empty", base.display())).into())
        }
        _ => Ok(()),
    }
}

/// A layer goes into a fresh directory; whoever applies a second one to the same snapshot wants the two
/// merged, which another differ does.
fn check_target(target: &OverlayStack) -> Result<(), DiffError> {
    if !is_empty(&target.top)? {
        return Err(NotOurs::because(format!("{} is not empty", target.top.display())).into());
    }
    access(&target.top, AccessFlags::W_OK).map_err(|errno| {
        NotOurs::because(format!("cannot write to {}: {errno}", target.top.display()))
    })?;
    Ok(())
}

/// What is odd but whole is left to the next differ, which gets an empty directory as this one did.
fn left_or_failed(source: ImportError, digest: String, dir: &Path) -> DiffError {
    if !source.is_beyond_this_reader() {
        return DiffError::Import { digest, source };
    }
    match remove_contents(dir) {
        Ok(()) => NotOurs::because(one_line(&source)).into(),
        Err(source) => DiffError::Io {
            act: "empty",
            path: dir.to_owned(),
            source,
        },
    }
}

fn is_empty(dir: &Path) -> Result<bool, DiffError> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(NotOurs::because(format!("{} is not there", dir.display())).into())
        }
        Err(source) => Err(DiffError::Io {
            act: "list",
            path: dir.to_owned(),
            source,
        }),
    }
}

fn sync_file_system(dir: &Path) -> Result<(), DiffError> {
    let synced = fs::File::open(dir).and_then(|dir| Ok(nix::unistd::syncfs(dir)?));
    synced.map_err(|source| DiffError::Io {
        act: "sync the file system of",
        path: dir.to_owned(),
        source,
    })
}

/// The service as the gRPC glue wants it: calls go on in tasks of their own, so that one whose caller
/// has left still cleans up behind itself.
#[derive(Debug)]
pub(super) struct Calls(pub(super) Arc<DiffService>);

impl Calls {
    async fn run<T, F>(
        &self,
        rpc: &'static str,
        headers: &MetadataMap,
        job: impl FnOnce(Arc<DiffService>, Option<String>, GivenUp) -> F,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, DiffError>> + Send + 'static,
    {
        let start = Instant::now();
        let namespace = namespace_of(headers).map(str::to_owned);
        let (waiting, caller) = oneshot::channel();
        let given_up = GivenUp {
            caller,
            daemon: self.0.give_up.clone(),
        };
        let task = tokio::spawn(job(Arc::clone(&self.0), namespace, given_up));
        let result = joined(task).await;
        drop::<oneshot::Sender<()>>(waiting);
        let took_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        match &result {
            Ok(_) => tracing::debug!(rpc, took_us, "ok"),
            Err(error) if error.code() == Code::Unimplemented => {
                tracing::debug!(rpc, reason = one_line(error), "left to the next differ");
            }
            Err(error) => {
                tracing::warn!(rpc, took_us, code = ?error.code(), error = one_line(error), "failed");
            }
        }
        result.map_err(Status::from)
    }
}

#[tonic::async_trait]
impl transship_proto::diff_server::Differ for Calls {
    async fn diff(&self, request: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        let written = self
            .run(
                "Diff",
                &headers,
                |service, namespace, given_up| async move {
                    service.write_diff(namespace, request, given_up).await
                },
            )
            .await?;
        Ok(Response::new(DiffResponse {
            diff: Some(written),
        }))
    }

    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        let applied = self
            .run(
                "Apply",
                &headers,
                |service, namespace, given_up| async move {
                    service.apply_layer(namespace, request, given_up).await
                },
            )
            .await?;
        Ok(Response::new(ApplyResponse {
            applied: Some(applied),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    #[test]
    fn what_is_left_to_another_differ_is_left_with_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "kept").unwrap();
        let target = dir.path().join("target");
        let fill = || {
            fs::create_dir_all(target.join("a/b")).unwrap();
            fs::write(target.join("a/b/file"), "").unwrap();
            fs::write(target.join(".hidden"), "").unwrap();
            drop(symlink(&outside, target.join("link")));
            fs::set_permissions(target.join("a"), fs::Permissions::from_mode(0o500)).unwrap();
        };
        let digest = || "sha256:00".to_owned();
        let odd = || ImportError::Refused {
            path: "a/b".into(),
            reason: "odd",
        };
        fill();
        let left = left_or_failed(odd(), digest(), &target);
        assert_eq!(left.code(), Code::Unimplemented);
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
        assert!(outside.try_exists().unwrap());
        // What is damaged is so for everybody: the caller removes it.
        fill();
        let damaged = ImportError::Malformed {
            offset: 0,
            reason: "cut off",
        };
        let failed = left_or_failed(damaged, digest(), &target);
        assert_eq!(failed.code(), Code::Unknown);
        assert_ne!(fs::read_dir(&target).unwrap().count(), 0);
    }
}
