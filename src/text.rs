//! Models as text: the official ONNX textual syntax, but with marks for the weights, and differences between models.
//!
//! A constant of at most eight elements is written out. A longer one is `#` and a hash where a file carries it, and `*`
//! where a pass computed it: then its last bits may depend on the machine, and the text does not. Fixtures write
//! `normal(seed)`, `lowrank(rank, seed)`, `blocks(count, seed)` and `levels(count, seed)` in that place.

mod diff;
mod parse;
mod print;

pub use self::{
    diff::{Diff, diff},
    parse::{SyntaxError, parse},
    print::print,
};
