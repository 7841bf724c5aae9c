// SPDX-License-Identifier: LGPL-2.1-or-later

//! Refuses a snapshot of disks whose images a block job of QEMU uses.
//!
//! A disk with a block job (a mirror, a commit, a backup) cannot be switched to an overlay, or
//! could not be merged back if the snapshot failed. QEMU reports that only in the switch, when the
//! guest is paused; so this module asks for the jobs before.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::guest::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::model::{DiskPlan, Drive};
use crate::monitor::{Command, Failure};

/// Whether a block device of QEMU's has one of the names of this drive.
pub fn is_block_of(device: &Value, drive: &Drive) -> bool {
    let known = |name: &str| drive.names.iter().any(|known| known == name);
    let text = |what: &str| device[what].as_str().unwrap_or_default();
    known(text("device")) || text("qdev").split('/').any(known)
}

/// Refuses disks that have an image in an active block job.
pub fn check_no_block_jobs(guest: &mut dyn Guest, disks: &[DiskPlan]) -> Result<()> {
    let deadline = Deadline::after(DEFAULT_TIMEOUT);
    let mut query = |command: &str| {
        let step = format!("cannot ask for block jobs ({command})");
        guest.run(&step, Command::new(command, json!({})), deadline)
    };
    let jobs = query("query-block-jobs")?;
    let Some(first) = jobs.as_array().and_then(|jobs| jobs.first()) else { return Ok(()) };
    let blocks = query("query-block")?;
    let graph = match guest.execute(Command::new("x-debug-query-block-graph", json!({})), deadline)
    {
        Ok(graph) => Graph::read(&graph),
        Err(failure @ (Failure::Late | Failure::Lost(_))) => {
            return Err(failure.into_error("cannot ask which images block jobs work on"));
        }
        // QEMU does not tell which disks the jobs work on.
        Err(Failure::Refused(..)) if disks.is_empty() => return Ok(()),
        Err(Failure::Refused(..)) => return refuse(&disks[0], first),
    };
    for disk in disks {
        let mut blocks = blocks.as_array().into_iter().flatten();
        let block = blocks.find(|block| {
            is_block_of(block, &disk.drive) || block["inserted"]["node-name"] == *disk.drive.node
        });
        let node = block
            .and_then(|block| block["inserted"]["node-name"].as_str())
            .unwrap_or(&disk.drive.node);
        let images = graph.around(node);
        let mut jobs = jobs.as_array().into_iter().flatten();
        if let Some(job) =
            jobs.find(|job| graph.job(job).iter().any(|image| images.contains(image)))
        {
            return refuse(disk, job);
        }
    }
    Ok(())
}

fn refuse(disk: &DiskPlan, job: &Value) -> Result<()> {
    let text = |what: &str| job[what].as_str().unwrap_or("unknown");
    fail!(
        OperationInvalid,
        "disk '{}' has an active block job ('{}', {}): wait for it to end, or cancel it",
        disk.drive.name(),
        text("device"),
        text("type")
    );
}

/// QEMU's block graph: the nodes, and which is a child of which.
struct Graph {
    nodes: Vec<(u64, String, String)>,
    edges: Vec<(u64, u64)>,
}

impl Graph {
    fn read(graph: &Value) -> Graph {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let node =
            |node: &Value| Some((node["id"].as_u64()?, text(&node["type"]), text(&node["name"])));
        let edge = |edge: &Value| Some((edge["parent"].as_u64()?, edge["child"].as_u64()?));
        Graph {
            nodes: graph["nodes"].as_array().into_iter().flatten().filter_map(node).collect(),
            edges: graph["edges"].as_array().into_iter().flatten().filter_map(edge).collect(),
        }
    }

    fn find(&self, kind: &str, name: &str) -> Option<u64> {
        let mut nodes = self.nodes.iter();
        nodes.find(|(_, known_kind, known)| known_kind == kind && known == name).map(|(id, ..)| *id)
    }

    /// The nodes that a job works on.
    fn job(&self, job: &Value) -> Vec<u64> {
        let id = job["device"].as_str().and_then(|name| self.find("block-job", name));
        self.edges
            .iter()
            .filter(|(parent, _)| Some(*parent) == id)
            .map(|(_, child)| *child)
            .collect()
    }

    /// The node of an image, all nodes below it, and the filters that a job has put on top of it.
    fn around(&self, node: &str) -> BTreeSet<u64> {
        let is_driver = |id: u64| {
            self.nodes.iter().any(|(known, kind, _)| *known == id && kind == "block-driver")
        };
        let start = self.find("block-driver", node);
        let mut found = BTreeSet::new();
        for down in [true, false] {
            let mut next: Vec<u64> = start.into_iter().collect();
            while let Some(id) = next.pop() {
                found.insert(id);
                let neighbours = self
                    .edges
                    .iter()
                    .map(|&(parent, child)| if down { (parent, child) } else { (child, parent) });
                next.extend(
                    neighbours.filter(|(from, to)| *from == id && is_driver(*to)).map(|(_, to)| to),
                );
            }
        }
        found
    }
}
