//! `create`: a sandbox gets the hook, a staged container is restored and held.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use transship_checkpoint::annotations::{self, OnFailure, Role};
use transship_checkpoint::criu_images::tasks;
use transship_checkpoint::namespaces;
use transship_checkpoint::spec::{HookPoint, Spec};
use transship_checkpoint::stage::{PodDir, Staged, State, LinkedImages};

use super::bundle::{Bundle, Config, Marker};
use super::{Front, FrontContext, FrontError, Outcome, held, reason};
use crate::argv::Arguments;
use crate::runtime::exit_code;

/// Where runc and crun look for CRIU options when no annotation names a file.
const DEFAULT_CRIU_CONFIG: &str = "/etc/criu/runc.conf";

impl Front<'_> {
    pub(super) fn create(&self, create: &Arguments) -> Result<Option<Outcome>, FrontError> {
        let bundle = Bundle::of(create);
        let Some(mut config) = bundle.our_config(&create.id)? else {
            return Ok(None);
        };
        bundle.remove_marker();
        if config.annotations.role == Role::Sandbox {
            self.add_hooks(
                &mut config.spec,
                &[HookPoint::CreateRuntime, HookPoint::Poststop],
            )?;
            bundle.replace_config(&config.spec)?;
            return Ok(None);
        }
        match self.find_restore(&create.id, &config, &bundle)? {
            Some((pod, staged)) => self.restore_held(create, &bundle, config, &pod, &staged),
            None => self.create_cold(create, &bundle, config),
        }
    }

    pub(super) fn add_hooks(
        &self,
        spec: &mut Spec,
        points: &[HookPoint],
    ) -> Result<(), FrontError> {
        let hook = &self.around.hook;
        let path = hook.to_str().filter(|_| hook.is_file());
        let path = path.ok_or_else(|| FrontError::NoHook { path: hook.clone() })?;
        for point in points {
            spec.add_hook(*point, path, &["transship-hook", point.key()]);
        }
        Ok(())
    }

    /// A container that starts from its image: only the namespaces of a sandbox that the user
    /// named are brought up to date.
    fn create_cold(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
    ) -> Result<Option<Outcome>, FrontError> {
        if matches!(config.annotations.role, Role::Member { .. }) && !config.cri {
            let plan = self.plan_namespaces(&create.id, &config, true)?;
            if !namespaces::apply(&mut config.spec, &plan).is_empty() {
                bundle.replace_config(&config.spec)?;
            }
        }
        Ok(None)
    }

    /// What to restore for this container, staged now unless the sandbox's hook has done it.
    fn find_restore(
        &self,
        id: &str,
        config: &Config,
        bundle: &Bundle,
    ) -> Result<Option<(PodDir, Staged)>, FrontError> {
        let wanted = config.annotations.restore.as_deref();
        let name = config.annotations.container.as_deref().unwrap_or(id);
        let pod = self.pod_of(id, config)?;
        if let Some(staged) = pod.staged(name)? {
            let request = staged.request()?;
            let same = wanted.is_none_or(|wanted| wanted == request.checkpoint);
            match staged.state()? {
                State::Staged if same => return Ok(Some((pod, staged))),
                State::Failed(_) if same => {
                    let retry = config.annotations.on_failure == OnFailure::Fail;
                    return Ok(retry.then_some((pod, staged)));
                }
                // Consumed. In a pod a later container of this name is the next attempt; elsewhere
                // it may be another container, which has another layer.
                State::Restored if same && (config.cri || request.layer == bundle.layer()) => {
                    return Ok(None);
                }
                _ => {}
            }
        }
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let checkpoint = self.around.store.open(wanted)?;
        let manifest = &checkpoint.manifest;
        let named = manifest
            .containers
            .iter()
            .find(|container| container.name == name);
        let container = match (named, &config.annotations.container) {
            (Some(container), _) => container,
            // The pod has a container that the checkpoint does not have: it starts cold.
            (None, Some(_)) if config.cri => return Ok(None),
            (None, Some(name)) => manifest.container(Some(name))?,
            (None, None) => manifest.container(None)?,
        };
        let staged = pod.stage(name, &checkpoint, container)?;
        Ok(Some((pod, staged)))
    }

    fn restore_held(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
        pod: &PodDir,
        staged: &Staged,
    ) -> Result<Option<Outcome>, FrontError> {
        let _claim = staged.claim()?;
        let request = staged.request()?;
        let plan = self.plan_namespaces(&create.id, &config, true)?;
        let own_pod = plan.has_made().then(|| create.id.clone());
        namespaces::apply(&mut config.spec, &plan);

        // From here on other restores into the sandbox wait: its System V objects are made once.
        let _lock = pod.lock()?;
        let images = LinkedImages::of(&request.images)?;
        let joining = self.fit_images(images.path(), &config, pod)?;
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
        let log = self.globals.log.as_deref();
        let log_start = log
            .and_then(|log| fs::metadata(log).ok())
            .map_or(0, |meta| meta.len());
        let args = self.with_globals("restore", restore_args(create, images.path(), &work));
        let status = self.around.runtime.run(&self.around.own, &args)?;
        if !status.success() {
            let kept = reason::kept_log(&create.id);
            let reason = reason::of_restore(&work, log, log_start, &kept);
            staged.set_state(&State::Failed(reason.clone()))?;
            let error = FrontError::Restore {
                container: request.container,
                checkpoint: request.checkpoint,
                reason,
            };
            if config.annotations.on_failure == OnFailure::Fail {
                return Err(error);
            }
            self.report(&crate::one_line(&error), false);
            let original = Spec::parse(&config.original).expect("it was parsed before");
            bundle.replace_config(&original)?;
            return self.create_cold(
                create,
                bundle,
                Config {
                    spec: original,
                    ..config
                },
            );
        }
        let finish = || {
            let pid = read_pid(create)?;
            let start_time = held::start_time(pid).during("read", format!("/proc/{pid}/stat"))?;
            bundle.write_marker(&Marker {
                stopped: tasks::stopped(images.path())?,
                staged: Some(staged.path().to_path_buf()),
                own_pod,
                ..Marker::new(true, pid, start_time)
            })?;
            joining.record(pod)?;
            Ok(staged.consume(bundle.layer())?)
        };
        finish().inspect_err(|_: &FrontError| {
            // Restored, but nobody could let it go: it has not run, so nothing is lost.
            let args = self.with_globals("delete", vec!["--force".into(), (&create.id).into()]);
            drop(self.around.runtime.run(&self.around.own, &args));
        })?;
        Ok(Some(Outcome::Exit(exit_code(status))))
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

fn read_pid(create: &Arguments) -> Result<i32, FrontError> {
    let path = Path::new(create.value("pid-file").unwrap_or_default());
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
