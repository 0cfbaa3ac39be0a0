//! The target's side of a pod's migration: its sandbox made through the CRI, or by a kubelet, its containers restored into it one
//! after the other, held, and let go together.
//!
//! ```text
//!  Offer ─ plan ─> all reasons why not            admission: what the pod asks of this node; go_json: how it is read
//!  images, emptyDirs, RunPodSandbox (dev.transship/receive), CreateContainer of each
//!  > Ready ... the files
//!  staged; StartContainer of each: restored, and held although it has answered (containers; the runtime front)
//!  > Restored ... Commit
//!  each is let go (settle: also by whoever ends what was cut off)
//! ```

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1::{ContainerConfig, ImageSpec, PodSandboxConfig, PodSandboxState};
use tokio::time::{Instant, sleep};
use transship_checkpoint::annotations::{
    RECEIVE, RESTORE, RESTORE_IMAGE, RESTORE_LATEST, of_migration,
};
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::manifest::check_name;
use transship_checkpoint::store::{Checkpoint, Store};
use transship_checkpoint::wire::{Message, Offer, OfferedContainer, OfferedPod, unexpected};
use transship_containerd::Containerd;
use transship_sandbox::admission::foreign_spec::{Allowed, Refusal};
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};
use transship_sandbox::{Arrival as InSandbox, DEFAULT_RUN_DIR, PodDir};

use super::arrival::{Arrival, Arrivals, ArrivingPod, Locked, State};
use super::commitment::wait_for_commit;
use super::held_process::HeldProcess;
use super::offered_files::{listen, receive};
use super::{Request, image};
use crate::conversation::Conversation;
use crate::cri_pods::CriPods;
use crate::error::{Context, Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::kubelet;
use crate::progress::Progress;

use containers::{
    Made, MadeContainer, check_none_failed, fill_all, held, largest_first, start_all,
};

mod admission;
mod containers;
mod contents;
mod go_json;
pub(super) mod settle;

/// How long the CRI may take to know an image that containerd has: it hears of it as an event.
const IMAGE_PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(50);
/// An image comes slowly, and the answer takes containerd some work.
const IMAGE_PAUSE: Duration = Duration::from_millis(500);
/// How often the source is asked whether it still waits.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// How long somebody else may take to make the sandbox, to pull images and to start the first container, while the source
/// runs.
const POD_PATIENCE: Duration = Duration::from_secs(300);
/// How long somebody else may take to start all containers, while the source stands still.
const STARTS_PATIENCE: Duration = Duration::from_secs(60);
/// As kubelet makes an emptyDir.
const EMPTY_DIR_MODE: u32 = 0o777;

/// Where the pod comes from; made by [`plan`], which has checked it.
#[derive(Debug)]
pub(super) enum PodPlan {
    /// It is made.
    Make(Box<NewPod>),
    /// Somebody else makes it.
    Wait,
}

impl PodPlan {
    /// The containers whose images have to be here. Whoever makes the pod has them.
    pub(super) fn images_of<'o>(&self, offer: &'o Offer) -> &'o [OfferedContainer] {
        match self {
            Self::Make(_) => &offer.containers,
            Self::Wait => &[],
        }
    }

    /// Where their layers are unpacked.
    pub(super) fn snapshotter(&self) -> &str {
        match self {
            Self::Make(new) => &new.snapshotter,
            Self::Wait => "",
        }
    }
}

/// A pod as it will be made here.
#[derive(Debug)]
pub(super) struct NewPod {
    sandbox: PodSandboxConfig,
    containers: Vec<ContainerConfig>,
    runtime_handler: String,
    snapshotter: String,
}

