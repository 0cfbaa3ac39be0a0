//! Who may restore what, and what the new container's spec allows.

pub mod container_base;
pub mod foreign_spec;
pub mod node_config;
pub mod service_account;
