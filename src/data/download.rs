//! Files of known content over plain HTTP, resumed where they broke off.
//!
//! The checksum proves the content, so neither the server nor the way to it has to be trusted, and TLS (whose crates
//! need a C compiler) is not needed. What has come stands in `NAME.part`; `NAME` is only ever the whole file.

use super::{DataError, sync_folder};
use sha2::{Digest, Sha256};
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};
use ureq::{
    Agent, Body,
    http::{Response, Uri, header},
};

/// Tries of one URL.
const TRIES: u32 = 3;
/// Pause after the first try; after the k-th it is k times as long.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest silence of a server.
const SILENCE: Duration = Duration::from_secs(30);

/// What a file holds when it is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content<'a> {
    /// Its length.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: &'a str,
}

/// Why a URL did not give the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There was no answer.
    #[error("{url}: found no answer ({reason}), expected the file")]
    Silent {
        /// Where it should be.
        url: String,
        /// What failed.
        reason: String,
    },
    /// The answer was another than the file.
    #[error("{url}: found status {status}, expected 200")]
    Status {
        /// Where it should be.
        url: String,
        /// Of HTTP.
        status: u16,
    },
    /// The connection broke off.
    #[error("{url}: found {found} of the file's bytes and then {reason}, expected {expected}")]
    Cut {
        /// Where it is.
        url: String,
        /// Bytes that came, with those of earlier tries.
        found: u64,
        /// How it ended.
        reason: String,
        /// Bytes of the whole file.
        expected: u64,
    },
    /// It is another file.
    #[error("{url}: found {found}, expected {expected}")]
    Content {
        /// Where the right one should be.
        url: String,
        /// Its length or checksum.
        found: String,
        /// The right one's.
        expected: String,
    },
}

/// Why a file could not be downloaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// The file cannot be read or written here.
    #[error(transparent)]
    Disk(#[from] DataError),
    /// No URL gave it.
    #[error("{}: {}{}", path.display(), list(refusals), resume(*kept))]
    Refused {
        /// The file.
        path: PathBuf,
        /// The last refusal of each URL.
        refusals: Vec<Refusal>,
        /// Bytes that have come, kept in `NAME.part`.
        kept: u64,
    },
}