/// Checks all that can be checked before anything is made.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with all reasons in one line.
pub(super) async fn plan(
    node: &Containerd,
    offer: &Offer,
    offered: &OfferedPod,
    request: &Request,
) -> Result<PodPlan> {
    let pod = &offered.pod;
    for (what, name) in [
        ("the pod's name", &pod.name),
        ("the pod's namespace", &pod.namespace),
        ("the pod's uid", &pod.uid),
    ] {
        check_name(what, name)?;
    }
    let called = format!("{}/{}", pod.namespace, pod.name);
    let refused = |reasons: Vec<String>| {
        let reasons = reasons.join("; ");
        Error::refused(format!("the pod {called:?} cannot be made here: {reasons}"))
    };
    if request.wait_for_pod {
        // What it may have is decided by whoever makes it.
        let reasons = reasons_of_node(node, offer)?;
        return match reasons.is_empty() {
            true => Ok(PodPlan::Wait),
            false => Err(refused(reasons)),
        };
    }
    let mut sandbox: PodSandboxConfig = go_json::read(&offered.config)
        .with_context(|| format!("the configuration of the pod {called:?} cannot be used here"))?;
    let mut containers = Vec::new();
    for it in &offer.containers {
        let name = &it.container.name;
        let config = it.config.as_deref().unwrap_or_default();
        let config: ContainerConfig = go_json::read(config).with_context(|| {
            format!("the configuration of the pod's container {name:?} cannot be used here")
        })?;
        if config.metadata.as_ref().map(|it| &it.name) != Some(name) {
            let message = format!("the configuration of {name:?} is another container's");
            return Err(Error::refused(message));
        }
        containers.push(config);
    }
    let metadata = sandbox.metadata.clone().unwrap_or_default();
    if (&metadata.name, &metadata.namespace, &metadata.uid) != (&pod.name, &pod.namespace, &pod.uid)
    {
        let message = format!("the configuration of the pod {called:?} is another pod's");
        return Err(Error::refused(message));
    }
    admission::drop_reserved(&mut sandbox, &mut containers);
    let reasons = reasons(node, offer, (&sandbox, &containers), request).await?;
    if !reasons.is_empty() {
        let mut all = containers.iter();
        let hint = "files below /var/lib/kubelet/pods are made by a kubelet: where the other node has one, move it into a \
             pod of that one (--wait-for-pod), or as a checkpoint";
        return Err(
            match all.any(|it| admission::has_files_of_kubelet(it, &pod.uid)) {
                true => refused(reasons).hint(hint),
                false => refused(reasons),
            },
        );
    }
    let annotations = &mut sandbox.annotations;
    annotations.remove(RESTORE);
    annotations.remove(RESTORE_LATEST);
    annotations.remove(RESTORE_IMAGE);
    annotations.insert(RECEIVE.to_owned(), offer.migration.clone());
    Ok(PodPlan::Make(Box::new(NewPod {
        snapshotter: snapshotter(node, offer).await?,
        runtime_handler: offered.runtime_handler.clone(),
        sandbox,
        containers,
    })))
}

/// What concerns the node and the dumps, whoever makes the pod.
fn reasons_of_node(node: &Containerd, offer: &Offer) -> Result<Vec<String>> {
    let mut reasons = Vec::new();
    if node.namespace() != CRI_NAMESPACE {
        reasons.push(format!(
            "transship receive is told to make containers in the namespace {:?}, and pods are in {CRI_NAMESPACE:?}",
            node.namespace()
        ));
    }
    let rules = NodeConfig::read(Path::new(NODE_CONFIG));
    let rules = rules.context("the rules of this node cannot be read")?;
    for it in &offer.containers {
        if let Err(closed) = rules.check_options(&it.container.criu) {
            reasons.push(format!("{:?}: {closed}", it.container.name));
        }
    }
    let criu = std::process::Command::new("criu").arg("--version").output();
    if !criu.is_ok_and(|output| output.status.success()) {
        reasons.push("CRIU (criu --version) does not work here".to_owned());
    }
    Ok(reasons)
}

async fn reasons(
    node: &Containerd,
    offer: &Offer,
    (sandbox, containers): (&PodSandboxConfig, &[ContainerConfig]),
    request: &Request,
) -> Result<Vec<String>> {
    let mut reasons = reasons_of_node(node, offer)?;
    let metadata = sandbox.metadata.clone().unwrap_or_default();
    if let Some(seen) = kubelet::seen() {
        reasons.push(format!(
            "a kubelet runs here ({seen}), which ends pods that it has not made: \
             wait for the pod that kubelet makes (--wait-for-pod)"
        ));
    }
    for other in CriPods::of(node).sandboxes().await? {
        let its = other.metadata.clone().unwrap_or_default();
        let same_name = (&its.name, &its.namespace) == (&metadata.name, &metadata.namespace);
        if other.state() == PodSandboxState::SandboxReady && (same_name || its.uid == metadata.uid)
        {
            reasons.push(format!(
                "a pod of this name runs here, with the sandbox {}",
                other.id
            ));
        }
    }
    let allowed = |refusal: &Refusal| request.target.allowed.contains(&refusal.allow);
    let of_sandbox = admission::of_sandbox(sandbox).into_iter();
    reasons.extend(
        of_sandbox
            .filter(|it| !allowed(it))
            .map(|it| it.to_string()),
    );
    for (container, offered) in containers.iter().zip(&offer.containers) {
        let name = &offered.container.name;
        let refusals = admission::of_container(container, &metadata.uid).into_iter();
        let refused = refusals.filter(|it| !allowed(it));
        reasons.extend(refused.map(|it| format!("of its container {name:?} {it}")));
    }
    if reasons.is_empty() {
        // Only now: which paths are on this node is not for the sender of a stream to know.
        for (container, offered) in containers.iter().zip(&offer.containers) {
            let name = &offered.container.name;
            let missing = container.mounts.iter().filter(|mount| {
                admission::empty_dir(&metadata.uid, &mount.host_path).is_none()
                    && fs::metadata(&mount.host_path).is_err()
            });
            reasons.extend(missing.map(|mount| {
                format!(
                    "{:?}, which its container {name:?} has on {:?}, is not on this node",
                    mount.host_path, mount.container_path
                )
            }));
        }
    }
    Ok(reasons)
}

