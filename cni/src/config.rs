//! The configuration of a network.
//!
//! ```text
//!  *.conflist  { "cniVersion", "name", "plugins": [{ "type", "capabilities", ... }, ...] }
//!  *.conf, *.json: of one plugin  { "cniVersion", "name", "type", ... }
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use transship_path_error::During as _;

use crate::CniError;
use crate::listing::list;

/// What configurations are called; others in the directory are none.
const EXTENSIONS: [&str; 3] = ["conflist", "conf", "json"];
/// The version of the specification where a configuration names none.
const OLDEST: &str = "0.1.0";

/// A network as this node has it.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) name: String,
    pub(crate) version: String,
    /// The configuration of each plugin, in the order in which they are called.
    pub(crate) plugins: Vec<Value>,
    /// The file.
    pub(crate) text: Vec<u8>,
}

/// The network of this name, in the first file that has it.
pub(crate) fn find(dir: &Path, name: &str) -> Result<Network, CniError> {
    for file in files(dir)? {
        let text = fs::read(&file).during("read", &file)?;
        // One that is broken is some other network's.
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        if json["name"] == name {
            return Ok(read(name, &json, text));
        }
    }
    Err(CniError::NoNetwork {
        network: name.to_owned(),
        config_dir: dir.to_path_buf(),
    })
}

/// The name in the first file that has one.
pub(crate) fn first(dir: &Path) -> Result<Option<String>, CniError> {
    for file in files(dir)? {
        let text = fs::read(&file).during("read", &file)?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        if let Some(name) = json["name"].as_str() {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// The configurations in a directory, in their order.
fn files(dir: &Path) -> Result<Vec<PathBuf>, CniError> {
    let is_configuration = |path: &PathBuf| {
        let extension = path.extension().and_then(|it| it.to_str());
        extension.is_some_and(|it| EXTENSIONS.contains(&it))
    };
    let mut files = list(dir)?;
    files.retain(is_configuration);
    Ok(files)
}

fn read(name: &str, json: &Value, text: Vec<u8>) -> Network {
    Network {
        name: name.to_owned(),
        version: json["cniVersion"].as_str().unwrap_or(OLDEST).to_owned(),
        plugins: match json["plugins"].as_array() {
            Some(plugins) => plugins.clone(),
            None => vec![json.clone()],
        },
        text,
    }
}
