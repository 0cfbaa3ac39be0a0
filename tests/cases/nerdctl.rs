//! Containers as nerdctl makes them (Debian has no nerdctl): files of its data root on `/etc/hosts`,
//! `/etc/resolv.conf` and `/etc/hostname`, its hooks, which make the network, and a program that reads the output.
//!
//! ```text
//!  a  nerdctl's hook makes the network --> b  its node.toml allows hooks, log-uri: as on a
//!  a  CNI by us, --allow host-ports    <--
//! ```

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use transship_containerd::Containerd;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_faults::{counts_on, refused};

const PATIENCE: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "default";
const PROGRAM: &str = "/usr/local/bin/nerdctl";
const OUTPUT: &str = "binary:///usr/local/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=/srv/nerdctl";
/// The node's port that leads to the counter's.
const PORT: u16 = 8080;
const ADDRESS: &str = "10.77.0";

/// A network whose ports of the node lead into it.
const LAN: &str = r#"{"cniVersion":"0.4.0","name":"lan","plugins":[{"type":"bridge","bridge":"lan0",
    "isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]],
    "routes":[{"dst":"0.0.0.0/0"}]}},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;

/// In nerdctl's place: its hooks make and remove the network by the plugins of CNI and write down what they have
/// made as libcni does; called by containerd it reads the output.
const NERDCTL: &str = r#"#!/bin/bash
case "$*" in
*oci-hook*) ;;
# With its end of this pipe it says that it is ready.
*) exec 5>&-; cat <&3 >>/root/web.output; exit ;;
esac
set -eu -o pipefail
state=$(cat)
point="${*: -1}"
echo "$point" >>/root/hooks
pid=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' <<<"$state")
export CNI_CONTAINERID=default-web CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni CNI_NETNS=
result=/var/lib/cni/results/lan-default-web-eth0
lan='"cniVersion":"0.4.0","name":"lan"'
bridge="{$lan,"'"type":"bridge","bridge":"lan0","isGateway":true,"ipMasq":true,
  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}'
ports='"portMappings":[{"HostPort":8080,"ContainerPort":7000,"Protocol":"tcp","HostIP":"0.0.0.0"}]'
portmap() { echo "{$lan,"'"type":"portmap",'"\"runtimeConfig\":{$ports}$1}" | /usr/lib/cni/portmap; }
if [ "$point" = createRuntime ]; then
  export CNI_COMMAND=ADD CNI_NETNS="/proc/$pid/ns/net"
  made=$(/usr/lib/cni/bridge <<<"$bridge")
  made=$(portmap ",\"prevResult\":$made")
  mkdir -p /var/lib/cni/results
  echo '{"kind":"cniCacheV1","containerId":"default-web","ifName":"eth0","networkName":"lan",' \
    "\"capabilityArgs\":{$ports},\"result\":$made}" >$result
else
  export CNI_COMMAND=DEL
  portmap ''
  /usr/lib/cni/bridge <<<"$bridge"
  rm -f $result
fi
"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "nerdctl",
        tree: Tree::Forky,
        run: a_container_of_nerdctl_moves,
    }]
    .into_iter()
}

fn a_container_of_nerdctl_moves(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    for node in [&a, &b] {
        node.write_file("/etc/cni/net.d/05-lan.conflist", LAN)?;
        node.write_file(PROGRAM, NERDCTL)?;
        node.shell(&format!("chmod 0755 {PROGRAM}")).run()?;
    }
    b.write_file("/etc/resolv.conf", "search b.test\nnameserver 10.0.0.53\n")?;
    run_as_nerdctl(&a)?;
    is_reached_by_the_port(&a)?;

    refused(
        &a,
        &["migrate", "web", "--to", &to_b],
        5,
        "8080/tcp (--allow host-ports)",
    )?;
    b.write_file(
        "/etc/transship/node.toml",
        "[receive]\nallow = [\"hooks\", \"log-uri\"]\n",
    )?;
    let allow_ports = ["--allow", "host-ports"];
    migrate(&a, &to_b, &allow_ports)?;
    counts_on(&b, "web")?;
    is_reached_by_the_port(&b)?;
    ensure!(b.read_file("/root/hooks")? == b"createRuntime\n");
    poll_until("who reads the output on b", PATIENCE, || {
        let started = b.shell("test -e /root/web.output");
        { started }.run().map_err(|error| error.to_string())
    })?;
    let resolv_conf = in_container(&b, "/etc/resolv.conf")?;
    ensure!(
        resolv_conf == "search b.test\nnameserver 10.0.0.53\n",
        "{resolv_conf}"
    );
    nothing_is_left(&a)?;

    // Where only ports are allowed nothing of nerdctl runs.
    a.shell("rm -f /root/hooks /root/web.output").run()?;
    migrate(&b, &to_a, &allow_ports)?;
    counts_on(&a, "web")?;
    is_reached_by_the_port(&a)?;
    a.shell("! ls /root/hooks /root/web.output").run()?;
    ensure!(in_container(&a, "/etc/hostname")? == "web-1\n");
    let hosts = in_container(&a, "/etc/hosts")?;
    let own = { hosts.lines() }.find(|line| line.ends_with("\tweb-1"));
    let own = own
        .and_then(|line| line.split('\t').next())
        .context(hosts.clone())?;
    ensure!(
        own.starts_with(ADDRESS) && hosts.ends_with("10.0.0.9\tdb\n"),
        "{hosts}"
    );
    journey::ask(&a, own)?;
    nothing_is_left(&b)?;

    // Two cannot have the same port.
    b.start_daemon("busy", &["busybox", "nc", "-l", "-p", &PORT.to_string()])?;
    poll_until("a server on b", PATIENCE, || {
        let listens = b.shell(&format!(
            "grep -q ':{PORT:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6"
        ));
        { listens }.run().map_err(|error| error.to_string())
    })?;
    let mut again = vec!["migrate", "web", "--to", &to_b];
    again.extend(allow_ports);
    refused(&a, &again, 5, "the port 8080/tcp of this node is in use")?;
    b.stop_daemon("busy", "KILL")?;

    journey::remove_container(&a, "web")?;
    Ok(())
}

