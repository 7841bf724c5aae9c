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
    let answers = client.ask_all(&[
        ("query-status", json!({})),
        ("query-migrate-capabilities", json!({})),
        ("query-migrate-parameters", json!({})),
        ("query-block", json!({})),
        ("query-named-block-nodes", json!({"flat": true})),
        ("query-fdsets", json!({})),
        ("query-jobs", json!({})),
        ("query-block-jobs", json!({})),
    ]);
    let [status, capabilities, parameters, devices, nodes, fdsets, jobs, block_jobs] = &answers[..]
    else {
        panic!("an answer to each");
    };
    Fingerprint(BTreeMap::from([
        ("status", json!([status["status"], status["running"]])),
        ("capabilities", sorted(capabilities, Value::clone)),
        ("parameters", parameters.clone()),
        ("devices", sorted(devices, device)),
        ("nodes", sorted(nodes, node)),
        ("fdsets", sorted(fdsets, fdset)),
        ("jobs", sorted(jobs, Value::clone)),
        ("block jobs", sorted(block_jobs, Value::clone)),
    ]))
}

/// Takes the fingerprint of a domain of libvirt, and of its QEMU where the domain runs.
pub fn domain_fingerprint(guest: &Guest) -> Fingerprint {
    // libvirt loses the alias of this device when it is restarted.
    let usb = [
        "<controller type='usb' index='0' model='none'",
        ">\n      <alias name='usb'/>\n    </controller>",
    ];
    let without_alias = |xml: String| xml.replace(&usb.concat(), &format!("{}/>", usb[0]));
    let mut all = if guest.alive() { fingerprint(&mut guest.control()).0 } else { BTreeMap::new() };
    // Where libvirt has nothing to report, like an inactive XML or a current snapshot, the answer
    // is empty.
    let name = guest.name();
    let questions: [(&str, &[&str]); 7] = [
        ("domain", &["dumpxml", name]),
        ("inactive domain", &["dumpxml", name, "--inactive"]),
        ("domain's state", &["domstate", name]),
        ("domain's job", &["domjobinfo", name]),
        ("snapshots", &["snapshot-list", name, "--parent"]),
        ("current snapshot", &["snapshot-current", name, "--name"]),
        ("checkpoints", &["checkpoint-list", name, "--name"]),
    ];
    let answers = guest.daemon().virsh_each(&questions.map(|(_, words)| words));
    let answers = answers.into_iter().map(|answer| json!(without_alias(answer)));
    all.extend(questions.iter().map(|(question, _)| *question).zip(answers));
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
