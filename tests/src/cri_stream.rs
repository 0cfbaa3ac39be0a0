//! The CRI's streams (exec, attach, port-forward), by WebSocket as `kubectl` of today speaks it.
//!
//! ```text
//! Exec|Attach|PortForward --> URL on 127.0.0.1 of the node
//!   GET with Upgrade: websocket, protocol v4.channel.k8s.io
//!   binary frames: channel:u8 data...      0 stdin, 1 stdout, 2 stderr, 3 the end's status
//!                                          port-forward: 0 data, 1 errors; each begins with the port
//! ```

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use k8s_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tungstenite::client::IntoClientRequest as _;
use tungstenite::{HandshakeError, Message, WebSocket};

use crate::cri::{Cri, Pod};
use crate::node::Node;
use crate::{TestbedError, poll_until};

const PATIENCE: Duration = Duration::from_secs(20);

/// An open stream; it ends when this is dropped.
#[derive(Debug)]
pub struct CriStream {
    socket: WebSocket<Netcat>,
    /// All that has come, by channel.
    received: HashMap<u8, Vec<u8>>,
}

/// A connection in the node's network; reading does not wait.
#[derive(Debug)]
struct Netcat {
    process: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Netcat {
    fn connect(node: &Node, host: &str, port: &str) -> io::Result<Self> {
        let mut process = node
            .command("busybox")
            .args(["nc", host, port])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = process.stdin.take().expect("it is piped");
        let output = process.stdout.take().expect("it is piped");
        let netcat = Self {
            process,
            input,
            output,
        };
        fcntl(&netcat.output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(netcat)
    }
}

impl Read for Netcat {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.output.read(buffer)
    }
}

impl Write for Netcat {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.input.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.input.flush()
    }
}

impl Drop for Netcat {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Cri {
    /// Runs a command with a terminal in a container.
    ///
    /// # Errors
    /// When containerd does not offer or serve it.
    pub fn exec_tty(
        &self,
        node: &Node,
        id: &str,
        command: &[&str],
    ) -> Result<CriStream, TestbedError> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty: true,
            stdin: true,
            stdout: true,
            ..Default::default()
        };
        let answer = self.call("open exec", |mut client| async move {
            client.exec(request).await
        })?;
        CriStream::open(node, &answer.url)
    }

    /// Attaches to the first process of a container.
    ///
    /// # Errors
    /// When containerd does not offer or serve it.
    pub fn attach(&self, node: &Node, id: &str, tty: bool) -> Result<CriStream, TestbedError> {
        let request = AttachRequest {
            container_id: id.to_owned(),
            tty,
            stdin: tty,
            stdout: true,
            ..Default::default()
        };
        let answer = self.call("open attach", |mut client| async move {
            client.attach(request).await
        })?;
        CriStream::open(node, &answer.url)
    }

    /// Connects to a port of a pod.
    ///
    /// # Errors
    /// When containerd does not offer or serve it.
    pub fn port_forward(
        &self,
        node: &Node,
        pod: &Pod,
        port: u16,
    ) -> Result<CriStream, TestbedError> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port.into()],
        };
        let answer = self.call("open port-forward", |mut client| async move {
            client.port_forward(request).await
        })?;
        CriStream::open(node, &answer.url)
    }
}

impl CriStream {
    fn open(node: &Node, url: &str) -> Result<CriStream, TestbedError> {
        const ACT: &str = "open a stream";
        let failed = |source| TestbedError::cri(ACT, source);
        let mut request = url
            .replacen("http", "ws", 1)
            .into_client_request()
            .map_err(failed)?;
        let address = request.uri().authority().map(ToString::to_string);
        let address = address.unwrap_or_default();
        let origin = format!("http://{address}").parse();
        let headers = request.headers_mut();
        headers.insert("Origin", origin.expect("it was part of a URL"));
        let protocol = "v4.channel.k8s.io".parse().expect("plain letters");
        headers.insert("Sec-WebSocket-Protocol", protocol);
        let (host, port) = address.rsplit_once(':').unwrap_or((&address, "80"));
        let netcat =
            Netcat::connect(node, host, port).map_err(|source| TestbedError::cri(ACT, source))?;
        let mut state = Some(tungstenite::client::client(request, netcat));
        let opened = poll_until("the stream's beginning", PATIENCE, || match state.take() {
            Some(Ok((socket, _))) => Ok(Ok(socket)),
            Some(Err(HandshakeError::Interrupted(begun))) => {
                state = Some(begun.handshake());
                Err("no answer yet".to_owned())
            }
            Some(Err(HandshakeError::Failure(error))) => Ok(Err(error)),
            None => Err("the handshake has ended".to_owned()),
        })?;
        Ok(CriStream {
            socket: opened.map_err(failed)?,
            received: HashMap::new(),
        })
    }

    /// Sends data on a channel.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn send(&mut self, channel: u8, data: &str) -> Result<(), TestbedError> {
        let frame = [&[channel], data.as_bytes()].concat();
        self.socket
            .send(Message::binary(frame))
            .map_err(|source| TestbedError::cri("write to a stream", source))
    }

    /// Waits for a text on a channel, and gives all that has come on it.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_for(&mut self, channel: u8, text: &str) -> Result<String, TestbedError> {
        poll_until("an answer on the stream", PATIENCE, || {
            let end = self.receive().to_string();
            let data = self.received(channel);
            if data.contains(text) {
                return Ok(data);
            }
            Err(format!("{data:?} {:?}, {end}", self.received(3)))
        })
    }

    /// Takes what has come, and says why there is no more.
    fn receive(&mut self) -> tungstenite::Error {
        loop {
            match self.socket.read() {
                Ok(Message::Binary(frame)) => {
                    if let [channel, data @ ..] = &frame[..] {
                        self.received.entry(*channel).or_default().extend(data);
                    }
                }
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    }

    fn received(&self, channel: u8) -> String {
        let data = self.received.get(&channel).map_or(&[][..], Vec::as_slice);
        String::from_utf8_lossy(data).into_owned()
    }
}
