//! The OCI runtime of a container, called past containerd.
//!
//! containerd's `Tasks.Checkpoint` carries five of CRIU's options. For the others the runtime is
//! called as the shim calls it, with `--leave-running`, so that nothing changes for containerd:
//!
//! ```text
//!  RUNTIME --root ROOT/NAMESPACE checkpoint FLAGS --leave-running ID
//!     CRIU_CONFIG_FILE = <work>/criu.conf     what is no flag of this runtime
//!         action-script <work>/dump.sh        exports the upperdir while CRIU's links are in it, and writes
//!                                             down those in /dev/shm; holds the dump (dump_hold), whose end
//!                                             somebody waits for (begun_dump)
//! ```
//!
//! Action scripts work beside the RPC that the runtimes use since CRIU 3.19.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use containerd_client::services::v1::Container as Record;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::timeout;
use transship_checkpoint::criu_options::{ConfigLine, CriuOptions};
use transship_checkpoint::store;
use transship_proto::runc_options::Options;
use transship_sandbox::{RELEASE_COMMAND, criu_lock};

use crate::begun_dump::BegunDump;
use crate::dump_hold::DumpHold;
use crate::error::{Context, Error, Result};

/// Where containerd's runc shim lets the runtimes keep their states (`process.RuncRoot`).
const SHIM_ROOT: &str = "/run/containerd/runc";
/// How long a runtime may take for a state, a pause or a resume.
const PATIENCE: Duration = Duration::from_secs(10);

/// An OCI runtime and where it knows a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OciRuntime {
    binary: PathBuf,
    root: PathBuf,
    systemd_cgroup: bool,
}

/// What a runtime says of a container.
#[derive(Debug, Deserialize)]
pub(crate) struct RuntimeState {
    /// `running`, `paused`, `stopped`, ...
    pub(crate) status: String,
    /// Its first process; 0 where that has ended.
    #[serde(default)]
    pub(crate) pid: u32,
}

/// An export of the upperdir in the middle of a dump.
#[derive(Debug)]
pub struct ExportInside<'a> {
    /// containerd's socket.
    pub address: &'a Path,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The layer to be written.
    pub to: &'a Path,
    /// Where its figures go: JSON of `transship snapshot export`.
    pub figures: &'a Path,
    /// `/dev/shm` of the pod, and where the links in it are written down.
    pub links: Option<(&'a Path, &'a Path)>,
}

impl OciRuntime {
    /// The runtime of a container record; the default one where its options cannot be read.
    pub(crate) fn of_record(record: &Record, namespace: &str) -> Self {
        let options = record.runtime.as_ref().and_then(|it| it.options.as_ref());
        let options = options.and_then(|any| Options::decode(&*any.value).ok());
        Self::of(&options.unwrap_or_default(), namespace)
    }

    /// The runtime of a container record with these options.
    pub fn of(options: &Options, namespace: &str) -> Self {
        let or =
            |text: &str, default: &str| PathBuf::from(if text.is_empty() { default } else { text });
        Self {
            binary: or(&options.binary_name, "runc"),
            root: or(&options.root, SHIM_ROOT).join(namespace),
            systemd_cgroup: options.systemd_cgroup,
        }
    }

    /// Its program, without directories.
    pub(crate) fn name(&self) -> String {
        let name = self.binary.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Whether it knows the flags of a dump that is held.
    pub(crate) fn can_hold_dumps(&self) -> bool {
        ["runc", "transship-runc"].contains(&self.name().as_str())
    }

    /// Whether it is transship's front, which looks after the container's later lives.
    pub(crate) fn is_front(&self) -> bool {
        self.name().starts_with("transship-")
    }

    /// Begins to dump a container into `images`, and leaves it as it is; `watched` tells CRIU where the watched files are.
    /// What is held waits for [`DumpHold::begin`]. The runtime keeps the draft, so that it finds its configuration and its
    /// script also when its caller is killed: without them CRIU would dump what nobody lets go on.
    ///
    /// # Errors
    /// The runtime cannot be started.
    pub async fn begin_dump(
        &self,
        id: &str,
        criu: &CriuOptions,
        (draft, images, work): (&Path, &Path, &Path),
        watched: &[ConfigLine],
        export: Option<ExportInside<'_>>,
        hold: Option<&DumpHold>,
    ) -> Result<BegunDump> {
        // The container may stand still: the runtime is asked only where its version matters.
        let help = match criu.depend_on_runtime() {
            true => self.checkpoint_help().await?,
            false => String::new(),
        };
        let (options, mut lines) = criu.dump_arguments(&help);
        let mut flags: Vec<OsString> = Vec::new();
        for (name, value) in options {
            flags.push(format!("--{name}").into());
            flags.extend(value.map(OsString::from));
        }
        lines.extend_from_slice(watched);
        lines.push(ConfigLine::with("network-lock", criu_lock().name())?);
        let script = work.join("dump.sh");
        let scripted = export.is_some() || hold.is_some();
        if scripted {
            write_script(&script, id, export.as_ref(), hold)?;
            let script = script.to_string_lossy();
            lines.push(ConfigLine::with("action-script", &script)?);
        }
        if let Some(hold) = hold {
            flags.extend(hold.flags()?.into_iter().map(OsString::from));
        }
        let config = work.join("criu.conf");
        write_new(&config, &ConfigLine::to_text(&lines), 0o600)?;

        let mut command = self.command();
        command.arg("checkpoint").arg("--image-path").arg(images);
        command.arg("--work-path").arg(work).args(flags);
        command.args(["--leave-running", id]);
        command.env("CRIU_CONFIG_FILE", &config).kill_on_drop(true);
        let keeps = store::open_to_work(draft);
        let keeps = keeps.with_context(|| format!("cannot lock {}", draft.display()))?;
        // Which it does not read, and has as long as it lives.
        command.stdin(keeps);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let runtime = command.spawn().with_context(|| self.cannot_be_run())?;
        let files = [Some(config), scripted.then_some(script)];
        let called = format!("{} cannot dump {id:?}", self.binary.display());
        Ok(BegunDump::of(runtime, called, files))
    }

    /// Whether the container is paused; one that the runtime does not know is not.
    pub async fn has_paused(&self, id: &str) -> bool {
        let state = self.state(id).await;
        state.is_ok_and(|state| state.status == "paused")
    }

    /// What the runtime itself knows of the container.
    ///
    /// # Errors
    /// What the runtime says, also of a container that it does not know.
    pub(crate) async fn state(&self, id: &str) -> Result<RuntimeState> {
        let json = self.run("state", &[id]).await?;
        serde_json::from_str(&json)
            .with_context(|| format!("{} says no state of {id:?}", self.binary.display()))
    }

    /// Freezes the container's processes.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn pause(&self, id: &str) -> Result<()> {
        self.run("pause", &[id]).await.map(drop)
    }

