//! A direct, encrypted connection between the two nodes of a migration, for the bulk of the data.
//!
//! ```text
//!  source                                          target
//!   Identity ──public key, in Offer─────────────>   Identity
//!            <──public key, addresses, in Need───   Listener (an address of its own, any port)
//!   connect ══ STREAMS × TLS 1.3 over TCP ══════>   accept
//! ```
//!
//! Each side proves the key that it has named over the command's channel, and takes no other: raw public
//! keys (RFC 7250), made for one migration. Nobody else gets further than the handshake, and the listener
//! is gone as soon as the source has come, or after three seconds. Where the other node cannot be reached
//! directly, the command's pipe carries everything.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::client::AlwaysResolvesClientRawPublicKeys;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::{default_provider, sign::any_eddsa_type};
use rustls::crypto::verify_tls13_signature_with_raw_key;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, ClientConnection, DigitallySignedStruct,
    DistinguishedName, ServerConfig, ServerConnection, SignatureScheme, StreamOwned,
};

use crate::error::{Context as _, Error, Result};

/// Connections for the files of one migration: a file goes through one of them, so that the layer of the upperdir does
/// not wait for the memory.
pub const STREAMS: usize = 2;
/// How long the source may take to come.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long one handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Handshakes beside each other, with strangers as well.
const HANDSHAKES: usize = 16;
/// How often who waits looks at those that are shaking hands.
const LOOK: Duration = Duration::from_millis(10);
/// More addresses than this are not tried.
const ADDRESSES: usize = 4;
/// Bytes that the session takes before it writes: one frame of the stream.
const BUFFER: usize = 1 << 20;
/// The name in the handshake, which means nothing: keys are compared.
const NAME: &str = "transship";

/// Where the target is to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataAddress {
    /// Nowhere: all goes through the command.
    Nowhere,
    /// At this address of its own.
    At(IpAddr),
}

/// What [`DataAddress::Nowhere`] is called on command lines.
const NOWHERE: &str = "none";

impl FromStr for DataAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            NOWHERE => Ok(Self::Nowhere),
            text => { text.parse().map(Self::At) }
                .map_err(|_| format!("{text:?} is neither an IP address nor {NOWHERE:?}")),
        }
    }
}

impl std::fmt::Display for DataAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nowhere => f.write_str(NOWHERE),
            Self::At(address) => address.fmt(f),
        }
    }
}

impl DataAddress {
    /// The address, if it is one.
    pub fn address(self) -> Option<IpAddr> {
        match self {
            Self::Nowhere => None,
            Self::At(address) => Some(address),
        }
    }
}

/// One connection: a file after the other goes through it, one way.
pub type Connection = Box<dyn Link>;

/// Both directions of a connection.
pub trait Link: Read + Write + Send {}

impl<L: Read + Write + Send> Link for L {}

/// The key of this side, for one migration.
#[derive(Debug)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
    public: String,
}

/// Connections, and the sockets below them: to end a read or write that another thread sits in.
pub struct Connections {
    connections: Vec<Connection>,
    sockets: Vec<TcpStream>,
}

/// Ends the connections when it is dropped, whoever sits in them.
#[derive(Debug)]
pub struct EndAtDrop(Vec<TcpStream>);

/// Where the source is waited for.
#[derive(Debug)]
pub struct Listener {
    listeners: Vec<TcpListener>,
    config: Arc<ServerConfig>,
    streams: usize,
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connections")
            .field("sockets", &self.sockets)
            .finish_non_exhaustive()
    }
}

impl EndAtDrop {
    /// A read that takes longer than this fails.
    ///
    /// # Errors
    /// A system call failed.
    pub fn read_within(&self, patience: Duration) -> io::Result<()> {
        { self.0.iter() }.try_for_each(|socket| socket.set_read_timeout(Some(patience)))
    }
}