fn migrate(from: &Node, to: &str, more: &[&str]) -> anyhow::Result<()> {
    let mut command = from.command("transship");
    command
        .args(["migrate", "web", "--to", to])
        .args(more)
        .run()?;
    Ok(())
}

/// What `nerdctl run --name web-1 -p 8080:7000 --add-host db:10.0.0.9` makes.
fn run_as_nerdctl(node: &Node) -> anyhow::Result<()> {
    let state_dir = "/srv/nerdctl/1935db59/containers/default/web";
    let etc_hosts = "/srv/nerdctl/1935db59/etchosts/default/web";
    node.shell(&format!(
        "mkdir -p {state_dir} {etc_hosts}
         echo web-1 >{state_dir}/hostname; echo nameserver 10.0.0.1 >{state_dir}/resolv.conf
         echo 127.0.0.1 localhost >{etc_hosts}/hosts"
    ))
    .run()?;
    let state = format!("nerdctl/state-dir={state_dir}");
    let labels = [
        "nerdctl/name=web-1",
        "nerdctl/extraHosts=[\"db:10.0.0.9\"]",
        state.as_str(),
    ];
    let mut create = vec!["containers", "create", "--snapshotter", "transship"];
    create.extend(labels.iter().flat_map(|label| ["--label", label]));
    create.extend(["transship.test/counter:1", "web", "/usr/bin/counter"]);
    node.ctr(&create)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let socket = node.path_from_outside("/run/containerd/containerd.sock");
        let containerd = Containerd::connect(&socket, NAMESPACE).await?;
        let spec = containerd.container("web").await?.spec.context("no spec")?;
        let mut spec: Value = serde_json::from_slice(&spec.value)?;
        spec["hostname"] = json!("web-1");
        let annotations = labels.iter().filter_map(|label| label.split_once('='));
        for (name, value) in annotations {
            spec["annotations"][name] = json!(value);
        }
        let hook = |point: &str| {
            let args = [
                "nerdctl",
                "--data-root=/srv/nerdctl",
                "internal",
                "oci-hook",
                point,
            ];
            json!([{"path": PROGRAM, "args": args, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}])
        };
        spec["hooks"] = json!({
            "createRuntime": hook("createRuntime"),
            "postStop": hook("postStop"),
        });
        let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
        for (source, destination) in [
            (format!("{state_dir}/resolv.conf"), "/etc/resolv.conf"),
            (format!("{etc_hosts}/hosts"), "/etc/hosts"),
            (format!("{state_dir}/hostname"), "/etc/hostname"),
        ] {
            mounts.push(
                json!({"type": "bind", "source": source, "destination": destination,
                "options": ["bind", "rprivate"]}),
            );
        }
        containerd
            .update_spec("web", serde_json::to_vec(&spec)?)
            .await?;
        anyhow::Ok(())
    })?;
    node.ctr(&["tasks", "start", "--detach", "--log-uri", OUTPUT, "web"])?;
    journey::wait_for_count(node, "web", 3)?;
    Ok(())
}

/// From outside of the node's containers.
fn is_reached_by_the_port(node: &Node) -> anyhow::Result<()> {
    let address = node.shell(
        "ip -4 -o address show | sed -n 's/.*link[0-9]* *inet \\([0-9.]*\\).*/\\1/p' | head -n 1",
    );
    let address = { address }.read()?;
    poll_until("an answer by the node's port", PATIENCE, || {
        node.ask_counter(&format!("{}:{PORT}", address.trim()))
            .map(drop)
    })?;
    Ok(())
}

fn in_container(node: &Node, path: &str) -> anyhow::Result<String> {
    journey::read_in_container(node, "web", path).map_err(anyhow::Error::msg)
}

/// No address, rule or file of the container.
fn nothing_is_left(node: &Node) -> anyhow::Result<()> {
    let left = node.shell(&format!(
        "ls /var/lib/cni/results | grep -- -web- || true
         grep -l -- -web /var/lib/cni/networks/lan/[0-9]* 2>/dev/null || true
         iptables-save -t nat | grep 'dport {PORT} ' || true
         find /var/lib/transship/containers -type f 2>/dev/null || true"
    ));
    let left = { left }.read()?;
    ensure!(left.is_empty(), "{left}");
    journey::check_nothing_left(node)
}
