//! What must be there where a container is restored, told from the checkpoint alone.

use serde::Serialize;
use serde_json::Value;
use transship_checkpoint::manifest::{Container, Manifest};

use crate::socket::Socket;

/// Where kubelet and the CRI put what each pod gets anew.
const OF_THE_POD: [&str; 3] = [
    "/var/lib/kubelet/pods/",
    "/var/lib/containerd/",
    "/run/containerd/",
];

/// One thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Requirement {
    /// `architecture`, `image`, `path`, `namespaces`, `address`, `device` or `page size`.
    pub kind: &'static str,
    /// Which one.
    pub what: String,
    /// What for.
    pub why: String,
}

/// What the container needs. A spec that cannot be parsed asks for nothing.
pub(crate) fn requirements(
    manifest: &Manifest,
    container: &Container,
    spec: &[u8],
    sockets: &[Socket],
) -> Vec<Requirement> {
    let mut found = Vec::new();
    let mut need = |kind, what: String, why: String| {
        let requirement = Requirement { kind, what, why };
        if !found.contains(&requirement) {
            found.push(requirement);
        }
    };
    let architecture = manifest.source.architecture.clone();
    need("architecture", architecture, "its code".to_owned());
    if let Some(size) = manifest.source.page_size {
        need("page size", size.to_string(), "its memory".to_owned());
    }
    let image = &container.image;
    if !image.name.is_empty() {
        let digest = match image.digest.as_str() {
            "" => String::new(),
            digest => format!("@{digest}"),
        };
        need(
            "image",
            format!("{}{digest}", image.name),
            "the files below its own".to_owned(),
        );
    }
    if !container.joined.is_empty() {
        let why = "shared with a sandbox: --sandbox or --new-namespaces".to_owned();
        need("namespaces", container.joined.join(", "), why);
    }
    let spec: Value = serde_json::from_slice(spec).unwrap_or_default();
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
        let options = mount["options"].as_array().into_iter().flatten();
        let mut options = options.filter_map(Value::as_str);
        let is_bind = text("type") == "bind" || options.any(|it| it == "bind" || it == "rbind");
        let source = text("source");
        if is_bind && !OF_THE_POD.iter().any(|prefix| source.starts_with(prefix)) {
            need(
                "path",
                source,
                format!("mounted on {}", text("destination")),
            );
        }
    }
    for device in spec["linux"]["devices"].as_array().into_iter().flatten() {
        let path = device["path"].as_str().unwrap_or_default().to_owned();
        need("device", path, "it has it".to_owned());
    }
    for socket in sockets {
        if socket.protocol == "tcp" && socket.state == "connected" {
            let host = socket.local.rsplit_once(':').map_or("", |(host, _)| host);
            let is_loopback = host.starts_with("127.") || host == "[::1]";
            if let Some(peer) = socket.peer.as_ref().filter(|_| !is_loopback) {
                let why = format!("its end of the connection to {peer}, when it is kept");
                need("address", host.to_owned(), why);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::manifest::{Image, Source};

    use super::*;

    #[test]
    fn paths_and_addresses_of_the_node_are_told() {
        let container = Container {
            image: Image {
                name: "web:1".into(),
                digest: "sha256:00".into(),
                ..Image::default()
            },
            joined: vec!["network".into()],
            ..Container::default()
        };
        let manifest = Manifest {
            name: "web".into(),
            created: 0,
            source: Source {
                architecture: "x86_64".into(),
                page_size: Some(4096),
                ..Source::default()
            },
            ..Manifest::default()
        };
        let spec = br#"{"mounts": [
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind"]},
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "options": ["bind"],
             "source": "/var/lib/kubelet/pods/1/etc-hosts"}]}"#;
        let socket = |local: &str, state| Socket {
            protocol: "tcp",
            state,
            local: local.to_owned(),
            peer: Some("10.0.0.9:80".to_owned()),
            by: Vec::new(),
        };
        let sockets = [
            socket("10.0.0.5:4000", "connected"),
            socket("127.0.0.1:4000", "connected"),
            socket("0.0.0.0:80", "listening"),
        ];
        let found = requirements(&manifest, &container, spec, &sockets);
        let shown: Vec<_> = found.iter().map(|it| (it.kind, it.what.as_str())).collect();
        assert_eq!(
            shown,
            [
                ("architecture", "x86_64"),
                ("page size", "4096"),
                ("image", "web:1@sha256:00"),
                ("namespaces", "network"),
                ("path", "/srv/data"),
                ("address", "10.0.0.5"),
            ]
        );
        // What is no spec asks for nothing more.
        assert_eq!(requirements(&manifest, &container, b"x", &[]).len(), 4);
    }
}
