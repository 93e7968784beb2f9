//! `--passes`: its syntax, and running what it says. Each pass is a transaction: run on a copy, checked, kept or dropped.

use std::fmt;

use serde::Serialize;

use crate::{
    analysis::cost::Cost,
    codec::Model,
    ir::{Graph, InvalidGraph},
    pass::{COUNTED_ONLY, Context, Fidelity, Pass, PassInfo, Price},
    passes::{PASSES, find},
};

/// The preset of all exact and rounding passes.
pub const SIMPLIFY: &str = "simplify";
/// The preset of no passes.
pub const NONE: &str = "none";
/// The option of passes that store weights by which they make tables alone.
const TABLES: &str = "tables";
/// Rounds after which `simplify` stops even if passes still find work; real models take two or three.
const MAX_ROUNDS: usize = 16;

/// A pass with its options.
#[derive(Debug)]
pub struct Step {
    /// Its entry in the list.
    pub info: &'static PassInfo,
    /// The pass.
    pub pass: Box<dyn Pass>,
    /// As the person wrote it.
    pub spelling: String,
}

/// What `--passes` says to do, in order.
#[derive(Debug)]
pub enum Item {
    /// All exact and rounding passes, until none finds work.
    Simplify {
        /// Whether nothing comes after it, so that weights may be stored as nothing else would have them.
        is_last: bool,
    },
    /// One pass.
    Pass(Step),
}

impl Item {
    /// What it may do to the model's outputs.
    #[must_use]
    pub fn fidelity(&self) -> Fidelity {
        match self {
            Self::Simplify { .. } => Fidelity::Rounding,
            Self::Pass(step) => step.info.fidelity,
        }
    }

    /// Whether the error budget drives it.
    #[must_use]
    pub fn is_free(&self) -> bool {
        matches!(self, Self::Pass(step) if step.info.fidelity == Fidelity::Lossy && !step.pass.is_fixed())
    }

    /// How many kinds of changes it can be told to prefer.
    #[must_use]
    pub fn kinds(&self) -> usize {
        match self {
            Self::Pass(step) if self.is_free() => step.pass.kinds(),
            _ => 0,
        }
    }
}

/// What is wrong with `--passes`.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// No such pass.
    #[error("there is no pass `{0}`; `onnx-shrink passes` lists them")]
    Unknown(String),
    /// Wrong options.
    #[error("pass `{name}`: {message}; `onnx-shrink passes {name}` explains its options")]
    Options {
        /// The pass.
        name: &'static str,
        /// What clap says.
        message: String,
    },
    /// A preset does not take options.
    #[error("`{0}` takes no options")]
    Preset(String),
    /// A comma too many, or nothing at all.
    #[error("a name is missing; write for instance `svd,prune`, or `none` for no pass")]
    Missing,
    /// Nothing beside something.
    #[error("`none` stands alone")]
    NotAlone,
}

/// Parses `NAME[:KEY=VALUE]…,NAME…`. A list of lossy passes only becomes `simplify,LIST,simplify`.
///
/// # Errors
///
/// When a pass is unknown or its options are wrong.
pub fn parse(list: &str) -> Result<Vec<Item>, ParseError> {
    let mut items = Vec::new();
    let spellings: Vec<_> = list.split(',').map(str::trim).collect();
    if spellings.iter().any(|spelling| spelling.is_empty()) {
        return Err(ParseError::Missing);
    }
    if spellings.len() > 1 && spellings.contains(&NONE) {
        return Err(ParseError::NotAlone);
    }
    for spelling in spellings {
        let mut parts = spelling.split(':');
        let name = parts.next().unwrap_or_default();
        let options: Vec<_> = parts.collect();
        if name == SIMPLIFY || name == NONE {
            if !options.is_empty() {
                return Err(ParseError::Preset(name.to_owned()));
            }
            if name == SIMPLIFY {
                items.push(Item::Simplify { is_last: false });
            }
            continue;
        }
        let info = find(name).ok_or_else(|| ParseError::Unknown(name.to_owned()))?;
        let pass = info.build(&options).map_err(|error| {
            let message = error.to_string();
            // The first paragraph says what is wrong, and what would be right.
            let lines: Vec<_> = message.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            let message = lines.join(" ").trim_start_matches("error: ").to_owned();
            ParseError::Options { name: info.name, message }
        })?;
        items.push(Item::Pass(Step { info, pass, spelling: spelling.to_owned() }));
    }
    if !items.is_empty() && items.iter().all(|item: &Item| item.fidelity() == Fidelity::Lossy) {
        items.insert(0, Item::Simplify { is_last: false });
        items.push(Item::Simplify { is_last: false });
    }
    if let Some(Item::Simplify { is_last }) = items.last_mut() {
        *is_last = true;
    }
    Ok(items)
}

