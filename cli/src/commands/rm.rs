//! `transship rm NAME...`

use transship_checkpoint::store::StoreError;

use super::store;
use crate::args::RmArgs;
use transship_engine::{Error, Result};

pub(crate) fn run(args: &RmArgs) -> Result<()> {
    for name in &args.names {
        match store().remove(name) {
            Err(error @ StoreError::NotFound { .. }) => {
                return Err(Error::not_found(error.to_string()));
            }
            other => other?,
        }
    }
    Ok(())
}