    /// Lets them go.
    ///
    /// # Errors
    /// What the runtime says, also of a container that is not paused.
    pub async fn resume(&self, id: &str) -> Result<()> {
        self.run("resume", &[id]).await.map(drop)
    }

    /// Lets a container go that was started and is held for its migration.
    ///
    /// # Errors
    /// What the runtime front says.
    pub(crate) async fn release(&self, id: &str, containerd: &Path) -> Result<()> {
        let mut command = self.command();
        command.arg(RELEASE_COMMAND).arg(id);
        // It tells others through containerd.
        command.env("GRPC_ADDRESS", containerd);
        self.finish(RELEASE_COMMAND, command).await.map(drop)
    }

    /// Kills the container's processes; of one that is held no process executes anything.
    ///
    /// # Errors
    /// What the runtime says.
    pub(crate) async fn kill(&self, id: &str) -> Result<()> {
        self.run("kill", &[id, "KILL"]).await.map(drop)
    }

    /// Kills what is left of the container's processes, and takes away all that it keeps of it. One that it does not
    /// know is fine.
    ///
    /// # Errors
    /// What the runtime says.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        self.run("delete", &["--force", id]).await.map(drop)
    }

    /// Process ids of all processes of the container.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let json = self.run("ps", &["--format", "json", id]).await?;
        serde_json::from_str(&json)
            .with_context(|| format!("cannot read the processes of {id:?}: {json:?}"))
    }

    /// Runs one short verb of the runtime and gives its output.
    async fn run(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command();
        command.arg(verb).args(arguments);
        self.finish(verb, command).await
    }

    async fn finish(&self, verb: &str, mut command: Command) -> Result<String> {
        command.kill_on_drop(true);
        let output = match timeout(PATIENCE, self.output(&mut command)).await {
            Ok(output) => output?,
            Err(_) => {
                let message = format!("{} {verb} does not end", self.binary.display());
                return Err(Error::failed(message));
            }
        };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let message = format!("{} {verb} failed: {}", self.binary.display(), said.trim());
            return Err(Error::failed(message));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// What `checkpoint` of this runtime understands: runc before 1.3.0 knows less.
    async fn checkpoint_help(&self) -> Result<String> {
        let mut command = Command::new(&self.binary);
        command.args(["checkpoint", "--help"]);
        let output = self.output(&mut command).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn output(&self, command: &mut Command) -> Result<std::process::Output> {
        let output = command.stdin(Stdio::null()).output().await;
        output.with_context(|| self.cannot_be_run())
    }

    fn cannot_be_run(&self) -> String {
        format!("cannot run the OCI runtime {}", self.binary.display())
    }
}

/// The file of this program, or the one that has taken its name since, which does the same: an upgrade replaces it while
/// `serve` goes on.
fn own_program() -> std::io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    // What the kernel says of a file that has no name any more.
    let named = program.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    let named = named.map(|it| PathBuf::from(OsStr::from_bytes(it)));
    Ok(named.unwrap_or(program))
}

/// CRIU runs it at every step; `post-dump` is the one at which its links are there.
fn write_script(
    script: &Path,
    id: &str,
    export: Option<&ExportInside<'_>>,
    hold: Option<&DumpHold>,
) -> Result<()> {
    let program = own_program().context("cannot find this program")?;
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let path = |path: &Path| quoted(&path.to_string_lossy());
    let [begin, ended, dumped, wait] = hold.map_or_else(
        || ["exit 0", "exit 0", ":", "exit 0"].map(str::to_owned),
        |hold| hold.script_parts(path),
    );
    let mut text = format!(
        "#!/bin/sh\ncase \"$CRTOOLS_SCRIPT_ACTION\" in\npre-dump) {begin} ;;\npost-dump) ;;\nstatus-ready) {ended} ;;\n*) exit 0 ;;\nesac\n"
    );
    if let Some((dir, to)) = export.and_then(|export| export.links) {
        text += &format!(
            "{} dump-links {} {} || exit 1\n",
            path(&program),
            path(dir),
            path(to)
        );
    }
    text += &format!("{dumped}\n");
    if let Some(export) = export {
        text += &format!(
            "{} --json -a {} -n {} snapshot export --no-pause -o {} {} 2>{} || exit 1\n",
            path(&program),
            path(export.address),
            quoted(export.namespace),
            path(export.to),
            quoted(id),
            path(export.figures),
        );
    }
    text += &format!("{wait}\n");
    write_new(script, &text, 0o700)
}

/// Writes a file that was not there before.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
