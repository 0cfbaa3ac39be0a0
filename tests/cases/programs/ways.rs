//! The three ways in which a program moves from one node to the other and back.
//!
//! | way | its network | who asks |
//! |---|---|---|
//! | alone | its own, with `lo` alone | somebody in the container, before, between and after the moves |
//! | in a sandbox | that of the sandbox, another one on each node | somebody outside, all the time |
//! | in a pod | that of the pod, another one on each node | somebody outside, but while the pod is paused |

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Image, Node, PodContainer, PodNamespaces, Testbed, journey,
};

use super::client::{Client, Place};
use super::{Expected, Program};
use crate::pods::send;

const SERVER: &str = "server";
const CLIENT: &str = "client";

pub(super) struct Ways<'a> {
    bed: &'a Testbed,
    a: &'a Node,
    b: &'a Node,
    program: &'a Program,
    /// Reference of the image that both nodes have.
    image: &'a str,
}

impl<'a> Ways<'a> {
    pub(super) fn new(
        bed: &'a Testbed,
        [a, b]: [&'a Node; 2],
        program: &'a Program,
        image: &'a Image,
    ) -> Ways<'a> {
        let image = image.reference();
        Ways {
            bed,
            a,
            b,
            program,
            image,
        }
    }

    pub(super) fn alone(&self) -> anyhow::Result<()> {
        self.run_server(&[])?;
        let client = Client::new(self.program, inside(self.a)?);
        client.while_asking(|| {
            client.wait_for_more()?;
            for (from, to) in [(self.a, self.b), (self.b, self.a)] {
                // Where it is refused, it is asked on where it is.
                client.rest();
                let moved = self.migrate(from, to, self.program.alone, &[])?;
                client.move_to(inside(if moved { to } else { from })?);
                client.wait_for_more()?;
                if !moved {
                    break;
                }
            }
            Ok(())
        })?;
        client.check(&inside(self.a)?)?;
        journey::remove_container(self.a, SERVER)?;
        self.nothing_is_left()
    }

    pub(super) fn in_a_sandbox(&self) -> anyhow::Result<()> {
        journey::run_sandbox(self.a, "sandbox")?;
        let pid = journey::task_pid(self.a, "sandbox")?;
        let shared = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
        let shared = shared.map(|(kind, file)| format!("{kind}:/proc/{pid}/ns/{file}"));
        let join: Vec<&str> = shared.iter().flat_map(|it| ["--with-ns", it]).collect();
        self.run_server(&join)?;
        self.run_client()?;
        let place = |node: &Node, sandbox: &str| match self.program.inside {
            true => inside(node),
            false => self.outside(&journey::sandbox_address(node, sandbox)?),
        };
        let client = Client::new(self.program, place(self.a, "sandbox")?);
        client.while_asking(|| {
            client.wait_for_more()?;
            let hops = [(self.a, self.b, "sandbox-b"), (self.b, self.a, "sandbox-a")];
            for (from, to, sandbox) in hops {
                journey::run_sandbox(to, sandbox)?;
                if self.program.inside {
                    client.rest();
                }
                let more = ["--sandbox", sandbox, "--tcp", "close", "--skip-in-flight"];
                if self.migrate(from, to, self.program.in_a_sandbox, &more)? {
                    client.move_to(place(to, sandbox)?);
                    client.wait_for_more()?;
                    continue;
                }
                if self.program.inside {
                    client.move_to(inside(from)?);
                }
                client.wait_for_more()?;
                break;
            }
            Ok(())
        })?;
        client.check(&inside(self.a)?)?;
        for node in [self.a, self.b] {
            for id in node.ctr(&["tasks", "ls", "-q"])?.lines() {
                journey::remove_container(node, id)?;
            }
        }
        self.nothing_is_left()
    }

