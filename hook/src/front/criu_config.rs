//! CRIU's options of one restore, in a file of the bundle.
//!
//! The annotation `org.criu.config` of the bundle's spec names the file: to `restore`, which reads
//! the spec, and later to every `checkpoint`, which reads the annotations that the runtime kept
//! from it. What holds a restore would hold a dumped container, too. So the file is for the restore alone; afterwards a link to what the container had takes its place.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use transship_checkpoint::annotations;
use transship_checkpoint::criu_options::{ConfigLine, CriuOptions};
use transship_checkpoint::spec::Spec;

use transship_path_error::During as _;

use super::bundle::{Bundle, CRIU_CONFIG_FILE};
use super::{FitError, FrontError};
use crate::runtime::CRIU_CONFIG_DIR;

/// Where runc and crun look for CRIU options when no annotation names a file.
const DEFAULT_CONFIG: &str = "/etc/criu/runc.conf";

/// The file of one restore.
#[derive(Debug)]
pub(super) struct CriuConfig {
    path: PathBuf,
    own: Option<PathBuf>,
}

impl CriuConfig {
    /// Writes the file, with `more` lines at its end, and names it in the spec.
    pub(super) fn write(
        bundle: &Bundle,
        spec: &mut Spec,
        options: &CriuOptions,
        more: &[ConfigLine],
    ) -> Result<Self, FrontError> {
        let path = bundle.path(CRIU_CONFIG_FILE);
        let path = std::path::absolute(&path).during("find", &path)?;
        let own = match spec.annotations().remove(annotations::CRIU_CONFIG) {
            // A failed attempt has named it already.
            Some(named) if Path::new(&named) == path => fs::read_link(&path).ok(),
            // The way to say: none.
            Some(named) if named.is_empty() => None,
            Some(named) => {
                check_named(&named)?;
                Some(named.into())
            }
            None => Some(DEFAULT_CONFIG.into()),
        };
        let text = options.restore_config(&read(own.as_deref())?) + &ConfigLine::to_text(more);
        let config = Self { path, own };
        config.replace(|new| fs::write(new, text))?;
        spec.set_annotation(annotations::CRIU_CONFIG, &config.path.to_string_lossy());
        Ok(config)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts in its place what the container had.
    pub(super) fn give_back(&self) -> Result<(), FrontError> {
        match &self.own {
            Some(own) => self.replace(|new| symlink(own, new)),
            // The runtimes take a file that does not exist for none.
            None => Ok(fs::remove_file(&self.path).during("remove", &self.path)?),
        }
    }

    fn replace(&self, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), FrontError> {
        let new = self.path.with_extension("new");
        drop(fs::remove_file(&new));
        Ok(make(&new)
            .and_then(|()| fs::rename(&new, &self.path))
            .during("write", &self.path)?)
    }
}

/// Checks that a file that an annotation names is the operator's.
pub(super) fn check_named(named: &str) -> Result<(), FrontError> {
    let path = Path::new(named);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if named.is_empty() || path.starts_with(CRIU_CONFIG_DIR) && plain {
        return Ok(());
    }
    Err(FrontError::from(FitError::ForeignCriuConfig {
        path: named.to_owned(),
    }))
}

fn read(own: Option<&Path>) -> Result<String, FrontError> {
    let Some(own) = own else {
        return Ok(String::new());
    };
    match fs::read_to_string(own) {
        // As the runtimes have it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => Ok(text.during("read", own)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_for_the_restore_alone() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        let options = CriuOptions::default();
        for value in ["", "/etc/criu/no-such-file.conf"] {
            let mut spec = Spec::parse(b"{}").unwrap();
            spec.set_annotation(annotations::CRIU_CONFIG, value);
            let held = [ConfigLine::switch("leave-stopped")];
            let config = CriuConfig::write(&bundle, &mut spec, &options, &held).unwrap();
            let named = spec.annotations().remove(annotations::CRIU_CONFIG).unwrap();
            assert_eq!(
                fs::read_to_string(&named).unwrap(),
                "leave-stopped\n",
                "{value}"
            );
            config.give_back().unwrap();
            let own = fs::read_link(&named).ok();
            assert_eq!(own, (!value.is_empty()).then(|| value.into()));
            assert_eq!(read(Some(Path::new(&named))).unwrap(), "");
        }
    }

    #[test]
    fn only_files_of_the_operator_are_taken() {
        for named in ["/etc/criu/web.conf", "/etc/criu/d/web.conf", ""] {
            assert!(check_named(named).is_ok(), "{named}");
        }
        for named in [
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/x/c.conf",
            "/etc/criu/../../tmp/x",
            "etc/criu/x",
            "/etc/criu-other/x",
        ] {
            let error = check_named(named).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
