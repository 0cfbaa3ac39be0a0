//! `transship rm NAME...`

use transship_engine::Result;
use transship_engine::retention::remove;

use super::store;
use crate::args::RmArgs;

pub(crate) fn run(args: &RmArgs) -> Result<()> {
    args.names
        .iter()
        .try_for_each(|name| remove(&store(), name))
}
