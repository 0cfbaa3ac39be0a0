//! A small registry over HTTP for tests, which keeps blobs and manifests in memory and fails where it is told to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::oci::digests::digest_of;

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Good,
    /// This status, with these headers.
    Status(&'static str, &'static str),
    /// The connection breaks after so many bytes of the body, or before any answer.
    Cut(usize),
    /// Nothing comes at all.
    Silent,
    /// Nothing comes any more after so many bytes of the body.
    Stall(usize),
    /// A byte now and then.
    Drip,
    /// Other bytes, as many.
    Lie,
    /// More bytes than there are.
    More,
    /// The whole, whatever part is asked for.
    NoRanges,
    /// So many bytes of what is sent are read, and the connection breaks; others are not lost.
    Reads(usize),
    /// What is sent is read a byte now and then.
    Sips,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Asked {
    pub(crate) fn is_for_blob(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/")
    }

    fn from(&self) -> usize {
        let range = self.headers.get("range").map(String::as_str);
        let from = range.and_then(|it| it.strip_prefix("bytes=")?.strip_suffix('-'));
        from.map_or(0, |it| it.parse().unwrap())
    }
}

type Moods = dyn Fn(&Asked, usize) -> Mood + Send + Sync;

#[derive(Default)]
struct Kept {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: BTreeMap<String, Vec<u8>>,
    asked: Vec<Asked>,
    /// Blobs of other repositories, by (repository, digest).
    others: BTreeMap<(String, String), Vec<u8>>,
    /// Whether it keeps lists of artifacts itself.
    knows_subjects: bool,
    /// Where uploads go instead of here.
    elsewhere: Option<String>,
    /// What has come of uploads in pieces, by the path of each.
    pieces: BTreeMap<String, Vec<u8>>,
    /// The answer to whatever is asked for.
    gives: Option<Vec<u8>>,
}

pub(crate) struct Server {
    pub(crate) host: String,
    kept: Arc<Mutex<Kept>>,
    moods: Arc<Mutex<Arc<Moods>>>,
}

impl Server {
    /// One that is always good.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let kept = Arc::new(Mutex::new(Kept::default()));
        let good: Arc<Moods> = Arc::new(|_, _| Mood::Good);
        let moods = Arc::new(Mutex::new(good));
        let server = Self {
            host,
            kept: Arc::clone(&kept),
            moods: Arc::clone(&moods),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (kept, moods) = (Arc::clone(&kept), Arc::clone(&moods));
                std::thread::spawn(move || serve(&stream, &kept, &moods));
            }
        });
        server
    }

    /// From now on it answers the n-th request so.
    pub(crate) fn is_in(&self, moods: impl Fn(&Asked, usize) -> Mood + Send + Sync + 'static) {
        self.kept.lock().unwrap().asked.clear();
        *self.moods.lock().unwrap() = Arc::new(moods);
    }

    /// What it was asked since then.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.kept.lock().unwrap().asked.clone()
    }

    pub(crate) fn forget_everything(&self) {
        *self.kept.lock().unwrap() = Kept::default();
    }

    pub(crate) fn put_blob(&self, bytes: &[u8]) {
        let mut kept = self.kept.lock().unwrap();
        kept.blobs.insert(digest_of(bytes), bytes.to_vec());
    }

    pub(crate) fn has_elsewhere(&self, repository: &str, bytes: &[u8]) {
        let place = (repository.to_owned(), digest_of(bytes));
        let mut kept = self.kept.lock().unwrap();
        kept.others.insert(place, bytes.to_vec());
    }

    pub(crate) fn knows_subjects(&self) {
        self.kept.lock().unwrap().knows_subjects = true;
    }

    /// The manifest of a tag or digest.
    pub(crate) fn manifest(&self, reference: &str) -> Option<Vec<u8>> {
        self.kept.lock().unwrap().manifests.get(reference).cloned()
    }

    pub(crate) fn blob(&self, digest: &str) -> Option<Vec<u8>> {
        self.kept.lock().unwrap().blobs.get(digest).cloned()
    }

    pub(crate) fn gives(&self, bytes: &[u8]) {
        self.kept.lock().unwrap().gives = Some(bytes.to_vec());
    }

    pub(crate) fn sends_uploads_to(&self, url: String) {
        self.kept.lock().unwrap().elsewhere = Some(url);
    }
}

fn serve(stream: &TcpStream, kept: &Mutex<Kept>, moods: &Mutex<Arc<Moods>>) {
    let mut reader = BufReader::new(stream);
    while let Some(mut asked) = read_head(&mut reader) {
        let nth = {
            let mut kept = kept.lock().unwrap();
            kept.asked.push(asked.clone());
            kept.asked.len() - 1
        };
        let moods = Arc::clone(&moods.lock().unwrap());
        let mood = moods(&asked, nth);
        let length = asked.headers.get("content-length");
        let mut length = length.map_or(0, |it| it.parse().unwrap());
        if let Mood::Reads(bytes) = mood {
            length = length.min(bytes);
        }
        if mood == Mood::Sips {
            while reader.read_exact(&mut [0]).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
            return;
        }
        asked.body = vec![0; length];
        if reader.read_exact(&mut asked.body).is_err() {
            return;
        }
        // A client that has gone away is not this server's matter.
        if reply(stream, &asked, mood, kept).is_none() {
            return;
        }
    }
}

/// A request without its body.
fn read_head(reader: &mut impl BufRead) -> Option<Asked> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    Some(Asked {
        method,
        path,
        headers,
        body: Vec::new(),
    })
}

