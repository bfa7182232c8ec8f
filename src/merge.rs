//! Ways of combining adapters.

mod cat;
mod soup;
mod svd;

pub use cat::Cat;
pub use soup::Soup;
pub use svd::{ITERATIONS, Kept, Rank, Svd};
