//! What is checked of a result before anybody writes it.

use std::collections::BTreeSet;

use super::{Job, Link, Report, ShrinkError, within};
use crate::{
    analysis::{
        cost::{Cost, peak_memory, work},
        shapes::Shapes,
        validity::{self, Fault},
    },
    codec::{Model, keeps_weights},
    verify::{
        Bound, Difference, Engine, ROUNDING_BUDGET, Reference, Samples, Source, Split, Undone, Value, are_alike,
        error_when_optimized, prove_regions, runs_as_written, takes_batches,
    },
};

/// Of a person's samples, so many are enough to show that only rounding differs.
const MAX_SAMPLES: usize = 16;
/// Models of more bytes are compared region by region, where no data is given: each engine keeps copies of all weights.
const MAX_WHOLE_BYTES: usize = 100 << 20;
/// Models whose constants and values that are alive at once take more bytes are, too.
const MAX_WHOLE_MEMORY: u64 = 200 << 20;
/// So are models whose run takes more multiply-adds.
const MAX_WHOLE_WORK: u64 = 8_000_000_000;
/// Changes that were taken back that are named.
const NAMED: usize = 3;

/// Proves that `result`, which exact and rounding passes made of `model`, computes the same but for rounding. Where that
/// can't be shown of a
/// change, it is taken back.
pub(super) fn lossless(
    model: &Model,
    result: &mut Model,
    job: &Job,
    source: Option<Source<'_>>,
    report: &mut Report,
) -> Result<(), ShrinkError> {
    let Some(source) = source.filter(|_| job.verify) else { return usable(model, result, job, None, report) };
    if are_alike(model, result) {
        report.notes.push(
            "operators and constants were only left out, merged or moved, which was proven without running the model"
                .to_owned(),
        );
        return usable(model, result, job, None, report);
    }
    let bound = Samples::likely_shapes(model, &job.request);
    if job.request.data.is_none() && is_heavy(model, &bound) {
        by_region(model, result, job, (&bound, "running all of it takes long"), report)?;
        return usable(model, result, job, None, report);
    }
    let samples = source.gather(model, true);
    report.tell_of_shapes(&samples);
    if let Some(why) = &samples.unrunnable {
        by_region(model, result, job, (&samples.bound, &format!("the model can't be run as a whole ({why})")), report)?;
        return usable(model, result, job, None, report);
    }
    let mut inputs = samples.part(Split::Last);
    inputs.truncate(MAX_SAMPLES);
    let reference = Reference::new(&job.request.engine, model, inputs)?;
    let mut found = reference.compare(result);
    if !found.as_ref().is_ok_and(is_rounding) {
        let proof = prove_regions(&job.request.engine, model, result, &samples.bound)?;
        tell_of_undone(&proof.undone, job, report)?;
        revert_if_larger(model, result, &proof.undone);
        match found {
            Err(why) if proof.undone.is_empty() => {
                report
                    .notes
                    .push(format!("verified change by change, since the result can't be run as a whole ({why})"));
                report.difference = Some(proof.difference);
                return usable(model, result, job, None, report);
            }
            _ => found = reference.compare(result),
        }
    }
    let difference = found?;
    within(difference.rounding, ROUNDING_BUDGET)?;
    report.difference = Some(difference);
    usable(model, result, job, Some(&samples), report)
}

fn is_rounding(difference: &Difference) -> bool {
    difference.rounding <= ROUNDING_BUDGET
}

/// Whether running all of a model takes much memory or long.
fn is_heavy(model: &Model, bound: &Bound) -> bool {
    let shapes = Shapes::infer(&model.graph, bound);
    Cost::bytes(model) > MAX_WHOLE_BYTES
        || peak_memory(&model.graph, &shapes) > MAX_WHOLE_MEMORY
        || work(&model.graph, &shapes) > MAX_WHOLE_WORK
}

/// Proves each change by itself, at the input shapes of `bound`.
fn by_region(
    model: &Model,
    result: &mut Model,
    job: &Job,
    (bound, why): (&Bound, &str),
    report: &mut Report,
) -> Result<(), ShrinkError> {
    let proof = prove_regions(&job.request.engine, model, result, bound)?;
    tell_of_undone(&proof.undone, job, report)?;
    revert_if_larger(model, result, &proof.undone);
    report.random_inputs = true;
    if proof.regions > 0 {
        report.notes.push(format!("each change was verified by itself, on random inputs, since {why}"));
        report.difference = Some(proof.difference);
    }
    Ok(())
}

/// Makes `result` the `model` again where more was taken back than is left: a part in its old form beside one in its new form may take more
/// than either.
fn revert_if_larger(model: &Model, result: &mut Model, undone: &[Undone]) {
    let nodes = |model: &Model| -> usize {
        let inside = model.graph.bodies().map(|(_, body)| body.graph.ops().len());
        model.graph.ops().len() + inside.sum::<usize>()
    };
    if !undone.is_empty() && nodes(result) >= nodes(model) && Cost::bytes(result) >= Cost::bytes(model) {
        *result = model.clone();
    }
}

