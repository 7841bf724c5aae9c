//! What a failed snapshot must leave as it was: QEMU's settings, block nodes, jobs and fd sets, in a
//! form that can be compared.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::qmp::Client;

/// The state of a QEMU, without what changes by itself (counters, sizes, generated names).
#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint(pub BTreeMap<&'static str, Value>);

impl Fingerprint {
    /// Where two differ, one line each; empty when they are equal.
    pub fn differences(&self, other: &Fingerprint) -> String {
        let lines = self.0.iter().filter(|(key, value)| other.0.get(*key) != Some(value));
        lines.map(|(key, value)| format!("{key}:\n  {value}\n  {}\n", other.0[key])).collect()
    }
}

/// Takes the fingerprint of the QEMU at the other end. Its status is part of it: take both of two
/// fingerprints with the guest running, or both with it paused.
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

fn sorted(list: &Value, keep: impl Fn(&Value) -> Value) -> Value {
    let mut kept: Vec<Value> = list.as_array().into_iter().flatten().map(keep).collect();
    kept.sort_by_key(Value::to_string);
    Value::Array(kept)
}

/// A generated node name (`#block123`) says nothing, and is another one after a switch and back.
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