/// Where the layers are unpacked; a CRI with another one unpacks them once more.
async fn snapshotter(node: &Containerd, offer: &Offer) -> Result<String> {
    let loaded = node.snapshotters().await?;
    let its = offer.containers.first().map(|it| &it.container.snapshotter);
    let ours = "transship".to_owned();
    Ok(match its {
        Some(its) if loaded.contains(its) => its.clone(),
        _ if loaded.contains(&ours) => ours,
        _ => "overlayfs".to_owned(),
    })
}

/// Takes the pod, up to the moment when it may be let go: gives the process id of the first process of its first
/// container. The caller undoes what is there of a pod that has failed.
pub(super) async fn take(
    node: &Containerd,
    store: &Store,
    conversation: &mut Conversation,
    (offer, offered): (&Offer, &OfferedPod),
    plan: PodPlan,
    request: &Request,
    (interrupt, progress): (&Interrupt, &dyn Progress),
) -> Result<(Locked, Result<u32>)> {
    progress.step("image");
    let listen = || listen(offer, &request.data_addresses);
    let (images, snapshotter) = (plan.images_of(offer), plan.snapshotter().to_owned());
    let chains = image::receive(node, conversation, images, &snapshotter, listen).await?;
    let pod = &offered.pod;
    let names = offer.containers.iter().map(|it| it.container.name.clone());
    let arrival = Arrival {
        state: State::Arriving,
        boot: String::new(),
        namespace: node.namespace().to_owned(),
        container: format!("{}/{}", pod.namespace, pod.name),
        name: String::new(),
        snapshotter,
        made_by: String::new(),
        checkpoint: of_migration(&offer.migration),
        upperdir: None,
        lacks_memory: false,
        image: None,
        pod: Some(ArrivingPod {
            uid: pod.uid.clone(),
            containers: names.collect(),
            waits: matches!(plan, PodPlan::Wait),
            ..ArrivingPod::default()
        }),
    };
    // Before the first thing is made that no lease takes away.
    let mut locked = Arrivals::default().begin(&offer.migration, arrival)?;
    let taken = async {
        let made = match plan {
            PodPlan::Make(new) => {
                let images = (chains.as_slice(), &request.target.allowed);
                make(node, offer, *new, images, &mut locked).await?
            }
            PodPlan::Wait => {
                let what = (offer, offered);
                let deadline = Instant::now() + POD_PATIENCE;
                let until = (deadline, interrupt);
                let made = wait_for_sandbox(node, conversation, what, &mut locked, until).await?;
                let images = wait_for_images(node, conversation, (offer, &made), until);
                images.await?;
                wait_for_start(conversation, &made, until).await?;
                made
            }
        };
        interrupt.check()?;
        let contents = contents::make(offer, &made, &mut locked)?;
        let what = (offer, contents);
        let checkpoint = receive(store, conversation, what, request, progress).await?;
        agree(
            node,
            conversation,
            &made,
            &checkpoint,
            &mut locked,
            interrupt,
        )
        .await
    };
    let taken = taken.await;
    Ok((locked, taken))
}

