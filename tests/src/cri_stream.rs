//! The CRI's streams (exec, attach, port-forward), by WebSocket as `kubectl` of today speaks it.
//!
//! ```text
//! Exec|Attach|PortForward --> URL on 127.0.0.1 of the node
//!   GET with Upgrade: websocket, protocol v4.channel.k8s.io
//!   binary frames: channel:u8 data...      0 stdin, 1 stdout, 2 stderr, 3 the end's status
//!                                          port-forward: 0 data, 1 errors; each begins with the port
//! ```

use std::io::{self, Read as _, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};

use crate::cri::{Cri, Pod};
use crate::node::{Node, lock};
use crate::{TestbedError, poll_until};

const PATIENCE: Duration = Duration::from_secs(20);

/// An open stream; it ends when this is dropped.
#[derive(Debug)]
pub struct CriStream {
    connection: Child,
    input: ChildStdin,
    received: Arc<Mutex<Vec<u8>>>,
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
        let failed = |source: io::Error| TestbedError::cri("open a stream", source);
        let (address, path) = url
            .trim_start_matches("http://")
            .split_once('/')
            .ok_or_else(|| failed(io::Error::other("no path")))?;
        let (host, port) = address
            .rsplit_once(':')
            .ok_or_else(|| failed(io::Error::other("no port")))?;
        let mut connection = node
            .command("busybox")
            .args(["nc", host, port])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut input = connection.stdin.take().expect("it is piped");
        let mut output = connection.stdout.take().expect("it is piped");
        let received = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&received);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                lock(&sink).extend_from_slice(&buffer[..len]);
            }
        });
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\n\
             Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dHJhbnNzaGlwdHJhbnNzaA==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        );
        input.write_all(request.as_bytes()).map_err(failed)?;
        let stream = CriStream {
            connection,
            input,
            received,
        };
        poll_until("the stream's beginning", PATIENCE, || {
            let text = String::from_utf8_lossy(&lock(&stream.received)).into_owned();
            match text.split_once("\r\n\r\n") {
                Some((head, _)) if head.starts_with("HTTP/1.1 101") => Ok(()),
                _ => Err(text),
            }
        })?;
        Ok(stream)
    }

    /// Sends data on a channel.
    ///
    /// # Errors
    /// When the connection has ended.
    ///
    /// # Panics
    /// With more than 124 bytes.
    pub fn send(&mut self, channel: u8, data: &str) -> Result<(), TestbedError> {
        let len = u8::try_from(data.len() + 1).expect("a short line");
        assert!(len < 126, "a short line");
        // A final binary frame, masked with zeros.
        let mut frame = vec![0x82, 0x80 | len, 0, 0, 0, 0, channel];
        frame.extend_from_slice(data.as_bytes());
        self.input
            .write_all(&frame)
            .map_err(|source| TestbedError::cri("write to a stream", source))
    }

    /// Waits for a text on a channel, and gives all that has come on it.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_for(&self, channel: u8, text: &str) -> Result<String, TestbedError> {
        poll_until("an answer on the stream", PATIENCE, || {
            let data = String::from_utf8_lossy(&self.received(channel)).into_owned();
            if data.contains(text) {
                return Ok(data);
            }
            let others = String::from_utf8_lossy(&self.received(3)).into_owned();
            Err(format!("{data:?} {others:?}"))
        })
    }

    fn received(&self, channel: u8) -> Vec<u8> {
        let bytes = lock(&self.received);
        let head = bytes.windows(4).position(|it| it == b"\r\n\r\n");
        let mut rest = &bytes[head.map_or(bytes.len(), |at| at + 4)..];
        let mut data = Vec::new();
        while let [_, short, after @ ..] = rest {
            let (len, after) = match (short & 0x7f, after) {
                (126, [high, low, after @ ..]) => (u16::from_be_bytes([*high, *low]).into(), after),
                (126.., _) => break,
                (len, after) => (usize::from(len), after),
            };
            let Some((frame, after)) = after.split_at_checked(len) else {
                break;
            };
            if let [of, frame @ ..] = frame
                && *of == channel
            {
                data.extend_from_slice(frame);
            }
            rest = after;
        }
        data
    }
}

impl Drop for CriStream {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        drop(self.connection.kill());
        drop(self.connection.wait());
    }
}
