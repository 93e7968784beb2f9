//! The command: the only place that prints, exits or creates the output file.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{
    collections::BTreeSet,
    fs,
    io::{self, IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use onnx_shrink::{
    analysis::{
        cost::Cost,
        moments::{Table, file},
    },
    cli::{Cli, Command, Feeds, Shrink},
    codec::{CodecError, Model, save, size_at},
    pass::{Fidelity, Minimize},
    passes::{PASSES, find},
    pipeline::{self, Item, Outcome},
    shrink::{self, BUDGET_ON_RANDOM, BUDGET_WITH_DATA, Job, Predictions, Report, ShrinkError, shrink},
    text,
    verify::{
        Cannot, Certificate, DataError, Difference, ROUNDING_BUDGET, Reference, Request, Samples, Split,
        catches_panics, compare_regions,
    },
};

/// Exit codes of the command.
mod exit {
    pub(crate) const FAILED: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    pub(crate) const NOT_VERIFIED: u8 = 3;
    pub(crate) const INTERRUPTED: u8 = 130;
    /// Of `diff`, which fails with 2.
    pub(crate) const DIFFERENT: u8 = 1;
    pub(crate) const TROUBLE: u8 = 2;
}

/// What an interrupt does: it ends the program, but lets a file that is being written be dropped first.
#[derive(Clone, Debug, Default)]
struct Interrupt {
    came: Arc<AtomicBool>,
    writing: Arc<Mutex<()>>,
}

impl Interrupt {
    #[allow(clippy::exit, reason = "nothing but the process holds anything here")]
    fn install() -> anyhow::Result<Self> {
        let interrupt = Self::default();
        let own = interrupt.clone();
        ctrlc::set_handler(move || {
            own.came.store(true, Ordering::SeqCst);
            let _idle = own.writing.lock().unwrap_or_else(PoisonError::into_inner);
            std::process::exit(i32::from(exit::INTERRUPTED));
        })?;
        Ok(interrupt)
    }
}

fn main() -> ExitCode {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !catches_panics() {
            tell(panic);
        }
    }));
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Inspect { model }) => inspect(&model),
        Some(Command::Diff { a, b }) => Ok(diff(&a, &b)),
        Some(Command::Verify { a, b, feeds, max_error }) => verify(&a, &b, &feeds, max_error),
        Some(Command::Passes { name }) => explain(name.as_deref()),
        None => Interrupt::install().and_then(|interrupt| run(&cli.shrink, &interrupt)),
    };
    result.unwrap_or_else(|error| {
        if error.downcast_ref::<CodecError>().is_some_and(|error| matches!(error, CodecError::Interrupted)) {
            return ExitCode::from(exit::INTERRUPTED);
        }
        let refusal = error.downcast_ref::<Refusal>();
        let remedies = refusal.map(|refusal| refusal.remedies.join(", ")).filter(|remedies| !remedies.is_empty());
        eprintln!("error: {}{}", chain(&error), remedies.map_or_else(String::new, |remedies| format!("; {remedies}")));
        let shrink_error = refusal.map(|refusal| &refusal.error);
        let not_verified = shrink_error.is_some_and(ShrinkError::is_verification)
            || error.downcast_ref::<Cannot>().is_some()
            || error.downcast_ref::<Refused>().is_some();
        let usage = error.downcast_ref::<Usage>().is_some()
            || shrink_error.is_some_and(ShrinkError::is_usage)
            || error.downcast_ref::<DataError>().is_some_and(DataError::is_usage);
        ExitCode::from(match () {
            () if usage => exit::USAGE,
            () if not_verified => exit::NOT_VERIFIED,
            () => exit::FAILED,
        })
    })
}

/// The command line asks for what can't be done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// `verify` found that two models are not the same.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

/// Why nothing was written, and what can be done about it.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
struct Refusal {
    remedies: Vec<&'static str>,
    #[source]
    error: ShrinkError,
}

