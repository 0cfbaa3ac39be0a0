//! Debian's Docker, whose daemon has BuildKit in it, on our snapshotter and differ, compared with the same on
//! containerd's own.
//!
//! ```text
//!  ours: Diff ─> docker-registry ─┬─> dockerd, storage-driver transship: build, commit, push ─┐
//!                                 └─> dockerd, storage-driver overlayfs: build, commit, push ─┴─> docker-registry
//!  docker-registry ─┬─> ctr pull: transship, our differ ─────> tree ─┐
//!                   └─> ctr pull: overlayfs, walking ────────> tree ─┴─ equal? and without times, of both daemons?
//! ```

use anyhow::ensure;
use transship_testbed::{CommandRun as _, DebianProgram, Node, NodeOptions, Testbed};

use super::builders::{pull, push_changed};
use super::pulls::{REGISTRY, start_registry};
use super::{difference, log_counts, start};

const DRIVERS: [&str; 2] = ["transship", "overlayfs"];

/// Several stages, caches, links, and all that a layer can say.
const DOCKERFILE: &str = "
FROM 127.0.0.1:5000/ours:1 AS build
COPY change /change
RUN --network=none --mount=type=cache,target=/cache echo cached >/cache/x && sh -eu /change && rm /change
FROM 127.0.0.1:5000/ours:1
RUN rm -r /data/keep /new/deep
COPY --link --chown=7:8 files /data/keep
COPY --from=build /data /from-build
RUN --mount=type=bind,from=build,source=/etc,target=/bound cp /bound/group /copied
RUN rm /from-build/keep/3 && ln /copied /linked && busybox chmod 4755 /copied
";

/// In the image, which has no more than busybox.
const CHANGE: &str = "
    rm -r /data/keep; mkdir /data/keep; echo 3 >/data/keep/3; echo 4 >/data/keep/4; ln /data/keep/3 /data/linked
    rm -r /new/deep; rm /new/hardlink
    echo more >>/etc/group; chmod 2755 /bin/box; busybox chown 5:6 /data
    rm '/new/sym link'; mkdir '/new/sym link'; : >'/new/sym link/file'
    busybox mkfifo /data/fifo";

pub(super) fn docker_makes_of_images_what_it_makes_on_stock(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _containerd, image) = start(bed, &NodeOptions::default())?;
    start_registry(&node)?;
    push_changed(&node, &image)?;
    for program in [
        DebianProgram::DOCKER,
        DebianProgram::DOCKER_CLI,
        DebianProgram::DOCKER_BUILDX,
    ] {
        program.install(bed.settings(), &node)?;
    }
    node.write_file("/root/context/Dockerfile", DOCKERFILE)?;
    node.write_file("/root/context/change", CHANGE)?;
    node.shell(
        "cd /root/context; mkdir -p files/dir; echo 1 >files/dir/one; ln -s one files/dir/link
         touch -d 2001-02-03 files/dir/one",
    )
    .run()?;
    let count = |line: &str| log_counts(&node, line);
    let before = (count("layer written")?, count("layer applied")?);
    build(&node, "transship")?;
    let after = (count("layer written")?, count("layer applied")?);
    ensure!(
        after.0 > before.0 && after.1 > before.1,
        "{before:?}, and {after:?} afterwards"
    );
    build(&node, "overlayfs")?;
    for what in ["built", "committed"] {
        let mut trees = Vec::new();
        for driver in DRIVERS {
            let reference = format!("{REGISTRY}/{what}-{driver}:1");
            let theirs = pull(&node, &reference, "overlayfs")?;
            let ours = pull(&node, &reference, "transship")?;
            ensure!(
                ours == theirs,
                "{what}, {driver}:\n{}",
                difference(&theirs, &ours)
            );
            trees.push(without_times(&ours));
        }
        ensure!(trees[0].contains("./linked f"), "{}", trees[0]);
        ensure!(
            trees[0] == trees[1],
            "{what}:\n{}",
            difference(&trees[1], &trees[0])
        );
    }
    ensure!(log_counts(&node, "WARN")? == 0);
    Ok(())
}

/// Builds, changes and pushes images, and pulls one of them again.
fn build(node: &Node, driver: &str) -> anyhow::Result<()> {
    let config = serde_json::json!({
        "features": {"containerd-snapshotter": true},
        "storage-driver": driver,
        "containerd": "/run/containerd/containerd.sock",
        // Where containerd's layers lie, Docker's files can.
        "data-root": format!("/var/lib/containerd/docker-{driver}"),
        "bridge": "none",
        "iptables": false,
    });
    node.write_file("/root/docker.json", config.to_string())?;
    node.start_daemon(
        "dockerd",
        &["dockerd", "--config-file", "/root/docker.json"],
    )?;
    node.wait_for_daemon("dockerd", &["docker", "version"])?;
    node.shell(&format!(
        "docker info --format '{{{{.Driver}}}}' | grep -qx {driver}
         built={REGISTRY}/built-{driver}:1; committed={REGISTRY}/committed-{driver}:1
         docker build --quiet --network none --provenance=false --tag $built /root/context
         docker run --name change --network none --entrypoint /bin/sh $built -euc '
             rm -r /from-build/keep; mkdir /from-build/keep; echo 5 >/from-build/keep/5; mv /copied /moved
             rm /data/keep/dir/link; echo more >>/data/keep/dir/one'
         docker commit change $committed; docker rm change
         docker push --quiet $built; docker push --quiet $committed
         docker rmi --force $built $committed; docker builder prune --all --force >/dev/null
         docker pull --quiet $committed
         docker run --rm --network none --entrypoint /bin/sh $committed -euc \
             'cat /from-build/keep/5 /moved; ! test -e /data/keep/dir/link'
         docker rmi --force $committed"
    ))
    .run()?;
    Ok(node.stop_daemon("dockerd", "TERM")?)
}

/// The lines of a tree without the times, which are those of the building.
fn without_times(tree: &str) -> String {
    let is_time = |word: &str| word.len() == 10 && word.bytes().all(|it| it.is_ascii_digit());
    let lines = tree.lines().map(|line| {
        let words = line.split(' ').filter(|word| !is_time(word));
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}