impl Drop for EndAtDrop {
    fn drop(&mut self) {
        for socket in &self.0 {
            // One that the other side has ended is as good.
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

impl Connections {
    /// How many.
    pub fn count(&self) -> usize {
        self.connections.len()
    }

    /// From now on the kernel ends one whose other side has acknowledged nothing for so long.
    ///
    /// # Errors
    /// A system call failed.
    pub fn end_unheard(&self, patience: Duration) -> Result<()> {
        let most = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        for socket in &self.sockets {
            { setsockopt(socket, TcpUserTimeout, &most) }
                .context("cannot bound the wait for the other side")?;
        }
        Ok(())
    }

    /// The connections, and what ends them.
    pub fn split(self) -> (Vec<Connection>, EndAtDrop) {
        (self.connections, EndAtDrop(self.sockets))
    }

    /// Takes the last one, and what ends it.
    pub fn take_last(&mut self) -> Option<(Connection, EndAtDrop)> {
        let (connection, socket) = self.connections.pop().zip(self.sockets.pop())?;
        Some((connection, EndAtDrop(vec![socket])))
    }

    fn none() -> Self {
        Self {
            connections: Vec::new(),
            sockets: Vec::new(),
        }
    }

    fn add(&mut self, socket: &TcpStream, connection: Connection) -> io::Result<()> {
        self.sockets.push(socket.try_clone()?);
        self.connections.push(connection);
        Ok(())
    }
}

impl Identity {
    /// A new key.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new() -> Result<Self> {
        let failed = || Error::failed("cannot make a key for the direct connection");
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let document = document.map_err(|_| failed())?;
        let key = any_eddsa_type(&PrivatePkcs8KeyDer::from(document.as_ref()));
        let key = key.map_err(|error| failed().because(error))?;
        let public = key.public_key().ok_or_else(failed)?.into_owned();
        let raw = CertificateDer::from(public.to_vec());
        Ok(Self {
            certified: Arc::new(CertifiedKey::new(vec![raw], key)),
            public: BASE64.encode(&public),
        })
    }

    /// What the other side has to know: a SubjectPublicKeyInfo in base64.
    pub fn public(&self) -> &str {
        &self.public
    }

    /// Listens at these addresses for the owner of `key`, who makes so many connections.
    ///
    /// # Errors
    /// No such key, or none of the addresses is this node's.
    pub fn listen(&self, addresses: &[IpAddr], key: &str, streams: usize) -> Result<Listener> {
        let failed = "cannot listen for the direct connection";
        let config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context(failed)?
            .with_client_cert_verifier(Pinned::of(key)?)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
                Arc::clone(&self.certified),
            )));
        let mut listeners = Vec::new();
        let mut refused = None;
        for address in addresses.iter().take(ADDRESSES) {
            let listener = TcpListener::bind((*address, 0)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(listener)
            });
            match listener {
                Ok(listener) => listeners.push(listener),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if listeners.is_empty() => Err(error).context(failed),
            _ => Ok(Listener {
                listeners,
                config: Arc::new(config),
                streams,
            }),
        }
    }

    /// Connects to the owner of `key`, so many times, at that of these addresses which first proves to be the owner's.
    ///
    /// # Errors
    /// None answers, or not with that key.
    pub fn connect(
        &self,
        addresses: &[SocketAddr],
        key: &str,
        streams: usize,
    ) -> Result<Connections> {
        let config = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context("cannot prepare the direct connection")?
            .dangerous()
            .with_custom_certificate_verifier(Pinned::of(key)?)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                Arc::clone(&self.certified),
            )));
        let config = Arc::new(config);
        let mut why = Error::failed("the other node names no address");
        for (address, first) in reach(addresses, &config)? {
            match first.and_then(|first| connect_to(&address, first, &config, streams)) {
                Ok(connections) => return Ok(connections),
                Err(error) => {
                    why = Error::failed(format!("cannot connect to {address}")).because(error);
                }
            }
        }
        Err(why)
    }
}

/// AES with 128 bits before that with 256: a quarter less work for the processor, of which the freeze is made, and keys
/// that live for one migration.
fn provider() -> CryptoProvider {
    let mut provider = default_provider();
    let quickest = CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != quickest);
    provider
}

/// An address, and what has become of the attempt to reach it.
type Reached = (SocketAddr, io::Result<Proven>);

/// A connection whose other side has proven its key. It has not seen ours yet, so that it counts none that is not used.
struct Proven {
    socket: TcpStream,
    session: ClientConnection,
}

/// Tries all of them side by side, so that those which lead nowhere, or to somebody else, keep nobody waiting. They come
/// as they answer.
fn reach(addresses: &[SocketAddr], config: &Arc<ClientConfig>) -> Result<mpsc::IntoIter<Reached>> {
    let (told, reached) = mpsc::channel();
    for address in addresses.iter().copied().take(ADDRESSES) {
        let (told, config) = (told.clone(), Arc::clone(config));
        let connect = move || {
            // One that comes too late is closed before our key has been shown.
            drop(told.send((address, prove(&address, config))));
        };
        {
            thread::Builder::new()
                .name("connect".to_owned())
                .spawn(connect)
        }
        .context("cannot start a thread")?;
    }
    Ok(reached.into_iter())
}