/// Makes all that can be there before the source is frozen.
async fn make(
    node: &Containerd,
    offer: &Offer,
    mut plan: NewPod,
    (chains, allowed): (&[String], &Allowed),
    locked: &mut Locked,
) -> Result<Made> {
    let mut cri = CriPods::of(node);
    for ((config, offered), chain) in plan
        .containers
        .iter_mut()
        .zip(&offer.containers)
        .zip(chains)
    {
        let id = image::config_of(node, offered, chain).await?;
        if !cri.has_image(&id).await? {
            pod_of(locked).images.push(id.clone());
            locked.write()?;
            image::record(node, offered, chain, allowed).await?;
            wait_for_image(&mut cri, &id).await?;
        }
        config.image = Some(ImageSpec {
            image: id,
            ..ImageSpec::default()
        });
    }
    let uid = pod_of(locked).uid.clone();
    let mounts = plan.containers.iter().flat_map(|config| &config.mounts);
    let volumes: Vec<PathBuf> = mounts
        .filter_map(|mount| admission::empty_dir(&uid, &mount.host_path))
        .map(Path::to_path_buf)
        .collect();
    make_empty_dirs(&volumes, &plan.sandbox.log_directory, locked)?;
    rotate_logs(&plan)?;
    let sandbox = cri
        .run(plan.sandbox.clone(), plan.runtime_handler.clone())
        .await?;
    if pod_dir(&sandbox)?.pins().is_empty() {
        return Err(not_under_the_front(&plan.runtime_handler));
    }
    let mut containers = Vec::new();
    for (config, chain) in plan.containers.into_iter().zip(chains) {
        let name = config.metadata.clone().unwrap_or_default().name;
        let id = cri.create(&sandbox, config, &plan.sandbox).await?;
        let container = MadeContainer::look_at(node, &name, &id, &sandbox).await?;
        container.check_base(chain)?;
        containers.push(container);
    }
    Ok(Made {
        sandbox,
        containers,
    })
}

/// Waits for the sandbox that somebody else makes.
async fn wait_for_sandbox(
    node: &Containerd,
    conversation: &mut Conversation,
    (offer, offered): (&Offer, &OfferedPod),
    locked: &mut Locked,
    (deadline, interrupt): (Instant, &Interrupt),
) -> Result<Made> {
    let mut cri = CriPods::of(node);
    let mut asked = Instant::now();
    loop {
        for sandbox in cri.sandboxes().await? {
            let wanted = sandbox.annotations.get(RECEIVE) == Some(&offer.migration)
                && sandbox.state() == PodSandboxState::SandboxReady;
            let metadata = sandbox.metadata.clone().unwrap_or_default();
            if !wanted {
                continue;
            }
            if metadata.namespace != offered.pod.namespace {
                return Err(Error::refused(format!(
                    "the pod that waits here is of the namespace {:?}, and this one of {:?}",
                    metadata.namespace, offered.pod.namespace
                )));
            }
            // The runtime front makes it before the sandbox is ready.
            let dir = pod_dir(&sandbox.id)?;
            if dir.pins().is_empty() {
                return Err(not_under_the_front(&sandbox.runtime_handler));
            }
            dir.set_not_running(&offered.not_running)?;
            let pod = pod_of(locked);
            pod.uid = metadata.uid;
            pod.sandbox = Some(sandbox.id.clone());
            locked.write()?;
            return Ok(Made {
                sandbox: sandbox.id,
                containers: Vec::new(),
            });
        }
        interrupt.check()?;
        if Instant::now() > deadline {
            return Err(Error::failed(format!(
                "no pod with the annotation {RECEIVE}: {} has come within {} s",
                offer.migration,
                POD_PATIENCE.as_secs()
            )));
        }
        ask_whether_to_wait(conversation, &mut asked).await?;
        sleep(PAUSE).await;
    }
}

/// Waits until somebody else has pulled what the pod's containers are made of: the source runs on meanwhile, and would
/// stand still if that were done when they are started. Until then no start waits long, because a kubelet pulls one
/// image after the other, each when it has tried to start the container before.
async fn wait_for_images(
    node: &Containerd,
    conversation: &mut Conversation,
    (offer, made): (&Offer, &Made),
    (deadline, interrupt): (Instant, &Interrupt),
) -> Result<()> {
    let mut cri = CriPods::of(node);
    let mut asked = Instant::now();
    let pod = pod_dir(&made.sandbox)?;
    let mut missing: Vec<&OfferedContainer> = offer.containers.iter().collect();
    let mut has_told = false;
    loop {
        let mut still = Vec::new();
        for offered in missing {
            if !has_image_of(node, &mut cri, offered).await? {
                still.push(offered);
            }
        }
        missing = still;
        match (missing.is_empty(), has_told) {
            (true, false) => return Ok(()),
            (true, true) => return Ok(pod.set_arrival(InSandbox::Coming)?),
            (false, true) => {}
            (false, false) => pod.set_arrival(InSandbox::LacksImages)?,
        }
        has_told = true;
        interrupt.check()?;
        if Instant::now() > deadline {
            let mut all = Vec::new();
            for it in missing.iter().map(|it| &it.container) {
                let other = match cri.has_image(&it.image.name).await? {
                    true => ", which means an image of other layers here",
                    false => "",
                };
                all.push(format!(
                    "{:?} of its container {:?}{other}",
                    it.image.name, it.name
                ));
            }
            return Err(Error::failed(format!(
                "nobody has pulled images of the pod within {} s: {}",
                POD_PATIENCE.as_secs(),
                all.join("; ")
            ))
            .hint(
                "pull them there first: a kubelet that waits for a sidecar pulls none after it",
            ));
        }
        ask_whether_to_wait(conversation, &mut asked).await?;
        sleep(IMAGE_PAUSE).await;
    }
}