/// What one pass did.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// As the person wrote it.
    pub pass: String,
    /// What it may do to the outputs.
    pub fidelity: Fidelity,
    /// Bytes of the model before it, less those after.
    pub bytes_removed: i64,
    /// What it counted.
    pub tally: std::collections::BTreeMap<&'static str, u64>,
    /// What it left alone, and why.
    pub declined: Vec<String>,
    /// The error that it predicts, relative and squared, summed over layers, for a lossy pass.
    #[serde(serialize_with = "root")]
    pub predicted: f64,
}

/// What a person sees of a squared error.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn root<S: serde::Serializer>(squared: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(squared.sqrt())
}

/// Why a pipeline stopped.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// A pass failed.
    #[error("pass `{pass}` failed")]
    Failed {
        /// Its name.
        pass: String,
        /// What went wrong.
        source: anyhow::Error,
    },
    /// A pass left an invalid graph behind.
    #[error("pass `{pass}` broke the graph, which is a mistake in this program; leave it out with --passes")]
    Broke {
        /// Its name.
        pass: String,
        /// The invariant it broke.
        source: InvalidGraph,
    },
}

/// Runs one pass on `graph` as a transaction: on an error, `graph` is as it was.
///
/// # Errors
///
/// When the pass fails or leaves an invalid graph.
pub fn transact(name: &str, pass: &dyn Pass, graph: &mut Graph, cx: &mut Context) -> Result<bool, PipelineError> {
    let mut next = graph.clone();
    next.purge();
    pass.run(&mut next, cx).map_err(|source| PipelineError::Failed { pass: name.to_owned(), source })?;
    let changed = next.edits() != graph.edits();
    if changed {
        next.check().map_err(|source| PipelineError::Broke { pass: name.to_owned(), source })?;
        *graph = next;
    }
    Ok(changed)
}

/// Runs `items` on `model` at `price`, and says what each pass did; passes of `simplify` are added up over its rounds.
///
/// # Errors
///
/// See [`transact`].
pub fn run<'a>(
    items: impl IntoIterator<Item = &'a Item>,
    model: &mut Model,
    cx: &mut Context,
    price: Price,
) -> Result<Vec<Outcome>, PipelineError> {
    let mut outcomes = Vec::new();
    let mut bytes = Cost::bytes(model);
    for item in items {
        match item {
            Item::Simplify { is_last } => simplify(model, &mut bytes, *is_last, cx, &mut outcomes)?,
            Item::Pass(step) => {
                cx.reset(price);
                outcomes.push(one(&step.spelling, step.info.fidelity, step.pass.as_ref(), (model, &mut bytes), cx)?);
            }
        }
    }
    Ok(outcomes)
}

/// Runs one pass on a model of so many bytes, which are updated.
fn one(
    name: &str,
    fidelity: Fidelity,
    pass: &dyn Pass,
    (model, bytes): (&mut Model, &mut usize),
    cx: &mut Context,
) -> Result<Outcome, PipelineError> {
    let before = *bytes;
    if transact(name, pass, &mut model.graph, cx)? {
        *bytes = Cost::bytes(model);
    }
    Ok(Outcome {
        pass: name.to_owned(),
        fidelity,
        bytes_removed: before as i64 - *bytes as i64,
        tally: cx.tally.clone(),
        declined: std::mem::take(&mut cx.declined),
        predicted: cx.predicted,
    })
}

