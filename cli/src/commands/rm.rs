//! `transship rm NAME...`

use anyhow::Result;
use transship_checkpoint::store::StoreError;

use super::store;
use crate::args::RmArgs;
use transship_engine::problem::{Kind, Problem};

pub(crate) fn run(args: &RmArgs) -> Result<()> {
    for name in &args.names {
        match store().remove(name) {
            Err(error @ StoreError::NotFound { .. }) => {
                return Err(Problem::new(Kind::NotFound, error.to_string()).into());
            }
            other => other?,
        }
    }
    Ok(())
}
