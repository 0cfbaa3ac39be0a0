//! What the engine tells its caller while an operation goes on.

/// Is told of each step. The command line draws bars; a service may log, or use [`Silent`].
pub trait Progress: Send + Sync {
    /// A step begins; the one before it has ended.
    fn step(&self, name: &str);

    /// A step begins that moves about `total` bytes; [`Progress::counter`] says how far it is.
    fn bytes(&self, name: &str, total: u64);

    /// Something that somebody has to know or do for it to go on; told whatever else is shown.
    fn tell(&self, line: &str);

    /// A function to be called with the number of bytes that have been moved since its last call,
    /// from any thread.
    fn counter(&self) -> Box<dyn FnMut(u64) + Send>;
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _name: &str) {}

    fn bytes(&self, _name: &str, _total: u64) {}

    fn tell(&self, _line: &str) {}

    fn counter(&self) -> Box<dyn FnMut(u64) + Send> {
        Box::new(|_bytes| {})
    }
}