/// Connects, and has the other side prove its key: the first half of the handshake.
fn prove(address: &SocketAddr, config: Arc<ClientConfig>) -> io::Result<Proven> {
    let socket = TcpStream::connect_timeout(address, HANDSHAKE)?;
    let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
    let mut session = ClientConnection::new(config, name).map_err(io::Error::other)?;
    during_handshake(&socket, |socket| {
        while session.is_handshaking() {
            while session.wants_write() {
                session.write_tls(socket)?;
            }
            if session.read_tls(socket)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let read = session.process_new_packets();
            read.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        Ok(())
    })?;
    Ok(Proven { socket, session })
}

/// `first` leads to the address already.
fn connect_to(
    address: &SocketAddr,
    first: Proven,
    config: &Arc<ClientConfig>,
    streams: usize,
) -> io::Result<Connections> {
    let (mut connections, mut first) = (Connections::none(), Some(first));
    for _ in 0..streams {
        let Proven { socket, session } = match first.take() {
            Some(first) => first,
            None => prove(address, Arc::clone(config))?,
        };
        let mut stream = StreamOwned::new(session, socket.try_clone()?);
        stream.conn.set_buffer_limit(Some(BUFFER));
        during_handshake(&socket, |socket| {
            // The other side says when it has seen our key, and that it has not only one of these.
            let mut seen = [0];
            rustls::Stream::new(&mut stream.conn, socket).read_exact(&mut seen)
        })?;
        connections.add(&socket, Box::new(stream))?;
    }
    Ok(connections)
}

/// A socket until a deadline, however little comes with each read.
struct UntilDeadline<'s> {
    socket: &'s TcpStream,
    deadline: Instant,
}

impl UntilDeadline<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(Some(left)),
        }
    }
}

impl Read for UntilDeadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer)
    }
}

impl Write for UntilDeadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// With a deadline for all of it.
fn during_handshake<T>(
    socket: &TcpStream,
    shake: impl FnOnce(&mut UntilDeadline<'_>) -> io::Result<T>,
) -> io::Result<T> {
    socket.set_nodelay(true)?;
    let deadline = Instant::now() + HANDSHAKE;
    let done = shake(&mut UntilDeadline { socket, deadline })?;
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    Ok(done)
}

impl Listener {
    /// Where it listens.
    ///
    /// # Errors
    /// A system call failed.
    pub fn addresses(&self) -> Result<Vec<SocketAddr>> {
        let addresses = self.listeners.iter().map(TcpListener::local_addr);
        let addresses: io::Result<_> = addresses.collect();
        addresses.context("cannot tell where the direct connection is waited for")
    }

    /// Waits for the source. Who has not its key is sent away.
    ///
    /// # Errors
    /// It has not come in time.
    pub fn accept(self) -> Result<Connections> {
        let deadline = Instant::now() + PATIENCE;
        let (told, proven) = mpsc::channel();
        let (mut came, mut found) = (0, BTreeMap::new());
        while found.len() < self.streams {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = "nobody has come for the direct connection";
                return Err(Error::failed(message));
            }
            let wanted = { self.listeners.iter() }
                .map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN));
            let mut wanted: Vec<PollFd<'_>> = wanted.collect();
            let left = PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO);
            poll(&mut wanted, left).context("cannot wait for the direct connection")?;
            for listener in &self.listeners {
                // Beside each other: one that says nothing keeps nobody waiting. One that gave up meanwhile, or is a
                // stranger, leaves room for the next one.
                if Arc::strong_count(&self.config) <= HANDSHAKES
                    && let Ok((socket, _)) = listener.accept()
                {
                    let (config, told, turn) = (Arc::clone(&self.config), told.clone(), came);
                    came += 1;
                    let shake = move || {
                        if let Ok(connection) = shake_hands(&socket, config) {
                            drop(told.send((turn, socket, connection)));
                        }
                    };
                    {
                        thread::Builder::new()
                            .name("handshake".to_owned())
                            .spawn(shake)
                    }
                    .context("cannot start a thread")?;
                }
            }
            found.extend(
                proven
                    .try_iter()
                    .map(|(turn, socket, it)| (turn, (socket, it))),
            );
        }
        let mut connections = Connections::none();
        // In the order in which the source has made them: the last one may be for pages.
        for (socket, connection) in found.into_values().take(self.streams) {
            { connections.add(&socket, connection) }.context("cannot keep a connection")?;
        }
        Ok(connections)
    }
}

