//! One call of a plugin.
//!
//! ```text
//!  environment  CNI_COMMAND, CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS, CNI_PATH
//!  stdin        the plugin's configuration, with name, cniVersion, runtimeConfig and prevResult
//!  stdout       ADD: the result so far; on failure { "code", "msg", "details" }
//! ```

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use transship_path_error::During as _;
use transship_program_output::output_within;

use crate::config::Network;
use crate::{Address, Attachment, Cni, CniError, Place};

/// What a plugin is called for.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) command: &'static str,
    pub(crate) place: Place<'a>,
    pub(crate) attachment: &'a Attachment,
    pub(crate) previous: Option<&'a Value>,
}

/// The program of a plugin. Its name may lead nowhere else.
pub(crate) fn find(
    dirs: &[PathBuf],
    network: &Network,
    plugin: &Value,
) -> Result<PathBuf, CniError> {
    let name = plugin["type"].as_str().unwrap_or_default();
    let plain = !name.is_empty() && !name.contains('/') && name != "..";
    let mut paths = dirs.iter().map(|dir| dir.join(name));
    let found = plain.then(|| paths.find(|path| path.is_file())).flatten();
    found.ok_or_else(|| CniError::NoPlugin {
        plugin: name.to_owned(),
        network: network.name.clone(),
        dirs: dirs.to_vec(),
    })
}

/// Runs a plugin and gives its result; null from one that gives none. One that takes too long is killed, with all that it
/// has started.
pub(crate) fn run(
    cni: &Cni,
    network: &Network,
    plugin: &Value,
    call: &Call<'_>,
) -> Result<Value, CniError> {
    let dirs = &cni.plugin_dirs;
    let program = find(dirs, network, plugin)?;
    let path: Vec<&str> = dirs.iter().filter_map(|dir| dir.to_str()).collect();
    let child = Command::new(&program)
        .env("CNI_COMMAND", call.command)
        .env("CNI_CONTAINERID", call.place.container)
        .env("CNI_NETNS", call.place.namespace.unwrap_or(Path::new("")))
        .env("CNI_IFNAME", &call.attachment.interface)
        .env("CNI_ARGS", arguments(call.attachment))
        .env("CNI_PATH", path.join(":"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .during("run", &program)?;
    let input = input(network, plugin, call).to_string();
    let name = plugin["type"].as_str().unwrap_or_default();
    let output = output_within(cni.patience, child, input).during("run", &program)?;
    let output = output.ok_or_else(|| CniError::Slow {
        plugin: name.to_owned(),
        network: network.name.clone(),
        seconds: cni.patience.as_secs(),
    })?;
    if !output.status.success() {
        return Err(CniError::Plugin {
            plugin: name.to_owned(),
            network: network.name.clone(),
            reason: reason(&output.stdout, &output.stderr),
        });
    }
    if output.stdout.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&output.stdout).map_err(|source| CniError::Json {
        what: format!("the answer of the plugin {name:?}"),
        source,
    })
}

/// What is to be kept, for plugins that read it here; others pass it over.
fn arguments(attachment: &Attachment) -> String {
    let mut arguments = "IgnoreUnknown=1".to_owned();
    if attachment.address == Address::Keep {
        if !attachment.mac.is_empty() {
            arguments += &format!(";MAC={}", attachment.mac);
        }
        // More than one are in the configuration.
        if let [address] = without_prefixes(attachment).as_slice() {
            arguments += &format!(";IP={address}");
        }
    }
    arguments
}

fn without_prefixes(attachment: &Attachment) -> Vec<&str> {
    let addresses = attachment.addresses.iter();
    { addresses.filter_map(|address| address.split('/').next()) }.collect()
}

fn input(network: &Network, plugin: &Value, call: &Call<'_>) -> Value {
    let mut input = plugin.as_object().cloned().unwrap_or_default();
    let capabilities = input.remove("capabilities").unwrap_or_default();
    input.insert("name".to_owned(), json!(network.name));
    input.insert("cniVersion".to_owned(), json!(network.version));
    if call.attachment.address == Address::Keep {
        // <https://www.cni.dev/docs/conventions/>: "args", for plugins that have no such capability.
        let args = input.entry("args").or_insert_with(|| json!({}));
        args["cni"]["ips"] = json!(without_prefixes(call.attachment));
    }
    let runtime = runtime_config(call.attachment, &capabilities);
    if !runtime.is_empty() {
        input.insert("runtimeConfig".to_owned(), Value::Object(runtime));
    }
    if let Some(previous) = call.previous {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    Value::Object(input)
}

/// What plugins are told that have said that they can do it: the node's ports, and what is to be kept.
fn runtime_config(attachment: &Attachment, capabilities: &Value) -> Map<String, Value> {
    let mut runtime = Map::new();
    if capabilities["portMappings"] == true && !attachment.ports.is_empty() {
        runtime.insert("portMappings".to_owned(), json!(attachment.ports));
    }
    if attachment.address == Address::Keep {
        if capabilities["ips"] == true {
            runtime.insert("ips".to_owned(), json!(attachment.addresses));
        }
        if capabilities["mac"] == true && !attachment.mac.is_empty() {
            runtime.insert("mac".to_owned(), json!(attachment.mac));
        }
    }
    runtime
}

fn reason(stdout: &[u8], stderr: &[u8]) -> String {
    let said: Value = serde_json::from_slice(stdout).unwrap_or_default();
    let words = [&said["msg"], &said["details"]];
    let words: Vec<&str> = words.iter().filter_map(|it| it.as_str()).collect();
    let text = match words.is_empty() {
        true => String::from_utf8_lossy(stderr).trim().to_owned(),
        false => words.join(": "),
    };
    text.replace('\n', " ")
        .trim_end_matches([':', ' '])
        .to_owned()
}
