//! Pairs (u, v) from memory-mapped files and built-in generators, sampled by a counter-based permutation.
//!
//! A [`Source`] is a set of pairs that any thread can read at any index. Batch number `step` of an epoch is
//! samples `permute(seed, epoch, n, step * batch + i)`: a function of numbers, not of a generator's state, so a
//! run resumes exactly at any step. [`Prefetch`] gathers batches on a thread of its own, beside compute.

pub mod digits;
#[cfg(feature = "cli")]
pub mod download;
pub mod gaussian2d;
pub mod gp;
pub mod idx;
pub mod images;
pub mod npy;
pub mod ocean;
pub mod tensors;

mod permute;
mod prefetch;

pub use npy::{Npy, read_npy_i64, write_npy_f32, write_npy_i64};
pub use permute::{Order, permute};
pub use prefetch::{PairBatch, Prefetch};

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// So many of `count` are a `share` of them, what f64 makes of a decimal forgiven: 29 of 100 are 0.29.
#[cfg(feature = "cli")]
pub(crate) fn share_of(count: usize, share: f64) -> usize {
    (count as f64 * share + 1e-9) as usize
}

/// Which member of the pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The rows.
    U,
    /// The columns.
    V,
}

/// A set of pairs, readable at any index from any thread.
pub trait Source: Send + Sync {
    /// Number of pairs.
    fn len(&self) -> usize;
    /// Whether there is no pair at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Numbers a sample on `side`.
    fn dim(&self, side: Side) -> usize;
    /// Writes samples `index` of `side`, `[index.len(), dim]`, as f32.
    ///
    /// # Panics
    /// When an index is not below [`len`](Source::len) or `out` has another length.
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]);
    /// Class of each pair, where the v side is a one-hot label.
    fn labels(&self) -> Option<&[u8]> {
        None
    }
}

/// Rows of numbers, readable at any index from any thread.
pub trait Rows: Sync {
    /// Number of rows.
    fn count(&self) -> usize;
    /// Numbers a row.
    fn dim(&self) -> usize;
    /// Writes the rows from `first` on, `[out.len() / dim, dim]`, as f32.
    ///
    /// # Panics
    /// When there are not as many.
    fn read(&self, first: usize, out: &mut [f32]);
}

/// Rows in memory, `[count, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// `count * dim` numbers; what is over is no row, and where `dim` is 0 there is none.
    pub data: &'a [f32],
    /// Numbers a row.
    pub dim: usize,
}

impl Rows for Table<'_> {
    fn count(&self) -> usize {
        self.data.len().checked_div(self.dim).unwrap_or(0)
    }
    fn dim(&self) -> usize {
        self.dim
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.data[first * self.dim..][..out.len()]);
    }
}

impl Rows for Npy {
    fn count(&self) -> usize {
        self.rows()
    }
    fn dim(&self) -> usize {
        Npy::dim(self)
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        self.read_rows(first..first + out.len() / Npy::dim(self), out);
    }
}

/// One side of a source.
pub struct SideOf<'a>(pub &'a dyn Source, pub Side);

impl Rows for SideOf<'_> {
    fn count(&self) -> usize {
        self.0.len()
    }
    fn dim(&self) -> usize {
        self.0.dim(self.1)
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        let index: Vec<usize> = (first..first + out.len() / Rows::dim(self)).collect();
        self.0.gather(self.1, &index, out);
    }
}

/// Why data could not be read or written. Messages name the file, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused.
    #[error("{}: found {source}, expected a file or folder that can be used", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A file could not be written; the one that was there before still is.
    #[error("{}: not written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{}: found {found}, expected {expected}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// A matrix given as a covariance is none.
    #[error("covariance: found {found}, expected {expected}")]
    Covariance {
        /// Its shape, or the pivot that is not positive.
        found: String,
        /// What a covariance has.
        expected: String,
    },
}

impl DataError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| DataError::Io { path: path.to_owned(), source }
    }
    fn format(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        DataError::Format { path: path.to_owned(), found: found.into(), expected: expected.into() }
    }
}

