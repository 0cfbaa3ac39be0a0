//! `create` of a staged container: restores it, and holds it until `start`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use transship_checkpoint::annotations::{self, OnFailure};
use transship_checkpoint::criu_images::tasks;
use transship_checkpoint::namespaces::{self, Plan};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::stage::{LinkedImages, PodDir, Staged, State};

use super::bundle::{Bundle, Config, Marker};
use super::{Front, FrontContext, FrontError, Outcome, held};
use crate::argv::Arguments;
use crate::one_line;

/// Where runc and crun look for CRIU options when no annotation names a file.
const DEFAULT_CRIU_CONFIG: &str = "/etc/criu/runc.conf";

impl Front<'_> {
    pub(super) fn restore_held(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
        pod: &PodDir,
        staged: &Staged,
    ) -> Result<Option<Outcome>, FrontError> {
        // Until the checkpoint is consumed nobody else restores it.
        let _claim = staged.claim()?;
        let plan = self.plan_namespaces(&create.id, &config, true)?;
        let on_failure = config.annotations.on_failure;
        let original = config.original.clone();
        let result = self.restore_staged(create, bundle, &mut config, &plan, pod, staged);
        let Err(error) = result else {
            return Ok(Some(Outcome::Exit(0)));
        };
        if plan.has_made() {
            // The error is what failed first; what cannot be removed is in /run.
            drop(pod.unpin());
        }
        staged.set_state(&State::Failed(one_line(&error)))?;
        if on_failure == OnFailure::Fail {
            return Err(error);
        }
        self.report(&one_line(&error), false);
        config.spec = Spec::parse(&original).expect("it was parsed before");
        bundle.replace_config(&config.spec)?;
        self.create_cold(create, bundle, config)
    }

    fn restore_staged(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        config: &mut Config,
        plan: &Plan,
        pod: &PodDir,
        staged: &Staged,
    ) -> Result<(), FrontError> {
        let request = staged.request()?;
        namespaces::apply(&mut config.spec, plan);
        // Other restores into the sandbox wait: its System V objects are made once.
        let _lock = pod.lock()?;
        let images = LinkedImages::of(&request.images)?;
        let joining = self.fit_images(images.path(), config, pod)?;
        staged.write_criu_config(&own_criu_config(&config.spec)?, &request.criu)?;
        config
            .spec
            .set_annotation(annotations::CRIU_CONFIG, path_text(&staged.criu_config()));
        bundle.replace_config(&config.spec)?;

        let work = bundle.path("work");
        match fs::create_dir(&work) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).during("create", &work);
            }
            _ => {}
        }
        let args = restore_args(create, images.path(), &work);
        self.run_restore(args, &work, &create.id)?
            .map_err(|reason| FrontError::Restore {
                container: request.container,
                checkpoint: request.checkpoint,
                reason,
            })?;
        let finish = || {
            let pid = read_pid(create)?;
            let start_time = held::start_time(pid).during("read", format!("/proc/{pid}/stat"))?;
            bundle.write_marker(&Marker {
                stopped: tasks::stopped(images.path())?,
                staged: Some(staged.path().to_path_buf()),
                own_pod: plan.has_made().then(|| create.id.clone()),
                ..Marker::new(true, pid, start_time)
            })?;
            joining.record(pod)?;
            Ok(staged.consume(bundle.layer())?)
        };
        finish().inspect_err(|_| {
            // It has not run, so nothing is lost.
            self.delete_restored(&create.id);
            bundle.remove_marker();
        })
    }
}

/// The CRIU options that the runtime would have read.
fn own_criu_config(spec: &Spec) -> Result<String, FrontError> {
    let annotations = spec.annotations();
    let path = match annotations
        .get(annotations::CRIU_CONFIG)
        .map(String::as_str)
    {
        None => DEFAULT_CRIU_CONFIG,
        // The way to say: none.
        Some("") => return Ok(String::new()),
        Some(path) => path,
    };
    match fs::read_to_string(path) {
        // As the runtime has it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text.during("read", path),
    }
}

/// The arguments of `restore` that do what those of `create` say. `--no-new-keyring` and
/// `--preserve-fds` have no meaning for a restored process: its keyring and files come from the
/// images.
fn restore_args(create: &Arguments, images: &Path, work: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![
        "--detach".into(),
        "--no-subreaper".into(),
        "--image-path".into(),
        images.into(),
        "--work-path".into(),
        work.into(),
    ];
    for flag in ["pid-file", "console-socket"] {
        if let Some(value) = create.value(flag) {
            args.push(format!("--{flag}").into());
            args.push(value.to_owned());
        }
    }
    if create.switch("no-pivot") {
        args.push("--no-pivot".into());
    }
    if let Some(bundle) = create.bundle() {
        args.push("--bundle".into());
        args.push(bundle.into());
    }
    args.push((&create.id).into());
    args
}

/// The first process of a container that the runtime has just made.
pub(super) fn read_pid(arguments: &Arguments) -> Result<i32, FrontError> {
    let path = Path::new(arguments.value("pid-file").unwrap_or_default());
    let text = fs::read_to_string(path).during("read", path)?;
    text.trim()
        .parse()
        .map_err(io::Error::other)
        .during("read", path)
}

fn path_text(path: &Path) -> &str {
    path.to_str()
        .expect("it is made of /run/transship and names that are text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::argv::{Command, Invocation};

    #[test]
    fn create_becomes_restore() {
        let line = "create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot \
                    --no-new-keyring --preserve-fds 2 web";
        let call = Invocation::read(line.split_whitespace().map(OsString::from).collect());
        let Command::Create(create) = call.command else {
            panic!()
        };
        let args = restore_args(&create, Path::new("/i"), Path::new("/b/work"));
        let args: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(
            args.join(" "),
            "--detach --no-subreaper --image-path /i --work-path /b/work --pid-file /b/init.pid \
             --console-socket /s --no-pivot --bundle /b web"
        );
    }

    #[test]
    fn the_containers_own_criu_options_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("criu.conf");
        fs::write(&file, "tcp-established\n").unwrap();
        let mut spec = Spec::parse(b"{}").unwrap();
        for (value, text) in [
            ("", ""),
            (file.to_str().unwrap(), "tcp-established\n"),
            ("/no/such/file", ""),
        ] {
            spec.set_annotation(annotations::CRIU_CONFIG, value);
            assert_eq!(own_criu_config(&spec).unwrap(), text);
        }
    }
}
