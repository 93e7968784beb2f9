//! Finding the price at which a result has the cost that is asked for.

use super::{Job, ShrinkError, stage::Stage};
use crate::{
    analysis::cost::Cost,
    pass::{Context, Minimize, Price},
};

/// The search stops when the cost is at most this much below what is asked for.
const NEAR: f64 = 0.005;
/// Prices are looked for between these powers of ten: predicted error for a byte or a multiply-add.
const POWERS: (f64, f64) = (-24.0, 6.0);
/// Halvings of that range, after which a price is known to a millionth.
const HALVINGS: usize = 48;

/// The price at which so large a share of the cost `before` is left, or a little less; nothing is measured on the way.
pub(super) fn price(
    stage: &Stage<'_>,
    job: &Job,
    target: f64,
    before: &Cost,
    cx: &mut Context,
    progress: &mut dyn FnMut(&str),
) -> Result<f64, ShrinkError> {
    let of = |cost: &Cost| match job.minimize {
        Minimize::Bytes => cost.bytes as f64,
        Minimize::Macs => cost.macs as f64,
    };
    let whole = of(before);
    let bound = cx.bound.clone();
    let mut share = |power: f64, progress: &mut dyn FnMut(&str)| {
        let price = Price::per_byte(libm::pow(10.0, power));
        let result = stage.run(cx, &|_| Some(price), None, progress)?;
        Ok::<_, ShrinkError>(of(&Cost::of(&result.model, &bound)) / whole.max(1.0))
    };
    let (mut low, mut high) = POWERS;
    let least = share(high, progress)?;
    if least > target {
        return Err(ShrinkError::OutOfReach { target, least });
    }
    for step in 1..=HALVINGS {
        progress(&format!("looking for the target, step {step}"));
        let middle = f64::midpoint(low, high);
        let found = share(middle, progress)?;
        if found > target {
            low = middle;
        } else {
            high = middle;
            if found >= target * (1.0 - NEAR) {
                break;
            }
        }
    }
    Ok(libm::pow(10.0, high))
}
