//! What breaks during a migration, and chance that chooses it.
//!
//! ```text
//!  migrate ──────────────────────────────> its exit code
//!      └─ a moment of as long as one takes ─> the fault ─> healed
//! ```
//!
//! The seed is printed with what fails; `TRANSSHIP_FAULT_SEED` takes it.

use std::time::{Duration, SystemTime};

use transship_testbed::{CommandRun as _, ContainerdConfig, Node, poll_until};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// The way to the other node, as long as it is not cut.
const LINK: &str = "#!/bin/sh\n[ ! -e /run/cut ] || exit 255\nexec ssh node-OTHER \"$@\"\n";
const MOVE: &str = "#!/bin/sh\nrm -f /run/moved\n\
    transship migrate WHAT --to /usr/local/bin/link --link-timeout 3 \"$@\"\necho $? >/run/moved\n";
/// What cuts the link, see `DumpHold`. It ends as well when the migration does.
const IN_DUMP: &str = "while [ ! -e /run/moved ]; do
    for held in /run/transship/opened/dump-*/files/.*/.hold-*/dumped; do
        [ ! -e $held ] || { touch /run/cut; pkill -KILL -x ssh; break 2; }
    done
done";
/// A disk of its own below the checkpoints, which can be filled, as the memory can that has a migration's files.
const SMALL_DISK: &str =
    "mount -t tmpfs -o size=160m,mode=0700 tmpfs /var/lib/transship/checkpoints";
const FILL: &str =
    "dd if=/dev/zero of=/var/lib/transship/checkpoints/.fill bs=1M 2>/dev/null || true
