//! A server on tokio's threads: it counts the connections, has a child process say the count, and
//! answers with it.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::process::Command;

const FILE: &str = "/srv/n";

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    match runtime.block_on(serve()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

async fn serve() -> std::io::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:7000").await?;
    let count = Arc::new(AtomicU64::new(0));
    loop {
        let (mut connection, _) = listener.accept().await?;
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            let now = count.fetch_add(1, Ordering::Relaxed) + 1;
            let said = Command::new("echo").arg(now.to_string()).output().await?;
            tokio::fs::write(FILE, &said.stdout).await?;
            connection.write_all(&said.stdout).await
        });
    }
}

fn failed(error: &std::io::Error) -> ExitCode {
    eprintln!("tokio: {error}");
    ExitCode::FAILURE
}
