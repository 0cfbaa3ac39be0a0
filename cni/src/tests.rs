use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use super::*;

/// Writes down how it was called; `first` gives an interface, `second` hands on what came before.
const PLUGIN: &str = r#"#!/bin/sh
input=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $input" >>"$0.calls"
[ "$CNI_COMMAND" = ADD ] || exit 0
case "$0" in
*hangs) sleep 1000 & echo $! >"$0.child"; wait;;
*fails) echo '{"code": 11, "msg": "no more addresses", "details": "all are taken"}'; exit 1;;
*) echo '{"cniVersion":"1.0.0","interfaces":[{"name":"veth1"},{"name":"eth0","mac":"0a:01","sandbox":"/ns"}],
   "ips":[{"address":"10.1.0.9/24","interface":1}]}';;
esac
"#;

struct Bed {
    dir: tempfile::TempDir,
    cni: Cni,
}

fn bed(plugins: &Value) -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for made in ["net.d", "bin"] {
        fs::create_dir(at(made)).unwrap();
    }
    for plugin in ["first", "second", "fails", "hangs"] {
        let path = at("bin").join(plugin);
        fs::write(&path, PLUGIN).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let list = json!({"cniVersion": "1.0.0", "name": "lan", "plugins": plugins});
    fs::write(at("net.d/20-lan.conflist"), list.to_string()).unwrap();
    fs::write(at("net.d/10-broken.conflist"), "{").unwrap();
    let cni = Cni {
        config_dir: at("net.d"),
        plugin_dirs: vec![at("nowhere"), at("bin")],
        results_dir: at("results"),
        patience: Duration::from_secs(60),
    };
    Bed { dir, cni }
}

