//! Tests on real nodes, one case per tree: `node_<tree>_<what>`; `vm_<tree>_<what>` in the machine of
//! `make test-vm`, where the nodes have cgroup v2 alone and the machine has systemd.
//!
//! ```text
//! <case file>::cases() ─> Case ─> libtest-mimic Trial ─> Testbed on the case's tree ─> the case
//! ```
//!
//! A case gets an empty testbed; when it fails, the logs of its nodes are printed. Without root or
//! mmdebstrap a case is skipped with its reason, or fails if `REQUIRE` lists `node`; elsewhere than in
//! that machine `vm_` cases are skipped. A case called `long_...` runs in `make test-long` alone.

mod admission;
mod conditions;
mod conditions_of_nodes;
mod consumed_once;
mod crit;
mod criu_options;
mod criu_options_alone;
mod crun;
mod differ;
mod faults;
mod foreign_checkpoints;
mod foreign_streams;
mod forged_files;
mod forged_images;
mod forged_names;
mod forged_opens;
mod forged_volumes;
mod freeze_containerd;
mod frozen;
mod image_documents;
mod image_labels;
mod images_incomplete;
mod images_with_links;
mod journey;
mod kubernetes;
mod lost_task;
mod migration_address;
mod migration_begun;
mod migration_cut;
mod migration_direct;
mod migration_faults;
mod migration_files;
mod migration_interrupted;
mod migration_keeps;
mod migration_lazy;
mod migration_undecided;
mod migration_variants;
mod moments;
mod nerdctl;
mod network_sysctls;
mod node_api;
mod not_ours;
mod one_copy;
mod package;
mod package_foreign;
mod package_image;
mod package_podman;
mod package_registry;
mod package_sealed;
mod pod_refusals;
mod pods;
mod pods_aside;
mod pods_begun;
mod pods_closed;
mod pods_fifo;
mod pods_kubelet;
mod pods_memory;
mod pods_migrated;
mod pods_migrated_ended;
mod pods_moved;
mod pods_moved_volumes;
mod pods_ordinary;
mod pods_own_files;
mod pods_shared;
mod pods_volumes;
mod power_cut;
mod programs;
mod random_faults;
mod random_faults_of_pods;
mod readme;
mod reference;
mod remedies;
mod restore_cut;
mod restore_killed;
mod restore_mounts;
mod snapshotter;
mod stale_namespaces;
mod starts;
mod stock;
mod sysv_left;
mod tcp_journeys;
mod teardown;
mod upperdir_told;
mod vm_cgroups;
mod vm_units;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use transship_testbed::{Need, Needs, Settings, Testbed, Tree};

/// One test on one tree.
struct Case {
    /// What comes after `<need>_<tree>_`.
    what: &'static str,
    tree: Tree,
    run: fn(&Testbed) -> anyhow::Result<()>,
}

impl Case {
    /// The same test on each of the trees.
    fn on_all_trees(
        what: &'static str,
        run: fn(&Testbed) -> anyhow::Result<()>,
    ) -> impl Iterator<Item = Case> {
        Tree::ALL
            .into_iter()
            .map(move |tree| Case { what, tree, run })
    }

    fn into_trial(self, place: Place, settings: &Settings, needs: &Needs) -> Trial {
        let (settings, needs) = (settings.clone(), needs.clone());
        let prefix = match place {
            Place::Anywhere => "node",
            Place::Vm => "vm",
        };
        Trial::ignorable_test(format!("{prefix}_{}_{}", self.tree, self.what), move || {
            let in_vm = (place == Place::Vm).then_some(Need::Vm);
            for need in in_vm.into_iter().chain([Need::Node(self.tree)]) {
                match need.missing(&settings) {
                    Some(reason) if needs.requires(need) => return Err(reason.into()),
                    Some(reason) => return Ok(Completion::ignored_with(reason)),
                    None => {}
                }
            }
            let bed = Testbed::new(self.tree, &settings).map_err(|error| failed(&error.into()))?;
            let result = (self.run)(&bed);
            if let Err(error) = &result {
                // Here and at the end: of much output somebody may see a part.
                eprintln!("{error:#}");
                for node in bed.nodes() {
                    eprintln!("{}", node.logs());
                }
            }
            bed.stop().map_err(|error| failed(&error.into()))?;
            result
                .map(|()| Completion::Completed)
                .map_err(|error| failed(&error))
        })
        .with_ignored_flag(self.what.starts_with("long_"))
    }
}