fn shake_hands(socket: &TcpStream, config: Arc<ServerConfig>) -> io::Result<Connection> {
    socket.set_nonblocking(false)?;
    let session = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(session, socket.try_clone()?);
    during_handshake(socket, |socket| {
        stream.conn.complete_io(socket)?;
        let mut stream = rustls::Stream::new(&mut stream.conn, socket);
        stream.write_all(&[1])?;
        stream.flush()
    })?;
    Ok(Box::new(stream))
}

/// Takes one key, and no other.
#[derive(Debug)]
struct Pinned {
    key: Vec<u8>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn of(key: &str) -> Result<Arc<Self>> {
        let key = BASE64.decode(key.as_bytes());
        Ok(Arc::new(Self {
            key: key.context("the other node's key for the direct connection is none")?,
            algorithms: provider().signature_verification_algorithms,
        }))
    }

    fn compare(&self, found: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        match found.as_ref() == self.key {
            true => Ok(()),
            false => Err(rustls::Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
        }
    }
}

/// What rustls asks of the verifier of a server and of that of a client in the same words.
macro_rules! signatures_by_the_pinned_key {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let message = "only TLS 1.3 is spoken";
            Err(rustls::Error::General(message.to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            _cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let key = SubjectPublicKeyInfoDer::from(self.key.as_slice());
            verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        found: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.compare(found)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures_by_the_pinned_key!();
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        found: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.compare(found)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures_by_the_pinned_key!();
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn here() -> Vec<IpAddr> {
        vec![Ipv4Addr::LOCALHOST.into()]
    }

    #[test]
    fn the_two_sides_meet_and_data_goes_through() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let listener = target.listen(&here(), source.public(), STREAMS).unwrap();
        let addresses = listener.addresses().unwrap();
        let accepting = thread::spawn(|| listener.accept());
        let there = source
            .connect(&addresses, target.public(), STREAMS)
            .unwrap();
        let here = accepting.join().unwrap().unwrap();
        assert_eq!((there.count(), here.count()), (STREAMS, STREAMS));
        let ((mut sending, _there), (mut receiving, end)) = (there.split(), here.split());
        let sent = vec![7; 3 << 20];
        let reading = thread::spawn(move || {
            let mut came = vec![0; 3 << 20];
            receiving[0]
                .read_exact(&mut came)
                .map(|()| (came, receiving))
        });
        sending[0].write_all(&sent).unwrap();
        sending[0].flush().unwrap();
        let (came, mut receiving) = reading.join().unwrap().unwrap();
        assert_eq!(came, sent);
        let waiting = thread::spawn(move || receiving[1].read(&mut [0]));
        drop(end);
        // Whatever it gets, it does not wait any more.
        drop(waiting.join().unwrap());
    }

    /// An address that takes no connection, and refuses none, as long as what comes with it is there.
    fn nowhere() -> (SocketAddr, impl Sized) {
        use std::os::fd::AsRawFd as _;

        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen,
            socket,
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let full = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        bind(full.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
        listen(&full, Backlog::new(0).unwrap()).unwrap();
        let bound: SockaddrIn = getsockname(full.as_raw_fd()).unwrap();
        let address = SocketAddr::from((bound.ip(), bound.port()));
        let patience = Duration::from_millis(500);
        let waiting = std::iter::repeat_with(|| TcpStream::connect_timeout(&address, patience));
        let waiting: Vec<_> = waiting.take_while(io::Result::is_ok).collect();
        (address, (full, waiting))
    }

    #[test]
    fn addresses_that_lead_nowhere_keep_nobody_waiting() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let listener = target.listen(&here(), source.public(), STREAMS).unwrap();
        let (dead, alive) = (nowhere(), listener.addresses().unwrap());
        let addresses = [&[dead.0; ADDRESSES - 1], &alive[..]].concat();
        // Which is over before they would have been tried one after another.
        let accepting = thread::spawn(|| listener.accept());
        let connected = source.connect(&addresses, target.public(), STREAMS);
        assert_eq!(connected.unwrap().count(), STREAMS);
        assert!(accepting.join().unwrap().is_ok());
        assert!(
            source
                .connect(&addresses[..ADDRESSES - 1], target.public(), 1)
                .is_err()
        );
    }

    #[test]
    fn addresses_of_somebody_else_keep_nobody_waiting() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let listener = target.listen(&here(), source.public(), STREAMS).unwrap();
        // They take connections, and say nothing.
        let silent = [(); ADDRESSES - 1].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let mut addresses: Vec<_> = { silent.iter() }
            .map(|it| it.local_addr().unwrap())
            .collect();
        addresses.extend(listener.addresses().unwrap());
        // One after the other they would take longer than the target waits.
        let accepting = thread::spawn(|| listener.accept());
        let connected = source.connect(&addresses, target.public(), STREAMS);
        assert_eq!(connected.unwrap().count(), STREAMS);
        assert_eq!(accepting.join().unwrap().unwrap().count(), STREAMS);
    }

    #[test]
    fn two_addresses_of_one_node_are_one() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let twice = [here(), here()].concat();
        let listener = target.listen(&twice, source.public(), STREAMS).unwrap();
        let addresses = listener.addresses().unwrap();
        let accepting = thread::spawn(|| listener.accept());
        let there = source.connect(&addresses, target.public(), STREAMS);
        let (mut there, _there) = there.unwrap().split();
        let (here, _here) = accepting.join().unwrap().unwrap().split();
        // Each has its other end.
        for (at, connection) in there.iter_mut().enumerate() {
            connection.write_all(&[u8::try_from(at).unwrap()]).unwrap();
            connection.flush().unwrap();
        }
        for (at, mut connection) in here.into_iter().enumerate() {
            let mut came = [0];
            connection.read_exact(&mut came).unwrap();
            assert_eq!(usize::from(came[0]), at);
        }
    }

