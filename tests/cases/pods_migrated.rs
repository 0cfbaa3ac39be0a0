//! A pod of three containers that share memory moves in one migration, there and back: each counts on without
//! a gap, one copy runs, whatever fails or is killed.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, Pod, PodNamespaces, Testbed, Tree,
    journey, poll_until,
};

use crate::Case;
use crate::moments::{paced_front, tells_how_it_ended};
use crate::package_image::PUBLIC_KEY;
use crate::pods_shared::{
    Lines, ROLES, fill_scratch, run_mates, run_mates_of, steps, steps_with, volume_dir, wait_for,
};

const PATIENCE: Duration = Duration::from_secs(90);
const POD: (&str, &str) = ("shop", "mates");
const MATES: &str = "--pod shop/mates --volumes emptydir --tcp established";
/// What is told from other runtimes by its name.
const FRONT: &str = "/usr/local/lib/paced/transship-runc";

/// The moments of the front.
const MOMENTS: &str = r#"    # The second of the three.
    *" create "*)
        # What the shim has mounted is filled.
        bundle=$(echo "$*" | sed 's/.* --bundle \([^ ]*\) .*/\1/')
        [ ! -e "$bundle/rootfs/own-file" ] || echo >>/run/filled
        # One whose `create` has answered may still be restored.
        held=$(grep -ls ^held /run/transship/pods/*/restore/*/state | wc -l)
        [ "$held" = 0 ] || stop_at create
        /usr/local/bin/transship-runc "$@" || exit
        [ "$held" != 2 ] || stop_at held
        exit
        ;;
    *" transship-release "*)
        stop_at release
        /usr/local/bin/transship-runc "$@" || exit
        stop_at released
        exit
        ;;"#;
/// Restores one container, and not the next one.
const FAILING_CRIU: &str = r#"#!/bin/sh
if [ "$1" = swrk ] && ls /run/transship/pods/*/restore/*/holder >/dev/null 2>&1; then exit 1; fi
exec /usr/local/sbin/criu.real "$@"
"#;
const MOVE: &str = r#"#!/bin/sh
transship migrate --pod shop/mates --to "$1" --volumes emptydir --tcp established --link-timeout 5 \
    --allow unmasked-paths --before-restore "#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "pod_migrated",
        tree: Tree::Forky,
        run: a_pod_moves_in_one_migration,
    })
}

fn a_pod_moves_in_one_migration(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    bed.link(&a, &b)?;
    let pause = Image::pause(bed.settings())?;
    for node in [&a, &b] {
        node.shell("mkdir -p /usr/local/lib/paced").run()?;
        node.write_file(FRONT, paced_front(MOMENTS))?;
        node.write_file("/usr/local/bin/move", tells_how_it_ended(MOVE))?;
        node.shell("chmod +x /usr/local/lib/paced/transship-runc /usr/local/bin/move")
            .run()?;
        node.start_snapshotter()?;
        node.start_containerd(&ContainerdConfig {
            transship_diff: false,
            runtime_binary: Some(FRONT.to_owned()),
            ..ContainerdConfig::transship()
        })?;
        node.import_image_into("k8s.io", &pause, "transship")?;
    }
    // What comes with a migration is signed by nobody.
    let rules = format!("[checkpoints]\nsigned-by = [\"{PUBLIC_KEY}\"]\n");
    b.write_file("/etc/transship/node.toml", rules)?;
    let busybox = bed.tree_dir().join("bin/busybox");
    let mates = Image::podmate(bed.settings(), &busybox)?;
    a.import_image_into("k8s.io", &mates, "transship")?;
    let to_b = bed.ssh(&a, &b)?;
    let to_a = bed.ssh(&b, &a)?;
    let cri = a.cri()?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    run_mates(&a, &cri, &pod)?;
    fill_scratch(&a, &pod)?;
    wait_for(&a, &pod, [20; 3])?;
    a.shell("for pid in $(pgrep -x podmate); do echo content >/proc/$pid/root/own-file; done")
        .run()?;

    all_reasons_at_once(&a, &b, &pod, &to_b)?;
    a_restore_that_fails_leaves_nothing(&a, &b, &pod, &to_b)?;

    b.shell("rm -f /run/filled").run()?;
    let told = { a.command("/usr/local/bin/move") }.arg(&to_b).read()?;
    runs_only(&b, &a, &pod).with_context(|| told.clone())?;
    ensure!(
        told.contains("the pod \"shop/mates\" runs on the other node"),
        "{told}"
    );
    let scratch = volume_dir(&pod, "scratch");
    let content = b.shell(&format!(
        "cat {scratch}/symlink; stat -c %u:%g {scratch}/link"
    ));
    ensure!(
        { content }.read()? == "content\n12:34\n",
        "the emptyDir came along"
    );
    // Else their mounts would be taken away in the freeze, and the kernel would write out the disk for that.
    let filled = b.shell(
        "wc -l </run/filled; cat $(pgrep -x podmate | sed 's,.*,/proc/&/root/own-file,') | sort | uniq -c | xargs",
    );
    let filled = { filled }.read()?;
    ensure!(filled == "3\n3 content\n", "when `create` came: {filled}");
    journey::check_no_pod_left(&a)?;

    cut_at(&b, &a, &pod, &to_a, "frozen", Cut::Source, Runs::Here)?;
    cut_at(&b, &a, &pod, &to_a, "create", Cut::Target, Runs::Here)?;
    cut_at(&b, &a, &pod, &to_a, "held", Cut::Held, Runs::Here)?;
    cut_at(&b, &a, &pod, &to_a, "released", Cut::Target, Runs::There)?;
    cut_at(&a, &b, &pod, &to_b, "release", Cut::Source, Runs::There)?;
    into_the_pod_of_a_kubelet(&b, &a, &pod, &to_a)?;
    for node in [&a, &b] {
        journey::check_no_pod_left(node)?;
        let script =
            "cd /var/lib/transship; find checkpoints migrations -mindepth 1 2>/dev/null || true";
        let left = node.shell(script).read()?;
        ensure!(left.is_empty(), "left: {left}");
    }
    Ok(())
}