/// Runs every exact and rounding pass, again and again until a round changes nothing.
fn simplify(
    model: &mut Model,
    bytes: &mut usize,
    is_last: bool,
    cx: &mut Context,
    outcomes: &mut Vec<Outcome>,
) -> Result<(), PipelineError> {
    let exact = || PASSES.iter().filter(|info| info.fidelity != Fidelity::Lossy);
    let storing: Vec<_> = exact().filter(|info| info.stores && is_last).collect();
    let passes: Vec<_> = exact().filter(|info| !info.stores).collect();
    let first = outcomes.len();
    let mut run = |infos: &[&PassInfo], options: &[&str], first: usize, model: &mut Model| {
        for (i, info) in infos.iter().enumerate() {
            let Ok(pass) = info.build(options) else { continue };
            cx.reset(Price::default());
            let outcome = one(info.name, info.fidelity, pass.as_ref(), (model, bytes), cx)?;
            match outcomes.get_mut(first + i) {
                Some(total) => total.absorb(outcome),
                None => outcomes.push(outcome),
            }
        }
        Ok(())
    };
    run(&storing, &[TABLES], first, model)?;
    for _ in 0..MAX_ROUNDS {
        let edits = model.graph.edits();
        run(&passes, &[], first + storing.len(), model)?;
        if model.graph.edits() == edits {
            break;
        }
    }
    run(&storing, &[], first, model)
}

impl Outcome {
    /// Whether anything was done that is counted.
    #[must_use]
    pub fn did_something(&self) -> bool {
        self.tally.iter().any(|(what, &n)| n > 0 && !COUNTED_ONLY.contains(what))
    }

    fn absorb(&mut self, other: Self) {
        self.bytes_removed += other.bytes_removed;
        for (what, n) in other.tally {
            *self.tally.entry(what).or_default() += n;
        }
        self.declined = other.declined;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let did: Vec<_> = self.tally.iter().map(|(what, n)| format!("{n} {what}")).collect();
        let nothing = match (self.did_something(), self.fidelity) {
            (true, _) => None,
            (false, Fidelity::Lossy) => Some("nothing that fits and is worth its error".to_owned()),
            (false, _) => Some("nothing to do".to_owned()),
        };
        let did = nothing.into_iter().chain(did).collect::<Vec<_>>().join(", ");
        write!(f, "{:<26} {:>+14}  {did}", self.pass, -self.bytes_removed)?;
        if self.predicted > 0.0 { write!(f, ", predicted error {:.2e}", self.predicted.sqrt()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(list: &str) -> Vec<String> {
        let name = |item: &Item| match item {
            Item::Simplify { .. } => SIMPLIFY.to_owned(),
            Item::Pass(step) => step.spelling.clone(),
        };
        parse(list).unwrap().iter().map(name).collect()
    }

    #[test]
    fn lossy_lists_are_wrapped_and_others_run_as_written() {
        assert_eq!(spelled("svd:rank=8"), ["simplify", "svd:rank=8", "simplify"]);
        assert_eq!(spelled("identity,svd"), ["identity", "svd"]);
        assert_eq!(spelled("none"), Vec::<String>::new());
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parse("svd:rnk=8").unwrap_err().to_string().contains("--rnk"));
        assert!(parse("sdv").unwrap_err().to_string().contains("no pass `sdv`"));
        assert!(parse("svd:energy=2").unwrap_err().to_string().contains("at most 1"));
        assert!(parse("svd,,prune").unwrap_err().to_string().contains("missing"));
        assert!(parse("none,svd").unwrap_err().to_string().contains("alone"));
    }
}
