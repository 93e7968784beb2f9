//! Results of falling size, from one calibration: how error and certificate grow on the way down.

use serde::Serialize;

use super::{
    Job, ShrinkError,
    land::land,
    stage::{Effort, Stage},
};
use crate::{
    analysis::cost::Cost,
    codec::Model,
    pass::Context,
    verify::{Certificate, Difference, Reference},
};

/// The shares of the cost that the results have, in hundredths.
const SHARES: [u32; 9] = [90, 80, 70, 60, 50, 40, 30, 20, 10];

/// One of the results.
#[derive(Clone, Debug, Serialize)]
pub struct Link {
    /// The share of the cost that it was to have, in hundredths.
    pub share: u32,
    /// What it costs.
    pub cost: Cost,
    /// How it differs from the input, on samples that only the links of this chain have seen.
    pub difference: Difference,
    /// What that says about other inputs.
    pub certificate: Option<Certificate>,
    /// Whether its bound, and that of every larger result before it, is within the flips that are allowed: tested from the
    /// mildest on up to the first failure, such a row of claims needs no correction (Angelopoulos 2021).
    pub certified: bool,
    /// The result.
    #[serde(skip)]
    pub model: Model,
}

/// The results down to the smallest that there is, each checked on the samples of `last`.
pub(super) fn links(
    stage: &Stage<'_>,
    job: &Job,
    before: &Cost,
    last: &Reference,
    cx: &mut Context,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Link>, ShrinkError> {
    let (mut links, mut unbroken) = (Vec::new(), job.max_flips.is_some());
    let target = |share: u32| (job, f64::from(share) / 100.0);
    // What each pass is worth is measured once, half way down.
    let known = match land(stage, target(SHARES[SHARES.len() / 2]), before, None, cx, progress) {
        Err(ShrinkError::OutOfReach { .. }) => None,
        known => Some(known?),
    };
    for share in SHARES {
        let landing = match land(stage, target(share), before, known.as_ref(), cx, progress) {
            Err(ShrinkError::OutOfReach { .. }) => break,
            landing => landing?,
        };
        let result = stage.run(cx, &|i| Some(landing.price(i)), (stage.judge.as_ref(), Effort::Most), progress)?;
        let difference = last.compare(&result.model)?;
        let certificate = Certificate::of(&difference).ok();
        let bound = certificate.as_ref().map_or(1.0, |certificate| certificate.bound);
        unbroken &= job.max_flips.is_some_and(|most| bound <= most);
        let cost = Cost::of(&result.model, &cx.bound);
        links.push(Link { share, cost, difference, certificate, certified: unbroken, model: result.model });
    }
    Ok(links)
}

/// The links as a table of tab-separated columns.
#[must_use]
pub fn table(links: &[Link], before: &Cost) -> String {
    let mut text = "file\tbytes\tof input\tMACs\tof input\terror\ttop class changed\tbound\tcertified\n".to_owned();
    for link in links {
        let share = |after: f64, before: f64| format!("{:.4}", after / before.max(1.0));
        let bound = link.certificate.as_ref().map_or_else(|| "-".to_owned(), |c| format!("{:.4}", c.bound));
        let columns = [
            format!("{}.onnx", link.share),
            link.cost.bytes.to_string(),
            share(link.cost.bytes as f64, before.bytes as f64),
            link.cost.macs.to_string(),
            share(link.cost.macs as f64, before.macs as f64),
            format!("{:.4}", link.difference.error),
            format!("{:.4}", link.difference.flips),
            bound,
            if link.certified { "yes" } else { "no" }.to_owned(),
        ];
        text.push_str(&columns.join("\t"));
        text.push('\n');
    }
    text
}
