//! Whether a kubelet runs on this node, which makes and ends pods by what its API server says.

use std::os::unix::net::UnixStream;

/// A kubelet of any distribution serves its pod resources here, unless its root directory is another one.
const SOCKET: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";
const PROGRAM: &str = "kubelet";

/// What was seen of a kubelet; none where there is none to be seen.
pub(crate) fn seen() -> Option<String> {
    // What a kubelet that is gone has left refuses.
    if UnixStream::connect(SOCKET).is_ok() {
        return Some(format!("it answers at {SOCKET}"));
    }
    let all = procfs::process::all_processes().into_iter().flatten();
    let stats = all.filter_map(|process| process.ok()?.stat().ok());
    let found = stats.into_iter().find(|stat| stat.comm == PROGRAM);
    found.map(|stat| format!("process {}", stat.pid))
}
