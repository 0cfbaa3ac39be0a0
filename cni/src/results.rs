//! What plugins have made, as libcni keeps it.
//!
//! ```text
//!  /var/lib/cni/results/<network>-<container>-<interface>
//!      { "kind": "cniCacheV1", "containerId", "config": base64, "ifName", "networkName",
//!        "capabilityArgs": { "portMappings": [{ "hostPort", "containerPort", "protocol", "hostIP" }] },
//!        "result": { "cniVersion", "interfaces": [{ "name", "mac", "sandbox" }],
//!                    "ips": [{ "address": "10.88.0.5/16", "interface": 2 }], ... } }
//! ```
//!
//! containerd's clients write the fields of a port as `HostPort`, `ContainerPort`, `Protocol` and `HostIP`.
//! Results before version 0.3.0 of the specification have `ip4` and `ip6` instead of lists.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use serde::Deserialize as _;
use serde_json::{Value, json};
use transship_path_error::During as _;

use crate::config::Network;
use crate::listing::list;
use crate::{Address, Attachment, CniError, PortMapping};

const KIND: &str = "cniCacheV1";

/// The networks of a container, by its results.
pub(crate) fn read(dir: &Path, container: &str) -> Result<Vec<Attachment>, CniError> {
    let mut found = Vec::new();
    for file in list(dir)? {
        let named = file.file_name().and_then(|name| name.to_str());
        // Its parts may have dashes themselves: what it says counts.
        if !named.is_some_and(|name| name.contains(container)) {
            continue;
        }
        let text = fs::read(&file).during("read", &file)?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        if json["kind"] == KIND && json["containerId"] == container {
            found.extend(attachment(&json));
        }
    }
    Ok(found)
}

/// The ports of the node that lead to containers, and to which.
pub(crate) fn ports(dir: &Path) -> Result<Vec<(String, PortMapping)>, CniError> {
    let mut found = Vec::new();
    for file in list(dir)? {
        let text = fs::read(&file).during("read", &file)?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        let container = json["containerId"].as_str().unwrap_or_default();
        let ports = ports_of(&json).into_iter();
        found.extend(ports.map(|port| (container.to_owned(), port)));
    }
    Ok(found)
}

fn ports_of(json: &Value) -> Vec<PortMapping> {
    let listed = json["capabilityArgs"]["portMappings"].as_array();
    let listed = listed.into_iter().flatten();
    { listed.filter_map(|port| PortMapping::deserialize(port).ok()) }.collect()
}

fn attachment(json: &Value) -> Option<Attachment> {
    let interface = json["ifName"].as_str()?.to_owned();
    let (addresses, mac) = given(&json["result"], &interface);
    Some(Attachment {
        network: json["networkName"].as_str()?.to_owned(),
        interface,
        addresses,
        mac,
        address: Address::New,
        ports: ports_of(json),
    })
}

/// The addresses and the hardware address of an interface of the container in a result.
pub(crate) fn given(result: &Value, interface: &str) -> (Vec<String>, String) {
    let interfaces = result["interfaces"].as_array();
    let interfaces = interfaces.map(Vec::as_slice).unwrap_or_default();
    let is_own = |it: &&Value| {
        it["name"] == interface && it["sandbox"].as_str().is_some_and(|it| !it.is_empty())
    };
    let mac = interfaces
        .iter()
        .find(is_own)
        .and_then(|it| it["mac"].as_str());
    let listed = result["ips"].as_array().into_iter().flatten();
    let listed = listed.filter(|ip| match ip["interface"].as_u64() {
        Some(at) => {
            let at = usize::try_from(at).ok().and_then(|at| interfaces.get(at));
            at.is_none_or(|at| is_own(&at))
        }
        None => true,
    });
    let listed = listed.filter_map(|ip| ip["address"].as_str());
    let old = ["ip4", "ip6"]
        .into_iter()
        .filter_map(|kind| result[kind]["ip"].as_str());
    let addresses = listed.chain(old).map(str::to_owned).collect();
    (addresses, mac.unwrap_or_default().to_owned())
}

pub(crate) fn read_result(dir: &Path, container: &str, of: &Attachment) -> Option<Value> {
    let text = fs::read(path(dir, container, of)).ok()?;
    let mut json: Value = serde_json::from_slice(&text).ok()?;
    Some(json["result"].take()).filter(|result| !result.is_null())
}

pub(crate) fn write(
    dir: &Path,
    container: &str,
    of: &Attachment,
    network: &Network,
    result: &Value,
) -> Result<(), CniError> {
    // What the configuration of a network has in it is for root alone, as with libcni.
    { DirBuilder::new().recursive(true).mode(0o700).create(dir) }.during("create", dir)?;
    let path = path(dir, container, of);
    let mut json = json!({
        "kind": KIND,
        "containerId": container,
        "config": BASE64.encode(&network.text),
        "ifName": of.interface,
        "networkName": of.network,
        "result": result,
    });
    if !of.ports.is_empty() {
        json["capabilityArgs"] = json!({ "portMappings": of.ports });
    }
    let mut new = path.clone().into_os_string();
    new.push(".new");
    let written = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file =
            { options.write(true).create(true).truncate(true).mode(0o600) }.open(&new)?;
        file.write_all(json.to_string().as_bytes())?;
        fs::rename(&new, &path)
    };
    Ok(written().during("write", &path)?)
}

pub(crate) fn remove(dir: &Path, container: &str, of: &Attachment) {
    // Without it the container is in no network; one that stays is written over.
    drop(fs::remove_file(path(dir, container, of)));
}

fn path(dir: &Path, container: &str, of: &Attachment) -> PathBuf {
    let plain = |text: &str| text.replace('/', "_");
    dir.join(format!(
        "{}-{}-{}",
        plain(&of.network),
        plain(container),
        plain(&of.interface)
    ))
}
