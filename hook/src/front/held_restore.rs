//! `create` of a staged container: restores it, and holds it until `start`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use transship_checkpoint::annotations::{OnFailure, Rootfs};
use transship_checkpoint::container_log::put_in_front;
use transship_checkpoint::criu_images::memory_apart::MemoryApart;
use transship_checkpoint::criu_images::{inventory, tasks};
use transship_checkpoint::criu_options::{ConfigLine, Tcp};
use transship_checkpoint::manifest::ROOTFS_DIFF_FILE;
use transship_checkpoint::namespaces::{self, Namespace, Plan};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::wire::missing_pages;
use transship_sandbox::consumed::{Consumed, Owner};
use transship_sandbox::given_back::{is_given_back, set_given_back};
use transship_sandbox::opened::has_arrived;
use transship_sandbox::origins::forget_gone;
use transship_sandbox::{
    LinkedImages, PodDir, Staged, State, criu_lock, raise_loopback_of, sysctls_of_network,
};

use transship_path_error::During as _;

use super::admission::{admit, read_spec, take_oom_score};
use super::bundle::{Bundle, Config, HeldRestore, Marker, Phase};
use super::criu_config::CriuConfig;
use super::fit::not_admitted;
use super::held::Hold;
use super::shared_pids::check_pids;
use super::shm_attach::attach;
use super::{
    Front, FrontError, Outcome, RestoreError, apart_memory, held, lost_addresses, memory_fill,
    open_files, task_attributes,
};
use crate::argv::Arguments;
use crate::start_time::start_time;
use crate::{hold_script, one_line, own_networks};

