//! Tasks: what runs in a container.

use std::time::Duration;

use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    CheckpointTaskRequest, CreateTaskRequest, DeleteTaskRequest, GetRequest, KillRequest,
    ListPidsRequest, PauseTaskRequest, ResumeTaskRequest, StartRequest, WaitRequest,
};
use containerd_client::tonic::Code;
use containerd_client::tonic::transport::Channel;
use containerd_client::types::Mount;
use containerd_client::types::v1::{Process, Status};
use transship_proto::runc_options::CheckpointOptions;

use crate::Cause;
use crate::{Containerd, ContainerdError, During, present};

const SIGKILL: u32 = nix::libc::SIGKILL.unsigned_abs();

/// How long a killed task may take to end.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Where a task's output goes: paths of FIFOs or URIs; empty for nowhere.
#[derive(Debug, Default)]
pub struct Output {
    /// Target of its standard output.
    pub stdout: String,
    /// Target of its standard error.
    pub stderr: String,
}

impl Containerd {
    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel())
    }

    /// The task of the container `id`, in a state that its shim has told: containerd gives out one that it does not know,
    /// without a process, while a shim is slow.
    ///
    /// # Errors
    /// The answer of containerd, or [`Cause::Silent`].
    pub async fn task(&self, id: &str) -> Result<Process, ContainerdError> {
        let act = || format!("read the task of {id:?}");
        let request = GetRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        let answer = self.tasks().get(self.request(request)).await.during(act)?;
        let task = present(answer.into_inner().process, "process", act)?;
        match task.status() {
            Status::Unknown => Err(Cause::Silent).during(act),
            _ => Ok(task),
        }
    }

    /// Process ids of all processes of the container, as this node sees them.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>, ContainerdError> {
        let answer = self
            .tasks()
            .list_pids(self.request(ListPidsRequest {
                container_id: id.to_owned(),
            }))
            .await
            .during(|| format!("list the processes of {id:?}"))?;
        Ok(answer
            .into_inner()
            .processes
            .into_iter()
            .map(|process| process.pid)
            .collect())
    }

    /// Freezes all processes of the container.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn pause(&self, id: &str) -> Result<(), ContainerdError> {
        self.tasks()
            .pause(self.request(PauseTaskRequest {
                container_id: id.to_owned(),
            }))
            .await
            .during(|| format!("pause {id:?}"))?;
        Ok(())
    }

    /// Thaws them. It is no error when they run already: the runtime thaws a container whose dump
    /// has failed.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn resume(&self, id: &str) -> Result<(), ContainerdError> {
        let request = ResumeTaskRequest {
            container_id: id.to_owned(),
        };
        let resumed = self.tasks().resume(self.request(request)).await;
        match resumed.during(|| format!("resume {id:?}")) {
            Ok(_) => Ok(()),
            Err(error) => match self.task(id).await {
                Ok(task) if task.status() == Status::Running => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Dumps the container with CRIU; where to, and how, the options say.
    ///
    /// # Errors
    /// The answer of containerd; CRIU's log says more.
    pub async fn dump(&self, id: &str, options: &CheckpointOptions) -> Result<(), ContainerdError> {
        let request = CheckpointTaskRequest {
            container_id: id.to_owned(),
            parent_checkpoint: String::new(),
            options: Some(containerd_client::to_any(options)),
        };
        self.tasks()
            .checkpoint(self.request(request))
            .await
            .during(|| format!("dump {id:?}"))?;
        Ok(())
    }

    /// Creates the task of the container `id` and returns its process id.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn create_task(
        &self,
        id: &str,
        rootfs: Vec<Mount>,
        output: Output,
    ) -> Result<u32, ContainerdError> {
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdout: output.stdout,
            stderr: output.stderr,
            ..CreateTaskRequest::default()
        };
        let answer = self
            .tasks()
            .create(self.request(request))
            .await
            .during(|| format!("create the task of {id:?}"))?;
        Ok(answer.into_inner().pid)
    }

    /// Starts the created task.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn start_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = StartRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        self.tasks()
            .start(self.request(request))
            .await
            .during(|| format!("start {id:?}"))?;
        Ok(())
    }

    /// Kills the task of the container, whatever state it is in, and deletes it. A container
    /// without a task is fine.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn kill_task(&self, id: &str) -> Result<(), ContainerdError> {
        let status = match self.task(id).await {
            Ok(task) => task.status(),
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        };
        match self.kill_task_in(status, id).await {
            // Somebody else has deleted it meanwhile: `ctr run` does with its own.
            Err(_) if matches!(self.task(id).await, Err(error) if error.is_not_found()) => Ok(()),
            ended => ended,
        }
    }

    async fn kill_task_in(&self, status: Status, id: &str) -> Result<(), ContainerdError> {
        match status {
            Status::Running | Status::Paused | Status::Pausing => self.end_task(id).await?,
            // The shim kills what was created and never started. A runtime that was killed when it had started it, and
            // before its shim knew, has left what cannot be deleted as it is.
            Status::Created if self.delete_task(id).await.is_err() => self.end_task(id).await?,
            _ => {}
        }
        self.delete_task(id).await
    }

    /// Kills a task, and waits for its end.
    async fn end_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = KillRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
            signal: SIGKILL,
            all: true,
        };
        match self.tasks().kill(self.request(request)).await {
            Err(status) if status.code() != Code::NotFound => {
                return Err(status).during(|| format!("kill {id:?}"));
            }
            _ => {}
        }
        // On cgroup v1 a signal waits until the freezer lets go; the process dies before it
        // executes anything. runc thaws by itself since 1.1.3, then this has nothing to do.
        drop(self.resume(id).await);
        let mut wait = self.request(WaitRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        });
        wait.set_timeout(END_PATIENCE);
        self.tasks()
            .wait(wait)
            .await
            .during(|| format!("wait for the end of {id:?}, which was killed"))?;
        Ok(())
    }

    /// Deletes a task that does not run. One that is not there is fine.
    async fn delete_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = DeleteTaskRequest {
            container_id: id.to_owned(),
        };
        match self.tasks().delete(self.request(request)).await {
            Err(status) if status.code() != Code::NotFound => {
                Err(status).during(|| format!("delete the task of {id:?}"))
            }
            _ => Ok(()),
        }
    }
}