    pub(super) fn in_a_pod(&self) -> anyhow::Result<()> {
        let start = self.start();
        let command = ["/bin/bash", "-c", &start];
        let container = PodContainer {
            name: SERVER,
            image: self.image,
            command: &command,
            security: self.program.security,
            ..PodContainer::default()
        };
        self.run_client()?;
        let place = |node: &Node, id: &str, address: &str| match self.program.inside {
            true => inside_of(node, "k8s.io", id),
            false => self.outside(address),
        };
        let mut cri = self.a.cri()?;
        let mut pod = cri.run_pod(("shop", "server-0"), &[], PodNamespaces::Usual)?;
        let mut id = cri.run_container(&pod, &container)?;
        let client = Client::new(self.program, place(self.a, &id, &cri.pod_ip(&pod)?)?);
        client.while_asking(|| {
            client.wait_for_more()?;
            for (hop, from, to) in [(1, self.a, self.b), (2, self.b, self.a)] {
                let (name, of) = (format!("server-{hop}"), format!("shop/server-{}", hop - 1));
                if self.program.inside {
                    client.rest();
                }
                // Paused after it: what it would acknowledge is in no checkpoint.
                let mut checkpoint = from.command("transship");
                checkpoint.args(["checkpoint", "--pod", &of, "--name", &name]);
                checkpoint.args(["--leave-paused", "--tcp", "close", "--skip-in-flight"]);
                if !succeeds(checkpoint, self.program.in_a_pod)? {
                    client.move_to(place(from, &id, &cri.pod_ip(&pod)?)?);
                    client.wait_for_more()?;
                    break;
                }
                client.rest();
                cri.remove_pod(&pod)?;
                send(self.bed, from, to, &name)?;
                cri = to.cri()?;
                let annotation = [("dev.transship/restore", name.as_str())];
                pod = cri.run_pod(("shop", &name), &annotation, PodNamespaces::Usual)?;
                id = cri.run_container(&pod, &container)?;
                client.move_to(place(to, &id, &cri.pod_ip(&pod)?)?);
                client.wait_for_more()?;
                for node in [from, to] {
                    node.command("transship").args(["rm", &name]).run()?;
                }
            }
            Ok(())
        })?;
        client.check(&inside_of(self.a, "k8s.io", &id)?)?;
        cri.remove_pod(&pod)?;
        journey::remove_container(self.a, CLIENT)?;
        for node in [self.a, self.b] {
            journey::check_no_pod_left(node)?;
        }
        self.nothing_is_left()
    }

    fn run_server(&self, more: &[&str]) -> anyhow::Result<()> {
        let mut run = self.a.command("ctr");
        run.args(["run", "--detach", "--snapshotter", "transship"]);
        run.args(self.program.run).args(more);
        run.args(["--log-uri", "file:///var/log/server.log"]);
        run.args([self.image, SERVER]);
        run.args(["/bin/bash", "-c", &self.start()]);
        Ok(run.run()?)
    }

    /// With the name of the loopback, which kubelet and nerdctl give a container, and `ctr` and the CRI do not.
    fn start(&self) -> String {
        let start = self.program.start;
        format!("[ -s /etc/hosts ] || echo 127.0.0.1 localhost >/etc/hosts\n{start}")
    }

    /// A container of the same image with the node's network, in which the operations run.
    fn run_client(&self) -> anyhow::Result<()> {
        let mut run = self.a.command("ctr");
        run.args(["run", "--detach"]);
        run.args(["--snapshotter", "transship", "--net-host"]);
        run.args([self.image, CLIENT, "sleep", "infinity"]);
        Ok(run.run()?)
    }

    fn outside(&self, address: &str) -> anyhow::Result<Place> {
        Ok(Place::Outside {
            node: self.a.clone(),
            client: journey::task_pid(self.a, CLIENT)?,
            address: address.to_owned(),
        })
    }

    /// Whether it has moved, as expected.
    fn migrate(
        &self,
        from: &Node,
        to: &Node,
        expected: Expected,
        more: &[&str],
    ) -> anyhow::Result<bool> {
        let ssh = self.bed.ssh(from, to)?;
        let mut migrate = from.command("transship");
        migrate.args(["migrate", SERVER, "--to", &ssh]).args(more);
        succeeds(migrate, expected)
            .with_context(|| format!("from {} to {}", from.name(), to.name()))
    }

    fn nothing_is_left(&self) -> anyhow::Result<()> {
        journey::check_nothing_left(self.a)?;
        journey::check_nothing_left(self.b)
    }
}

/// Whether the command, with the flags that are expected, succeeds as expected.
fn succeeds(mut command: std::process::Command, expected: Expected) -> anyhow::Result<bool> {
    match expected {
        Expected::Works => command.run()?,
        Expected::With(flags) => command.args(flags).run()?,
        Expected::Refused(part) => {
            let said = command.read_failure()?;
            ensure!(said.contains(part), "{said}");
            return Ok(false);
        }
    }
    Ok(true)
}

fn inside(node: &Node) -> anyhow::Result<Place> {
    Ok(Place::Inside {
        node: node.clone(),
        server: journey::task_pid(node, SERVER)?,
    })
}

fn inside_of(node: &Node, namespace: &str, id: &str) -> anyhow::Result<Place> {
    let tasks = node.ctr(&["-n", namespace, "tasks", "ls"])?;
    let mut rows = tasks.lines().map(str::split_whitespace);
    let pid =
        rows.find_map(|mut row| (row.next() == Some(id)).then(|| row.next()?.parse().ok())?);
    Ok(Place::Inside {
        node: node.clone(),
        server: pid.with_context(|| format!("no task {id} in {tasks}"))?,
    })
}
