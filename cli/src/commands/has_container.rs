//! `transship has-container ID`: what the watch over a held restore asks.

use transship_engine::Result;

use super::{connect, print_line};
use crate::args::Global;

pub(crate) async fn run(global: &Global, id: &str) -> Result<()> {
    let answer = match connect(global).await?.container(id).await {
        Err(error) if error.is_not_found() => "no",
        found => found.map(|_| "yes")?,
    };
    print_line(answer)
}
