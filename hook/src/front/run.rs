//! `run`: create and start in one call, as people at a terminal and builders of images do it. Nothing is held between
//! the two, so nothing can be restored; and a cold start is not what an annotation of ours asks for.

use transship_checkpoint::annotations::Role;

use super::bundle::Bundle;
use super::{FitError, Front, FrontError, Outcome};
use crate::argv::Arguments;

impl Front<'_> {
    pub(super) fn run(&self, run: &Arguments) -> Result<Option<Outcome>, FrontError> {
        let bundle = Bundle::of(run);
        self.refuse_moved(&bundle)?;
        let config = bundle.our_config(&run.id)?;
        let needs_create = config.is_some_and(|config| {
            let annotations = config.annotations;
            annotations.role != Role::Alone
                || annotations.restore.is_some()
                || annotations.restore_latest
                || annotations.restore_image.is_some()
        });
        match needs_create {
            true => Err(FrontError::from(FitError::RunAtOnce { id: run.id.clone() })),
            false => Ok(None),
        }
    }
}