/// Waits until somebody has started a container of the pod, which waits for the source then: what keeps whoever makes the
/// pod from that (a Secret or a volume that is not there, init containers) is nothing to stand still for.
async fn wait_for_start(
    conversation: &mut Conversation,
    made: &Made,
    (deadline, interrupt): (Instant, &Interrupt),
) -> Result<()> {
    let pod = pod_dir(&made.sandbox)?;
    let mut asked = Instant::now();
    while !pod.is_waited_for()? {
        interrupt.check()?;
        if Instant::now() > deadline {
            return Err(Error::failed(format!(
                "no container of the pod has been started within the {} s that are waited for it",
                POD_PATIENCE.as_secs()
            ))
            .hint("`kubectl describe pod` says what keeps the kubelet from starting it"));
        }
        ask_whether_to_wait(conversation, &mut asked).await?;
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Whether the CRI has an image with its layers, by whatever name: its own may mean another one here.
async fn has_image_of(
    node: &Containerd,
    cri: &mut CriPods,
    offered: &OfferedContainer,
) -> Result<bool> {
    let image = &offered.container.image;
    let rebuilt = image.rebuilt.iter().map(|it| &it.chain_id);
    for chain in [&image.chain_id].into_iter().chain(rebuilt) {
        match image::config_of(node, offered, chain).await {
            Ok(id) if cri.has_image(&id).await? => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Refused => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Now and then: a source that has given up is not heard otherwise.
async fn ask_whether_to_wait(conversation: &mut Conversation, asked: &mut Instant) -> Result<()> {
    if asked.elapsed() < ASK_INTERVAL {
        return Ok(());
    }
    conversation.send(Message::Waiting).await?;
    let go_on = "the source to go on waiting";
    match conversation.receive(go_on).await? {
        Message::GoOn => {}
        other => return Err(unexpected(go_on, &other).into()),
    }
    *asked = Instant::now();
    Ok(())
}

fn not_under_the_front(runtime_handler: &str) -> Error {
    Error::refused(format!(
        "the CRI here does not run pods with the runtime handler {runtime_handler:?} under transship's front, or \
         does not hand it their annotations (pod_annotations = [\"dev.transship/*\"])"
    ))
}

fn pod_of(locked: &mut Locked) -> &mut ArrivingPod {
    locked.arrival.pod.get_or_insert_default()
}

fn pod_dir(sandbox: &str) -> Result<PodDir> {
    Ok(PodDir::at(Path::new(DEFAULT_RUN_DIR), sandbox)?)
}

async fn wait_for_image(cri: &mut CriPods, id: &str) -> Result<()> {
    let deadline = Instant::now() + IMAGE_PATIENCE;
    while !cri.has_image(id).await? {
        if Instant::now() > deadline {
            let message = format!("the CRI does not hear of the image {id}, which containerd has");
            return Err(Error::failed(message));
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Makes the emptyDirs, where they are not; what is made goes with a pod that does not come to run.
fn make_empty_dirs(volumes: &[PathBuf], logs: &str, locked: &mut Locked) -> Result<()> {
    // Whose first missing ancestor below the directories of pods is made by this.
    let new = |path: &Path| {
        let missing = path.ancestors().take_while(|path| !is_there(path));
        missing.last().map(Path::to_path_buf)
    };
    let pods = Path::new("/var/lib/kubelet/pods");
    DirBuilder::new()
        .recursive(true)
        .create(pods)
        .with_context(|| format!("cannot make {}", pods.display()))?;
    let logs = Path::new(logs);
    let mut made: Vec<PathBuf> = volumes.iter().filter_map(|volume| new(volume)).collect();
    // containerd makes it; that of others has more than this pod's.
    made.extend((logs.components().count() > 4 && !is_there(logs)).then(|| logs.to_path_buf()));
    made.sort();
    made.dedup();
    pod_of(locked).directories = made;
    locked.write()?;
    for volume in volumes {
        let failed = || format!("cannot make {}", volume.display());
        let parent = volume.parent().unwrap_or(volume);
        let made = DirBuilder::new().recursive(true).mode(0o750).create(parent);
        made.with_context(failed)?;
        if !is_there(volume) {
            fs::create_dir(volume).with_context(failed)?;
            let mode = fs::Permissions::from_mode(EMPTY_DIR_MODE);
            fs::set_permissions(volume, mode).with_context(failed)?;
        }
    }
    Ok(())
}

/// A log that the pod has left here before is kept beside the new one, as kubelet names one that it rotates: what
/// the pod has written since comes along with all of it.
fn rotate_logs(plan: &NewPod) -> Result<()> {
    let now = transship_containerd::rfc3339(std::time::SystemTime::now());
    let now = now.replace(['-', ':', 'Z'], "").replace('T', "-");
    let directory = Path::new(&plan.sandbox.log_directory);
    let logged = |it: &&ContainerConfig| directory.is_absolute() && !it.log_path.is_empty();
    for config in plan.containers.iter().filter(logged) {
        let log = directory.join(&config.log_path);
        let mut old = log.clone().into_os_string();
        old.push(format!(".{now}"));
        match fs::rename(&log, old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed.with_context(|| format!("cannot rename {}", log.display()))?,
        }
    }
    Ok(())
}

/// Restores all containers, and waits until the source has committed itself: then they may be let go. Gives the process
/// id of the first process of the first.
async fn agree(
    node: &Containerd,
    conversation: &mut Conversation,
    made: &Made,
    checkpoint: &Checkpoint,
    locked: &mut Locked,
    interrupt: &Interrupt,
) -> Result<u32> {
    conversation.send(Message::Received).await?;
    match conversation.receive("the word to restore").await? {
        Message::Restore => {}
        other => return Err(unexpected("the word to restore", &other).into()),
    }
    fill_all(made, checkpoint).await?;
    interrupt.check()?;
    // All of them before the first is restored: what one shares with others is made for all.
    let pod = pod_dir(&made.sandbox)?;
    for container in &checkpoint.manifest.containers {
        let staged = pod.stage(&container.name, checkpoint, container)?;
        // Whoever else has made the pod may start a container again.
        if let Some(made) = made.container(&container.name) {
            staged.set_once(&made.once())?;
        }
    }
    pod.set_arrival(InSandbox::Arrived)?;
    let cri = CriPods::of(node);
    let containers = largest_first(made, &checkpoint.manifest);
    start_all(&cri, &pod, containers, interrupt).await?;
    let deadline = Instant::now() + STARTS_PATIENCE;
    let mut asked = Instant::now();
    let mut all = Vec::new();
    for container in &checkpoint.manifest.containers {
        let name = &container.name;
        let held = loop {
            if let Some(held) = held(&pod, name)? {
                break held;
            }
            let containers = checkpoint.manifest.containers.iter();
            check_none_failed(&pod, containers.map(|it| it.name.as_str()))?;
            if Instant::now() > deadline {
                return Err(Error::failed(format!(
                    "the container {name:?} of the pod has not been started within {} s",
                    STARTS_PATIENCE.as_secs()
                )));
            }
            interrupt.check()?;
            ask_whether_to_wait(conversation, &mut asked).await?;
            sleep(PAUSE).await;
        };
        all.push((name, held));
    }
    // What the source has not named in a layer, and of emptyDirs that it has left behind.
    contents::remove(pod_of(locked))?;
    for (name, held) in &all {
        let files = match made.container(name) {
            Some(made) => made.files.clone(),
            None => {
                let found = MadeContainer::look_at(node, name, &held.id, &made.sandbox);
                found.await?.files
            }
        };
        let pod = pod_of(locked);
        pod.files.extend(files);
        pod.ids.push(held.id.clone());
        pod.held.push(HeldProcess::of(held.pid, held.start_time)?);
    }
    let first = all.first().map(|(_, held)| held.pid.cast_unsigned());
    let pid = first.ok_or_else(|| Error::failed("no container"))?;
    locked.write()?;
    conversation.send(Message::Restored).await?;
    wait_for_commit(conversation).await?;
    locked.commit()?;
    Ok(pid)
}