/// Training pairs and held-out pairs.
#[derive(Clone)]
pub struct Split {
    /// Pairs to learn from.
    pub train: Arc<dyn Source>,
    /// Pairs to judge by.
    pub test: Arc<dyn Source>,
}

/// Pairs `range` of a source, renumbered from 0.
#[derive(Clone, Debug)]
pub struct Subset<S> {
    source: S,
    range: Range<usize>,
}

/// Pairs held in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    u: Vec<f32>,
    v: Vec<f32>,
    dim_u: usize,
    dim_v: usize,
}

/// Pairs from two float matrices on disk with equal row counts: pair i is row i of each.
#[derive(Debug)]
pub struct PairsSource {
    u: Npy,
    v: Npy,
}

impl Split {
    /// The last `held_out` pairs of `source` to test on, those before to train on.
    ///
    /// # Panics
    /// When `held_out > source.len()`.
    pub fn at_end(source: Arc<dyn Source>, held_out: usize) -> Self {
        let (n, train) = (source.len(), source.len() - held_out);
        Split { train: Arc::new(Subset::new(source.clone(), 0..train)), test: Arc::new(Subset::new(source, train..n)) }
    }
}

impl<S: Source> Subset<S> {
    /// # Panics
    /// When `range` does not lie within the source.
    pub fn new(source: S, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= source.len(), "subset {range:?} of {} pairs", source.len());
        Subset { source, range }
    }
}

impl<S: Source> Source for Subset<S> {
    fn len(&self) -> usize {
        self.range.len()
    }
    fn dim(&self, side: Side) -> usize {
        self.source.dim(side)
    }
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]) {
        let shifted: Vec<usize> = index
            .iter()
            .map(|&i| {
                assert!(i < self.range.len(), "sample {i} of {}", self.range.len());
                self.range.start + i
            })
            .collect();
        self.source.gather(side, &shifted, out);
    }
    fn labels(&self) -> Option<&[u8]> {
        self.source.labels().map(|labels| &labels[self.range.clone()])
    }
}

impl Source for Arc<dyn Source> {
    fn len(&self) -> usize {
        (**self).len()
    }
    fn dim(&self, side: Side) -> usize {
        (**self).dim(side)
    }
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]) {
        (**self).gather(side, index, out);
    }
    fn labels(&self) -> Option<&[u8]> {
        (**self).labels()
    }
}

impl Memory {
    /// `u` is `[n, dim_u]`, `v` is `[n, dim_v]`.
    ///
    /// # Panics
    /// When the two do not hold the same number of whole samples, or a dimension is 0.
    pub fn new(u: Vec<f32>, dim_u: usize, v: Vec<f32>, dim_v: usize) -> Self {
        let n = u.len() / dim_u;
        assert!(u.len() == n * dim_u && v.len() == n * dim_v, "u {}/{dim_u}, v {}/{dim_v}", u.len(), v.len());
        Memory { u, v, dim_u, dim_v }
    }
    /// All samples of `side`, `[len, dim]`.
    pub fn side(&self, side: Side) -> &[f32] {
        match side {
            Side::U => &self.u,
            Side::V => &self.v,
        }
    }
}

impl Source for Memory {
    fn len(&self) -> usize {
        self.u.len() / self.dim_u
    }
    fn dim(&self, side: Side) -> usize {
        match side {
            Side::U => self.dim_u,
            Side::V => self.dim_v,
        }
    }
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]) {
        let (data, dim) = (self.side(side), self.dim(side));
        assert_eq!(out.len(), index.len() * dim, "output of {} samples of {dim}", index.len());
        for (row, &i) in out.chunks_exact_mut(dim).zip(index) {
            row.copy_from_slice(&data[i * dim..(i + 1) * dim]);
        }
    }
}