for files in /run/transship/opened/*/files; do
    mount -o remount,size=$(df -k --output=used $files | tail -n 1)k $files || true
done 2>/dev/null";
const EMPTY: &str =
    "rm -f /var/lib/transship/checkpoints/.fill; umount /var/lib/transship/checkpoints";

/// Brings to its end what has been cut off, and says who is still at work.
pub(crate) const RECOVER: &str = "transship recover --once 2>&1 || true
    pgrep -af '[f]reeze-guard|[r]eceive|checkpoint --image-pat[h]|criu swr[k]' || true";
/// What tells that of somebody.
const AT_WORK: [&str; 4] = ["-guard", "receive", "checkpoint --image-path", "criu swrk"];

/// Where something breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The command there, and not its guard.
    Command(Side),
    /// All that is called transship: the command, and what it has started by its name, but not its guards.
    All(Side),
    /// The connection, for longer than it may be silent.
    Link,
    /// The same, while CRIU waits for those who read memory.
    LinkInDump,
    Containerd(Side),
    Snapshotter(Side),
    Shim(Side),
    Criu(Side),
    Runtime(Side),
    Disk(Side),
}

use Fault::{All, Command, Containerd, Criu, Disk, Link, LinkInDump, Runtime, Shim, Snapshotter};
use Side::{Source, Target};

/// Those at the end are what `make test-long` alone has: a command or a runtime that goes on the target in the middle
/// of containerd's calls.
pub(crate) const FAULTS: [Fault; 18] = [
    Link,
    LinkInDump,
    Containerd(Source),
    Containerd(Target),
    Snapshotter(Source),
    Snapshotter(Target),
    Shim(Source),
    Shim(Target),
    Criu(Source),
    Runtime(Source),
    Disk(Source),
    Disk(Target),
    Command(Source),
    All(Source),
    Command(Target),
    All(Target),
    Criu(Target),
    Runtime(Target),
];

/// Where a migration goes from and to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way<'n> {
    pub(crate) from: &'n Node,
    pub(crate) to: &'n Node,
}

impl Way<'_> {
    pub(crate) fn turn(&mut self) {
        std::mem::swap(&mut self.from, &mut self.to);
    }

    fn side(&self, side: Side) -> &Node {
        match side {
            Source => self.from,
            Target => self.to,
        }
    }
}

/// Lets `node` move `what` to the other, whose ssh it has.
pub(crate) fn prepare(node: &Node, other: &Node, what: &str) -> anyhow::Result<()> {
    node.write_file("/usr/local/bin/link", LINK.replace("OTHER", other.name()))?;
    node.write_file("/usr/local/bin/move", MOVE.replace("WHAT", what))?;
    let prepare = "chmod +x /usr/local/bin/link /usr/local/bin/move; mkdir -p -m 0700 /var/lib/transship/checkpoints";
    Ok(node.shell(prepare).run()?)
}

/// Begins a migration with these arguments.
pub(crate) fn begin(from: &Node, arguments: &[&str]) -> anyhow::Result<()> {
    from.shell("rm -f /run/moved /var/log/move.log").run()?;
    let mut program = vec!["/usr/local/bin/move"];
    program.extend(arguments);
    Ok(from.start_daemon("move", &program)?)
}

/// The exit code of the migration.
pub(crate) fn wait_for_end(from: &Node) -> anyhow::Result<String> {
    Ok(poll_until("the end of the migration", PATIENCE, || {
        let code = from.shell("cat /run/moved || { ps axf; exit 1; }").output();
        let code = code.map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&code.stdout).trim().to_owned();
        match code.status.success() {
            true => Ok(said),
            false => Err(said),
        }
    })?)
}

impl Fault {
    /// Begins a migration, in which this breaks after `moment`, and gives its exit code.
    pub(crate) fn strike(
        self,
        way: Way<'_>,
        moment: Duration,
        arguments: &[&str],
        config: &ContainerdConfig,
    ) -> anyhow::Result<String> {
        let Way { from, .. } = way;
        let at = |side| way.side(side);
        if let Disk(side) = self {
            at(side).shell(SMALL_DISK).run()?;
        }
        begin(from, arguments)?;
        std::thread::sleep(moment);
        // What is to be killed may not be there yet, or not any more.
        let kill = |side, pattern: &str| {
            let kill = at(side).shell(&format!("pkill -KILL {pattern} || true"));
            { kill }.run()
        };
        match self {
            Command(Source) => kill(Source, "-f '^transship .*migrate|^transship migrate'")?,
            Command(Target) => kill(Target, "-f 'transship.* receive( |$)'")?,
            All(side) => kill(side, "-x transship")?,
            Link => from
                .shell("touch /run/cut; pkill -KILL -x ssh || true")
                .run()?,
            LinkInDump => from.shell(IN_DUMP).run()?,
            Containerd(side) => {
                at(side).stop_daemon("containerd", "KILL")?;
                at(side).start_containerd(config)?;
            }
            Snapshotter(side) => {
                at(side).stop_daemon("snapshotter", "KILL")?;
                at(side).start_snapshotter()?;
                // containerd tries again after a while.
                poll_until("the snapshotter through containerd", PATIENCE, || {
                    let listed = at(side).ctr(&["snapshots", "--snapshotter", "transship", "ls"]);
                    listed.map_err(|error| error.to_string())
                })?;
            }
            Shim(side) => kill(side, "-x containerd-shim")?,
            Criu(side) => kill(side, "-x criu")?,
            Runtime(side) => kill(side, "-x 'transship-runc|runc'")?,
            Disk(side) => at(side).shell(FILL).run()?,
        }
        let code = wait_for_end(from)?;
        from.shell("rm -f /run/cut").run()?;
        Ok(code)
    }

    /// What it leaves until a migration has come to its end.
    pub(crate) fn heal(self, way: Way<'_>) -> anyhow::Result<()> {
        match self {
            Disk(side) => Ok(way.side(side).shell(EMPTY).run()?),
            _ => Ok(()),
        }
    }
}

/// Whether [`RECOVER`] has found somebody at work.
pub(crate) fn is_at_work(said: &str) -> bool {
    AT_WORK.iter().any(|work| said.contains(work))
}

/// What the last migration from this node has said.
pub(crate) fn said(from: &Node, code: &str) -> String {
    let log = from.shell("tail -n 20 /var/log/move.log").read();
    format!("migrate ended with {code}: {}", log.unwrap_or_default())
}

/// splitmix64.
#[derive(Debug)]
pub(crate) struct Random {
    pub(crate) seed: u64,
    state: u64,
}

impl Random {
    /// Of the seed in the environment, or of the time.
    pub(crate) fn of_environment() -> anyhow::Result<Self> {
        let seed = match std::env::var("TRANSSHIP_FAULT_SEED") {
            Ok(seed) => seed.parse()?,
            Err(_) => SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)?
                .subsec_nanos()
                .into(),
        };
        Ok(Self { seed, state: seed })
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        let at = usize::try_from(self.below(of.len() as u64)).expect("it is below a length");
        of[at]
    }

    /// A moment of a migration that usually takes this long, or shortly after it.
    pub(crate) fn moment_of(&mut self, usual: Duration) -> anyhow::Result<Duration> {
        let micros = u64::try_from(usual.as_micros())?;
        Ok(Duration::from_micros(self.below(micros + micros / 10)))
    }

    /// Each of these kinds once at least, as far as `times` goes, then as they come; in any order.
    pub(crate) fn faults(&mut self, kinds: &[Fault], times: usize) -> anyhow::Result<Vec<Fault>> {
        let mut faults: Vec<Fault> = (0..times)
            .map(|run| { kinds.get(run).copied() }.unwrap_or_else(|| self.one_of(kinds)))
            .collect();
        for at in (1..faults.len()).rev() {
            let other = usize::try_from(self.below(at as u64 + 1))?;
            faults.swap(at, other);
        }
        Ok(faults)
    }
}
