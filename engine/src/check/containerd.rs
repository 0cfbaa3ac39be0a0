//! containerd: its version, our plugins in it, and the runtimes of its CRI.
//!
//! What the running CRI is configured with is in the verbose answer of `Status`: `info["config"]`, a
//! JSON object; `.containerd.runtimes.<name>.options.BinaryName`, `.PodAnnotations`.

use k8s_cri::v1::StatusRequest;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::Value;

use super::{Finding, Version};
use transship_containerd::Containerd;

const DIFF_PLUGINS: Version = Version(1, 7, 4);

/// All of it.
pub async fn findings(node: &Containerd) -> Vec<Finding> {
    let mut findings = Vec::new();
    let version = match node.version().await {
        Ok(version) => version,
        Err(error) => {
            let found = crate::error::one_line(&error);
            return vec![Finding::problem("containerd", found, "see its log")];
        }
    };
    findings.push(Finding::ok("containerd", version.clone()));
    let version = Version::find(&version);
    findings.push(plugin(
        node.snapshotters().await.unwrap_or_default(),
        "snapshotter",
        "transship",
        "restored containers use the built-in one",
    ));
    if version.is_none_or(|version| version >= DIFF_PLUGINS) {
        findings.push(plugin(
            node.differs().await.unwrap_or_default(),
            "differ",
            "transship-diff",
            "layers are made by the walking differ",
        ));
    }
    findings.extend(super::layers::findings(node).await);
    findings.extend(runtimes(node).await);
    findings
}

fn plugin(loaded: Vec<String>, what: &'static str, name: &str, without: &str) -> Finding {
    if loaded.iter().any(|plugin| plugin == name) {
        return Finding::ok(what, name);
    }
    let found = format!("{name} is not among {}: {without}", loaded.join(", "));
    let remedy = "start transship-snapshotter and see config/containerd-*.toml";
    Finding::note(what, found, remedy)
}

async fn runtimes(node: &Containerd) -> Vec<Finding> {
    let mut client = RuntimeServiceClient::new(node.channel());
    let answer = client.status(StatusRequest { verbose: true }).await;
    let config = match answer {
        Ok(answer) => answer
            .into_inner()
            .info
            .remove("config")
            .unwrap_or_default(),
        Err(status) => {
            let found = format!("does not answer: {}", status.message());
            return vec![Finding::note(
                "CRI",
                found,
                "without it pods are out of reach",
            )];
        }
    };
    match serde_json::from_str(&config) {
        Ok(config) => judge_runtimes(&config),
        Err(_) => vec![Finding::note(
            "CRI",
            "does not tell its configuration",
            "compare it with config/containerd-*.toml",
        )],
    }
}

fn judge_runtimes(config: &Value) -> Vec<Finding> {
    let runtimes = config["containerd"]["runtimes"].as_object();
    let mut findings = Vec::new();
    for (name, runtime) in runtimes.into_iter().flatten() {
        let binary = runtime["options"]["BinaryName"]
            .as_str()
            .unwrap_or_default();
        let front = binary.rsplit('/').next().unwrap_or_default();
        if !front.starts_with("transship-") {
            continue;
        }
        let passed = runtime["PodAnnotations"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .any(|pattern| matches!(pattern, "dev.transship/*" | "*"));
        findings.push(match passed {
            true => Finding::ok("runtime", format!("{name} is {binary}")),
            false => Finding::problem(
                "runtime",
                format!("{name} is {binary}, but the annotations of pods do not reach it"),
                "pod_annotations = [\"dev.transship/*\"] in its section",
            ),
        });
    }
    if findings.is_empty() {
        findings.push(Finding::problem(
            "runtime",
            "no runtime of the CRI is transship-runc, so no pod can be restored",
            "BinaryName = \"/usr/local/bin/transship-runc\" as in config/containerd-*.toml",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_runtime_needs_the_front_and_the_annotations() {
        let config = |binary: &str, annotations: Value| {
            json!({"containerd": {"runtimes": {"runc": {
                "options": {"BinaryName": binary}, "PodAnnotations": annotations}}}})
        };
        for (config, verdict) in [
            (
                config("/b/transship-runc", json!(["dev.transship/*"])),
                Verdict::Ok,
            ),
            (config("/b/transship-runc", json!(null)), Verdict::Problem),
            (config("runc", json!(["dev.transship/*"])), Verdict::Problem),
            (json!({}), Verdict::Problem),
        ] {
            let findings = judge_runtimes(&config);
            assert_eq!(findings[0].verdict, verdict, "{config}");
        }
    }
}