impl PairsSource {
    /// Opens both files and checks that every number is finite.
    ///
    /// # Errors
    /// [`DataError`] naming the file: as [`Npy::open`], a number that is not finite, or unequal row counts.
    pub fn open(u: impl AsRef<Path>, v: impl AsRef<Path>) -> Result<Self, DataError> {
        let (u, v) = (Npy::open(u)?, Npy::open(v)?);
        if u.rows() != v.rows() {
            let expected = format!("{} rows, as many as {} has", u.rows(), u.path().display());
            return Err(DataError::format(v.path(), format!("{} rows", v.rows()), expected));
        }
        u.check_finite()?;
        v.check_finite()?;
        u.expect_random_rows();
        v.expect_random_rows();
        Ok(PairsSource { u, v })
    }
    fn npy(&self, side: Side) -> &Npy {
        match side {
            Side::U => &self.u,
            Side::V => &self.v,
        }
    }
}

impl Source for PairsSource {
    fn len(&self) -> usize {
        self.u.rows()
    }
    fn dim(&self, side: Side) -> usize {
        self.npy(side).dim()
    }
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]) {
        self.npy(side).gather(index, out);
    }
}

/// Creates or replaces the file `path` with what `fill` writes: readers see the old file or the whole new one,
/// never a part, also when the machine stops half way (temporary file beside it, fsync, rename, fsync of the folder).
///
/// # Errors
/// [`DataError::Write`] naming `path`; nothing is left behind then.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), DataError> {
    // A rename would put the file in the place of a link to it.
    let there = path.canonicalize();
    let path = there.as_deref().unwrap_or(path);
    let write = || {
        // A rename would put a file in the place of a device.
        if path.exists() && !path.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is there and not a regular file"));
        }
        let mut builder = tempfile::Builder::new();
        let prefix = temporary(path);
        builder.prefix(&prefix);
        // A temporary file is private by default; this one becomes an ordinary file, subject to the umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let (_unfinished, file) = Unfinished::new(|| builder.tempfile_in(folder(path)), |file| file.path())?;
        let mut writer = BufWriter::new(file);
        fill(&mut writer)?;
        let file = writer.into_inner()?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        sync_folder(path)
    };
    write().map_err(|source| DataError::Write { path: path.to_owned(), source })
}

/// What the names of temporary files begin with.
const TEMPORARY: &str = ".contrastive-";

/// What the name of a temporary file for `path` begins with: whose it is, unless that is so long that the name would not be one.
fn temporary(path: &Path) -> OsString {
    let mut prefix = OsString::from(TEMPORARY);
    if let Some(name) = path.file_name().filter(|name| name.len() < 100) {
        prefix.push(name);
        prefix.push("-");
    }
    prefix
}

/// Takes away the temporary files for `names` that a program left in `folder` when it was killed; nobody writes these now.
#[cfg(feature = "cli")]
pub(crate) fn remove_temporary(folder: &Path, names: impl Iterator<Item = &'static str>) {
    let theirs: Vec<_> = names.map(|name| temporary(Path::new(name))).collect();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if theirs.iter().any(|theirs| name.as_encoded_bytes().starts_with(theirs.as_encoded_bytes())) {
            // They are in nobody's way.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Temporary files that are being written.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// One of them, until it is dropped.
struct Unfinished(PathBuf);

impl Unfinished {
    /// What `make` makes, at the path that `at` tells: there is no moment at which [`abandon_writes`] would miss it.
    fn new<T>(make: impl FnOnce() -> io::Result<T>, at: impl FnOnce(&T) -> &Path) -> io::Result<(Self, T)> {
        let mut all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        let made = make()?;
        let path = at(&made).to_owned();
        all.push(path.clone());
        Ok((Unfinished(path), made))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.0);
    }
}

/// Takes away the temporary files of all that [`write_atomic`] is writing: for a program that ends in the middle of it.
/// Writes under way wait for that end then, as do those that begin after it.
pub fn abandon_writes() {
    /// A folder is not empty when it was listed before a file in it got its own name, which may happen to each once.
    const TRIES: usize = 8;
    let unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    for path in &*unfinished {
        // Nobody is left to tell.
        if path.is_dir() {
            let _ = (0..TRIES).any(|_| std::fs::remove_dir_all(path).is_ok());
        } else {
            let _ = std::fs::remove_file(path);
        }
    }
    // Never given back: a write that finds its file gone would fail, and the program end by that.
    std::mem::forget(unfinished);
}

/// Whether the machine has memory for the product of `sizes` f32.
pub fn fits_memory(sizes: &[usize]) -> bool {
    let bytes = sizes.iter().try_fold(size_of::<f32>(), |all, &size| all.checked_mul(size));
    bytes.is_some_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok())
}

