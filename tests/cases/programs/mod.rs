//! Servers as Debian ships them, moved there and back: alone, in a sandbox, and in a pod, with a client
//! that counts what was acknowledged.
//!
//! ```text
//!   client ── one operation after the other, each on a connection of its own ──> server
//!   acknowledged <= what the server has counted <= acknowledged + unanswered
//!
//!   servers.rs, interpreters.rs, stacks.rs   the programs: a row each
//!   ways.rs                       the three ways they move       client.rs  who counts
//!   table.rs                      what was seen, for docs/programs.md
//! ```
//!
//! `.ci/run` moves five of them, on one pair of nodes; `make test-programs` all of them, and writes the
//! table of docs/programs.md.

mod client;
mod interpreters;
mod servers;
mod stacks;
mod table;
mod ways;

use std::time::Instant;

use anyhow::Context as _;
use transship_testbed::{
    ContainerdConfig, DebianImage, Image, Node, PodSecurity, Testbed, Tree, Workload,
};

use crate::Case;

/// A program that moves.
#[derive(Debug)]
struct Program {
    name: &'static str,
    image: &'static DebianImage,
    /// One of our own programs, put into the image.
    ours: Option<Workload>,
    /// The Debian package whose version the table shows.
    package: &'static str,
    /// What the container runs, in bash.
    start: &'static str,
    /// In bash with what the image has, and with the server's address in `$A`: succeeds when the server
    /// has acknowledged.
    operation: &'static str,
    /// The same: prints how many operations the server has done.
    count: &'static str,
    /// The operation reaches the server from inside of its container alone.
    inside: bool,
    /// Arguments of `ctr run` that it needs.
    run: &'static [&'static str],
    /// What it may do in a pod.
    security: PodSecurity<'static>,
    alone: Expected,
    in_a_sandbox: Expected,
    in_a_pod: Expected,
}

/// What comes of a move.
#[derive(Debug, Clone, Copy)]
enum Expected {
    Works,
    /// It does with these flags, which are about the program and not about its client.
    With(&'static [&'static str]),
    /// It is refused while the program runs on, with an error that has this part.
    Refused(&'static str),
}

impl Program {
    const PLAIN: Program = Program {
        ours: None,
        name: "",
        image: &DebianImage::SERVERS,
        package: "",
        start: "",
        operation: "",
        count: "",
        inside: false,
        run: &[],
        security: PodSecurity {
            default_seccomp: true,
            protected_paths: true,
            ..PodSecurity::NONE
        },
        alone: Expected::Works,
        in_a_sandbox: Expected::Works,
        in_a_pod: Expected::Works,
    };

    fn image(&self, bed: &Testbed) -> anyhow::Result<Image> {
        let image = self.image.image(bed.settings())?;
        Ok(match self.ours {
            Some(ours) => {
                let reference = format!("transship.test/{}:1", self.name);
                image.with_program(&reference, ours, bed.settings())?
            }
            None => image,
        })
    }
}

