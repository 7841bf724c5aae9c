// SPDX-License-Identifier: LGPL-2.1-or-later

//! `snapshot-list`.

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use serde_json::Value;

use super::known::{Known, Tree};
use super::names::DomainWord;
use crate::failure::Result;
use crate::output::{self, Table, local_time};
use crate::{Context, complete};

/// `snapshot-list`.
#[derive(Args)]
pub struct List {
    #[command(flatten)]
    domain: DomainWord,
    /// Show each snapshot's parent too
    #[arg(long, conflicts_with_all = ["tree", "name", "roots"])]
    parent: bool,
    /// Show the snapshots as a tree
    #[arg(long, conflicts_with_all = ["name", "roots", "leaves", "no_leaves"])]
    tree: bool,
    /// Show names only
    #[arg(long)]
    name: bool,
    /// Only snapshots without a parent
    #[arg(long, conflicts_with_all = ["from", "current"])]
    roots: bool,
    /// Only snapshots without children
    #[arg(long)]
    leaves: bool,
    /// Only snapshots with children
    #[arg(long)]
    no_leaves: bool,
    /// Only snapshots of a guest that was shut off
    #[arg(long)]
    inactive: bool,
    /// Only snapshots with memory
    #[arg(long)]
    active: bool,
    /// Only snapshots of disks without memory
    #[arg(long)]
    disk_only: bool,
    /// Only snapshots inside their images
    #[arg(long)]
    internal: bool,
    /// Only snapshots in files of their own
    #[arg(long)]
    external: bool,
    /// Only the children of this snapshot
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "current",
          add = ArgValueCompleter::new(complete::snapshots))]
    from: Option<String>,
    /// Only the children of the current snapshot
    #[arg(long)]
    current: bool,
    /// With --from or --current: their children too, and so on
    #[arg(long)]
    descendants: bool,
    /// Each parent before its children, instead of by name
    #[arg(long)]
    topological: bool,
}

impl List {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let guest = context.guest(&self.domain.get()?)?;
        let tree = Tree::read(&guest)?;
        let from = match (&self.from, self.current) {
            (Some(name), _) => Some(tree.get(name)?),
            (None, true) => Some(tree.get_current()?),
            (None, false) => None,
        };
        if self.tree && !context.json {
            let roots = from.map_or_else(|| self.sorted(tree.children(None)), |root| vec![root]);
            let drawing = Drawing { tree: &tree, list: &self };
            return output::print(&roots.iter().map(|root| drawing.of(root)).collect::<String>());
        }
        let mut found: Vec<&Known> = match from {
            Some(from) if self.descendants || self.tree => tree.descendants(&from.name),
            Some(from) => tree.children(Some(&from.name)).collect(),
            None if self.roots => tree.children(None).collect(),
            None => tree.all.iter().collect(),
        };
        found.retain(|known| self.is_wanted(&tree, known));
        let found = self.sorted(found.into_iter());
        if context.json {
            return output::json(&Value::Array(
                found.iter().map(|known| tree.to_json(known)).collect(),
            ));
        }
        if self.name {
            let names = found.iter().map(|known| format!("{}\n", known.name));
            return output::print(&names.collect::<String>());
        }
        let columns = ["Name", "Creation Time", "State", "Parent"];
        let shown = if self.parent { 4 } else { 3 };
        let mut table = Table::new(&columns[..shown]);
        for known in found {
            let time = known.creation_time.map(local_time).unwrap_or_default();
            let parent = known.parent.clone().unwrap_or_default();
            let mut row = vec![known.name.clone(), time, known.state.clone(), parent];
            row.truncate(shown);
            table.add(row);
        }
        output::print(&table.text(!context.quiet))
    }

    /// The snapshots by name, or each parent before its children, as they are known.
    fn sorted<'a>(&self, snapshots: impl Iterator<Item = &'a Known>) -> Vec<&'a Known> {
        let mut sorted: Vec<&Known> = snapshots.collect();
        if !self.topological {
            sorted.sort_by_key(|known| known.name.to_lowercase());
        }
        sorted
    }

    /// Whether the filters let it through. Of those of one kind, one is enough.
    fn is_wanted(&self, tree: &Tree, known: &Known) -> bool {
        let any = |filters: &[(bool, bool)]| {
            filters.iter().all(|(is_set, _)| !is_set)
                || filters.iter().any(|(is_set, holds)| *is_set && *holds)
        };
        let is_leaf = tree.children(Some(&known.name)).next().is_none();
        let (is_off, has_no_memory) = (known.state == "shutoff", known.state == "disk-snapshot");
        any(&[(self.leaves, is_leaf), (self.no_leaves, !is_leaf)])
            && any(&[
                (self.inactive, is_off),
                (self.disk_only, has_no_memory),
                (self.active, !is_off && !has_no_memory),
            ])
            && any(&[(self.internal, !known.is_external), (self.external, known.is_external)])
    }
}

/// Snapshots and their descendants, as virsh draws them.
struct Drawing<'a> {
    tree: &'a Tree,
    list: &'a List,
}

impl<'a> Drawing<'a> {
    fn of(&self, root: &'a Known) -> String {
        let mut text = format!("{}\n", root.name);
        if self.draw_children(root, "", &mut vec![&root.name], &mut text) == 0 {
            text.push('\n');
        }
        text
    }

    /// Draws the children, and returns their number. `above` has the snapshots that are being
    /// drawn: damaged metadata can have a circle.
    fn draw_children(
        &self,
        parent: &'a Known,
        indent: &str,
        above: &mut Vec<&'a str>,
        text: &mut String,
    ) -> usize {
        let children = self.list.sorted(self.tree.children(Some(&parent.name)));
        if !children.is_empty() {
            text.push_str(&format!("{indent}  |\n"));
        }
        for (number, child) in children.iter().enumerate() {
            let is_last = number + 1 == children.len();
            text.push_str(&format!("{indent}  +- {}\n", child.name));
            if above.contains(&child.name.as_str()) {
                continue;
            }
            let indent = format!("{indent}  {} ", if is_last { ' ' } else { '|' });
            above.push(&child.name);
            if self.draw_children(child, &indent, above, text) == 0 && is_last {
                text.push_str(indent.trim_end());
                text.push('\n');
            }
            above.pop();
        }
        children.len()
    }
}