fn list(refusals: &[Refusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn resume(kept: u64) -> String {
    if kept == 0 { String::new() } else { format!("; {kept} bytes are kept: run the same command again to resume") }
}

impl Refusal {
    /// Whether the same URL may do better soon.
    fn may_pass(&self) -> bool {
        match self {
            Refusal::Silent { .. } | Refusal::Cut { .. } => true,
            Refusal::Status { status, .. } => matches!(status, 408 | 429 | 500..),
            Refusal::Content { .. } => false,
        }
    }
}

/// Whether [`fetch`] can ask at `url`: `http://HOST`, with or without a path.
pub fn is_http(url: &str) -> bool {
    url.parse::<Uri>().is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some_and(|h| !h.is_empty()))
}

/// Makes `path` the file of `content`, from the first of `urls` that gives it, and returns the bytes that it took. A
/// file that is there already is not asked for; another one in its place is replaced. `observe` is told how many
/// bytes there are, whenever that changes.
///
/// # Errors
/// [`DownloadError`], naming `path` or `path.part` and each URL; whatever stood at `path` stands there still.
pub fn fetch(
    urls: &[String],
    path: &Path,
    content: Content<'_>,
    observe: &mut dyn FnMut(u64),
) -> Result<u64, DownloadError> {
    match File::open(path) {
        Ok(file) => {
            if other_than(&file, content).map_err(DataError::io(path))?.is_none() {
                observe(content.bytes);
                return Ok(0);
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => (),
        Err(e) => return Err(DataError::io(path)(e).into()),
    }
    let mut part = Part::open(path, content, observe)?;
    let mut refusals = Vec::new();
    for url in urls {
        match part.download(url)? {
            Ok(()) => return Ok(part.finish(path)?),
            Err(refusal) => refusals.push(refusal),
        }
    }
    let kept = part.give_up()?;
    Err(DownloadError::Refused { path: path.to_owned(), refusals, kept })
}

/// What `file` is and what it should be, if it is not the file of `content`.
fn other_than(mut file: &File, content: Content<'_>) -> io::Result<Option<[String; 2]>> {
    let bytes = file.metadata()?.len();
    if bytes != content.bytes {
        return Ok(Some([bytes, content.bytes].map(|n| format!("{n} bytes"))));
    }
    file.rewind()?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((sha256 != content.sha256).then(|| [&sha256, content.sha256].map(|sum| format!("SHA-256 {sum}"))))
}

/// Whether `path` is a name of `file`; only unix takes a name from a file that is open.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |of: std::fs::Metadata| (of.dev(), of.ino());
        match std::fs::metadata(path) {
            Ok(there) => Ok(id(there) == id(file.metadata()?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        Ok(true)
    }
}

/// What has come of a file.
struct Part<'a> {
    file: File,
    path: PathBuf,
    content: Content<'a>,
    /// Bytes that came from servers.
    taken: u64,
    observe: &'a mut dyn FnMut(u64),
}

impl<'a> Part<'a> {
    fn open(whole: &Path, content: Content<'a>, observe: &'a mut dyn FnMut(u64)) -> Result<Self, DataError> {
        let mut path = whole.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        loop {
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let file = open.map_err(DataError::io(&path))?;
            // Two writers would mix their bytes. Where files cannot be locked, the checksum would tell.
            if let Err(TryLockError::WouldBlock) = file.try_lock() {
                return Err(DataError::format(&path, "another download at work on it", "none"));
            }
            // Whoever had the lock meanwhile may have renamed or removed what was opened.
            if is_at(&file, &path).map_err(DataError::io(&path))? {
                return Ok(Part { file, path, content, taken: 0, observe });
            }
        }
    }

    fn disk(&self) -> impl FnOnce(io::Error) -> DataError {
        DataError::io(&self.path)
    }

    /// Bytes that are there.
    fn len(&self) -> Result<u64, DataError> {
        Ok(self.file.metadata().map_err(self.disk())?.len())
    }

    /// Completes the part from `url`, in a few tries.
    fn download(&mut self, url: &str) -> Result<Result<(), Refusal>, DataError> {
        for tried in 1.. {
            let before = self.len()?;
            let Err(refusal) = self.attempt(url)? else { break };
            // A checksum is also wrong when this URL was asked only for the end of a file begun with other bytes.
            let mixed = matches!(refusal, Refusal::Content { .. }) && before > 0 && self.len()? == 0;
            if tried == TRIES || !(mixed || refusal.may_pass()) {
                return Ok(Err(refusal));
            }
            thread::sleep(PAUSE * tried);
        }
        Ok(Ok(()))
    }

    /// One try: asks for what is missing, appends it, and empties the part if the whole is not what it should be.
    fn attempt(&mut self, url: &str) -> Result<Result<(), Refusal>, DataError> {
        if self.len()? != self.content.bytes
            && let Err(refusal) = self.append(url)?
        {
            return Ok(Err(refusal));
        }
        let Some([found, expected]) = other_than(&self.file, self.content).map_err(self.disk())? else {
            return Ok(Ok(()));
        };
        self.file.set_len(0).map_err(self.disk())?;
        Ok(Err(Refusal::Content { url: url.into(), found, expected }))
    }

    fn append(&mut self, url: &str) -> Result<Result<(), Refusal>, DataError> {
        let (have, expected) = (self.len()?, self.content.bytes);
        // More than the whole is nothing of it.
        let have = if have < expected { have } else { 0 };
        let (have, mut body) = match ask(url, have, expected) {
            Ok(answer) => answer,
            Err(refusal) => return Ok(Err(refusal)),
        };
        self.file.set_len(have).map_err(self.disk())?;
        self.file.seek(SeekFrom::Start(have)).map_err(self.disk())?;
        let (mut found, mut buffer) = (have, vec![0; 1 << 16]);
        let mut reader = body.as_reader().take(expected - have);
        while found < expected {
            (self.observe)(found);
            let reason = match reader.read(&mut buffer) {
                Ok(0) => "the end of the answer".into(),
                Ok(n) => {
                    self.file.write_all(&buffer[..n]).map_err(self.disk())?;
                    found += n as u64;
                    self.taken += n as u64;
                    continue;
                }
                Err(e) => e.to_string(),
            };
            return Ok(Err(Refusal::Cut { url: url.into(), found, reason, expected }));
        }
        Ok(Ok(()))
    }

    /// Turns the part into the file at `path`, also when the machine stops half way; returns the bytes taken.
    fn finish(self, path: &Path) -> Result<u64, DataError> {
        self.file.sync_all().map_err(self.disk())?;
        std::fs::rename(&self.path, path).map_err(DataError::io(path))?;
        sync_folder(path).map_err(DataError::io(path))?;
        (self.observe)(self.content.bytes);
        Ok(self.taken)
    }

    /// Leaves what has come for the next time, and no empty file; returns its length.
    fn give_up(self) -> Result<u64, DataError> {
        let kept = self.len()?;
        if kept == 0 {
            std::fs::remove_file(&self.path).map_err(self.disk())?;
        }
        Ok(kept)
    }
}

/// Asks for the file from byte `have` on. What comes starts at the byte returned: `have`, or 0 where the server cannot
/// do that.
fn ask(url: &str, have: u64, expected: u64) -> Result<(u64, Body), Refusal> {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_resolve(Some(SILENCE))
        .timeout_connect(Some(SILENCE))
        .timeout_per_read(Some(SILENCE));
    let host = url.parse().ok().and_then(|uri: Uri| uri.host().map(str::to_owned));
    if host.is_some_and(|host| matches!(&host[..], "localhost" | "127.0.0.1" | "[::1]")) {
        // The environment's proxy stands between this machine and others.
        config = config.proxy(None);
    }
    let agent = Agent::new_with_config(config.build());
    let get = |from: u64| {
        let request = agent.get(url);
        let request = if from > 0 { request.header(header::RANGE, format!("bytes={from}-")) } else { request };
        request.call().map_err(|e| Refusal::Silent { url: url.into(), reason: e.to_string() })
    };
    let (mut have, mut answer) = (have, get(have)?);
    let range = range(&answer);
    let not_the_rest = match answer.status().as_u16() {
        206 => range.is_none_or(|[start, _]| start != Some(have)),
        status => status == 416,
    };
    if have > 0 && not_the_rest {
        (have, answer) = (0, get(0)?);
    }
    let bytes = match answer.status().as_u16() {
        200 => {
            have = 0;
            answer.body().content_length()
        }
        206 if have > 0 => range.and_then(|[_, bytes]| bytes),
        status => return Err(Refusal::Status { url: url.into(), status }),
    };
    match bytes {
        Some(bytes) if bytes != expected => {
            let [found, expected] = [bytes, expected].map(|n| format!("{n} bytes"));
            Err(Refusal::Content { url: url.into(), found, expected })
        }
        _ => Ok((have, answer.into_body())),
    }
}

/// First byte and whole length of `Content-Range: bytes FIRST-LAST/LENGTH`; a length of `*` is not known.
fn range(answer: &Response<Body>) -> Option<[Option<u64>; 2]> {
    let range = answer.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, bytes) = range.strip_prefix("bytes ")?.split_once('/')?;
    Some([range.split_once('-')?.0, bytes].map(|n| n.trim().parse().ok()))
}