/// Five that start quickly: a database with an append-only file, a cache, a web server with workers, an
/// event loop, processes that share memory.
const QUICK: [&Program; 5] = [
    &servers::REDIS,
    &servers::MEMCACHED,
    &servers::NGINX,
    &interpreters::PYTHON_ASYNCIO,
    &interpreters::PYTHON_FORK,
];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("programs", five_move as fn(&Testbed) -> anyhow::Result<()>),
        case("long_program_redis", |bed| moves(bed, &servers::REDIS)),
        case("long_program_memcached", |bed| {
            moves(bed, &servers::MEMCACHED)
        }),
        case("long_program_nginx", |bed| moves(bed, &servers::NGINX)),
        case("long_program_mariadb", |bed| moves(bed, &servers::MARIADB)),
        case("long_program_etcd", |bed| moves(bed, &servers::ETCD)),
        case("long_program_prometheus", |bed| {
            moves(bed, &servers::PROMETHEUS)
        }),
        case("long_program_rabbitmq", |bed| {
            moves(bed, &servers::RABBITMQ)
        }),
        case("long_program_python_asyncio", |bed| {
            moves(bed, &interpreters::PYTHON_ASYNCIO)
        }),
        case("long_program_python_fork", |bed| {
            moves(bed, &interpreters::PYTHON_FORK)
        }),
        case("long_program_python_spawn", |bed| {
            moves(bed, &interpreters::PYTHON_SPAWN)
        }),
        case("long_program_node_http", |bed| {
            moves(bed, &interpreters::NODE_HTTP)
        }),
        case("long_program_node_watch", |bed| {
            moves(bed, &interpreters::NODE_WATCH)
        }),
        case("long_program_node_watch_image", |bed| {
            moves(bed, &interpreters::NODE_WATCH_IMAGE)
        }),
        case("long_program_jvm", |bed| moves(bed, &interpreters::JVM)),
        case("long_program_jvm_zgc", |bed| {
            moves(bed, &interpreters::JVM_ZGC)
        }),
        case("long_program_supervisor", |bed| {
            moves(bed, &stacks::SUPERVISOR)
        }),
        case("long_program_php_jit", |bed| moves(bed, &stacks::PHP_JIT)),
        case("long_program_haproxy", |bed| moves(bed, &stacks::HAPROXY)),
        case("long_program_gunicorn_sqlite", |bed| {
            moves(bed, &stacks::GUNICORN)
        }),
        case("long_program_puma", |bed| moves(bed, &stacks::PUMA)),
        case("long_program_slapd", |bed| moves(bed, &stacks::SLAPD)),
        case("long_program_go", |bed| moves(bed, &interpreters::GO)),
        case("long_program_go_mptcp", |bed| {
            moves(bed, &interpreters::GO_MPTCP)
        }),
        case("long_program_tokio", |bed| moves(bed, &interpreters::TOKIO)),
        case("long_program_tmux", |bed| moves(bed, &interpreters::TMUX)),
    ]
    .into_iter()
}

/// In the machine of `make test-vm`, where programs of other users than root can be dumped.
pub(crate) fn vm_cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case(
            "program_postgresql",
            (|bed| moves(bed, &servers::POSTGRESQL)) as fn(&Testbed) -> anyhow::Result<()>,
        ),
        case("program_of_uid_1000", |bed| {
            moves(bed, &interpreters::PYTHON_OF_UID_1000)
        }),
    ]
    .into_iter()
}

/// Moves a program in all three ways, and keeps what was seen for the table.
fn moves(bed: &Testbed, program: &Program) -> anyhow::Result<()> {
    let image = program.image(bed)?;
    let [a, b] = &start_two(bed, &image)?;
    let ways = ways::Ways::new(bed, [a, b], program, &image);
    let began = Instant::now();
    // One that is killed in the emulated machine, which is slow, has said how far it came.
    let goes = |way: &str| eprintln!("{} {way}: {:?}", program.name, began.elapsed());
    ways.alone().context("alone")?;
    goes("alone");
    ways.in_a_sandbox().context("in a sandbox")?;
    goes("in a sandbox");
    ways.in_a_pod().context("in a pod")?;
    goes("in a pod");
    table::keep(bed, program)
}

/// With a client outside, all on one pair of nodes.
fn five_move(bed: &Testbed) -> anyhow::Result<()> {
    let image = DebianImage::SERVERS.image(bed.settings())?;
    let [a, b] = &start_two(bed, &image)?;
    for program in QUICK {
        let ways = ways::Ways::new(bed, [a, b], program, &image);
        let what = |way| format!("{} in a {way}", program.name);
        ways.in_a_sandbox().with_context(|| what("sandbox"))?;
        ways.in_a_pod().with_context(|| what("pod"))?;
    }
    Ok(())
}

/// Two linked nodes that both have the image.
fn start_two(bed: &Testbed, image: &Image) -> anyhow::Result<[Node; 2]> {
    let nodes = [bed.node("a")?, bed.node("b")?];
    let [a, b] = &nodes;
    bed.link(a, b)?;
    let pause = Image::pause(bed.settings())?;
    for node in &nodes {
        node.start_snapshotter()?;
        // containerd's own differ is optimised, ours is built as the tests are.
        node.start_containerd(&ContainerdConfig {
            transship_diff: false,
            ..ContainerdConfig::transship()
        })?;
        for namespace in ["default", "k8s.io"] {
            for image in [&pause, image] {
                node.import_image_into(namespace, image, "transship")?;
            }
        }
    }
    Ok(nodes)
}
