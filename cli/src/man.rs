// SPDX-License-Identifier: LGPL-2.1-or-later

//! The man page: one page with all commands, made of what the help texts are made of.

use std::io::{self, Write};

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::examples::ALL;
use crate::failure::{Failure, Result};
use crate::output;

/// The exit statuses.
const STATUSES: &[(&str, &str)] = &[
    ("0", "Done."),
    (
        "1",
        "Failed. Everything is as it was before, unless the message says what is left. A recovery \
         has found something that must be decided on; a check of doctor has failed.",
    ),
    ("2", "The command line makes no sense. Nothing was done."),
    ("3", "Of daemon status: the daemon does not have the library, or will not have it."),
    (
        "130",
        "Interrupted by Ctrl-C (143: by SIGTERM, 129: by SIGHUP), and undone: the guest is as \
         before.",
    ),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    ("LIBVIRT_DEFAULT_URI", "The URI that is used without --connect. It can be a qmp: URI."),
    ("NO_COLOR", "If it is not empty, nothing is coloured."),
    (
        "INSTANTSNAP_QEMU_IMG, INSTANTSNAP_VIRSH, INSTANTSNAP_XMLLINT, INSTANTSNAP_SYSTEMCTL",
        "Absolute paths of the programs that are run.",
    ),
    (
        "INSTANTSNAP_WATCHDOG_CGROUP",
        "The directory of a cgroup for the process that takes over if this one is killed.",
    ),
];

/// Shows the page.
pub fn show(command: Command) -> Result<()> {
    let mut page = Vec::new();
    write(command, &mut page).map_err(|error| Failure::Other(error.to_string()))?;
    let page = String::from_utf8_lossy(&page);
    // Each part begins with the definition of the apostrophe.
    let is_definition = |line: &str| line.contains(".ds Aq");
    let lines =
        page.lines().enumerate().filter(|(number, line)| *number < 2 || !is_definition(line));
    output::print(&lines.map(|(_, line)| format!("{line}\n")).collect::<String>())
}

fn write(mut command: Command, page: &mut dyn Write) -> io::Result<()> {
    command.build();
    let man = Man::new(command.clone()).manual("instantsnap");
    man.render_title(page)?;
    // The words of command lines are long: no lines are filled up.
    Roff::new().control("ad", ["l"]).to_writer(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    heading("COMMANDS", page)?;
    of_commands(&command, "", page)?;
    list("EXIT STATUS", STATUSES, page)?;
    list("ENVIRONMENT", ENVIRONMENT, page)?;
    heading("EXAMPLES", page)?;
    for example in ALL {
        let mut roff = Roff::new();
        roff.control("TP", []).text([roman(example.what)]).control("nf", []);
        roff.text([bold(example.line)]).control("fi", []);
        roff.to_writer(page)?;
    }
    Roff::new()
        .control("SH", ["SEE ALSO"])
        .text([bold("virsh"), roman("(1), "), bold("qemu-img"), roman("(1)")])
        .to_writer(page)
}

/// A section for each command that does something.
fn of_commands(command: &Command, path: &str, page: &mut dyn Write) -> io::Result<()> {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = sub.get_name();
        if name == "help" {
            continue;
        }
        let path = format!("{path}{name}");
        if sub.has_subcommands() {
            of_commands(sub, &format!("{path} "), page)?;
            continue;
        }
        let mut sub = sub.clone();
        let usage = sub.render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ").trim().to_owned();
        let about = sub.get_long_about().or(sub.get_about()).map(ToString::to_string);
        let mut roff = Roff::new();
        roff.control("SS", [path.as_str()]).text([bold(usage)]);
        for paragraph in about.unwrap_or_default().split("\n\n") {
            let end = if paragraph.ends_with('.') { "" } else { "." };
            roff.control("PP", []).text([roman(paragraph.replace('\n', " ") + end)]);
        }
        roff.to_writer(page)?;
        of_options(sub, page)?;
    }
    Ok(())
}

/// The options of one command, without those of all commands.
fn of_options(command: Command, page: &mut dyn Write) -> io::Result<()> {
    let global: Vec<_> = command
        .get_arguments()
        .filter(|argument| argument.is_global_set() || argument.get_id() == "help")
        .map(|argument| argument.get_id().clone())
        .collect();
    let own = global
        .into_iter()
        .fold(command, |command, id| command.mut_arg(id, |argument| argument.hide(true)));
    let mut text = Vec::new();
    Man::new(own).render_options_section(&mut text)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    // The options are part of the command's section.
    let lines = text.lines().filter(|line| !line.starts_with(".SH"));
    page.write_all(lines.map(|line| format!("{line}\n")).collect::<String>().as_bytes())
}

fn heading(name: &str, page: &mut dyn Write) -> io::Result<()> {
    Roff::new().control("SH", [name]).to_writer(page)
}

fn list(name: &str, items: &[(&str, &str)], page: &mut dyn Write) -> io::Result<()> {
    heading(name, page)?;
    for (item, text) in items {
        let mut roff = Roff::new();
        roff.control("TP", []).text([bold(*item)]).text([roman(*text)]);
        roff.to_writer(page)?;
    }
    Ok(())
}