/// A kubelet, and what the operator has to allow, of each container.
fn all_reasons_at_once(a: &Node, b: &Node, pod: &Pod, to: &str) -> anyhow::Result<()> {
    b.shell("cp /bin/sleep /run/kubelet").run()?;
    b.start_daemon("kubelet", &["/run/kubelet", "1000"])?;
    let migrate = ["migrate", "--pod", "shop/mates", "--to", to];
    let all = ["--volumes", "emptydir", "--tcp", "established"];
    let said = { a.command("transship") }
        .args(migrate)
        .args(all)
        .read_failure()?;
    for reason in [
        "a kubelet runs here",
        "\"server\"",
        "\"client\"",
        "\"sharer\" it wants",
        "--allow unmasked-paths",
    ] {
        ensure!(said.contains(reason), "{reason:?} is not in {said}");
    }
    b.stop_daemon("kubelet", "KILL")?;
    // Before the other node is asked.
    let said = { a.command("transship") }.args(migrate).read_failure()?;
    ensure!(
        said.contains("--volumes emptydir") || said.contains("--tcp"),
        "{said}"
    );
    runs_only(a, b, pod)?;
    nothing_is_there(b, pod)
}

fn a_restore_that_fails_leaves_nothing(
    a: &Node,
    b: &Node,
    pod: &Pod,
    to: &str,
) -> anyhow::Result<()> {
    b.write_file("/run/failing-criu", FAILING_CRIU)?;
    b.shell(
        "cp $(command -v criu) /usr/local/sbin/criu.real
         install -m 0755 /run/failing-criu /usr/local/sbin/criu",
    )
    .run()?;
    a.command("/usr/local/bin/move").arg(to).run()?;
    let code = a.shell("cat /run/moved").read()?;
    ensure!(code.trim() == "5", "exit code {code}");
    b.shell("rm /usr/local/sbin/criu /usr/local/sbin/criu.real")
        .run()?;
    runs_only(a, b, pod)?;
    nothing_is_there(b, pod)
}

