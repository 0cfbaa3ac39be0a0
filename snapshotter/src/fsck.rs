//! Checks that database and directories agree, and mends what can be mended.
