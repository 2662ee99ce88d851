//! Downloads from a server that misbehaves in every way that one has to expect.
#![cfg(feature = "cli")]
#![allow(missing_docs)]

use contrastive::data::download::{Content, DownloadError, Refusal, fetch, is_http};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

const NAME: &str = "file.gz";

/// A server on this machine, with the byte that each request so far wanted to start from.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Option<usize>>>>,
}

impl Server {
    /// Answers request k, from the byte wanted on, with the bytes of `answer` and hangs up.
    fn new(answer: impl Fn(usize, Option<usize>) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream: TcpStream = stream.unwrap();
                let lines = BufReader::new(&stream).lines().map(Result::unwrap);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let wanted = head.iter().find_map(|line| {
                    let line = line.to_lowercase();
                    line.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok()
                });
                let k = seen.lock().unwrap().len();
                seen.lock().unwrap().push(wanted);
                // A client may hang up first.
                let _ = stream.write_all(&answer(k, wanted));
            }
        });
        Server { url, asked }
    }
    fn urls(&self) -> Vec<String> {
        vec![format!("{}{NAME}", self.url)]
    }
    fn asked(&self) -> Vec<Option<usize>> {
        self.asked.lock().unwrap().clone()
    }
}

fn reply(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// What a good server says.
fn good(body: &[u8], from: Option<usize>) -> Vec<u8> {
    match from {
        None => reply("200 OK", "", body),
        Some(from) if from < body.len() => {
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", body.len() - 1, body.len());
            reply("206 Partial Content", &range, &body[from..])
        }
        Some(_) => reply("416 Range Not Satisfiable", &format!("Content-Range: bytes */{}\r\n", body.len()), b""),
    }
}

/// All of an answer but its last `bytes`.
fn cut(mut answer: Vec<u8>, bytes: usize) -> Vec<u8> {
    answer.truncate(answer.len() - bytes);
    answer
}

/// Large enough for several reads.
fn body() -> Vec<u8> {
    (0..300_000u32).map(|k| (k.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn sum(body: &[u8]) -> String {
    Sha256::digest(body).iter().map(|b| format!("{b:02x}")).collect()
}

/// A folder to download into, and what is to come.
struct Target {
    dir: tempfile::TempDir,
    body: Vec<u8>,
    sha256: String,
}

impl Target {
    fn new() -> Self {
        let body = body();
        Target { dir: tempfile::tempdir().unwrap(), sha256: sum(&body), body }
    }
    fn path(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }
    fn part(&self) -> PathBuf {
        self.dir.path().join(format!("{NAME}.part"))
    }
    fn fetch(&self, urls: &[String]) -> Result<u64, DownloadError> {
        let content = Content { bytes: self.body.len() as u64, sha256: &self.sha256 };
        let mut last = 0;
        let result = fetch(urls, &self.path(), content, &mut |bytes| last = bytes);
        assert!(result.is_err() || last == content.bytes, "{last} bytes observed");
        result
    }
    /// The whole file and no part of it is there.
    fn is_whole(&self) {
        assert!(std::fs::read(self.path()).unwrap() == self.body);
        assert_eq!(names(self.dir.path()), [NAME]);
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_comes_once_and_a_wrong_one_is_replaced() {
    let target = Target::new();
    let server = Server::new(|_, from| good(&body(), from));
    assert_eq!(target.fetch(&server.urls()).unwrap(), 300_000);
    target.is_whole();
    assert_eq!(target.fetch(&server.urls()).unwrap(), 0);
    assert_eq!(server.asked(), [None]);
    // As long, and shorter.
    for wrong in [vec![0; 300_000], vec![0; 7]] {
        std::fs::write(target.path(), wrong).unwrap();
        assert_eq!(target.fetch(&server.urls()).unwrap(), 300_000);
        target.is_whole();
    }
}

#[test]
fn a_cut_connection_is_resumed_where_it_broke() {
    let target = Target::new();
    let server = Server::new(|k, from| cut(good(&body(), from), [200_000, 5, 0][k]));
    assert_eq!(target.fetch(&server.urls()).unwrap(), 300_000);
    target.is_whole();
    assert_eq!(server.asked(), [None, Some(100_000), Some(299_995)]);
}

#[test]
fn what_has_come_is_kept_for_the_next_time() {
    let target = Target::new();
    // 1000 bytes a connection.
    let bad = Server::new(|_, from| {
        let answer = good(&body(), from);
        let head = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        answer[..head + 1000].to_vec()
    });
    let error = target.fetch(&bad.urls()).unwrap_err();
    assert_eq!(bad.asked(), [None, Some(1000), Some(2000)]);
    let DownloadError::Refused { refusals, kept: 3000, .. } = &error else { panic!("{error}") };
    assert!(matches!(refusals[..], [Refusal::Cut { found: 3000, expected: 300_000, .. }]), "{error}");
    let message = error.to_string();
    assert!(message.contains(NAME) && message.contains(&bad.url), "{message}");
    assert!(message.contains("run the same command again to resume"), "{message}");
    assert_eq!(names(target.dir.path()), [format!("{NAME}.part")]);
    assert!(std::fs::read(target.part()).unwrap() == target.body[..3000]);

    let server = Server::new(|_, from| good(&body(), from));
    assert_eq!(target.fetch(&server.urls()).unwrap(), 297_000);
    assert_eq!(server.asked(), [Some(3000)]);
    target.is_whole();
}

// Without a length, only the bytes tell that the answer ended too early, or goes on for ever.
#[test]
fn an_answer_without_length_is_taken_at_ours() {
    let target = Target::new();
    let server = Server::new(|_, from| {
        let head = &b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"[..];
        let endless = [&body()[..], &[1; 100]].concat();
        [head, if from.is_none() { &endless[..10] } else { &endless }].concat()
    });
    assert_eq!(target.fetch(&server.urls()).unwrap(), 300_010);
    assert_eq!(server.asked(), [None, Some(10)]);
    target.is_whole();
}

#[test]
fn a_server_that_cannot_resume_is_asked_for_the_whole() {
    let other_part = |from: usize| {
        let range = format!("Content-Range: bytes {}-299999/300000\r\n", from + 1);
        reply("206 Partial Content", &range, &body()[from + 1..])
    };
    type Answer = Box<dyn Fn(Option<usize>) -> Vec<u8> + Send>;
    let servers: [(Answer, &[Option<usize>]); 4] = [
        // Ignores the range.
        (Box::new(|_| good(&body(), None)), &[Some(5000)]),
        (
            Box::new(|from| from.map_or_else(|| good(&body(), None), |_| good(&body(), Some(300_000)))),
            &[Some(5000), None],
        ),
        (Box::new(move |from| from.map_or_else(|| good(&body(), None), other_part)), &[Some(5000), None]),
        // Part of what, it does not say.
        (
            Box::new(|from| match from {
                Some(from) => reply("206 Partial Content", "", &body()[from..]),
                None => good(&body(), None),
            }),
            &[Some(5000), None],
        ),
    ];
    for (answer, asked) in servers {
        let target = Target::new();
        std::fs::write(target.part(), &target.body[..5000]).unwrap();
        let server = Server::new(move |_, from| answer(from));
        assert_eq!(target.fetch(&server.urls()).unwrap(), 300_000);
        assert_eq!(server.asked(), asked);
        target.is_whole();
    }
}

#[test]
fn a_part_of_another_file_is_dropped() {
    for (part, asked) in [
        (vec![7; 5000], &[Some(5000), None][..]),
        // As long as the whole, and longer.
        (vec![7; 300_000], &[None]),
        (vec![7; 300_001], &[None]),
    ] {
        let target = Target::new();
        std::fs::write(target.part(), part).unwrap();
        let server = Server::new(|_, from| good(&body(), from));
        target.fetch(&server.urls()).unwrap();
        assert_eq!(server.asked(), asked);
        target.is_whole();
    }
}

#[test]
fn a_whole_part_needs_no_server() {
    let target = Target::new();
    std::fs::write(target.part(), &target.body).unwrap();
    let server = Server::new(|_, from| good(&body(), from));
    assert_eq!(target.fetch(&server.urls()).unwrap(), 0);
    assert_eq!(server.asked(), []);
    target.is_whole();
}

#[test]
fn a_busy_server_is_asked_again_and_a_missing_file_is_not() {
    let target = Target::new();
    let busy = Server::new(|k, from| if k == 0 { reply("503 Busy", "", b"later") } else { good(&body(), from) });
    let missing = Server::new(|_, _| reply("404 Not Found", "", b"no such file"));
    assert_eq!(target.fetch(&[missing.urls(), busy.urls()].concat()).unwrap(), 300_000);
    assert_eq!((missing.asked().len(), busy.asked().len()), (1, 2));
    target.is_whole();

    let target = Target::new();
    let down = Server::new(|_, _| reply("503 Busy", "", b""));
    let error = target.fetch(&[missing.urls(), down.urls()].concat()).unwrap_err().to_string();
    assert_eq!((missing.asked().len(), down.asked().len()), (2, 3));
    for part in [NAME, &missing.urls()[0], "found status 404, expected 200", &down.urls()[0], "found status 503"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert!(!error.contains("resume"), "{error}");
    assert!(names(target.dir.path()).is_empty());
}

#[test]
fn wrong_bytes_leave_nothing() {
    let mut wrong = body();
    wrong[123_456] ^= 1;
    let longer = [&body()[..], b"!"].concat();
    for (wrong, found, expected) in [
        (wrong.clone(), format!("SHA-256 {}", sum(&wrong)), format!("SHA-256 {}", sum(&body()))),
        (longer, "300001 bytes".into(), "300000 bytes".into()),
        (b"<html>".to_vec(), "6 bytes".into(), "300000 bytes".into()),
    ] {
        let target = Target::new();
        let server = Server::new(move |_, from| good(&wrong, from));
        let error = target.fetch(&server.urls()).unwrap_err().to_string();
        assert_eq!(server.asked(), [None]);
        let want = format!("{NAME}: {}: found {found}, expected {expected}", server.urls()[0]);
        assert!(error.ends_with(&want), "{error}, not: {want}");
        assert!(names(target.dir.path()).is_empty());
        // The next server is another matter.
        let right = Server::new(|_, from| good(&body(), from));
        target.fetch(&[server.urls(), right.urls()].concat()).unwrap();
        target.is_whole();
    }
}

#[test]
fn silence_is_an_answer_too() {
    let target = Target::new();
    // Nobody listens there any more.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let urls = [format!("http://127.0.0.1:{port}/{NAME}")];
    let error = target.fetch(&urls).unwrap_err();
    let DownloadError::Refused { refusals, kept: 0, .. } = &error else { panic!("{error}") };
    assert!(matches!(refusals[..], [Refusal::Silent { .. }]) && error.to_string().contains(&urls[0]), "{error}");
    assert!(names(target.dir.path()).is_empty());
}

#[test]
fn two_downloads_of_one_file_do_not_mix() {
    let target = Target::new();
    let other = std::fs::File::create(target.part()).unwrap();
    other.lock().unwrap();
    let server = Server::new(|_, from| good(&body(), from));
    let error = target.fetch(&server.urls()).unwrap_err();
    assert!(matches!(error, DownloadError::Disk(_)), "{error}");
    assert!(
        error.to_string().ends_with("file.gz.part: found another download at work on it, expected none"),
        "{error}"
    );
    assert_eq!(server.asked(), []);
    drop(other);
    target.fetch(&server.urls()).unwrap();
    target.is_whole();
}

#[test]
fn urls_are_plain_http() {
    for url in ["http://a", "http://a.b/c/", "http://127.0.0.1:80/x"] {
        assert!(is_http(url), "{url}");
    }
    for url in ["https://a/", "ftp://a/", "a/b", "", "http://", "http:///a", "http://a b/", "file:///a"] {
        assert!(!is_http(url), "{url}");
    }
}

/// Status and error line of `contrastive data mnist` from `server`.
fn mnist(dir: &Path, server: &Server) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_contrastive"));
    command.current_dir(dir).args(["data", "mnist", "--json", "--out", "set", "--from", &server.url]);
    let output = command.output().unwrap();
    assert!(output.stdout.is_empty());
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_command_refuses_what_is_not_mnist() {
    let dir = tempfile::tempdir().unwrap();
    // The length of the first file, and other bytes.
    let server = Server::new(|_, from| good(&vec![0; 9_912_422], from));
    let (status, error) = mnist(dir.path(), &server);
    assert_eq!(status, Some(1), "{error}");
    // One line, and no progress: stderr is no terminal.
    assert_eq!(error.lines().count(), 1, "{error}");
    for part in
        ["error: ", "set/train-images-idx3-ubyte.gz", &server.url, "found SHA-256 ", "expected SHA-256 440fcabf"]
    {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert!(names(&dir.path().join("set")).is_empty());
}

#[test]
fn the_command_says_how_to_resume() {
    let dir = tempfile::tempdir().unwrap();
    // The command's three tries bring 50 bytes each.
    let server = Server::new(|k, from| match k {
        0..3 => cut(good(&vec![0; 9_912_422], from), 9_912_422 - from.unwrap_or(0) - 50),
        _ => reply("404 Not Found", "", b""),
    });
    let (status, error) = mnist(dir.path(), &server);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("150 bytes are kept: run the same command again to resume"), "{error}");
    assert_eq!(names(&dir.path().join("set")), ["train-images-idx3-ubyte.gz.part"]);
    mnist(dir.path(), &server);
    assert_eq!(server.asked()[3], Some(150));
}

// Each opens the part, finds that there is nobody to ask, and takes it away: not what another has opened meanwhile.
#[test]
fn many_at_once_are_alone_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let content = Content { bytes: 1, sha256: "" };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let error = fetch(&[], &path, content, &mut |_| {}).unwrap_err();
                    let alone = matches!(&error, DownloadError::Refused { kept: 0, .. });
                    assert!(alone || error.to_string().contains("another download"), "{error}");
                }
            });
        }
    });
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
