// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the benchmarks share: their options, the measured guest, snapshots by single commands, and
//! the evaluation of the figures.

#![allow(dead_code)] // Each benchmark uses its own part.

pub mod domain;
pub mod monitor;

use std::collections::BTreeMap;
use std::path::PathBuf;

use instantsnap_testkit::compile::workspace;
use instantsnap_testkit::{Binary, Format, Machine};
use lexopt::Parser;
use serde_json::{Value, json};

pub type Result<T> = std::result::Result<T, lexopt::Error>;

/// The options of a benchmark.
pub struct Options {
    pub rounds: usize,
    /// In MiB.
    pub memory: Vec<u32>,
    pub json: PathBuf,
}

impl Options {
    /// Parses the command line. By default the figures are written to `target/`. An unknown option
    /// goes to `more`, which returns whether it knows the option.
    pub fn parse(
        rounds: usize,
        memory: &[u32],
        json: &str,
        mut more: impl FnMut(&str, &mut Parser) -> Result<bool>,
    ) -> Result<Options> {
        use lexopt::Arg::{Long, Value};
        let json = workspace().join("target").join(json);
        let mut options = Options { rounds, memory: memory.to_vec(), json };
        let mut parser = Parser::from_env();
        while let Some(argument) = parser.next()? {
            let name = match argument {
                Long(name) => name.to_owned(),
                Value(_) => continue,
                _ => return Err(argument.unexpected()),
            };
            match name.as_str() {
                "rounds" => options.rounds = number(&mut parser)?,
                "memory" => options.memory = list(&mut parser)?,
                "json" => options.json = parser.value()?.into(),
                // cargo bench passes this.
                "bench" => {}
                _ if more(&name, &mut parser)? => {}
                _ => return Err(Long(&name).unexpected()),
            }
        }
        Ok(options)
    }

    /// Writes the figures.
    pub fn write(&self, document: &Value) {
        std::fs::write(&self.json, format!("{document:#}\n"))
            .expect("the JSON file cannot be written");
    }
}

fn number(parser: &mut Parser) -> Result<usize> {
    use lexopt::ValueExt;
    parser.value()?.parse()
}

/// An option's value: words or numbers with commas between them.
pub fn list<T: std::str::FromStr<Err: ToString>>(parser: &mut Parser) -> Result<Vec<T>> {
    let list = word(parser)?;
    let items = list.split(',').map(|item| item.parse().map_err(|error: T::Err| error.to_string()));
    Ok(items.collect::<std::result::Result<_, String>>()?)
}

/// An option's value.
pub fn word(parser: &mut Parser) -> Result<String> {
    use lexopt::ValueExt;
    parser.value()?.string()
}

/// The guests to measure: for each QEMU, each size of memory and each load.
pub struct Guests {
    pub options: Options,
    loads: Vec<String>,
    qemu: Option<String>,
}

impl Guests {
    /// Parses the command line like [`Options::parse`].
    pub fn parse(
        rounds: usize,
        memory: &[u32],
        json: &str,
        mut more: impl FnMut(&str, &mut Parser) -> Result<bool>,
    ) -> Result<Guests> {
        let (mut loads, mut qemu) = (vec!["idle".into(), "tick".into()], None);
        let options = Options::parse(rounds, memory, json, |name, parser| {
            match name {
                "load" => loads = list(parser)?,
                "qemu" => qemu = Some(word(parser)?),
                _ => return more(name, parser),
            }
            Ok(true)
        })?;
        Ok(Guests { options, loads, qemu })
    }

    /// Measures one guest after another and returns everything for the JSON file. The ratios are to
    /// `floor`.
    pub fn measure<W: AsRef<Figures> + serde::Serialize>(
        &self,
        ways: &[&str],
        floor: &str,
        mut measure: impl FnMut(&Machine) -> BTreeMap<&'static str, W>,
    ) -> Vec<Value> {
        let heading = format!(
            "| QEMU | guest | load | way | pause ms, median (min to max) | ratio to {floor} | \
             total ms, median | ratio |"
        );
        println!("{heading}");
        // As long as the heading above it.
        let cells = heading.trim_matches('|').split('|').map(|cell| "-".repeat(cell.len()));
        println!("|{}|", cells.collect::<Vec<_>>().join("|"));
        let mut results = Vec::new();
        for binary in Binary::all() {
            if self.qemu.as_ref().is_some_and(|wanted| !binary.name.starts_with(wanted.as_str())) {
                continue;
            }
            for &memory in &self.options.memory {
                for load in &self.loads {
                    let measured = measure(&machine(binary, memory, load));
                    let floor = measured[floor].as_ref();
                    for way in ways {
                        let row = measured[way].as_ref().row(way, floor);
                        println!("| {} | {memory} MiB | {load} | {row} |", binary.name);
                    }
                    results.push(json!({
                        "qemu": binary.name, "memory_mib": memory, "load": load, "rounds": self.options.rounds,
                        "ways": measured,
                    }));
                }
            }
        }
        results
    }
}

/// A guest to measure. All its memory is present from the start, as in a guest that has run for a
/// while.
pub fn machine(binary: &'static Binary, memory: u32, load: &str) -> Machine {
    let machine = Machine::new(binary).restless().memory(memory).prealloc().disk(Format::Raw);
    match load {
        "idle" => machine.append("halt=1"),
        "tick" => machine.append("dense=64"),
        other => panic!("unknown load {other}: idle or tick"),
    }
}

/// Takes snapshots in each way, again and again, and starts each round with another way. Returns
/// the figures without the first round, which is for warming up.
pub fn interleave<T>(
    ways: &[&'static str],
    rounds: usize,
    mut take: impl FnMut(&'static str) -> T,
) -> BTreeMap<&'static str, Vec<T>> {
    let mut taken: BTreeMap<_, Vec<T>> = BTreeMap::new();
    for round in 0..=rounds {
        let mut order = ways.to_vec();
        order.rotate_left(round % ways.len());
        for way in order {
            let took = take(way);
            if round > 0 {
                taken.entry(way).or_default().push(took);
            }
        }
    }
    taken
}

/// One figure for each round, in microseconds.
#[derive(Default, serde::Serialize)]
pub struct Figures {
    pub pause_us: Vec<u64>,
    pub total_us: Vec<u64>,
}

impl Figures {
    /// The cells of one way in a row of the table.
    fn row(&self, way: &str, floor: &Figures) -> String {
        let (pause, total) = (median(&self.pause_us), median(&self.total_us));
        format!(
            "{way} | {} | {:.2} | {:.0} | {:.2}",
            spread(&self.pause_us),
            pause / median(&floor.pause_us),
            total / 1e3,
            total / median(&floor.total_us)
        )
    }
}

impl AsRef<Figures> for Figures {
    fn as_ref(&self) -> &Figures {
        self
    }
}

/// Median (minimum to maximum) of microseconds, in milliseconds.
pub fn spread(us: &[u64]) -> String {
    let ms = |us: &u64| *us as f64 / 1e3;
    let (min, max) = (us.iter().min().expect("a figure"), us.iter().max().expect("a figure"));
    format!("{:.1} ({:.1} to {:.1})", median(us) / 1e3, ms(min), ms(max))
}

pub fn median(figures: &[u64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) as f64 / 2.0,
        _ => sorted[middle] as f64,
    }
}

/// A value in kB from a file in /proc.
pub fn kib(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let line =
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect(name);
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
