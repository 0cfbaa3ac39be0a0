//! What the network of a new container lets everybody do.
//!
//! ```text
//! /proc/sys/net/ipv4/ip_unprivileged_port_start    of the container's network: what is below takes a capability
//! /proc/sys/net/ipv4/tcp_{w,r}mem                  of the container's network: the kernel itself takes so much
//! /proc/sys/net/core/{w,r}mem_{max,default}        of the node; the kernel doubles what a program asks for
//! ```

use std::fs;
use std::io;
use std::path::Path;

use transship_checkpoint::criu_images::open_files::{BufferLimits, Buffers};

use super::allowance::Allowance;
use crate::pins::in_network;

const NETWORK: &str = "network";
/// `PROT_SOCK`: that of a new network.
const FIRST_FREE_PORT: u32 = 1024;

/// Limits for those without capabilities.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Network {
    /// The first port that everybody may bind.
    pub first_free_port: u32,
    /// How much sockets may keep.
    pub buffers: BufferLimits,
}

impl Network {
    /// Those of the network that a container of the spec is in.
    pub(super) fn of(allowed: &Allowance) -> Self {
        let joined = { allowed.joined.iter() }.find(|(kind, _)| kind == NETWORK);
        let read = match joined {
            // One that cannot be entered is joined by nobody.
            Some((_, path)) => in_network("enter", path, || Ok(Read::here())).ok(),
            None => Some(Read::here()),
        };
        let is_new = joined.is_none() && { allowed.namespaces.iter() }.any(|kind| kind == NETWORK);
        let live = read.as_ref().filter(|_| !is_new);
        let first_free_port = { allowed.first_free_port }
            .or(live.and_then(|read| read.first_free_port))
            .unwrap_or(FIRST_FREE_PORT);
        let (send, receive) = (of_node("w"), of_node("r"));
        let of_tcp = |own: u32, of: &dyn Fn(&Read) -> Option<u32>| {
            let most = read.as_ref().and_then(of);
            own.max(most.unwrap_or_default())
        };
        let others = Buffers {
            of_tcp: false,
            send,
            receive,
        };
        let tcp = Buffers {
            of_tcp: true,
            send: of_tcp(send, &|read| read.tcp_send),
            receive: of_tcp(receive, &|read| read.tcp_receive),
        };
        Self {
            first_free_port,
            buffers: BufferLimits { tcp, others },
        }
    }
}

/// What the kernel shows of the reader's network.
#[derive(Debug)]
struct Read {
    first_free_port: Option<u32>,
    tcp_send: Option<u32>,
    tcp_receive: Option<u32>,
}

impl Read {
    fn here() -> Self {
        Self {
            first_free_port: last_number("ipv4/ip_unprivileged_port_start").ok(),
            tcp_send: last_number("ipv4/tcp_wmem").ok(),
            tcp_receive: last_number("ipv4/tcp_rmem").ok(),
        }
    }
}

fn of_node(which: &str) -> u32 {
    // Where the node tells nothing the kernel's own defaults hold.
    let number = |name: &str| last_number(&format!("core/{which}mem_{name}")).unwrap_or(212_992);
    number("max").saturating_mul(2).max(number("default"))
}

/// Of three numbers the last one is the most.
fn last_number(name: &str) -> io::Result<u32> {
    let text = fs::read_to_string(Path::new("/proc/sys/net").join(name))?;
    let number = text.split_whitespace().next_back().map(str::parse);
    { number.and_then(Result::ok) }.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}
