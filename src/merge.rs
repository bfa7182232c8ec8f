//! Ways of combining adapters.

mod cat;
mod soup;
mod sparse;
mod svd;

pub use cat::Cat;
pub use soup::Soup;
pub use sparse::{Dense, Majority, Rule, Sparse, Sparsity};
pub(crate) use svd::gaussian;
pub use svd::{ITERATIONS, Kept, Rank, Svd, dora_norms};