/// The messages of an error and its causes; one that repeats its cause is left out.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    text
}

/// A result may be larger than the input by so many bytes for each node that it has less.
const BYTES_FOR_A_NODE: usize = 64;

/// The main job.
fn run(options: &Shrink, interrupt: &Interrupt) -> anyhow::Result<ExitCode> {
    let items = pipeline::parse(&options.passes).map_err(|error| Usage(format!("--passes: {error}")))?;
    let glob = |glob: &String| globset::Glob::new(glob).map_err(|error| Usage(format!("--keep: {error}")));
    let keep = options.keep.iter().map(glob).collect::<Result<_, _>>()?;
    let Some(input) = &options.input else { bail!("IN is missing; see --help") };
    check_strengths(options, &items)?;
    check_targets(options, input)?;
    let model = read(input)?;
    if model.unknown_bytes() > 0 {
        let lost = format!("{} bytes of the file are in fields that this program does not know", model.unknown_bytes());
        if options.strict {
            bail!("{}: {lost}; leave out --strict to drop them", input.display());
        }
        eprintln!("warning: {}: {lost}; they are dropped (--strict refuses)", input.display());
    }
    let job = Job {
        items,
        request: request(&options.feeds)?,
        max_error: options.max_error,
        max_flips: options.max_flips,
        minimize: match (options.target_macs, options.target_size) {
            (Some(_), _) => Minimize::Macs,
            (_, Some(_)) => Minimize::Bytes,
            _ => options.minimize,
        },
        target: options.target_macs.or(options.target_size),
        chain: options.pareto.is_some(),
        moments: moments(&options.moments, &model)?,
        max_gram_dim: options.max_gram_dim,
        keep,
        runtime: options.runtime,
        keep_initializer_inputs: options.keep_initializer_inputs,
        verify: !options.no_verify,
        strict: options.strict,
        warn: if options.quiet { |_| {} } else { |warning| eprintln!("warning: {warning}") },
    };
    let bar = progress(options.quiet);
    let shrunk = shrink(&model, &job, &mut |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    let (result, mut report) = shrunk.map_err(|error| Refusal { remedies: error.remedies(&job), error })?;
    let before = match &options.output {
        Some(output) if output.as_os_str() != "-" => {
            report.after.bytes = size_at(&result, output)?;
            size_at(&model, output)?
        }
        _ => model.source_bytes(),
    };
    // A known extent in the place of what computes it may take a few bytes more.
    let removed = report.before.node_count().saturating_sub(report.after.node_count());
    let larger = report.after.bytes > before + BYTES_FOR_A_NODE * removed && !options.force;
    if larger {
        report
            .notes
            .push("the result would be larger than the input, so the input was kept; --force overrides".to_owned());
        // What the passes did is told, but it is not what was written.
        report.difference = None;
        report.certificate = None;
    }
    if let (Some(output), false) = (&options.output, options.dry_run) {
        let _writing = interrupt.writing.lock().unwrap_or_else(PoisonError::into_inner);
        write(if larger { &model } else { &result }, output, &interrupt.came)?;
    }
    if larger {
        report.after = report.before.clone();
    }
    if result.graph.edits() == model.graph.edits() && !larger {
        let how = if model.has_external_data() { "but for where its data lies" } else { "byte for byte" };
        report.notes.push(format!("nothing was changed: the result is the input, {how}"));
    }
    if !options.quiet {
        eprint!("{}", table(&report, options.verbose));
    }
    if let Some(folder) = &options.pareto {
        let unwritten = || format!("{}: cannot be written", folder.display());
        fs::create_dir_all(folder).with_context(unwritten)?;
        for link in &report.chain {
            write(&link.model, &folder.join(format!("{}.onnx", link.share)), &interrupt.came)?;
        }
        let table = shrink::table(&report.chain, &report.before);
        fs::write(folder.join("table.tsv"), &table).with_context(unwritten)?;
        if !options.quiet {
            eprint!("\n{table}");
        }
    }
    if let Some(path) = &options.save_moments {
        let unwritten = || format!("{}: cannot be written", path.display());
        fs::write(path, file::encode(&report.moments, model.fingerprint())).with_context(unwritten)?;
    }
    if let Some(path) = &options.report {
        let json = serde_json::to_string_pretty(&report)? + "\n";
        if path.as_os_str() == "-" {
            print!("{json}");
        } else {
            fs::write(path, json).with_context(|| format!("{}: cannot be written", path.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The moments in `files`, added up.
fn moments(files: &[PathBuf], model: &Model) -> anyhow::Result<Option<Arc<Table>>> {
    let mut sum: Option<Table> = None;
    for path in files {
        let read = || path.display().to_string();
        let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let table = file::decode(&bytes, model.fingerprint()).with_context(read)?;
        match &mut sum {
            Some(sum) => file::merge(sum, &table).with_context(read)?,
            None => sum = Some(table),
        }
    }
    Ok(sum.map(Arc::new))
}

/// What runs the model, or why it can't be had.
fn request(feeds: &Feeds) -> anyhow::Result<Request> {
    feeds.request().map_err(|error| Usage(error).into())
}

/// Checks that there is a pass for each option that says how much passes may do.
fn check_strengths(options: &Shrink, items: &[Item]) -> anyhow::Result<()> {
    let is_lossy = |item: &Item| item.fidelity() == Fidelity::Lossy;
    let of_lossy = [
        ("--max-error", options.max_error.is_some()),
        ("--max-flips", options.max_flips.is_some()),
        ("--moments", !options.moments.is_empty()),
        ("--save-moments", options.save_moments.is_some()),
    ];
    let of_free = [
        ("--target-size", options.target_size.is_some()),
        ("--target-macs", options.target_macs.is_some()),
        ("--pareto", options.pareto.is_some()),
    ];
    let first = |list: &[(&'static str, bool)]| list.iter().find(|(_, is_given)| *is_given).map(|(name, _)| *name);
    if let (Some(name), false) = (first(&[&of_lossy[..], &of_free[..]].concat()), items.iter().any(is_lossy)) {
        return Err(Usage(format!(
            "{name}: no pass of the list trades accuracy; add one, for instance --passes svd,prune"
        ))
        .into());
    }
    if let (Some(name), false) = (first(&of_free), items.iter().any(Item::is_free)) {
        return Err(Usage(format!(
            "{name}: the strength of every lossy pass is fixed by its options; leave one of them free"
        ))
        .into());
    }
    Ok(())
}

/// Checks where results go before any work is done.
fn check_targets(options: &Shrink, input: &Path) -> anyhow::Result<()> {
    let same = |a: &Path, b: &Path| a == b || a.canonicalize().ok().is_some_and(|a| Some(a) == b.canonicalize().ok());
    let output = options.output.as_deref().filter(|_| !options.dry_run);
    if let Some(report) = &options.report {
        let taken = [(Some(input).filter(|path| path.as_os_str() != "-"), "IN"), (output, "OUT")];
        if let Some((_, which)) = taken.iter().find(|(path, _)| path.is_some_and(|path| same(path, report))) {
            return Err(Usage(format!("--report: {} is {which} already; name another file", report.display())).into());
        }
    }
    if let Some(folder) = options.pareto.as_deref().filter(|folder| folder.exists() && !folder.is_dir()) {
        bail!("{}: it is a file; --pareto wants a folder", folder.display());
    }
    let files = output.into_iter().chain(options.report.as_deref()).chain(options.save_moments.as_deref());
    for path in files.filter(|path| path.as_os_str() != "-") {
        if path.is_dir() {
            bail!("{}: it is a folder; name a file in it", path.display());
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            bail!("{}: there is no folder {}; make it first", path.display(), folder.display());
        }
    }
    Ok(())
}

fn progress(quiet: bool) -> ProgressBar {
    if quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn read(path: &Path) -> anyhow::Result<Model> {
    if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).context("standard input cannot be read")?;
        return Model::decode(bytes.into(), None).context("standard input");
    }
    Model::open(path).map_err(|error| match error {
        // It names the file itself.
        CodecError::Io { .. } => error.into(),
        error => anyhow::Error::from(error).context(path.display().to_string()),
    })
}

fn write(model: &Model, path: &Path, cancelled: &AtomicBool) -> anyhow::Result<()> {
    if path.as_os_str() == "-" {
        return io::stdout().write_all(&model.to_stream()?).context("standard output cannot be written");
    }
    save(model, path, cancelled)?;
    Ok(())
}

/// The before/after table.
fn table(report: &Report, verbose: bool) -> String {
    use std::fmt::Write as _;
    let mut text = report.before.compared_to(&report.after);
    if !report.passes.is_empty() {
        let _ = writeln!(text, "\n{:<26} {:>14}  what it did", "pass", "bytes");
    }
    let is_idle = |outcome: &&Outcome| {
        outcome.fidelity != Fidelity::Lossy && outcome.bytes_removed == 0 && !outcome.did_something() && !verbose
    };
    for outcome in report.passes.iter().filter(|outcome| !is_idle(outcome)) {
        let _ = writeln!(text, "{outcome}");
        for declined in outcome.declined.iter().filter(|_| verbose) {
            let _ = writeln!(text, "    declined {declined}");
        }
        if !outcome.declined.is_empty() && !verbose {
            let _ = writeln!(text, "    {} declined; -v says why", outcome.declined.len());
        }
    }
    let busy: BTreeSet<_> = report.passes.iter().filter(|o| !is_idle(o)).map(|outcome| outcome.pass.as_str()).collect();
    let idle = report.passes.iter().filter(is_idle).map(|outcome| outcome.pass.as_str());
    let idle: BTreeSet<_> = idle.filter(|pass| !busy.contains(pass)).collect();
    if !idle.is_empty() {
        let _ = writeln!(text, "nothing to do for {} more passes; -v names them", idle.len());
    }
    if let Some(difference) = &report.difference {
        let inputs = if report.random_inputs { "random inputs" } else { "samples" };
        let _ =
            write!(text, "\nerror {:.2e} on {} {inputs} that nothing else saw", difference.error, difference.samples);
        if let Some(budget) = report.budget {
            let _ = write!(text, ", budget {budget}");
        }
        if difference.classifies {
            let _ = write!(text, "; top class changed on {:.1} %", difference.flips * 100.0);
        }
        text.push('\n');
        if let Some(Certificate { samples, changed, bound, confidence }) = &report.certificate {
            let (bound, confidence) = (bound * 100.0, confidence * 100.0);
            let _ = writeln!(
                text,
                "certificate: the top class changed on {changed} of {samples} samples that nothing had seen, so with {confidence} % \
                 confidence on at most {bound:.2} % of such inputs, which bounds the loss of accuracy too"
            );
        }
        if let Some(Predictions { steps, median, worst }) = report.predictions {
            let _ = writeln!(
                text,
                "errors were predicted within a factor of {median:.1} in the median of {steps} steps, {worst:.1} at worst"
            );
        }
        for name in &difference.unexercised {
            let _ = writeln!(text, "note: output `{name}` hardly varies over these inputs: it was held to its value");
        }
        text += &untaken_note(difference);
    }
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    for cause in report.causes.iter().filter(|_| verbose) {
        let _ = writeln!(text, "    {cause}");
    }
    text
}

/// A line about what was not compared; nothing where all was.
fn untaken_note(difference: &Difference) -> String {
    const NAMED: usize = 3;
    let (named, rest) = difference.untaken.split_at(difference.untaken.len().min(NAMED));
    let rest = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
    match named {
        [] => String::new(),
        named => format!(
            "note: no input took the {}{rest}, so nothing of that was compared; --input and --data give other inputs\n",
            named.join(", the ")
        ),
    }
}

fn inspect(path: &Path) -> anyhow::Result<ExitCode> {
    let model = read(path)?;
    let mut raised = model.clone();
    raised.raise();
    let cost = Cost::of(&raised, &Samples::likely_shapes(&raised, &Request::default()));
    let cost = Cost { bytes: Cost::bytes(&model), ..cost };
    let ops: Vec<_> = cost.nodes.iter().map(|(op, count)| format!("  {op} {count}\n")).collect();
    let opset = |(domain, version): (&str, i64)| {
        format!("opset      {} {version}\n", if domain.is_empty() { "ai.onnx" } else { domain })
    };
    let (ops, opsets) = (ops.concat(), model.opsets().map(opset).collect::<Vec<_>>().concat());
    let text = format!(
        "nodes      {}\n{ops}parameters {}\nbytes      {}\nMACs       {} where shapes are known\nIR version {}\n{opsets}",
        cost.node_count(),
        cost.parameters,
        cost.bytes,
        cost.macs,
        model.ir_version()
    );
    // Whoever reads it may have seen enough.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn verify(a: &Path, b: &Path, feeds: &Feeds, max_error: Option<f64>) -> anyhow::Result<ExitCode> {
    let (mut first, mut second) = (read(a)?, read(b)?);
    // An engine need not know how a file spells its weights.
    first.raise();
    second.raise();
    let request = request(feeds)?;
    let samples = Samples::gather(&first, &request)?;
    let (difference, budget) = if samples.unrunnable.is_none() {
        let inputs = [Split::Fit, Split::Search, Split::Last].into_iter().flat_map(|part| samples.part(part));
        let reference = Reference::before_squashing(&request.engine, &first, inputs.collect())?;
        if reference.is_flat() {
            return Err(
                Refused("no output of A varies over the samples; give real inputs with --data".to_owned()).into()
            );
        }
        (reference.compare(&second)?, if samples.random { BUDGET_ON_RANDOM } else { BUDGET_WITH_DATA })
    } else {
        // Region by region, only rounding can be proven.
        let difference = compare_regions(&request.engine, &first, &second, &samples.bound)?;
        (Difference { error: difference.rounding, ..difference }, ROUNDING_BUDGET)
    };
    println!("{}", serde_json::to_string_pretty(&difference)?);
    eprint!("{}", untaken_note(&difference));
    let budget = max_error.unwrap_or(budget);
    // Written so that NaN fails.
    if difference.error <= budget {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Refused(format!("B computes something else: error {:.2e} where {budget:.2e} is allowed", difference.error))
        .into())
}

fn diff(a: &Path, b: &Path) -> ExitCode {
    let read = |path| read(path).inspect_err(|error| eprintln!("error: {}", chain(error)));
    let (Ok(a), Ok(b)) = (read(a), read(b)) else { return ExitCode::from(exit::TROUBLE) };
    let diff = text::diff(&a, &b);
    print!("{diff}");
    if diff.is_same { ExitCode::SUCCESS } else { ExitCode::from(exit::DIFFERENT) }
}

fn explain(name: Option<&str>) -> anyhow::Result<ExitCode> {
    let Some(name) = name else {
        for pass in PASSES {
            println!("{:<16} {:<9} {}", pass.name, pass.fidelity, pass.summary());
        }
        return Ok(ExitCode::SUCCESS);
    };
    match find(name) {
        Some(pass) => {
            print!("{}", pass.help());
            Ok(ExitCode::SUCCESS)
        }
        None if name == pipeline::SIMPLIFY => {
            println!("simplify\n\nThe preset of all exact and rounding passes, run until none finds work.");
            Ok(ExitCode::SUCCESS)
        }
        None => Err(Usage(format!("there is no pass `{name}`; `onnx-shrink passes` lists them")).into()),
    }
}