    #[test]
    fn who_sends_a_byte_at_a_time_is_not_waited_for() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let listener = target.listen(&here(), source.public(), STREAMS).unwrap();
        let mut socket = TcpStream::connect(listener.addresses().unwrap()[0]).unwrap();
        let begin = Instant::now();
        let accepting = thread::spawn(|| listener.accept());
        // The head of a record that is long.
        let mut bytes = [0x16, 3, 1, 0x3f, 0]
            .into_iter()
            .chain(std::iter::repeat(1));
        while !accepting.is_finished() && begin.elapsed() < 4 * PATIENCE {
            // The other side hangs up at last.
            drop(socket.write_all(&[bytes.next().unwrap()]));
            thread::sleep(Duration::from_millis(100));
        }
        let within = PATIENCE + 2 * HANDSHAKE;
        assert!(begin.elapsed() < within, "{:?}", begin.elapsed());
        assert!(accepting.join().unwrap().is_err());
    }

    #[test]
    fn who_says_nothing_keeps_nobody_waiting() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let listener = target.listen(&here(), source.public(), STREAMS).unwrap();
        let addresses = listener.addresses().unwrap();
        let silent: io::Result<Vec<_>> = { addresses.iter().cycle().take(4) }
            .map(TcpStream::connect)
            .collect();
        let silent = silent.unwrap();
        let accepting = thread::spawn(|| listener.accept());
        assert!(source.connect(&addresses, target.public(), STREAMS).is_ok());
        assert_eq!(accepting.join().unwrap().unwrap().count(), STREAMS);
        drop(silent);
    }

    #[test]
    fn a_stranger_gets_nothing_and_hinders_nobody() {
        let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
        let stranger = Identity::new().unwrap();
        let listener = target.listen(&here(), source.public(), STREAMS).unwrap();
        let addresses = listener.addresses().unwrap();
        let accepting = thread::spawn(|| listener.accept());
        assert!(
            stranger
                .connect(&addresses, target.public(), STREAMS)
                .is_err()
        );
        assert!(
            source
                .connect(&addresses, stranger.public(), STREAMS)
                .is_err()
        );
        assert!(source.connect(&addresses, target.public(), STREAMS).is_ok());
        assert!(accepting.join().unwrap().is_ok());
        assert!(
            source
                .connect(&addresses, target.public(), STREAMS)
                .is_err()
        );
        assert!(target.listen(&here(), "no key", STREAMS).is_err());
    }
}
