//! Drives a snapshots socket with many clients and prints how fast it is.
//!
//! ```text
//! cargo run --release --example load -- --address SOCK [--clients 1,16] [--seconds 5]
//!                                       [--present 0] [--snapshotter NAME]
//! ```
//!
//! One cycle is Prepare, Mounts, Commit, Remove of an empty snapshot; every client has a connection of
//! its own. `--present N` makes N committed snapshots first and keeps them.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "the client is shared with the tests"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;

#[path = "../tests/support/client.rs"]
mod client;

use client::Client;

#[derive(Debug, Parser)]
struct Arguments {
    /// Socket of a proxy snapshotter or of containerd
    #[arg(long)]
    address: PathBuf,
    /// Name by which containerd knows the snapshotter
    #[arg(long, default_value = "transship")]
    snapshotter: String,
    /// Numbers of clients to run one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64")]
    clients: Vec<usize>,
    /// How long each number runs
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Committed snapshots to make first
    #[arg(long, default_value_t = 0)]
    present: usize,
}

const RPCS: [&str; 4] = ["prepare", "mounts", "commit", "remove"];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let client = Client::connect(&arguments.address, &arguments.snapshotter).await?;
    fill(&client, arguments.present).await?;
    let start = Instant::now();
    client.list(&[]).await?;
    println!("list {:.1} ms", start.elapsed().as_secs_f64() * 1000.0);
    for count in &arguments.clients {
        let until = Instant::now() + Duration::from_secs(arguments.seconds);
        let tasks: Vec<_> = (0..*count)
            .map(|n| {
                let (address, name) = (arguments.address.clone(), arguments.snapshotter.clone());
                tokio::spawn(async move {
                    let client = Client::connect(&address, &name).await?;
                    run_cycles(&client, n, until).await
                })
            })
            .collect();
        let mut took: [Vec<Duration>; 4] = Default::default();
        for task in tasks {
            for (all, one) in took.iter_mut().zip(task.await??) {
                all.extend(one);
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = took[0].len() as f64 / arguments.seconds as f64;
        print!("clients {count:3}  cycles/s {rate:7.0}");
        for (rpc, took) in RPCS.iter().zip(&mut took) {
            took.sort_unstable();
            let at = |percent: usize| took[took.len() * percent / 100].as_secs_f64() * 1000.0;
            print!("  {rpc} p50 {:.2} p99 {:.2} ms", at(50), at(99));
        }
        println!();
    }
    Ok(())
}

async fn fill(client: &Client, count: usize) -> anyhow::Result<()> {
    let tasks: Vec<_> = (0..32)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                for i in (n..count).step_by(32) {
                    let key = format!("present/{i}/extract-0123456789-sha256:{i:064x}");
                    client.prepare(&key, "", &[]).await?;
                    client
                        .commit(&format!("sha256:{i:064x}"), &key, LABELS)
                        .await?;
                }
                Ok::<_, anyhow::Error>(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}

/// What containerd puts on a layer.
const LABELS: client::Labels<'static> = &[(
    "containerd.io/snapshot.ref",
    "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
)];

async fn run_cycles(
    client: &Client,
    n: usize,
    until: Instant,
) -> anyhow::Result<[Vec<Duration>; 4]> {
    let mut took: [Vec<Duration>; 4] = Default::default();
    for i in 0.. {
        if Instant::now() >= until {
            break;
        }
        let (key, name) = (format!("load/{n}/{i}"), format!("load/{n}/{i}/done"));
        let mut start = Instant::now();
        let mut lap = |rpc: usize| {
            took[rpc].push(start.elapsed());
            start = Instant::now();
        };
        client.prepare(&key, "", &[]).await?;
        lap(0);
        client.mounts(&key).await?;
        lap(1);
        client.commit(&name, &key, &[]).await?;
        lap(2);
        client.remove(&name).await?;
        lap(3);
    }
    Ok(took)
}
