//! A container that CNI has put into a network of its own: it gets an address of the network there, or keeps
//! the one that it had, with its connections; where it cannot, the source goes on with it.

use anyhow::{Context, ensure};
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey};

use crate::Case;
use crate::migration_faults::{counts_on, refused};
use crate::migration_keeps::ticks_on;

/// The same network on both nodes, before the one that each has.
const LAN: &str = r#"{"cniVersion":"0.4.0","name":"lan","plugins":[{"type":"bridge","bridge":"lan0",
    "isGateway":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]]}}]}"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "migration_address",
        tree: Tree::Forky,
        run: its_address_is_new_or_kept,
    }]
    .into_iter()
}

fn its_address_is_new_or_kept(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    run(&a, "transship.test/counter:1", "counter", &[])?;
    journey::wait_for_count(&a, "counter", 3)?;
    let before = interface(&a, "counter")?;
    a.command("transship")
        .args(["migrate", "counter", "--to", &to_b])
        .run()?;
    counts_on(&b, "counter")?;
    let there = interface(&b, "counter")?;
    ensure!(there.address != before.address, "{there:?} {before:?}");
    let (address, _) = there.address.split_once('/').context("no prefix")?;
    journey::ask(&b, address)?;
    nothing_is_left(&a, "transship-test", "counter")?;

    // The range of node a has no such address.
    let keep = ["migrate", "counter", "--to", &to_a, "--network", "keep"];
    refused(&b, &keep, 5, "failed to allocate all requested IPs: 10.88.")?;
    let after = interface(&b, "counter")?;
    ensure!(after == there, "{after:?} {there:?}");
    journey::ask(&b, address)?;
    nothing_is_left(&a, "transship-test", "counter")?;

    let no_such = ["migrate", "counter", "--to", &to_a];
    a.shell("mkdir /etc/cni/away; mv /etc/cni/net.d/* /etc/cni/away/")
        .run()?;
    refused(&b, &no_such, 5, "has no network \"transship-test\"")?;
    a.shell("mv /etc/cni/away/* /etc/cni/net.d/").run()?;
    journey::remove_container(&b, "counter")?;
    nothing_is_left(&b, "transship-test", "counter")?;

    connections_come_along(bed, (&a, &b), &to_b)
}

/// Both ends of the connection are in the container, on the address that it has from the network.
fn connections_come_along(bed: &Testbed, (a, b): (&Node, &Node), to_b: &str) -> anyhow::Result<()> {
    for node in [a, b] {
        node.write_file("/etc/cni/net.d/05-lan.conflist", LAN)?;
    }
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.import_image(&holder, "transship")?;
    let needs = [
        "/usr/bin/holder",
        "echo=0.0.0.0:7001",
        "peer=10.77.0.2:7001",
    ];
    run(a, "transship.test/holder:1", "talker", &needs)?;
    talks_on(a)?;
    let before = interface(a, "talker")?;
    a.command("transship")
        .args(["migrate", "talker", "--to", to_b, "--network", "keep"])
        .args(["--tcp", "established"])
        .run()?;
    talks_on(b)?;
    let after = interface(b, "talker")?;
    ensure!(after == before, "{after:?} {before:?}");
    nothing_is_left(a, "lan", "talker")?;
    journey::remove_container(b, "talker")?;
    nothing_is_left(b, "lan", "talker")
}

#[derive(Debug, PartialEq, Eq)]
struct Interface {
    address: String,
    mac: String,
}

fn interface(node: &Node, id: &str) -> anyhow::Result<Interface> {
    let pid = journey::task_pid(node, id)?;
    let show = node.shell(&format!(
        "nsenter -t {pid} -n ip -4 -o address show eth0; nsenter -t {pid} -n ip -o link show eth0"
    ));
    let text = { show }.read()?;
    let mut words = text.split_whitespace();
    let address = words.by_ref().skip_while(|word| *word != "inet").nth(1);
    let mac = text
        .split_whitespace()
        .find(|word| word.split(':').count() == 6);
    Ok(Interface {
        address: address.context(text.clone())?.to_owned(),
        mac: mac.context(text.clone())?.to_owned(),
    })
}

fn run(node: &Node, image: &str, id: &str, command: &[&str]) -> anyhow::Result<()> {
    let mut arguments = vec![
        "run",
        "--detach",
        "--cni",
        "--snapshotter",
        "transship",
        image,
        id,
    ];
    arguments.extend(command);
    node.ctr(&arguments)?;
    Ok(())
}

fn talks_on(node: &Node) -> anyhow::Result<()> {
    ticks_on(node, "talker", "echo ok\npeer ok")
}

/// No address is taken for the container, and no result of it is left.
fn nothing_is_left(node: &Node, network: &str, id: &str) -> anyhow::Result<()> {
    let left = node.shell(&format!(
        "ls /var/lib/cni/results | grep -- '-{id}-' || true; \
         grep -l -- '-{id}' /var/lib/cni/networks/{network}/[0-9]* 2>/dev/null || true"
    ));
    let left = { left }.read()?;
    ensure!(left.is_empty(), "{left}");
    Ok(())
}
