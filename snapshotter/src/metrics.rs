//! Prometheus metrics, on an address of their own when one is configured.
//!
//! ```text
//! transship_snapshotter_call_seconds{rpc,code}         histogram   how long calls took
//! transship_snapshotter_commit_batch_changes           histogram   changes that shared one transaction
//! transship_snapshotter_snapshots{kind}                gauge       snapshots there are
//! transship_snapshotter_layer_bytes                    gauge       disk use of counted layers
//! transship_snapshotter_background_tasks               gauge       deletions and counts to be done
//! transship_snapshotter_layers_applied_total{by}       counter     layers: by this_differ, by next_differ
//! ```
//!
//! The gauges are asked when somebody scrapes, so that calls pay nothing for them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::error::{Result, one_line};
use crate::snapshots::Snapshots;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    rpc: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Labels of layers that the diff service has applied itself, and has had applied by containerd's next one.
pub(crate) const THIS_DIFFER: &str = "this_differ";
pub(crate) const NEXT_DIFFER: &str = "next_differ";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AppliedLabel {
    by: &'static str,
}

/// All metrics of one daemon.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Histogram, fn() -> Histogram>,
    batches: Histogram,
    snapshots: Family<KindLabel, Gauge<u64, AtomicU64>>,
    layer_bytes: Gauge<u64, AtomicU64>,
    background: Gauge<u64, AtomicU64>,
    applied: Family<AppliedLabel, Counter>,
}

/// 0.1 ms to 6.5 s.
fn call_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.0001, 2.0, 17))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("transship_snapshotter"),
            calls: Family::new_with_constructor(call_buckets),
            batches: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            snapshots: Family::default(),
            layer_bytes: Gauge::default(),
            background: Gauge::default(),
            applied: Family::default(),
        };
        let registry = &mut metrics.registry;
        let seconds = Unit::Seconds;
        registry.register_with_unit(
            "call",
            "How long calls took",
            seconds,
            metrics.calls.clone(),
        );
        registry.register(
            "commit_batch_changes",
            "Changes that shared one metadata transaction",
            metrics.batches.clone(),
        );
        registry.register(
            "snapshots",
            "Snapshots there are",
            metrics.snapshots.clone(),
        );
        registry.register_with_unit(
            "layer",
            "Disk use of layers, each without its parents",
            Unit::Bytes,
            metrics.layer_bytes.clone(),
        );
        registry.register(
            "background_tasks",
            "Deletions and counts that are still to be done",
            metrics.background.clone(),
        );
        registry.register(
            "layers_applied",
            "Layers that were applied through the diff service",
            metrics.applied.clone(),
        );
        metrics
    }
}

impl Metrics {
    /// Notes a call that has been answered with `code`.
    pub(crate) fn note_call(&self, rpc: &'static str, code: &'static str, took: Duration) {
        self.calls
            .get_or_create(&CallLabels { rpc, code })
            .observe(took.as_secs_f64());
    }

    /// Notes a layer that has been applied.
    pub(crate) fn note_applied(&self, by: &'static str) {
        self.applied.get_or_create(&AppliedLabel { by }).inc();
    }

    /// Notes a transaction and the number of its changes.
    pub(crate) fn note_batch(&self, changes: usize) {
        self.batches
            .observe(f64::from(u32::try_from(changes).unwrap_or(u32::MAX)));
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    /// I/O errors while the snapshots are counted.
    pub fn render(&self, snapshots: &Snapshots) -> Result<String> {
        let count = snapshots.count()?;
        for (kind, number) in count.by_kind {
            self.snapshots
                .get_or_create(&KindLabel { kind: kind.name() })
                .set(number);
        }
        self.layer_bytes.set(count.layer_bytes);
        self.background
            .set(u64::try_from(snapshots.backlog()).unwrap_or(u64::MAX));
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        Ok(text)
    }
}

/// Answers scrapes on `address` as long as the daemon runs.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    snapshots: Arc<Snapshots>,
) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    let (metrics, snapshots) = (Arc::clone(&metrics), Arc::clone(&snapshots));
                    // A client that stops in the middle must not stay for ever.
                    let scrape = answer(connection, metrics, snapshots);
                    tokio::spawn(tokio::time::timeout(Duration::from_secs(10), scrape));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a scrape");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    Ok(())
}

/// One request, one answer, and the end: all of HTTP/1.1 that a scrape needs.
async fn answer(
    mut connection: TcpStream,
    metrics: Arc<Metrics>,
    snapshots: Arc<Snapshots>,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < 16 << 10 {
        if connection.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        match tokio::task::spawn_blocking(move || metrics.render(&snapshots)).await? {
            Ok(text) => ("200 OK", text),
            Err(error) => ("500 Internal Server Error", one_line(&error)),
        }
    } else {
        ("404 Not Found", "there is only GET /metrics\n".to_owned())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/openmetrics-text; version=1.0.0; \
         charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(body.as_bytes()).await?;
    connection.shutdown().await
}