/// None: the connection is not used any more.
fn reply(stream: &TcpStream, asked: &Asked, mood: Mood, kept: &Mutex<Kept>) -> Option<()> {
    if let Mood::Status(status, headers) = mood {
        let words = match asked.method.as_str() {
            "HEAD" => &b""[..],
            _ => b"in a bad mood",
        };
        return send(stream, status, headers, words);
    }
    if mood == Mood::Silent {
        // Until the client has had enough.
        drop((&*stream).read(&mut [0]));
        return None;
    }
    if mood == Mood::Cut(0) {
        return None;
    }
    let (status, mut headers, mut body) = good_answer(asked, &mut kept.lock().unwrap());
    if matches!(mood, Mood::Reads(_)) {
        return None;
    }
    let from = match mood {
        Mood::NoRanges => 0,
        _ => asked.from().min(body.len()),
    };
    let mut status = status;
    if from > 0 && status == "200 OK" {
        status = "206 Partial Content";
        let last = body.len().saturating_sub(1);
        headers += &format!("content-range: bytes {from}-{last}/{}\r\n", body.len());
        body.drain(..from);
    }
    match mood {
        Mood::Lie => body.iter_mut().for_each(|byte| *byte ^= 1),
        Mood::More => body.extend_from_slice(&[b'x'; 100_000]),
        _ => {}
    }
    let length = body.len();
    let mut out = stream;
    let head = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n");
    out.write_all(head.as_bytes()).ok()?;
    if asked.method == "HEAD" {
        return Some(());
    }
    match mood {
        Mood::Cut(bytes) => {
            out.write_all(&body[..bytes.min(length)]).ok()?;
            None
        }
        Mood::Stall(bytes) => {
            out.write_all(&body[..bytes.min(length)]).ok()?;
            drop((&*stream).read(&mut [0]));
            None
        }
        Mood::Drip => {
            for byte in body {
                out.write_all(&[byte]).ok()?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Some(())
        }
        _ => out.write_all(&body).ok(),
    }
}

fn send(mut stream: &TcpStream, status: &str, headers: &str, body: &[u8]) -> Option<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()
}

fn good_answer(asked: &Asked, kept: &mut Kept) -> (&'static str, String, Vec<u8>) {
    let none = || ("404 Not Found", String::new(), Vec::new());
    if let Some(bytes) = &kept.gives {
        return ("200 OK", String::new(), bytes.clone());
    }
    let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
    let last = path.rsplit('/').next().unwrap_or_default();
    let is_upload = path.contains("/uploads/");
    match asked.method.as_str() {
        "POST" => {
            let words = query
                .strip_prefix("mount=")
                .and_then(|it| it.split_once("&from="));
            if let Some((digest, from)) = words {
                let digest = digest.replace("%3A", ":");
                let place = (from.replace("%2F", "/"), digest.clone());
                if let Some(bytes) = kept.others.get(&place).cloned() {
                    kept.blobs.insert(digest, bytes);
                    return ("201 Created", String::new(), Vec::new());
                }
            }
            kept.pieces.remove(&format!("{path}1"));
            let place = kept.elsewhere.clone().unwrap_or_default() + path + "1";
            let headers = format!("location: {place}\r\n");
            ("202 Accepted", headers, Vec::new())
        }
        "PATCH" => {
            let piece = kept.pieces.entry(path.to_owned()).or_default();
            let range = &asked.headers["content-range"];
            if !range.starts_with(&format!("{}-", piece.len())) {
                return ("416 Range Not Satisfiable", String::new(), Vec::new());
            }
            piece.extend_from_slice(&asked.body);
            ("202 Accepted", format!("location: {path}\r\n"), Vec::new())
        }
        "GET" if is_upload => match kept.pieces.get(path) {
            None => none(),
            Some(piece) => {
                let last = piece.len().saturating_sub(1);
                let headers = format!("location: {path}\r\nrange: 0-{last}\r\n");
                ("204 No Content", headers, Vec::new())
            }
        },
        "PUT" if is_upload => {
            let digest = query.trim_start_matches("digest=").replace("%3A", ":");
            let mut blob = kept.pieces.remove(path).unwrap_or_default();
            blob.extend_from_slice(&asked.body);
            if digest != digest_of(&blob) {
                return ("400 Bad Request", String::new(), b"DIGEST_INVALID".to_vec());
            }
            kept.blobs.insert(digest, blob);
            ("201 Created", String::new(), Vec::new())
        }
        "PUT" => {
            let digest = digest_of(&asked.body);
            kept.manifests.insert(last.to_owned(), asked.body.clone());
            kept.manifests.insert(digest.clone(), asked.body.clone());
            let mut headers = format!("docker-content-digest: {digest}\r\n");
            let json: serde_json::Value = serde_json::from_slice(&asked.body).unwrap();
            if let Some(subject) = json["subject"]["digest"]
                .as_str()
                .filter(|_| kept.knows_subjects)
            {
                headers += &format!("oci-subject: {subject}\r\n");
            }
            ("201 Created", headers, Vec::new())
        }
        _ if path.contains("/manifests/") => match kept.manifests.get(last) {
            Some(bytes) => ("200 OK", String::new(), bytes.clone()),
            None => none(),
        },
        _ => match kept.blobs.get(last) {
            Some(bytes) => ("200 OK", String::new(), bytes.clone()),
            None => none(),
        },
    }
}
