//! What is checked of a result before anybody writes it.

use super::{Job, Link, Report, ShrinkError, within};
use crate::{
    analysis::validity,
    codec::{Model, keeps_weights},
    verify::{
        Difference, Engine, ROUNDING_BUDGET, Reference, Samples, Split, Value, compare_regions, error_when_optimized,
        runs_as_written, takes_batches,
    },
};

/// Checks that only rounding differs.
pub(super) fn same(model: &Model, result: &Model, job: &Job, samples: &Samples) -> Result<Difference, ShrinkError> {
    let difference = match &samples.unrunnable {
        None => Reference::new(&job.request.engine, model, samples.part(Split::Last))?.compare(result)?,
        Some(_) => compare_regions(&job.request.engine, model, result, &samples.bound)?,
    };
    within(difference.rounding, ROUNDING_BUDGET)?;
    Ok(difference)
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
    holds(model, (result, &report.chain), &job.request.engine, &inputs)?;
    let verified = report.difference.as_ref().map_or(0.0, |difference| difference.error);
    optimized((model, result), &job.request.engine, &inputs, verified)
}

/// The first thing that runtimes would refuse one of these files for, and not the original.
fn fault<'a>(model: &Model, mut files: impl Iterator<Item = &'a Model>) -> Option<String> {
    let known = validity::faults(&model.graph);
    files.find_map(|file| validity::faults(&file.lowered().graph).into_iter().find(|fault| !known.contains(fault)))
}

/// Checks that the result takes batches where the original does, and that its file and those of the chain hold the weights that
/// were verified.
fn holds(
    model: &Model,
    (result, chain): (&Model, &[Link]),
    engine: &Engine,
    inputs: &[Vec<Value>],
) -> Result<(), ShrinkError> {
    let takes = |model: &Model| matches!(takes_batches(engine, model, inputs), Ok(Some(true)));
    // What the original can't do is not asked of the result.
    if takes(model) && !takes(result) {
        return Err(ShrinkError::Batches);
    }
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
        assert!(fault(&early, [&early, &both].into_iter()).is_some_and(|fault| fault.contains("Gelu")));
    }
}
