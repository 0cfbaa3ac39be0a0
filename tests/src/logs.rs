//! What the programs in a node wrote, for the report of a failed test.

use crate::node::Node;
use crate::run::CommandRun as _;

/// Lines of each log that go into a report.
const LINES: u32 = 40;

impl Node {
    /// The last lines of each daemon's log and of each log that runc and CRIU left.
    ///
    /// Tells why when the node no longer answers; a report must not hide the failure behind its own.
    pub fn logs(&self) -> String {
        let script = format!(
            "for log in /var/log/*.log /var/log/transship/*.log $(find /run/containerd /run/transship /var/lib/containerd \
               /var/lib/transship -xdev \\( -name '*.log' -o -name log.json \\) \
               -not -path '*/rootfs/*' -not -path '*/snapshots/*' 2>/dev/null)
             do [ -s \"$log\" ] || continue
               echo \"--- {name}: $log\"; tail -n {LINES} \"$log\"
             done",
            name = self.name(),
        );
        match self.shell(&script).read() {
            Ok(text) => text,
            Err(error) => format!("--- {}: no logs: {error}", self.name()),
        }
    }

    /// The last lines of one log.
    pub(crate) fn log_tail(&self, path: &str) -> String {
        let lines = LINES.to_string();
        self.command("tail")
            .args(["-n", &lines, path])
            .read()
            .unwrap_or_else(|error| error.to_string())
    }
}
