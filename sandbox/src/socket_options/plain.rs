//! The options that a kernel gives and takes as four bytes.
//!
//! Left out is what CRIU keeps, what the kernel changes by itself while a connection lives (`TCP_QUICKACK`,
//! `SO_TXREHASH`), and the modes that are no options any more once they are chosen (`TCP_ULP`, `UDP_ENCAP`).

use std::os::fd::BorrowedFd;

use nix::sys::socket::{getsockopt, setsockopt};

/// When an option is read, and who may have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    Always,
    /// The kernel changes it, or answers something else, when there is a connection.
    OfListeners,
    /// The kernel keeps something else there for a connection of TCP, and takes nothing.
    OfDatagrams,
    /// As always, but for what the kernel itself does with it.
    TrafficClass,
    /// The kernel asks who sets it for `CAP_NET_ADMIN` in its network.
    NetworkAdmin,
    /// For `CAP_NET_RAW` or `CAP_NET_ADMIN`.
    NetworkRaw,
    /// For `CAP_NET_BROADCAST`.
    NetworkBroadcast,
}

impl Rule {
    /// Whether a process with these capabilities may set it.
    pub(super) fn allows(self, capabilities: u64) -> bool {
        let any_of = match self {
            Self::NetworkAdmin => 1 << 12,
            Self::NetworkRaw => 1 << 12 | 1 << 13,
            Self::NetworkBroadcast => 1 << 11,
            _ => return true,
        };
        capabilities & any_of != 0
    }
}