/// Has `fill` write the files of a data set to a folder that it is given, and puts them into `folder` in the place of those
/// that a set there is made of, once all are whole: files of two of them would look like one.
///
/// # Errors
/// `fill`'s; [`DataError::Write`] naming the file. The old set stays then.
pub fn write_set(folder: &Path, fill: impl FnOnce(&Path) -> Result<(), DataError>) -> Result<(), DataError> {
    const NAMES: [&str; 4] = ["u.npy", "v.npy", "labels.npy", "frequencies.npy"];
    let write = |path: &Path, source| DataError::Write { path: path.to_owned(), source };
    if let Some(path) = NAMES.map(|name| folder.join(name)).iter().find(|path| path.exists() && !path.is_file()) {
        return Err(write(path, io::Error::new(io::ErrorKind::InvalidInput, "it is there and not a regular file")));
    }
    let make = || tempfile::Builder::new().prefix(TEMPORARY).tempdir_in(folder);
    let (_unfinished, new) = Unfinished::new(make, |new| new.path()).map_err(|e| write(folder, e))?;
    fill(new.path()).map_err(|e| match e {
        // By the name that it was to have.
        DataError::Write { path, source } => write(&folder.join(path.file_name().unwrap_or_default()), source),
        e => e,
    })?;
    // Nor does the program end by [`abandon_writes`] with a part of them in place.
    let whole = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    for name in NAMES {
        let (from, to) = (new.path().join(name), folder.join(name));
        if from.exists() {
            std::fs::rename(&from, &to).map_err(|e| write(&to, e))?;
        } else {
            remove_files(folder, &[name])?;
        }
    }
    drop(whole);
    sync_folder(&folder.join(NAMES[0])).map_err(|e| write(folder, e))
}

/// Takes away those of `folder`'s files `names` that are there, in their order.
///
/// # Errors
/// [`DataError::Write`] naming the file.
pub(crate) fn remove_files(folder: &Path, names: &[&str]) -> Result<(), DataError> {
    for name in names {
        let path = folder.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(DataError::Write { path, source }),
            _ => {}
        }
    }
    Ok(())
}

/// The folder that `path` lies in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename to `path` reach the disk; only unix lets a folder be opened and synced.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder(path))?.sync_all() } else { Ok(()) }
}