impl Bed {
    fn calls(&self, plugin: &str) -> Vec<String> {
        let calls = self.dir.path().join(format!("bin/{plugin}.calls"));
        let text = fs::read_to_string(calls).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn attachment(address: Address, ip: &str) -> Attachment {
    Attachment {
        network: "lan".into(),
        interface: "eth0".into(),
        addresses: vec![ip.into()],
        mac: "0A:01".into(),
        address,
        ports: Vec::new(),
    }
}

const PLACE: Place<'static> = Place {
    container: "default-web",
    namespace: None,
};

#[test]
fn plugins_are_called_in_turn_and_what_they_made_is_kept() {
    let bed = bed(&json!([
        {"type": "first", "capabilities": {"ips": true, "mac": true}},
        {"type": "second", "capabilities": {"portMappings": true}},
    ]));
    bed.cni.check("lan").unwrap();
    assert_eq!(bed.cni.default_network().unwrap().as_deref(), Some("lan"));
    let kept = attachment(Address::Keep, "10.1.0.9/24");
    bed.cni.add(PLACE, &kept).unwrap();
    let first = &bed.calls("first")[0];
    assert!(
        first.starts_with("ADD default-web  eth0 IgnoreUnknown=1;MAC=0A:01;IP=10.1.0.9 {"),
        "{first}"
    );
    assert!(
        first.contains(r#""runtimeConfig":{"ips":["10.1.0.9/24"],"mac":"0A:01"}"#)
            && first.contains(r#""args":{"cni":{"ips":["10.1.0.9"]}}"#)
            && !first.contains("prevResult")
            && !first.contains("capabilities"),
        "{first}"
    );
    let second = &bed.calls("second")[0];
    assert!(
        second.contains(r#""prevResult":{"#) && !second.contains("runtimeConfig"),
        "{second}"
    );
    let found = bed.cni.of_container("default-web").unwrap();
    let mut made = attachment(Address::New, "10.1.0.9/24");
    made.mac = "0a:01".into();
    assert_eq!(found, [made]);
    assert!(bed.cni.of_container("default-we").unwrap().is_empty());

    bed.cni.del(PLACE, &kept).unwrap();
    let del = &bed.calls("first")[1];
    assert!(
        del.starts_with("DEL ") && del.contains("prevResult"),
        "{del}"
    );
    assert!(bed.cni.of_container("default-web").unwrap().is_empty());
}

/// Named as containerd's clients write them down, and as the specification does.
#[test]
fn ports_lead_to_a_container_wherever_it_is() {
    let bed = bed(
        &json!([{"type": "first"}, {"type": "second", "capabilities": {"portMappings": true}}]),
    );
    let written = json!({
        "kind": "cniCacheV1", "containerId": "default-web", "ifName": "eth0", "networkName": "lan",
        "capabilityArgs": {"portMappings": [
            {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0"}]},
        "result": {"ips": [{"address": "10.1.0.9/24"}]},
    });
    fs::create_dir(bed.dir.path().join("results")).unwrap();
    let path = bed.dir.path().join("results/lan-default-web-eth0");
    fs::write(&path, written.to_string()).unwrap();
    let [found] = bed
        .cni
        .of_container("default-web")
        .unwrap()
        .try_into()
        .unwrap();
    assert_eq!(found.ports[0].to_string(), "8080/tcp");
    assert!(found.is_plain());

    let taken = bed
        .cni
        .check_ports("lan", &found.ports)
        .unwrap_err()
        .to_string();
    assert_eq!(
        taken,
        "the port 8080/tcp of this node leads to the container \"default-web\" already"
    );
    fs::remove_file(&path).unwrap();
    bed.cni.check_ports("lan", &found.ports).unwrap();
    bed.cni.add(PLACE, &found).unwrap();
    let port = r#"{"portMappings":[{"containerPort":80,"hostIP":"0.0.0.0","hostPort":8080,"protocol":"tcp"}]}"#;
    let told = &bed.calls("second")[0];
    assert!(
        told.contains(&format!(r#""runtimeConfig":{port}"#)),
        "{told}"
    );
    assert!(!bed.calls("first")[0].contains("8080"));
    let made = bed.cni.of_container("default-web").unwrap();
    assert_eq!(made[0].ports, found.ports);

    let mut odd = found;
    odd.ports[0].protocol = "tcp -j ACCEPT".into();
    assert!(!odd.is_plain());
}

#[test]
fn ports_need_a_plugin_that_maps_them() {
    let bed = bed(&json!([{"type": "first"}]));
    let port = PortMapping {
        host_port: 80,
        container_port: 80,
        protocol: "tcp".into(),
        host_ip: String::new(),
    };
    let error = bed.cni.check_ports("lan", &[port]).unwrap_err().to_string();
    assert!(error.contains("portMappings"), "{error}");
}

#[test]
fn an_address_that_is_not_given_is_given_back() {
    let bed = bed(&json!([{"type": "first"}]));
    let other = attachment(Address::Keep, "10.1.0.7/24");
    let error = bed.cni.add(PLACE, &other).unwrap_err().to_string();
    assert!(
        error.contains("10.1.0.7/24") && error.contains("10.1.0.9/24"),
        "{error}"
    );
    assert!(bed.calls("first")[1].starts_with("DEL "));
    bed.cni
        .add(PLACE, &attachment(Address::New, "10.1.0.7/24"))
        .unwrap();
}

#[test]
fn what_is_missing_or_fails_is_named() {
    let bed = bed(&json!([{"type": "first"}, {"type": "fails"}]));
    let new = attachment(Address::New, "10.1.0.9/24");
    let error = bed.cni.add(PLACE, &new).unwrap_err().to_string();
    assert!(
        error.contains("no more addresses: all are taken"),
        "{error}"
    );
    assert!(bed.cni.of_container("default-web").unwrap().is_empty());
    let error = bed.cni.check("wan").unwrap_err().to_string();
    assert!(error.contains("\"wan\""), "{error}");
    for missing in ["gone", "../first", ""] {
        let bed = self::bed(&json!([{ "type": missing }]));
        let error = bed.cni.check("lan").unwrap_err();
        assert!(matches!(error, CniError::NoPlugin { .. }), "{error}");
    }
}

#[test]
fn words_that_would_be_others_are_seen() {
    let good = attachment(Address::Keep, "fd00::9/64");
    assert!(good.is_plain());
    let changes: [fn(&mut Attachment); 6] = [
        |it| it.network = "../lan".into(),
        |it| it.interface = "eth0;x".into(),
        |it| it.interface = "interface-too-long".into(),
        |it| it.mac = "0a:01;IP=10.0.0.1".into(),
        |it| it.addresses = vec!["10.0.0.1".into()],
        |it| it.addresses.push("10.0.0.1;x/24".into()),
    ];
    for change in changes {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(!bad.is_plain(), "{bad:?}");
    }
}

#[test]
fn a_plugin_that_hangs_is_killed_with_what_it_has_started() {
    let mut bed = bed(&json!([{"type": "hangs"}]));
    bed.cni.patience = Duration::from_secs(1);
    let error = bed
        .cni
        .add(PLACE, &attachment(Address::New, "10.1.0.9/24"))
        .unwrap_err();
    assert!(matches!(error, CniError::Slow { .. }), "{error}");
    let child = fs::read_to_string(bed.dir.path().join("bin/hangs.child")).unwrap();
    let process = Path::new("/proc").join(child.trim()).join("stat");
    let runs = || fs::read_to_string(&process).is_ok_and(|stat| !stat.contains(") Z "));
    for _ in 0..100 {
        if !runs() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("it runs on");
}