/// One option.
#[derive(Debug)]
pub(super) struct Plain {
    /// As `tasks.json` has it.
    pub(super) name: &'static str,
    pub(super) rule: Rule,
    pub(super) get: fn(BorrowedFd<'_>) -> nix::Result<u32>,
    pub(super) set: fn(BorrowedFd<'_>, u32) -> nix::Result<()>,
}

macro_rules! table {
    ($($name:ident $rule:ident $level:ident $number:literal $macro:ident,)*) => {
        mod option {
            $(
                pub(super) mod $name {
                    use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};
                    // By number: libc and headers do not have the names of all.
                    const NUMBER: libc::c_int = $number;
                    sockopt_impl!(
                        #[doc = stringify!($macro)]
                        This, Both, libc::$level, NUMBER, u32
                    );
                }
            )*
        }

        /// All of them, in the order of their levels and numbers.
        pub(super) const TABLE: &[Plain] = &[$(
            Plain {
                name: stringify!($name),
                rule: Rule::$rule,
                get: |socket| getsockopt(&socket, option::$name::This),
                set: |socket, value| setsockopt(&socket, option::$name::This, &value),
            },
        )*];
    };
}

table! {
    timestamp Always SOL_SOCKET 29 SO_TIMESTAMP,
    timestampns Always SOL_SOCKET 35 SO_TIMESTAMPNS,
    timestamping Always SOL_SOCKET 37 SO_TIMESTAMPING,
    timestamp_new Always SOL_SOCKET 63 SO_TIMESTAMP_NEW,
    timestampns_new Always SOL_SOCKET 64 SO_TIMESTAMPNS_NEW,
    timestamping_new Always SOL_SOCKET 65 SO_TIMESTAMPING_NEW,
    rxq_ovfl Always SOL_SOCKET 40 SO_RXQ_OVFL,
    peek_off Always SOL_SOCKET 42 SO_PEEK_OFF,
    lock_filter Always SOL_SOCKET 44 SO_LOCK_FILTER,
    select_err_queue Always SOL_SOCKET 45 SO_SELECT_ERR_QUEUE,
    busy_poll NetworkAdmin SOL_SOCKET 46 SO_BUSY_POLL,
    max_pacing_rate Always SOL_SOCKET 47 SO_MAX_PACING_RATE,
    incoming_cpu OfListeners SOL_SOCKET 49 SO_INCOMING_CPU,
    zerocopy Always SOL_SOCKET 60 SO_ZEROCOPY,
    prefer_busy_poll NetworkAdmin SOL_SOCKET 69 SO_PREFER_BUSY_POLL,
    busy_poll_budget NetworkAdmin SOL_SOCKET 70 SO_BUSY_POLL_BUDGET,
    reserve_mem Always SOL_SOCKET 73 SO_RESERVE_MEM,
    rcvmark Always SOL_SOCKET 75 SO_RCVMARK,
    passpidfd Always SOL_SOCKET 76 SO_PASSPIDFD,
    rcvpriority Always SOL_SOCKET 82 SO_RCVPRIORITY,
    passrights Always SOL_SOCKET 83 SO_PASSRIGHTS,
    inq Always SOL_SOCKET 84 SO_INQ,
    tcp_maxseg OfListeners IPPROTO_TCP 2 TCP_MAXSEG,
    tcp_syncnt Always IPPROTO_TCP 7 TCP_SYNCNT,
    tcp_linger2 Always IPPROTO_TCP 8 TCP_LINGER2,
    defer_accept Always IPPROTO_TCP 9 TCP_DEFER_ACCEPT,
    tcp_window_clamp OfListeners IPPROTO_TCP 10 TCP_WINDOW_CLAMP,
    tcp_thin_linear_timeouts Always IPPROTO_TCP 16 TCP_THIN_LINEAR_TIMEOUTS,
    user_timeout Always IPPROTO_TCP 18 TCP_USER_TIMEOUT,
    fast_open Always IPPROTO_TCP 23 TCP_FASTOPEN,
    tcp_notsent_lowat Always IPPROTO_TCP 25 TCP_NOTSENT_LOWAT,
    tcp_save_syn Always IPPROTO_TCP 27 TCP_SAVE_SYN,
    tcp_fastopen_no_cookie OfListeners IPPROTO_TCP 34 TCP_FASTOPEN_NO_COOKIE,
    tcp_inq Always IPPROTO_TCP 36 TCP_INQ,
    tcp_tx_delay Always IPPROTO_TCP 37 TCP_TX_DELAY,
    tcp_rto_max_ms Always IPPROTO_TCP 44 TCP_RTO_MAX_MS,
    ip_tos TrafficClass IPPROTO_IP 1 IP_TOS,
    ip_ttl Always IPPROTO_IP 2 IP_TTL,
    ip_recvopts Always IPPROTO_IP 6 IP_RECVOPTS,
    ip_retopts Always IPPROTO_IP 7 IP_RETOPTS,
    ip_pktinfo Always IPPROTO_IP 8 IP_PKTINFO,
    ip_mtu_discover Always IPPROTO_IP 10 IP_MTU_DISCOVER,
    ip_recverr Always IPPROTO_IP 11 IP_RECVERR,
    ip_recvttl Always IPPROTO_IP 12 IP_RECVTTL,
    ip_recvtos Always IPPROTO_IP 13 IP_RECVTOS,
    ip_passsec Always IPPROTO_IP 18 IP_PASSSEC,
    ip_transparent NetworkRaw IPPROTO_IP 19 IP_TRANSPARENT,
    ip_recvorigdstaddr Always IPPROTO_IP 20 IP_RECVORIGDSTADDR,
    ip_minttl Always IPPROTO_IP 21 IP_MINTTL,
    ip_checksum Always IPPROTO_IP 23 IP_CHECKSUM,
    ip_bind_address_no_port Always IPPROTO_IP 24 IP_BIND_ADDRESS_NO_PORT,
    ip_recvfragsize Always IPPROTO_IP 25 IP_RECVFRAGSIZE,
    ip_recverr_rfc4884 Always IPPROTO_IP 26 IP_RECVERR_RFC4884,
    ip_multicast_if OfDatagrams IPPROTO_IP 32 IP_MULTICAST_IF,
    ip_multicast_ttl OfDatagrams IPPROTO_IP 33 IP_MULTICAST_TTL,
    ip_multicast_loop OfDatagrams IPPROTO_IP 34 IP_MULTICAST_LOOP,
    ip_multicast_all OfDatagrams IPPROTO_IP 49 IP_MULTICAST_ALL,
    ip_unicast_if Always IPPROTO_IP 50 IP_UNICAST_IF,
    ip_local_port_range Always IPPROTO_IP 51 IP_LOCAL_PORT_RANGE,
    ipv6_unicast_hops Always IPPROTO_IPV6 16 IPV6_UNICAST_HOPS,
    ipv6_multicast_if OfDatagrams IPPROTO_IPV6 17 IPV6_MULTICAST_IF,
    ipv6_multicast_hops OfDatagrams IPPROTO_IPV6 18 IPV6_MULTICAST_HOPS,
    ipv6_multicast_loop OfDatagrams IPPROTO_IPV6 19 IPV6_MULTICAST_LOOP,
    ipv6_mtu_discover Always IPPROTO_IPV6 23 IPV6_MTU_DISCOVER,
    ipv6_recverr Always IPPROTO_IPV6 25 IPV6_RECVERR,
    ipv6_multicast_all OfDatagrams IPPROTO_IPV6 29 IPV6_MULTICAST_ALL,
    ipv6_recverr_rfc4884 Always IPPROTO_IPV6 31 IPV6_RECVERR_RFC4884,
    ipv6_flowinfo_send Always IPPROTO_IPV6 33 IPV6_FLOWINFO_SEND,
    ipv6_recvpktinfo Always IPPROTO_IPV6 49 IPV6_RECVPKTINFO,
    ipv6_recvhoplimit Always IPPROTO_IPV6 51 IPV6_RECVHOPLIMIT,
    ipv6_recvhopopts Always IPPROTO_IPV6 53 IPV6_RECVHOPOPTS,
    ipv6_recvrthdr Always IPPROTO_IPV6 56 IPV6_RECVRTHDR,
    ipv6_recvdstopts Always IPPROTO_IPV6 58 IPV6_RECVDSTOPTS,
    ipv6_recvpathmtu Always IPPROTO_IPV6 60 IPV6_RECVPATHMTU,
    ipv6_dontfrag Always IPPROTO_IPV6 62 IPV6_DONTFRAG,
    ipv6_recvtclass Always IPPROTO_IPV6 66 IPV6_RECVTCLASS,
    ipv6_tclass TrafficClass IPPROTO_IPV6 67 IPV6_TCLASS,
    ipv6_autoflowlabel Always IPPROTO_IPV6 70 IPV6_AUTOFLOWLABEL,
    ipv6_addr_preferences Always IPPROTO_IPV6 72 IPV6_ADDR_PREFERENCES,
    ipv6_minhopcount Always IPPROTO_IPV6 73 IPV6_MINHOPCOUNT,
    ipv6_recvorigdstaddr Always IPPROTO_IPV6 74 IPV6_RECVORIGDSTADDR,
    ipv6_transparent NetworkRaw IPPROTO_IPV6 75 IPV6_TRANSPARENT,
    ipv6_unicast_if Always IPPROTO_IPV6 76 IPV6_UNICAST_IF,
    ipv6_recvfragsize Always IPPROTO_IPV6 77 IPV6_RECVFRAGSIZE,
    udp_no_check6_tx Always IPPROTO_UDP 101 UDP_NO_CHECK6_TX,
    udp_no_check6_rx Always IPPROTO_UDP 102 UDP_NO_CHECK6_RX,
    udp_segment Always IPPROTO_UDP 103 UDP_SEGMENT,
    udp_gro Always IPPROTO_UDP 104 UDP_GRO,
    netlink_pktinfo Always SOL_NETLINK 3 NETLINK_PKTINFO,
    netlink_broadcast_error Always SOL_NETLINK 4 NETLINK_BROADCAST_ERROR,
    netlink_no_enobufs Always SOL_NETLINK 5 NETLINK_NO_ENOBUFS,
    netlink_listen_all_nsid NetworkBroadcast SOL_NETLINK 8 NETLINK_LISTEN_ALL_NSID,
    netlink_cap_ack Always SOL_NETLINK 10 NETLINK_CAP_ACK,
    netlink_ext_ack Always SOL_NETLINK 11 NETLINK_EXT_ACK,
    netlink_get_strict_chk Always SOL_NETLINK 12 NETLINK_GET_STRICT_CHK,
}