/// The first row of `data` `[rows, dim]` that holds a NaN or an infinity. Runs on all cores.
pub fn first_non_finite(data: &[f32], dim: usize) -> Option<usize> {
    use rayon::prelude::*;
    // No early exit within a chunk: so the test vectorises.
    const CHUNK: usize = 1 << 14;
    let chunk =
        data.par_chunks(CHUNK).position_first(|chunk| chunk.iter().fold(false, |bad, x| bad | !x.is_finite()))?;
    let start = chunk * CHUNK;
    data[start..].iter().position(|x| !x.is_finite()).map(|at| (start + at) / dim.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pair i is ([2i, 2i + 1], [-i]).
    fn counting(n: usize) -> Memory {
        Memory::new((0..2 * n).map(|x| x as f32).collect(), 2, (0..n).map(|x| -(x as f32)).collect(), 1)
    }

    #[test]
    fn subsets_and_splits_renumber_from_zero() {
        let split = Split::at_end(Arc::new(counting(7)), 3);
        assert_eq!((split.train.len(), split.test.len()), (4, 3));
        let mut u = [0.0; 4];
        split.test.gather(Side::U, &[2, 0], &mut u);
        assert_eq!(u, [12.0, 13.0, 8.0, 9.0]);
        let mut v = [0.0; 1];
        split.train.gather(Side::V, &[3], &mut v);
        assert_eq!(v, [-3.0]);
        let nested = Subset::new(Subset::new(counting(7), 2..6), 1..3);
        nested.gather(Side::V, &[1], &mut v);
        assert_eq!((nested.len(), v), (2, [-4.0]));
    }

    #[test]
    #[should_panic(expected = "sample 4 of 4")]
    fn a_subset_does_not_leak_its_neighbours() {
        Subset::new(counting(7), 0..4).gather(Side::V, &[4], &mut [0.0]);
    }

    #[test]
    fn non_finite_rows_are_found_wherever_they_are() {
        // 3 numbers a row, spanning several of the parallel chunks; the earliest of two must win.
        let clean = vec![f32::MAX; 3 * 20_000];
        assert_eq!(first_non_finite(&clean, 3), None);
        for (at, bad) in [(0, f32::NAN), (16_383, f32::INFINITY), (16_384, f32::NEG_INFINITY), (59_999, f32::NAN)] {
            let mut data = clean.clone();
            data[at] = bad;
            data[59_999] = f32::NAN;
            assert_eq!(first_non_finite(&data, 3), Some(at / 3));
        }
        assert_eq!(first_non_finite(&[], 0), None);
    }

    #[test]
    fn pairs_must_match_and_be_finite() {
        let folder = tempfile::tempdir().unwrap();
        let (u, v) = (folder.path().join("u.npy"), folder.path().join("v.npy"));
        write_npy_f32(&u, &[5, 2], &[1.0; 10]).unwrap();
        write_npy_f32(&v, &[4, 1], &[1.0; 4]).unwrap();
        let message = PairsSource::open(&u, &v).unwrap_err().to_string();
        assert!(message.contains("v.npy: found 4 rows, expected 5 rows"), "{message}");
        write_npy_f32(&v, &[5, 1], &[1.0, 2.0, 3.0, f32::NAN, 5.0]).unwrap();
        let message = PairsSource::open(&u, &v).unwrap_err().to_string();
        assert!(message.contains("v.npy: found a value that is not finite in row 3"), "{message}");
        write_npy_f32(&v, &[5, 1], &[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let pairs = PairsSource::open(&u, &v).unwrap();
        let mut out = [0.0; 2];
        pairs.gather(Side::V, &[4, 1], &mut out);
        assert_eq!((pairs.len(), pairs.dim(Side::U), pairs.dim(Side::V), out), (5, 2, 1, [5.0, 2.0]));
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomic(&path, |w| w.write_all(b"old")).unwrap();
        let failed = write_atomic(&path, |w| {
            w.write_all(&[0; 100_000])?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let missing = folder.path().join("no/such/file");
        assert!(write_atomic(&missing, |_| Ok(())).unwrap_err().to_string().contains("file"));
    }

    // What is mapped or open stays what it was, as the new file takes the old one's name and not its place.
    #[cfg(unix)]
    #[test]
    fn a_file_is_replaced_and_not_written_over() {
        use std::io::Read;
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let [path, ordinary] = ["a", "b"].map(|name| folder.path().join(name));
        std::fs::write(&ordinary, "").unwrap();
        write_atomic(&path, |w| w.write_all(b"old")).unwrap();
        let mut open = File::open(&path).unwrap();
        write_atomic(&path, |w| w.write_all(b"new and longer")).unwrap();
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!((&text[..], &std::fs::read(&path).unwrap()[..]), ("old", &b"new and longer"[..]));
        let mode = |path| std::fs::metadata(path).unwrap().mode();
        assert_eq!(mode(&path), mode(&ordinary), "others may read it as they may any file");
    }

    #[cfg(feature = "cli")]
    #[test]
    fn temporary_files_of_the_dead_are_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let names = [".contrastive-model-x1", ".contrastive-config-y2", ".contrastive-other-z3", "model"];
        names.iter().for_each(|name| std::fs::write(folder.path().join(name), "").unwrap());
        remove_temporary(folder.path(), ["model", "config"].into_iter());
        assert_eq!(names.map(|name| folder.path().join(name).exists()), [false, false, true, true]);
    }
}