/// Where a case runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On whatever Linux this is.
    Anywhere,
    /// In the machine of `make test-vm` alone.
    Vm,
}

/// The cases of a file. One chain of all of them is a type that the compiler gives up at.
fn each(cases: impl Iterator<Item = Case> + 'static) -> Box<dyn Iterator<Item = Case>> {
    Box::new(cases)
}

fn failed(error: &anyhow::Error) -> Failed {
    format!("{error:#}").into()
}

fn main() -> ExitCode {
    if let Some(code) = transship_testbed::node_role(std::env::args_os()) {
        return code;
    }
    let arguments = Arguments::from_args();
    let executable = match std::env::current_exe() {
        Ok(executable) => executable,
        Err(error) => {
            eprintln!("cannot find this program: {error}");
            return ExitCode::FAILURE;
        }
    };
    let settings = Settings::from_variables(|name| std::env::var_os(name), executable);
    let needs = Needs::from_require(&std::env::var("REQUIRE").unwrap_or_default());
    if let Some(factor) = std::env::var("TRANSSHIP_PATIENCE")
        .ok()
        .and_then(|factor| factor.parse().ok())
    {
        transship_testbed::stretch_deadlines(factor);
    }
    let cases = [
        each(starts::cases()),
        each(admission::cases()),
        each(forged_files::cases()),
        each(forged_images::cases()),
        each(forged_names::cases()),
        each(forged_opens::cases()),
        each(forged_volumes::cases()),
        each(conditions::cases()),
        each(conditions_of_nodes::cases()),
        each(consumed_once::cases()),
        each(crit::cases()),
        each(criu_options::cases()),
        each(criu_options_alone::cases()),
        each(crun::cases()),
        each(differ::cases()),
        each(foreign_checkpoints::cases()),
        each(image_documents::cases()),
        each(foreign_streams::cases()),
        each(freeze_containerd::cases()),
        each(frozen::cases()),
        each(images_incomplete::cases()),
        each(images_with_links::cases()),
        each(image_labels::cases()),
        each(journey::cases()),
        each(kubernetes::cases()),
        each(lost_task::cases()),
        each(migration_address::cases()),
        each(migration_begun::cases()),
        each(migration_cut::cases()),
        each(migration_variants::cases()),
        each(migration_direct::cases()),
        each(migration_keeps::cases()),
        each(pods_migrated::cases()),
        each(pods_moved::cases()),
        each(pods_moved_volumes::cases()),
        each(migration_faults::cases()),
        each(migration_files::cases()),
        each(migration_interrupted::cases()),
        each(migration_lazy::cases()),
        each(migration_undecided::cases()),
        each(nerdctl::cases()),
        each(network_sysctls::cases()),
        each(node_api::cases()),
        each(not_ours::cases()),
        each(one_copy::cases()),
        each(package::cases()),
        each(package_foreign::cases()),
        each(package_podman::cases()),
        each(package_registry::cases()),
        each(package_sealed::cases()),
        each(pod_refusals::cases()),
        each(pods::cases()),
        each(pods_closed::cases()),
        each(pods_fifo::cases()),
        each(pods_memory::cases()),
        each(pods_aside::cases()),
        each(pods_begun::cases()),
        each(pods_kubelet::cases()),
        each(pods_ordinary::cases()),
        each(pods_migrated_ended::cases()),
        each(pods_own_files::cases()),
        each(pods_shared::cases()),
        each(pods_volumes::cases()),
        each(power_cut::cases()),
        each(programs::cases()),
        each(random_faults::cases()),
        each(random_faults_of_pods::cases()),
        each(readme::cases()),
        each(reference::cases()),
        each(remedies::cases()),
        each(restore_cut::cases()),
        each(restore_killed::cases()),
        each(restore_mounts::cases()),
        each(snapshotter::cases()),
        each(stale_namespaces::cases()),
        each(stock::cases()),
        each(sysv_left::cases()),
        each(tcp_journeys::cases()),
        each(teardown::cases()),
        each(upperdir_told::cases()),
    ];
    let in_vm = vm_cgroups::cases()
        .chain(vm_units::cases())
        .chain(programs::vm_cases());
    let trials = { cases.into_iter().flatten() }
        .map(|case| (Place::Anywhere, case))
        .chain(in_vm.map(|case| (Place::Vm, case)))
        .map(|(place, case)| case.into_trial(place, &settings, &needs))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