impl Front<'_> {
    pub(super) fn restore_held(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
        (pod, staged): (&PodDir, &Staged),
        log: Option<&Path>,
    ) -> Result<Option<Outcome>, FrontError> {
        // Until the checkpoint is consumed nobody else restores it.
        let _claim = staged.claim()?;
        let plan = self.plan_namespaces(&create.id, &config, true)?;
        let original = Spec::parse(&config.original).expect("it was parsed before");
        let work = bundle.make_work_dir()?;
        let watch = self.watch_hold(create, bundle)?;
        let result = self.restore_staged(create, bundle, &mut config, &plan, pod, staged);
        let Err(error) = result else {
            if config.cri {
                let request = staged.request()?;
                if let (Some(log), Some(files)) = (log, request.images.parent())
                    && let Err(error) = put_in_front(files, log)
                {
                    let lost = format!("the log that it had: {error}");
                    Self::tell_incomplete(&create.id, true, &lost);
                }
                Self::tell_restored(&request.checkpoint);
            }
            watch.held();
            return Ok(Some(Outcome::Exit(0)));
        };
        own_networks::remove(&work);
        if plan.has_made() {
            // The error is what failed first; what cannot be removed is in /run.
            drop(pod.unpin());
        }
        bundle.remove_marker();
        bundle.replace_config(&original)?;
        config.spec = original;
        match config.annotations.on_failure {
            OnFailure::Fail => {
                if config.annotations.restore.is_some() && pod.pins().is_empty() {
                    // Another attempt stages it again; only the sandbox's hook cannot.
                    drop(staged.remove());
                    drop(pod.remove_if_empty());
                } else {
                    staged.set_state(&State::Failed(one_line(&error)))?;
                }
                Err(error)
            }
            OnFailure::ColdStart => {
                if config.annotations.rootfs == Rootfs::FromImage && error.may_have_filled() {
                    bundle.empty_upperdir()?;
                }
                // The layer goes on without the memory: no later attempt may bring it back.
                self.consume(&self.held_restore(&create.id, bundle, &config, staged)?)?;
                let (checkpoint, reason) = (staged.request()?.checkpoint, one_line(&error));
                // Nobody waits for its memory any more, nor for its end of a connection.
                drop(staged.remove());
                drop(pod.remove_if_empty());
                self.tell_cold_start(&create.id, Some(&checkpoint), &reason);
                self.create_cold(create, bundle, config)
            }
        }
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
        if is_given_back(&request.images) {
            let (container, checkpoint) = (request.container, request.checkpoint);
            let error = RestoreError::GivenBack {
                container,
                checkpoint,
            };
            return Err(error.into());
        }
        namespaces::apply(&mut config.spec, plan);
        // Other restores into the sandbox wait: what its containers share is made once.
        let lock = pod.lock()?;
        check_pids(config, &request)?;
        if config.cri {
            self.fill_shared_dirs(config, pod, &request)?;
        }
        // Until the end of this restore, or longer.
        let connections = self.hold_pod_connections(config, pod, &request)?;
        let has_its_files = { staged.once() }.is_some_and(|it| it.id == create.id && it.is_filled);
        if config.annotations.rootfs == Rootfs::FromImage && !has_its_files {
            let diff = request.images.with_file_name(ROOTFS_DIFF_FILE);
            bundle.fill_rootfs(&diff, &request.checkpoint)?;
        }
        let images = LinkedImages::of(&request.images)?;
        let edits = self.fit_images(images.path(), config, pod, &request.checkpoint)?;
        // Where CRIU changes nothing that they share, others may begin.
        let shares = edits.concern_others()
            || connections.is_some()
            || request.criu.link_remap
            || has_deleted_files(images.path())
            || namespaces::joined(&config.spec).contains_key(&Namespace::Pid);
        let _lock = shares.then_some(lock);
        let of_container = request.images.parent().unwrap_or(&request.images);
        let old = read_spec(of_container)?;
        if config.cri {
            Self::fit_volumes(images.path(), config, bundle, &old, &request)?;
        }
        let asked = config.annotations.criu.over(request.criu.clone());
        let admission = admit(images.path(), Some(&old), &config.spec, bundle, &asked)
            .map_err(|source| not_admitted(&request, source))?;
        admission.apply(images.path())?;
        let attributes = task_attributes::read(of_container).during("read", of_container)?;
        task_attributes::correct_timers(images.path(), &attributes)?;
        inventory::set_network_lock(images.path(), criu_lock())?;
        let networks = config.annotations.networks.as_deref();
        let keeps_addresses = { networks.map(own_networks::are_kept).transpose() }
            .during("parse the networks for", bundle.dir())?
            .unwrap_or_default();
        if !keeps_addresses {
            lost_addresses::leave(images.path(), config)?;
        }
        let mut criu = config.annotations.criu.over(request.criu);
        // A migration may bring memory when the copy runs already.
        criu.lazy_pages |= { request.images.with_file_name(missing_pages::SOCKET) }
            .symlink_metadata()
            .is_ok();
        let failed = |reason: String| {
            FrontError::from(RestoreError::Restore {
                container: request.container.clone(),
                checkpoint: request.checkpoint.clone(),
                reason,
            })
        };
        // What comes when it is touched is somebody else's.
        let mut apart = match criu.lazy_pages {
            true => None,
            false => MemoryApart::take(images.path(), rustix::param::page_size() as u64)
                .map_err(|error| failed(one_line(&error)))?,
        };
        // Kubelet may try once more; whoever has started it himself goes back to the source.
        let is_once = has_arrived(&request.images) && (!config.cri || staged.once().is_some());
        if let Some(memory) = apart.as_mut().filter(|_| is_once) {
            let images = &request.images;
            set_given_back(images)?;
            memory.give_back().during("open for writing", images)?;
        }
        if admission.lsm_profile.is_some() {
            criu.lsm_profile = admission.lsm_profile;
        }
        let mut lines = self.cgroup_lines(&create.id, &config.spec)?;
        let work = bundle.path("work");
        let joined = namespaces::joined(&config.spec);
        let joins_pids = joined.contains_key(&Namespace::Pid);
        // A frozen task cannot be traced; but in the pid namespace of others those could let it go on.
        let traced = !edits.attachments.is_empty();
        if joins_pids || !traced {
            lines.push(hold_script::prepare(&work).during("prepare", &work)??);
        }
        if traced {
            lines.push(ConfigLine::switch("leave-stopped"));
        }
        let criu_config = CriuConfig::write(bundle, &mut config.spec, &criu, &lines)?;
        bundle.replace_config(&config.spec)?;

        if let Some(networks) = &config.annotations.networks {
            if traced || joins_pids {
                let id = create.id.clone();
                return Err(RestoreError::NoNetworks { id }.into());
            }
            let locks = criu.tcp == Tcp::Established && keeps_addresses;
            own_networks::write(&work, networks, locks).during("write into", &work)?;
        }
        let sysctls = match joined.contains_key(&Namespace::Network) {
            true => BTreeMap::new(),
            false => sysctls_of_network(config.spec.sysctls()),
        };
        own_networks::write_sysctls(&work, &sysctls).during("write into", &work)?;
        self.remove_aborted_restore(&create.id, bundle);
        let own_pod = plan.has_made().then(|| create.id.clone());
        let held_restore = self.held_restore(&create.id, bundle, config, staged)?;
        let restoring = Marker::restoring(own_pod, Some(held_restore));
        staged.set_state(&State::Held(
            std::path::absolute(bundle.dir()).during("find", bundle.dir())?,
        ))?;
        bundle.write_marker(&restoring)?;
        let restore = create
            .to_restore(images.path(), &work)
            .with_flags(criu.restore_flags());
        take_oom_score(&config.spec)?;
        self.run_restore(restore, bundle, config, &work, Some(criu_config.path()))
            .and_then(|done| done.map_err(failed))
            .inspect_err(|_| edits.undo())?;
        let finish = || {
            let pid = read_pid(create)?;
            let not_held = |source| {
                let id = create.id.clone();
                FrontError::from(RestoreError::NotHeld { id, source })
            };
            let hold = held::wait_until_held(pid).map_err(not_held)?;
            open_files::check(&create.id, pid, &config.spec)?;
            let hold = match hold {
                Hold::Frozen(dir) if traced => held::thaw_stopped(pid, &dir).map_err(not_held)?,
                hold => hold,
            };
            let proc = format!("/proc/{pid}");
            self.take_into_cgroup(&create.id, &config.spec, pid)
                .during("move into the container's cgroup", &proc)?;
            // Others of a pod are restored while memory is put in.
            let is_late = is_once && config.cri && config.annotations.receives;
            if let Some(memory) = apart.as_ref().filter(|_| !is_late) {
                apart_memory::put_in(pid, memory, || {}).map_err(|source| {
                    let id = create.id.clone();
                    FrontError::from(RestoreError::NoMemory { id, source })
                })?;
            }
            if !joined.contains_key(&Namespace::Network) {
                raise_loopback_of(pid)?;
                if traced {
                    own_networks::set_sysctls(&work, pid).during("set the sysctls of", &proc)?;
                }
            }
            attach(pid, &edits.attachments).map_err(|source| {
                FrontError::from(RestoreError::NotAttached {
                    id: create.id.clone(),
                    source,
                })
            })?;
            let lost = task_attributes::give_back(pid, &attributes).during("look at", &proc)?;
            if !lost.is_empty() {
                Self::tell_incomplete(&create.id, config.cri, &lost.join("; "));
            }
            let start_time = start_time(pid).during("read", format!("/proc/{pid}/stat"))?;
            if let Some(memory) = apart.as_ref().filter(|_| is_late) {
                memory_fill::begin(&self.env.own, &work, (pid, start_time), memory)?;
            }
            staged.set_holder(pid, start_time)?;
            bundle.write_marker(&Marker {
                phase: Phase::Held,
                pid,
                start_time,
                stopped: tasks::stopped(images.path())?,
                frozen: match hold {
                    Hold::Frozen(dir) => Some(dir),
                    Hold::Stopped => None,
                },
                comes_with_migration: config.annotations.receives,
                ..restoring
            })?;
            edits.record(pod, (pid, start_time))?;
            criu_config.give_back()
        };
        finish().inspect_err(|_| {
            // It has not run, so nothing is lost.
            self.delete_restored(&create.id);
            edits.undo();
        })
    }

    fn held_restore(
        &self,
        id: &str,
        bundle: &Bundle,
        config: &Config,
        staged: &Staged,
    ) -> Result<HeldRestore, FrontError> {
        let request = staged.request()?;
        let asker = config.annotations.pod_container.as_deref().unwrap_or(id);
        // One that is gone cannot be taken away.
        let checkpoint = self.env.store.find(&request.checkpoint);
        let checkpoint = checkpoint.ok().filter(|_| config.annotations.once);
        let once = checkpoint.map(|it| it.manifest.created);
        // The name that the next attempt asks by, which is not always that in the checkpoint.
        let name = config.annotations.container.as_deref().unwrap_or(id);
        Ok(HeldRestore {
            owner: self.owner(id, config, bundle),
            checkpoint: request.checkpoint,
            container: name.to_owned(),
            asker: asker.to_owned(),
            staged: staged.path().to_path_buf(),
            once,
        })
    }

    /// Remembers that a container runs, or has ended again, and that what it was made from is consumed.
    pub(super) fn consume(&self, restore: &HeldRestore) -> Result<(), FrontError> {
        let mut consumed = Consumed::by(&self.env.consumed, &restore.owner)?;
        let (name, asker) = (&restore.container, &restore.asker);
        if restore.had_ended() {
            return Ok(consumed.add_ended(&restore.checkpoint, name, asker)?);
        }
        if let Some(created) = restore.once {
            consumed.add_once(&restore.checkpoint, created)?;
        }
        let created = self
            .env
            .store
            .find(&restore.checkpoint)
            .map(|it| it.manifest.created);
        Ok(consumed.add_container((&restore.checkpoint, created.ok()), name, asker)?)
    }

    /// Takes the checkpoint away when it is to be restored once, and nothing in the sandbox waits for it. What
    /// cannot be removed now, because its memory is still read, `transship serve` removes.
    pub(super) fn take_away(&self, restore: &HeldRestore) {
        let pod = PodDir::of_staged(&Staged::at(restore.staged.clone()));
        if restore.once.is_none() || pod.is_some_and(|pod| pod.has_restores()) {
            return;
        }
        let (store, name) = (&self.env.store, &restore.checkpoint);
        if let Ok(checkpoint) = store.find(name)
            && Some(checkpoint.manifest.created) == restore.once
            && !store.is_being_restored(name).unwrap_or(true)
        {
            drop(store.remove(name));
            drop(forget_gone(&self.env.origins));
        }
    }

    /// Takes back a restore whose container, in this bundle, has not run: the next attempt restores it
    /// again. One that has begun to do so already has it.
    pub(super) fn give_back(
        &self,
        restore: &HeldRestore,
        bundle: &Bundle,
    ) -> Result<(), FrontError> {
        let consumed = Consumed::by(&self.env.consumed, &restore.owner)?;
        let give_back =
            |mut consumed: Consumed| consumed.give_back(&restore.checkpoint, &restore.container);
        if restore.had_ended() {
            return Ok(give_back(consumed)?);
        }
        let staged = Staged::at(restore.staged.clone());
        let Some(pod) = PodDir::of_staged(&staged).filter(|_| staged.path().is_dir()) else {
            return Ok(());
        };
        let own = std::path::absolute(bundle.dir()).during("find", bundle.dir())?;
        if matches!(staged.state()?, State::Held(other) if other != own) {
            return Ok(());
        }
        give_back(consumed)?;
        // Without the sandbox's hook the next attempt stages it again.
        if matches!(restore.owner, Owner::Layer(_)) || pod.pins().is_empty() {
            staged.remove()?;
            return Ok(pod.remove_if_empty()?);
        }
        Ok(staged.set_state(&State::Staged)?)
    }
}

/// Whether CRIU makes files anew that have no name any more: it gives them one for a moment, which in a volume may be that of
/// another container's.
fn has_deleted_files(images: &Path) -> bool {
    let names = fs::read_dir(images).into_iter().flatten().flatten();
    let mut names = names.map(|entry| entry.file_name());
    names.any(|name| name.as_encoded_bytes().starts_with(b"ghost-file-"))
}

/// The first process of a container that the runtime has just made.
pub(super) fn read_pid(arguments: &Arguments) -> Result<i32, FrontError> {
    let path = Path::new(arguments.value("pid-file").unwrap_or_default());
    let text = fs::read_to_string(path).during("read", path)?;
    Ok(text
        .trim()
        .parse()
        .map_err(io::Error::other)
        .during("read", path)?)
}
