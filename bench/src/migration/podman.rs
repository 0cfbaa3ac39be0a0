//! podman's way: `container checkpoint --export`, a copy of the archive, `container restore --import`, on one node.

use anyhow::Result;
use transship_testbed::{CommandRun as _, NodeOptions, Testbed, Workload};

use super::{Course, Program, frozen};
use crate::node_clock::time_in_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::millis;

const PEER: &str = "podman checkpoint --export, cp, restore --import";
const IMAGE: &str = "localhost/counter:1";
/// From the freeze to the moment when the copy runs; the program is seen to count on.
const MOVE: &str = r#"
podman run --quiet --detach --name web --network none IMAGE /usr/bin/counter --memory-mb MEMORY >/dev/null
counts() { podman exec web /bin/busybox cat /data/counts | tail -n 1; }
until [ "$(counts)" -gt 3 ] 2>/dev/null; do :; done
podman_moves() {
  podman container checkpoint --export /root/a.tar.zst web
  cp /root/a.tar.zst /root/b.tar.zst
  podman rm --force --time 0 web
  podman container restore --import /root/b.tar.zst
}
timed podman_moves
at=$(counts); until [ "$(counts)" -gt "$at" ]; do :; done
podman rm --force --time 0 web >/dev/null; rm /root/a.tar.zst /root/b.tar.zst"#;

impl Course<'_> {
    pub(super) fn measure_podman(
        &mut self,
        bed: &Testbed,
        memory_mb: u32,
        sizes: &Sizes,
    ) -> Result<Row> {
        let options = NodeOptions {
            without_unified_cgroup: true,
            ..NodeOptions::default()
        };
        let node = bed.node_with("podman", &options)?;
        node.install_podman(bed.settings())?;
        let program = Workload::Counter.build(bed.settings())?;
        node.write_file("/root/counter", std::fs::read(program)?)?;
        let image = format!(
            "mkdir -p /root/image/bin /root/image/usr/bin /root/image/data
             cp /bin/busybox /root/image/bin/; install -m 0755 /root/counter /root/image/usr/bin/counter
             echo delete >/root/image/data/delete-me; : >/root/image/data/counts
             tar -C /root/image -cf /root/image.tar .
             podman import -q /root/image.tar {IMAGE}"
        );
        node.shell(&image).run()?;
        let script = MOVE
            .replace("IMAGE", IMAGE)
            .replace("MEMORY", &memory_mb.to_string());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..sizes.migrations {
            eprintln!("   {memory_mb} MB, podman, round {}", round + 1);
            ours.push(self.migrate(Program::idle(memory_mb), &[])?);
            let times = time_in_node(&node, &script)?;
            theirs.push(times.iter().map(|time| millis(*time)).sum());
        }
        let name = format!("frozen, {memory_mb} MB in memory, memory sent before: beside podman");
        let row = Row::of_pairs(name, "ms", &frozen(&ours), PEER, &theirs, Better::Less);
        Ok(row.goal(Goal::RatioAtLeast(3.0)))
    }
}