/// Notes which changes were taken back; an error where that is not allowed.
fn tell_of_undone(undone: &[Undone], job: &Job, report: &mut Report) -> Result<(), ShrinkError> {
    if undone.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = undone.iter().take(NAMED).map(|undone| format!("`{}`", undone.value)).collect();
    let more = undone.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let named = format!("{}{more}", names.join(", "));
    if job.strict {
        return Err(ShrinkError::Unproven(named));
    }
    report.notes.push(format!(
        "the operators before {named} stay as they were: their rewritten form could not be verified; -v says why"
    ));
    report.causes.extend(undone.iter().map(|undone| format!("`{}`: {}", undone.value, undone.why)));
    Ok(())
}

/// Checks that the result can be used as the original can: that runtimes would not refuse its file, and where it is to be verified, that it
/// takes batches, that the file holds what was verified, and that an engine that optimizes files makes the same of it.
pub(super) fn usable(
    model: &Model,
    result: &Model,
    job: &Job,
    samples: Option<&Samples>,
    report: &mut Report,
) -> Result<(), ShrinkError> {
    let files = report.chain.iter().map(|link| &link.model).chain([result]);
    match fault(model, files) {
        Some(fault) if job.verify => return Err(ShrinkError::Invalid(fault)),
        Some(fault) => report.notes.push(format!("runtimes may refuse the result, since {fault}")),
        None => {}
    }
    if !job.verify {
        return Ok(());
    }
    let runnable = samples.filter(|samples| samples.unrunnable.is_none());
    let inputs = runnable.map(|samples| samples.part(Split::Last)).unwrap_or_default();
    // A batch of two was compared already where shapes are open and the values drawn.
    let batch = |bound: &Bound| bound.values().next().and_then(|dims| dims.first().copied());
    let compared = runnable.filter(|_| !job.is_lossy()).and_then(|samples| samples.other.as_ref()).and_then(batch);
    if compared.is_none_or(|batch| batch < 2) {
        takes(model, result, &job.request.engine, &inputs)?;
    }
    holds((result, &report.chain), &job.request.engine, &inputs)?;
    let verified = report.difference.as_ref().map_or(0.0, |difference| difference.error);
    optimized((model, result), &job.request.engine, &inputs, verified)
}

/// The first thing that runtimes would refuse one of these files for, and not the original: a fault of a kind that the
/// original has as often
/// may be at a place of another name.
fn fault<'a>(model: &Model, mut files: impl Iterator<Item = &'a Model>) -> Option<String> {
    let known = validity::faults(&model.graph);
    let count = |faults: &BTreeSet<Fault>, kind: &str| faults.iter().filter(|fault| fault.kind == kind).count();
    files.find_map(|file| {
        let found = validity::faults(&file.lowered().graph);
        let is_new = |fault: &&Fault| !known.contains(fault) && count(&found, &fault.kind) > count(&known, &fault.kind);
        found.iter().find(is_new).map(ToString::to_string)
    })
}

/// Checks that the result takes batches where the original does.
fn takes(model: &Model, result: &Model, engine: &Engine, inputs: &[Vec<Value>]) -> Result<(), ShrinkError> {
    let takes = |model: &Model| matches!(takes_batches(engine, model, inputs), Ok(Some(true)));
    // What the original can't do is not asked of the result.
    if takes(model) && !takes(result) { Err(ShrinkError::Batches) } else { Ok(()) }
}

/// Checks that the file of the result and those of the chain hold the weights that were verified.
fn holds((result, chain): (&Model, &[Link]), engine: &Engine, inputs: &[Vec<Value>]) -> Result<(), ShrinkError> {
    for model in chain.iter().map(|link| &link.model).chain([result]) {
        if !keeps_weights(model) || runs_as_written(engine, model, inputs)? == Some(false) {
            return Err(ShrinkError::Misspelled);
        }
    }
    Ok(())
}

/// Checks that the engine, where it optimizes files, makes of the result's about what was `verified` of it.
fn optimized(
    models: (&Model, &Model),
    engine: &Engine,
    inputs: &[Vec<Value>],
    verified: f64,
) -> Result<(), ShrinkError> {
    /// Kernels of integers, of which an optimized file may use others than the original, differ by a few percent.
    const OF_KERNELS: f64 = 0.05;
    let allowed = 2.0 * verified + OF_KERNELS;
    match error_when_optimized(engine, models, inputs)? {
        Some(found) if found.is_nan() || found > allowed => Err(ShrinkError::Optimized { found, verified }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    #[test]
    fn only_faults_that_the_original_lacks_are_held_against_a_file() {
        let of = |body: &str| {
            let head = "<ir_version: 8, opset_import: [\"\": 13]>\ng (float[1,4] x) => (float[1,4] y)\n<float[4] s = normal(1)>\n";
            text::parse(&format!("{head}{{\n {body}\n}}\n")).unwrap()
        };
        let (plain, early) = (of("n = Abs (x)\n y = Neg (n)"), of("n = LayerNormalization (x, s)\n y = Neg (n)"));
        let both = of("n = LayerNormalization (x, s)\n y = Gelu (n)");
        assert!(fault(&plain, [&early].into_iter()).is_some_and(|fault| fault.contains("LayerNormalization")));
        assert_eq!(fault(&early, [&early].into_iter()), None);
        let renamed = of("m = LayerNormalization (x, s)\n y = Neg (m)");
        assert_eq!(fault(&early, [&renamed].into_iter()), None);
        let twice = of("m = LayerNormalization (x, s)\n y = LayerNormalization (m, s)");
        assert!(fault(&early, [&twice].into_iter()).is_some());
        assert!(fault(&early, [&early, &both].into_iter()).is_some_and(|fault| fault.contains("Gelu")));
    }
}