/// Neither what the CRI has of a pod, nor its image, its directories or files.
fn nothing_is_there(node: &Node, pod: &Pod) -> anyhow::Result<()> {
    journey::check_no_pod_left(node)?;
    let script = format!(
        "ctr -n k8s.io images ls -q | grep mate || true
         ls -d /var/lib/kubelet/pods/{0} /var/log/pods/*{0} /var/lib/transship/checkpoints/migration-* \
             /run/transship/opened/* \
             2>/dev/null || true",
        pod.uid()
    );
    let left = node.shell(&script).read()?;
    ensure!(left.is_empty(), "left: {left}");
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Source,
    Target,
    /// The second of the three containers that are held there.
    Held,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runs {
    Here,
    There,
}

/// Kills a side of the migration at a moment; the pod runs on where that moment decides.
fn cut_at(
    from: &Node,
    to: &Node,
    pod: &Pod,
    link: &str,
    moment: &str,
    cut: Cut,
    runs: Runs,
) -> anyhow::Result<()> {
    let stops = if moment == "frozen" { from } else { to };
    for node in [from, to] {
        node.shell("rm -f /run/at-* /run/moved").run()?;
    }
    stops.shell(&format!("touch /run/stop-at-{moment}")).run()?;
    let has_kubelet = cut == Cut::Source;
    if has_kubelet {
        from.shell("cp /bin/sleep /run/kubelet; rm -f /var/log/kubelet.log")
            .run()?;
        from.start_daemon("kubelet", &["/run/kubelet", "1000"])?;
    }
    from.start_daemon("move", &["/usr/local/bin/move", link])?;
    poll_until(moment, PATIENCE, || {
        let reached = stops.shell(&format!("test -e /run/at-{moment}")).run();
        reached.map_err(|error| {
            let said = from.shell("cat /run/moved /var/log/move.log").read();
            format!("{error}: {said:?}")
        })
    })?;
    let mark = format!("/var/lib/transship/moved/{}", pod.uid());
    if has_kubelet {
        { from.shell(&format!("test -s {mark}")).run() }
            .context("from the freeze on it starts nothing of the pod here")?;
    }
    match cut {
        Cut::Source => from.shell("pkill -KILL -x transship").run()?,
        Cut::Target => to.shell("pkill -KILL -x transship").run()?,
        Cut::Held => to.shell("pkill -KILL -f '[p]odmate client'").run()?,
    }
    stops.shell("rm -f /run/stop-at-*").run()?;
    let (runs, ended) = match runs {
        Runs::Here => (from, to),
        Runs::There => (to, from),
    };
    poll_until("one copy", PATIENCE, || {
        // A command that is still at work has the lock, and decides by itself.
        let recovered = { from.shell("transship recover --once 2>&1 || true") }.read();
        one_copy(runs, ended).map_err(|error| format!("{recovered:?}: {error}"))
    })?;
    runs_only(runs, ended, pod).with_context(|| format!("{cut:?} killed at: {moment}"))?;
    if has_kubelet {
        let not = if std::ptr::eq(runs, from) { "!" } else { "" };
        { from.shell(&format!("{not} test -e {mark}")).run() }
            .with_context(|| format!("the mark, with {cut:?} killed at: {moment}"))?;
        from.stop_daemon("kubelet", "KILL")?;
    }
    from.wait_for_daemon_end("move")?;
    journey::check_no_pod_left(ended)
}

/// Kubelet makes a pod of its own, starts one container after the other, and waits for each.
fn into_the_pod_of_a_kubelet(from: &Node, to: &Node, pod: &Pod, link: &str) -> anyhow::Result<()> {
    to.shell("cp /bin/sleep /run/kubelet").run()?;
    to.start_daemon("kubelet", &["/run/kubelet", "1000"])?;
    let cri = to.cri()?;

    // Of three containers one never comes.
    let bounded = format!("{MATES} --max-freeze 5s");
    let waiting = begin_waiting(&cri, from, link, "mates-late", &bounded)?;
    let two = run_mates_of(to, &cri, &waiting, &ROLES[..2]);
    from.wait_for_daemon_end("waits")?;
    runs_only(from, to, pod).with_context(|| format!("{two:?}"))?;
    // It may have been killed, and the other side does not know yet.
    let given_up = format!(
        "grep -q 'given up' /run/transship/pods/{}/arrival",
        waiting.id
    );
    poll_until("the end of the other side", PATIENCE, || {
        { to.shell(&given_up).run() }.map_err(|error| error.to_string())
    })?;
    let Err(refused) = run_mates_of(to, &cri, &waiting, &ROLES[2..]) else {
        anyhow::bail!("it starts after all");
    };
    ensure!(refused.to_string().contains("was given up"), "{refused}");
    cri.remove_pod(&waiting)?;

    // Nobody who starts a container waits for an image that is pulled after that.
    let images = "ctr -n k8s.io images";
    to.shell(&format!(
        "{images} export /run/mates.tar $({images} ls -q | grep mate | grep -v @)
         digest=$({images} ls | awk '/mate/ {{ print $3; exit }}')
         {images} ls | awk -v digest=$digest '$3 == digest {{ print $1 }}' | xargs {images} rm --sync"
    ))
    .run()?;
    let again = begin_waiting(&cri, from, link, "mates-again", MATES)?;
    says_of_arrival(to, &again, "lacks images")?;
    to.shell(&format!(
        "{images} import --snapshotter transship /run/mates.tar"
    ))
    .run()?;
    says_of_arrival(to, &again, "coming")?;

    // What has been started is held until all are.
    let first = run_mates_of(to, &cri, &again, &ROLES[..1])?;
    let before = steps(to, &again, ROLES[0])?.len();
    ensure!(cri.runs(&first[0])?, "to kubelet it runs");
    run_mates_of(to, &cri, &again, &ROLES[1..2])?;
    ensure!(
        steps(to, &again, ROLES[0])?.len() == before,
        "it runs already"
    );
    run_mates_of(to, &cri, &again, &ROLES[2..])?;
    from.wait_for_daemon_end("waits")?;
    runs_only(to, from, &again)?;
    journey::check_no_pod_left(from)?;
    cri.remove_pod(&again)?;
    Ok(to.stop_daemon("kubelet", "KILL")?)
}

/// Waits until the starts of a pod's containers are told so.
fn says_of_arrival(node: &Node, pod: &Pod, word: &str) -> anyhow::Result<()> {
    let said = format!("grep -qx '{word}' /run/transship/pods/{}/arrival", pod.id);
    Ok(poll_until(word, PATIENCE, || {
        { node.shell(&said).run() }.map_err(|error| error.to_string())
    })?)
}

/// Begins a migration that waits for a pod, and makes the sandbox of that.
pub(crate) fn begin_waiting(
    cri: &Cri,
    from: &Node,
    link: &str,
    name: &str,
    what: &str,
) -> anyhow::Result<Pod> {
    let migration = begin(from, link, what)?;
    let annotation = [("dev.transship/receive", migration.as_str())];
    Ok(cri.run_pod(("shop", name), &annotation, PodNamespaces::Usual)?)
}

/// Begins a migration that waits for a pod, as the daemon `waits`; gives what its annotation says.
pub(crate) fn begin(from: &Node, link: &str, what: &str) -> anyhow::Result<String> {
    let migrate = format!("exec transship migrate {what} --to '{link}' --wait-for-pod");
    from.shell("rm -f /var/log/waits.log").run()?;
    from.start_daemon("waits", &["sh", "-c", &migrate])?;
    let named = poll_until("the name of the migration", PATIENCE, || {
        let said = from.shell("cat /var/log/waits.log").read();
        let said = said.map_err(|error| error.to_string())?;
        let named = said.split_once("dev.transship/receive: ");
        named.map(|(_, name)| name[..32].to_owned()).ok_or(said)
    });
    Ok(named?)
}

pub(crate) fn one_copy(runs: &Node, ended: &Node) -> Result<(), String> {
    let count = |node: &Node| {
        let count = node.shell("pgrep -c -x podmate || true").read();
        count.map_err(|error| error.to_string())
    };
    match (count(runs)?.trim(), count(ended)?.trim()) {
        ("3", "0") => Ok(()),
        other => Err(format!("processes here and there: {other:?}")),
    }
}

/// Each container of the one copy goes on, and has missed nothing since its first step.
pub(crate) fn runs_only(runs: &Node, ended: &Node, pod: &Pod) -> anyhow::Result<()> {
    runs_only_with(Lines::AllThere, runs, ended, pod)
}

/// The same, and what its log has to say of that.
pub(crate) fn runs_only_with(
    lines: Lines,
    runs: &Node,
    ended: &Node,
    pod: &Pod,
) -> anyhow::Result<()> {
    let of_role = |role| steps_with(lines, runs, pod, role);
    let last = |role| -> Result<u64, String> {
        let steps = of_role(role).map_err(|error| format!("{error:#}"))?;
        let last = steps.last().ok_or_else(|| format!("{role} has no log"))?;
        Ok(last.n)
    };
    let all = || -> Result<[u64; 3], String> {
        let [one, two, three] = ROLES.map(last);
        Ok([one?, two?, three?])
    };
    let now = poll_until("one copy", PATIENCE, || {
        one_copy(runs, ended)?;
        all()
    })?;
    poll_until("the steps of all", PATIENCE, || {
        let then = all()?;
        let have = now.iter().zip(then).all(|(now, then)| then >= now + 10);
        have.then_some(())
            .ok_or_else(|| format!("{now:?}, and {then:?}"))
    })?;
    for role in ROLES {
        let first = of_role(role)?[0];
        ensure!(first.n == 1, "{role} begins with {first:?}");
    }
    Ok(())
}

/// How far the containers of the one copy have come, in the memory that they share.
pub(crate) fn slots(runs: &Node, ended: &Node) -> Result<[u64; 3], String> {
    one_copy(runs, ended)?;
    let read = "od -A n -t u8 -N 24 -w24 /proc/$(pgrep -x -o podmate)/root/dev/shm/podmate";
    let text = runs.shell(read).read().map_err(|error| error.to_string())?;
    let slots = text.split_whitespace().map(str::parse);
    let slots = { slots.collect::<Result<Vec<u64>, _>>() }.map_err(|error| error.to_string())?;
    slots.try_into().map_err(|_| text)
}

/// All go on from there in that memory. Each of the processes ends at the first step that is missing or there twice, so none
/// was started anew.
pub(crate) fn goes_on_from(before: &[u64; 3], runs: &Node, ended: &Node) -> anyhow::Result<()> {
    let least = poll_until("one copy", PATIENCE, || slots(runs, ended))?;
    poll_until("all to go on", PATIENCE, || {
        let now = slots(runs, ended)?;
        let mut all = before.iter().zip(&least).zip(&now);
        all.all(|((before, least), now)| now > before && *now > least + 10)
            .then_some(())
            .ok_or_else(|| format!("{before:?}, {least:?}, {now:?}"))
    })?;
    Ok(())
}
