//! `ssh node-b` from node a: the way on which a migration leaves a node.
//!
//! The host keys are those that Debian's package made when the tree was built, the same in all
//! nodes of the tree: they protect nothing and need not.

use std::time::Duration;

use crate::node::Node;
use crate::run::CommandRun as _;
use crate::{Testbed, TestbedError, poll_until};

/// AES-GCM is the fastest cipher on machines with AES instructions; the cipher must not decide how
/// long a migration takes. PAM would ask for limits and audit rights that a node lacks.
const SSHD: [&str; 11] = [
    "/usr/sbin/sshd",
    "-D",
    "-e",
    "-o",
    "UsePAM=no",
    "-o",
    "PermitRootLogin=prohibit-password",
    "-o",
    "UseDNS=no",
    "-o",
    "StrictModes=no",
];

const CLIENT: &str = "\
Host node-*
  User root
  Ciphers aes128-gcm@openssh.com
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
";

impl Testbed {
    /// Lets node `from` enter node `to` by ssh over their link, and gives the command for it:
    /// "ssh node-b".
    ///
    /// # Errors
    /// When keys cannot be made, or sshd does not come up.
    pub fn ssh(&self, from: &Node, to: &Node) -> Result<String, TestbedError> {
        from.write_file("/root/.ssh/config", CLIENT)?;
        let key = from
            .shell(
                "chmod 0700 /root/.ssh
             [ -e /root/.ssh/id_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
             cat /root/.ssh/id_ed25519.pub",
            )
            .read()?;
        to.command("sh")
            .args([
                "-eu",
                "-c",
                "mkdir -p -m 0700 /root/.ssh /run/sshd; cat >>/root/.ssh/authorized_keys",
            ])
            .feed(key.as_bytes())?;
        if !to.has_daemon("sshd") {
            to.start_daemon("sshd", &SSHD)?;
        }
        let command = format!("ssh node-{}", to.name());
        poll_until(&command, Duration::from_secs(20), || {
            from.shell(&format!("{command} true"))
                .run()
                .map_err(|error| error.to_string())
        })?;
        Ok(command)
    }
}
