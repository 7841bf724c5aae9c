// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state that a failed snapshot must not change: QEMU's settings, block nodes, jobs and fd
//! sets, in a form that can be compared.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::guest::Guest;
use crate::qmp::Client;

/// The state of a QEMU, without the parts that vary by themselves (counters, sizes, generated
/// names).
#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint(pub BTreeMap<&'static str, Value>);

impl Fingerprint {
    /// The differences of two fingerprints, one on each line; empty when they are equal.
    pub fn differences(&self, other: &Fingerprint) -> String {
        let keys: BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let of = |one: &Fingerprint, key: &str| one.0.get(key).cloned().unwrap_or_default();
        let different = keys.into_iter().filter(|key| of(self, key) != of(other, key));
        different
            .map(|key| format!("{key}:\n  {}\n  {}\n", of(self, key), of(other, key)))
            .collect()
    }
}

/// Takes the fingerprint of the QEMU at the other end. It includes the status, so both fingerprints
/// to compare must be of a running guest, or both of a paused one.
pub fn fingerprint(client: &mut Client) -> Fingerprint {
    let mut ask = |command: &str, arguments: Value| {
        client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    };
    let status = ask("query-status", json!({}));
    Fingerprint(BTreeMap::from([
        ("status", json!([status["status"], status["running"]])),
        ("capabilities", sorted(&ask("query-migrate-capabilities", json!({})), Value::clone)),
        ("parameters", ask("query-migrate-parameters", json!({}))),
        ("devices", sorted(&ask("query-block", json!({})), device)),
        ("nodes", sorted(&ask("query-named-block-nodes", json!({"flat": true})), node)),
        ("fdsets", sorted(&ask("query-fdsets", json!({})), fdset)),
        ("jobs", sorted(&ask("query-jobs", json!({})), Value::clone)),
        ("block jobs", sorted(&ask("query-block-jobs", json!({})), Value::clone)),
    ]))
}

/// Takes the fingerprint of a domain of libvirt, and of its QEMU where the domain runs.
pub fn domain_fingerprint(guest: &Guest) -> Fingerprint {
    let daemon = guest.daemon();
    // Where libvirt has nothing to report, like an inactive XML or a current snapshot, the error
    // message stands for it.
    let ask = |command: &str, options: &[&str]| {
        let answer = daemon.try_virsh(&[&[command, guest.name()], options].concat());
        json!(answer.unwrap_or_else(|error| error))
    };
    // libvirt loses the alias of this device when it is restarted.
    let usb = [
        "<controller type='usb' index='0' model='none'",
        ">\n      <alias name='usb'/>\n    </controller>",
    ];
    let live = ask("dumpxml", &[])
        .as_str()
        .map(|xml| xml.replace(&usb.concat(), &format!("{}/>", usb[0])));
    let mut all = if guest.alive() { fingerprint(&mut guest.control()).0 } else { BTreeMap::new() };
    all.extend([
        ("domain", json!(live)),
        ("inactive domain", ask("dumpxml", &["--inactive"])),
        ("domain's state", ask("domstate", &[])),
        ("domain's job", ask("domjobinfo", &[])),
        ("snapshots", ask("snapshot-list", &["--parent"])),
        ("current snapshot", ask("snapshot-current", &["--name"])),
        ("checkpoints", ask("checkpoint-list", &["--name"])),
    ]);
    Fingerprint(all)
}

fn sorted(list: &Value, keep: impl Fn(&Value) -> Value) -> Value {
    let mut kept: Vec<Value> = list.as_array().into_iter().flatten().map(keep).collect();
    kept.sort_by_key(Value::to_string);
    Value::Array(kept)
}

/// A generated node name (`#block123`) differs after a switch and its undo, so it is left out.
fn name(node: &Value) -> Value {
    let generated = node.as_str().is_some_and(|name| name.starts_with('#'));
    if generated { json!("#") } else { node.clone() }
}

fn node(node: &Value) -> Value {
    json!([name(&node["node-name"]), node["drv"], node["file"], node["ro"]])
}

fn device(device: &Value) -> Value {
    let inserted = &device["inserted"];
    let mut chain = Vec::new();
    let mut image = &inserted["image"];
    while image.is_object() {
        chain.push(json!([image["filename"], image["format"]]));
        image = &image["backing-image"];
    }
    json!([device["device"], device["qdev"], node(inserted), chain])
}

fn fdset(set: &Value) -> Value {
    let fds = set["fds"].as_array().map_or(0, Vec::len);
    json!([set["fdset-id"], fds])
}
