//! Combine LoRA adapters straight from their files, in bounded memory.
//!
//! The flow, and the modules in its order: an [`adapter`] file is opened, its `container` told and
//! the `header` (or that of [`gguf`]) checked, its tensors paired into a [`layout`]; a `bank` lays
//! adapters side by side, tensors matched by name, and the `base` lends the weights that DoRA
//! changes; [`blocks`] cuts the job to a memory budget; a `source` hands out bytes, mapped or read;
//! [`merge`] sums them with the [`kernels`] of the machine, and a `writer` puts the result down, whole
//! or not at all; `convert` puts one adapter down in another format. A [`Watch`] tells how far a job
//! is, and stops it.

// Files are little-endian, and their bytes are used where they lie.
#[cfg(target_endian = "big")]
compile_error!("lorameta runs on little-endian machines only");

pub mod adapter;
mod bank;
mod base;
pub mod blocks;
mod container;
mod convert;
mod dtype;
mod error;
mod experts;
pub mod gguf;
pub mod gram;
mod header;
mod joint;
pub mod kernels;
pub mod layout;
pub mod merge;
mod pattern;
#[cfg(feature = "python")]
mod python;
mod scan;
mod source;
mod tensor;
mod terms;
#[cfg(test)]
mod testing;
mod watch;
mod writer;

pub use adapter::Adapter;
pub use base::Base;
pub use blocks::{Options, Plan};
pub use container::{Container, Heads, Opening, file_tensors, gguf_metadata};
pub use convert::{Conversion, check_conversion, convert};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use merge::{Cat, Dense, Kept, Majority, Rank, Rule, Soup, Sparse, Sparsity, Svd};
pub use pattern::first_match;
pub use scan::scan;
pub use source::Io;
pub use tensor::{Order, Tensor};
pub use terms::Terms;
pub use watch::Watch;
