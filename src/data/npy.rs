//! NumPy's `.npy` files: matrices of floats read through a memory map, integers read whole, both written atomically.
//!
//! Little endian and C order only; header versions 1, 2 and 3. This file holds the only `unsafe` of the room: the map.

use super::{DataError, first_non_finite, write_atomic};
use half::f16;
use memmap2::Mmap;
use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

/// Number types of an array of floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE half precision.
    F16,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
}

/// A matrix of floats `[rows, dim]` on disk, memory-mapped: it may be larger than memory. A 1-D array of n numbers
/// is `[n, 1]`. The file must not be cut short while it is open.
#[derive(Debug)]
pub struct Npy {
    path: PathBuf,
    map: Mmap,
    start: usize,
    rows: usize,
    dim: usize,
    dtype: Dtype,
}

impl Npy {
    /// Opens a 1-D or 2-D array of f16, f32 or f64.
    ///
    /// # Errors
    /// [`DataError`] for a file that is missing, truncated or no `.npy`; for Fortran order, big endian numbers,
    /// another dtype, another rank, or no element at all.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        let map = map(path)?;
        let header = Header::parse(&map).map_err(|e| e.at(path))?;
        let dtype = match header.descr.as_str() {
            "<f2" => Dtype::F16,
            "<f4" => Dtype::F32,
            "<f8" => Dtype::F64,
            other => return Err(wrong_dtype(path, other, "<f2, <f4 or <f8")),
        };
        let (rows, dim) = match header.shape[..] {
            [rows] => (rows, 1),
            [rows, dim] => (rows, dim),
            _ => return Err(wrong_rank(path, &header.shape, "a 2-D array [rows, dim]")),
        };
        header.data(&map, dtype.size()).map_err(|e| e.at(path))?;
        Ok(Npy { path: path.to_owned(), start: header.len, map, rows, dim, dtype })
    }
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Number of rows, at least 1.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Numbers a row, at least 1.
    pub fn dim(&self) -> usize {
        self.dim
    }
    /// How the numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Reads rows `range` as f32, `[range.len(), dim]`.
    ///
    /// # Panics
    /// When `range` is not within the rows or `out` has another length.
    pub fn read_rows(&self, range: Range<usize>, out: &mut [f32]) {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        assert_eq!(out.len(), range.len() * self.dim, "output of {} rows of {}", range.len(), self.dim);
        self.decode(range.start * self.dim, out);
    }
    /// Reads rows `index` as f32, `[index.len(), dim]`.
    ///
    /// # Panics
    /// When an index is not below [`rows`](Npy::rows) or `out` has another length.
    pub fn gather(&self, index: &[usize], out: &mut [f32]) {
        assert_eq!(out.len(), index.len() * self.dim, "output of {} rows of {}", index.len(), self.dim);
        // All reads are on their way before the first is waited for: 6 to 9 times faster from a cold disk for 8192 rows
        // of 2 KiB, for 0.35 us a row. Only a hint, so its failure changes nothing.
        #[cfg(unix)]
        for &i in index {
            let size = self.dim * self.dtype.size();
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, self.start + i.min(self.rows - 1) * size, size);
        }
        for (row, &i) in out.chunks_exact_mut(self.dim).zip(index) {
            assert!(i < self.rows, "row {i} of {}", self.rows);
            self.decode(i * self.dim, row);
        }
    }
    /// The whole matrix without a copy, where it is stored as aligned f32 in this machine's byte order.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if self.dtype != Dtype::F32 || cfg!(target_endian = "big") {
            return None;
        }
        bytemuck::try_cast_slice(self.bytes()).ok()
    }
    /// The whole matrix in f64, exact.
    pub fn to_f64(&self) -> Vec<f64> {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::F16 => words(bytes).map(|b| f16::from_le_bytes(b).to_f64()).collect(),
            Dtype::F32 => words(bytes).map(|b| f64::from(f32::from_le_bytes(b))).collect(),
            Dtype::F64 => words(bytes).map(f64::from_le_bytes).collect(),
        }
    }
    /// Checks that every number is finite in f32 (a larger f64 is not). Reads the whole file, on all cores.
    ///
    /// # Errors
    /// [`DataError::Format`] naming the first row with a NaN or an infinity.
    pub fn check_finite(&self) -> Result<(), DataError> {
        // About a megabyte of f32 at a time bounds the memory of the converted types.
        let block = ((1 << 18) / self.dim).max(1);
        let mut buffer = Vec::new();
        for first in (0..self.rows).step_by(block) {
            let rows = first..self.rows.min(first + block);
            let bad = match self.as_f32() {
                Some(all) => first_non_finite(&all[rows.start * self.dim..rows.end * self.dim], self.dim),
                None => {
                    buffer.resize(rows.len() * self.dim, 0.0);
                    self.read_rows(rows, &mut buffer);
                    first_non_finite(&buffer, self.dim)
                }
            };
            if let Some(row) = bad {
                let found = format!("a value that is not finite in row {}", first + row);
                return Err(DataError::format(&self.path, found, "finite numbers"));
            }
        }
        Ok(())
    }
    /// Tells the system that rows will be gathered in random order, so that reading one reads no neighbours with it.
    pub(super) fn expect_random_rows(&self) {
        #[cfg(unix)]
        let _ = self.map.advise(memmap2::Advice::Random);
    }
    fn bytes(&self) -> &[u8] {
        &self.map[self.start..self.start + self.rows * self.dim * self.dtype.size()]
    }
    /// Elements `first..first + out.len()` as f32.
    fn decode(&self, first: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[first * size..(first + out.len()) * size];
        match self.dtype {
            Dtype::F16 => out.iter_mut().zip(words(bytes)).for_each(|(x, b)| *x = f16::from_le_bytes(b).to_f32()),
            Dtype::F32 => out.iter_mut().zip(words(bytes)).for_each(|(x, b)| *x = f32::from_le_bytes(b)),
            Dtype::F64 => out.iter_mut().zip(words(bytes)).for_each(|(x, b)| *x = f64::from_le_bytes(b) as f32),
        }
    }
}

impl Dtype {
    fn size(self) -> usize {
        match self {
            Dtype::F16 => 2,
            Dtype::F32 => 4,
            Dtype::F64 => 8,
        }
    }
}

/// Reads a whole array of integers of any width (labels, indices; `<u8` up to the largest i64) of 1 or 2 dimensions: its shape and
/// its elements in C order.
///
/// # Errors
/// As [`Npy::open`].
pub fn read_npy_i64(path: impl AsRef<Path>) -> Result<(Vec<usize>, Vec<i64>), DataError> {
    let path = path.as_ref();
    let map = map(path)?;
    let header = Header::parse(&map).map_err(|e| e.at(path))?;
    if !(1..=2).contains(&header.shape.len()) {
        return Err(wrong_rank(path, &header.shape, "an array of 1 or 2 dimensions"));
    }
    let data = |size| header.data(&map, size).map_err(|e| e.at(path));
    let elements = match header.descr.as_str() {
        "<i8" => words(data(8)?).map(i64::from_le_bytes).collect(),
        "<i4" => words(data(4)?).map(|b| i64::from(i32::from_le_bytes(b))).collect(),
        "<i2" => words(data(2)?).map(|b| i64::from(i16::from_le_bytes(b))).collect(),
        "|i1" => data(1)?.iter().map(|&b| i64::from(b.cast_signed())).collect(),
        "<u8" => {
            let fits = |b| i64::try_from(u64::from_le_bytes(b));
            let all: Result<Vec<i64>, _> = words(data(8)?).map(fits).collect();
            all.map_err(|_| DataError::format(path, "a number above 2^63 - 1", "integers that an i64 holds"))?
        }
        "<u4" => words(data(4)?).map(|b| i64::from(u32::from_le_bytes(b))).collect(),
        "<u2" => words(data(2)?).map(|b| i64::from(u16::from_le_bytes(b))).collect(),
        "|u1" => data(1)?.iter().map(|&b| i64::from(b)).collect(),
        other => return Err(wrong_dtype(path, other, "little-endian integers")),
    };
    Ok((header.shape, elements))
}

/// Writes an f32 array of `shape`, atomically.
///
/// # Errors
/// [`DataError::Write`] naming `path`.
///
/// # Panics
/// When `shape` does not hold `data.len()` elements.
pub fn write_npy_f32(path: impl AsRef<Path>, shape: &[usize], data: &[f32]) -> Result<(), DataError> {
    write_npy_f32_parts(path, shape, |push| push(data))
}

/// [`write_npy_f32`] of an array that is never whole in memory: `parts` hands its elements over piece by piece.
///
/// # Errors
/// [`DataError::Write`] naming `path`.
///
/// # Panics
/// When the pieces do not make up `shape`.
pub fn write_npy_f32_parts(
    path: impl AsRef<Path>,
    shape: &[usize],
    parts: impl FnOnce(&mut Push<'_, f32>) -> io::Result<()>,
) -> Result<(), DataError> {
    write(path.as_ref(), "<f4", shape, f32::to_le_bytes, parts)
}

/// Takes the next elements of an array.
pub type Push<'a, T> = dyn FnMut(&[T]) -> io::Result<()> + 'a;

/// Writes an int64 array of `shape`, atomically.
///
/// # Errors
/// [`DataError::Write`] naming `path`.
///
/// # Panics
/// When `shape` does not hold `data.len()` elements.
pub fn write_npy_i64(path: impl AsRef<Path>, shape: &[usize], data: &[i64]) -> Result<(), DataError> {
    write(path.as_ref(), "<i8", shape, i64::to_le_bytes, |push| push(data))
}

fn write<T: Copy, const SIZE: usize>(
    path: &Path,
    descr: &str,
    shape: &[usize],
    bytes: impl Fn(T) -> [u8; SIZE],
    parts: impl FnOnce(&mut Push<'_, T>) -> io::Result<()>,
) -> Result<(), DataError> {
    write_atomic(path, |w| {
        w.write_all(&header_v1(descr, shape)?)?;
        let mut buffer = Vec::with_capacity(SIZE << 13);
        let mut written = 0;
        parts(&mut |data| {
            written += data.len();
            for chunk in data.chunks(1 << 13) {
                buffer.clear();
                buffer.extend(chunk.iter().flat_map(|&x| bytes(x)));
                w.write_all(&buffer)?;
            }
            Ok(())
        })?;
        assert_eq!(written, shape.iter().product::<usize>(), "elements of shape {shape:?}");
        Ok(())
    })
}

/// Magic, version and dictionary, padded so that the data starts at a multiple of 64 bytes.
fn header_v1(descr: &str, shape: &[usize]) -> io::Result<Vec<u8>> {
    let dims: String = shape.iter().map(|n| format!("{n},")).collect();
    let dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    let total = (MAGIC.len() + 4 + dict.len() + 1).next_multiple_of(64);
    let len = u16::try_from(total - MAGIC.len() - 4).map_err(|_| io::Error::other("a shape too long to write"))?;
    let mut header = Vec::with_capacity(total);
    header.extend(MAGIC);
    header.extend([1, 0]);
    header.extend(len.to_le_bytes());
    header.extend(dict.bytes());
    header.resize(total - 1, b' ');
    header.push(b'\n');
    Ok(header)
}

fn map(path: &Path) -> Result<Mmap, DataError> {
    // Before it is opened: a pipe would wait for who writes to it.
    let kind = std::fs::metadata(path).map_err(DataError::io(path))?.file_type();
    if !kind.is_file() {
        let found = if kind.is_dir() { "a folder" } else { "a device or a pipe" };
        return Err(DataError::format(path, found, "a regular file, .npy"));
    }
    let file = File::open(path).map_err(DataError::io(path))?;
    // SAFETY: the map is read-only and private to this room; bytes are only ever decoded, so no value of them is
    // invalid. What we cannot rule out is another process cutting the file short meanwhile: the operating system then
    // stops this one with a signal, which the docs of `Npy` tell. Our own writers never do it: they rename.
    unsafe { Mmap::map(&file) }.map_err(DataError::io(path))
}

fn words<const SIZE: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; SIZE]> {
    bytes.as_chunks::<SIZE>().0.iter().copied()
}

fn wrong_dtype(path: &Path, found: &str, expected: &str) -> DataError {
    DataError::format(path, format!("dtype {found}"), format!("dtype {expected}"))
}

fn wrong_rank(path: &Path, shape: &[usize], expected: &str) -> DataError {
    DataError::format(path, format!("an array of shape {shape:?}"), expected)
}

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// What precedes the data.
#[derive(Debug, PartialEq)]
struct Header {
    descr: String,
    shape: Vec<usize>,
    /// Bytes before the data.
    len: usize,
}

/// Found and expected, still without the file.
struct Bad(String, String);

impl Bad {
    fn at(self, path: &Path) -> DataError {
        DataError::format(path, self.0, self.1)
    }
}

impl Header {
    fn parse(file: &[u8]) -> Result<Self, Bad> {
        if !file.starts_with(MAGIC) {
            return Err(Bad(format!("a file that begins with {:?}", head(file, 6)), "an .npy file".into()));
        }
        let version = file.get(6..8).ok_or_else(|| truncated(file))?;
        let (from, len) = match version[0] {
            1 => (10, file.get(8..10).map(|b| usize::from(b[0]) | usize::from(b[1]) << 8)),
            2 | 3 => (12, file.get(8..12).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)),
            other => return Err(Bad(format!("format version {other}"), "version 1, 2 or 3".into())),
        };
        let len = len.ok_or_else(|| truncated(file))?;
        let dict = file[from..].get(..len).ok_or_else(|| truncated(file))?;
        let unreadable = || {
            Bad(format!("the header {:?}", head(dict, 80)), "{'descr': .., 'fortran_order': .., 'shape': ..}".into())
        };
        let (descr, fortran, shape) = parse_dict(dict).ok_or_else(unreadable)?;
        if descr.starts_with('>') {
            return Err(Bad(format!("big endian numbers ({descr})"), "little endian".into()));
        }
        if fortran {
            return Err(Bad("Fortran order".into(), "C order (numpy.ascontiguousarray makes it)".into()));
        }
        Ok(Header { descr, shape, len: from + len })
    }
    /// The bytes of the elements, `size` each.
    fn data<'a>(&self, file: &'a [u8], size: usize) -> Result<&'a [u8], Bad> {
        let found = file.len() - self.len;
        let bytes = self.shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
        match bytes {
            Some(0) => Err(Bad(format!("an empty array of shape {:?}", self.shape), "at least one element".into())),
            Some(bytes) if bytes <= found => Ok(&file[self.len..self.len + bytes]),
            _ => {
                let expected = bytes.map_or("fewer".into(), |b| b.to_string());
                Err(Bad(format!("{found} bytes of data"), format!("{expected} bytes for shape {:?}", self.shape)))
            }
        }
    }
}

fn truncated(file: &[u8]) -> Bad {
    Bad(format!("a file of {} bytes that ends within its header", file.len()), "a whole .npy file".into())
}

fn head(bytes: &[u8], len: usize) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(len)]).into_owned()
}

/// Reads the Python dictionary of a header: descr, fortran_order and shape in any order. A dtype that is not a
/// string (a structured one) is returned as written.
fn parse_dict(dict: &[u8]) -> Option<(String, bool, Vec<usize>)> {
    let mut text = Text(std::str::from_utf8(dict).ok()?);
    let (mut descr, mut fortran, mut shape) = (None, None, None);
    text.eat("{")?;
    while text.eat("}").is_none() {
        let key = text.string()?;
        text.eat(":")?;
        match key {
            "descr" => descr = Some(text.string().or_else(|| text.list())?.to_owned()),
            "fortran_order" => fortran = Some(text.eat("True").is_some() || text.eat("False").map(|()| false)?),
            "shape" => shape = Some(text.tuple()?),
            _ => return None,
        }
        if text.eat(",").is_none() {
            text.eat("}")?;
            break;
        }
    }
    text.0.trim().is_empty().then_some((descr?, fortran?, shape?))
}

/// What is left of a Python literal.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    fn eat(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }
    fn until(&mut self, end: char) -> Option<&'a str> {
        let (inner, rest) = self.0.split_once(end)?;
        self.0 = rest;
        Some(inner)
    }
    fn string(&mut self) -> Option<&'a str> {
        match self.eat("'") {
            Some(()) => self.until('\''),
            None => self.eat("\"").and_then(|()| self.until('"')),
        }
    }
    fn list(&mut self) -> Option<&'a str> {
        self.eat("[")?;
        self.until(']')
    }
    fn tuple(&mut self) -> Option<Vec<usize>> {
        self.eat("(")?;
        let inner = self.until(')')?.trim();
        let inner = inner.strip_suffix(',').unwrap_or(inner);
        if inner.is_empty() {
            return Some(Vec::new());
        }
        inner.split(',').map(|n| n.trim().parse().ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// An .npy file with the header exactly as given.
    fn file(version: u8, dict: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([version, 0]);
        match version {
            1 => bytes.extend((dict.len() as u16).to_le_bytes()),
            _ => bytes.extend((dict.len() as u32).to_le_bytes()),
        }
        bytes.extend(dict.bytes());
        bytes.extend(data);
        bytes
    }

    fn on_disk(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::Builder::new().suffix(".npy").tempfile().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(-3.0f32..3.0)).collect()
    }

    #[test]
    fn written_arrays_read_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        for (rows, dim) in [(1, 1), (1, 7), (13, 1), (101, 5), (8193, 3)] {
            let data = random(rows * dim, rows as u64);
            write_npy_f32(&path, &[rows, dim], &data).unwrap();
            let npy = Npy::open(&path).unwrap();
            assert_eq!((npy.rows(), npy.dim(), npy.dtype()), (rows, dim, Dtype::F32));
            // Our header is padded to 64 bytes, so the map is aligned and the borrow must work.
            assert_eq!(npy.as_f32().unwrap(), data);
            assert_eq!(npy.to_f64(), data.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            let mut last = vec![0.0; dim];
            npy.read_rows(rows - 1..rows, &mut last);
            assert_eq!(last, data[(rows - 1) * dim..]);
            npy.check_finite().unwrap();
        }
        let ids = [i64::MIN, -1, 0, i64::MAX];
        write_npy_i64(&path, &[2, 2], &ids).unwrap();
        assert_eq!(read_npy_i64(&path).unwrap(), (vec![2, 2], ids.to_vec()));
        assert!(Npy::open(&path).unwrap_err().to_string().contains("found dtype <i8, expected dtype <f2, <f4 or <f8"));
    }

    /// The layout of numpy's `np.save` (header padded with blanks to a multiple of 64 bytes) for `np.arange(6, dtype=np.float32).reshape(2, 3)`.
    #[test]
    fn a_file_as_numpy_writes_it() {
        let dict = format!("{:<117}\n", "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }");
        let data: Vec<u8> = (0..6).flat_map(|x| (x as f32).to_le_bytes()).collect();
        let bytes = file(1, &dict, &data);
        assert_eq!(bytes.len(), 128 + 24);
        let npy = Npy::open(on_disk(&bytes)).unwrap();
        assert_eq!(npy.as_f32().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        // And ours has the same layout.
        let ours = header_v1("<f4", &[2, 3]).unwrap();
        assert_eq!(ours.len(), 128);
        assert_eq!(Header::parse(&ours).ok(), Header::parse(&bytes).ok());
    }

    #[test]
    fn every_float_type_version_and_alignment() {
        let (rows, dim) = (11, 3);
        // Halves: exact in all three types.
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let values: Vec<f32> = (0..rows * dim).map(|_| f32::from(rng.random_range(-100i16..100)) / 2.0).collect();
        for descr in ["<f2", "<f4", "<f8"] {
            for version in 1..=3 {
                for pad in 0..9 {
                    let pad = " ".repeat(pad);
                    let dict = format!("{{\"shape\":({rows},{dim}), 'fortran_order':False,'descr': '{descr}'}}{pad}\n");
                    let data: Vec<u8> = values
                        .iter()
                        .flat_map(|&x| match descr {
                            "<f2" => f16::from_f32(x).to_le_bytes().to_vec(),
                            "<f4" => x.to_le_bytes().to_vec(),
                            _ => f64::from(x).to_le_bytes().to_vec(),
                        })
                        .collect();
                    let bytes = file(version, &dict, &data);
                    let aligned = (bytes.len() - data.len()).is_multiple_of(4);
                    let npy = Npy::open(on_disk(&bytes)).unwrap();
                    let mut all = vec![0.0; rows * dim];
                    npy.read_rows(0..rows, &mut all);
                    assert_eq!(all, values);
                    assert_eq!(npy.as_f32().is_some(), descr == "<f4" && aligned);
                    let mut some = vec![0.0; 3 * dim];
                    npy.gather(&[10, 0, 10], &mut some);
                    assert_eq!(some[dim..2 * dim], values[..dim]);
                    assert_eq!(some[2 * dim..], values[10 * dim..]);
                    assert_eq!(npy.to_f64(), values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn every_integer_type() {
        let open = |descr: &str, data: &[u8]| {
            let dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (2,)}}");
            read_npy_i64(on_disk(&file(1, &dict, data))).map(|(_, x)| x).map_err(|e| e.to_string())
        };
        assert_eq!(open("|u1", &[0, 255]).unwrap(), [0, 255]);
        assert_eq!(open("<i4", &[1, 0, 0, 0, 254, 255, 255, 255]).unwrap(), [1, -2]);
        assert_eq!(open("|i1", &[1, 254]).unwrap(), [1, -2]);
        assert_eq!(open("<i2", &[1, 0, 254, 255]).unwrap(), [1, -2]);
        assert_eq!(open("<u2", &[1, 0, 254, 255]).unwrap(), [1, 65_534]);
        assert_eq!(open("<u4", &[1, 0, 0, 0, 254, 255, 255, 255]).unwrap(), [1, 4_294_967_294]);
        assert_eq!(open("<u8", &[1, 0, 0, 0, 0, 0, 0, 0].repeat(2)).unwrap(), [1, 1]);
        assert!(open("<u8", &[255; 16]).unwrap_err().contains("expected integers that an i64 holds"));
        assert!(open("<f4", &[0; 8]).unwrap_err().contains("found dtype <f4, expected dtype little-endian integers"));
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let dict = |descr: &str, fortran: &str, shape: &str| {
            format!("{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}")
        };
        let float = |shape: &str| dict("'<f4'", "False", shape);
        for (bytes, message) in [
            (b"PK\x03\x04 a zip".to_vec(), "expected an .npy file"),
            (Vec::new(), "expected an .npy file"),
            (MAGIC.to_vec(), "found a file of 6 bytes that ends within its header"),
            (file(9, &float("(1,)"), &[0; 4]), "found format version 9, expected version 1, 2 or 3"),
            (file(1, &dict("'<f4'", "True", "(2, 1)"), &[0; 8]), "found Fortran order, expected C order"),
            (file(1, &dict("'>f4'", "False", "(2, 1)"), &[0; 8]), "found big endian numbers (>f4), expected little"),
            (file(1, &dict("'<c8'", "False", "(1, 1)"), &[0; 8]), "found dtype <c8, expected dtype <f2, <f4 or <f8"),
            (file(1, &dict("[('a', '<f4')]", "False", "(1,)"), &[0; 4]), "found dtype ('a', '<f4'), expected"),
            (file(1, &float("()"), &[0; 4]), "found an array of shape [], expected a 2-D array [rows, dim]"),
            (file(1, &float("(1, 1, 1)"), &[0; 4]), "found an array of shape [1, 1, 1], expected a 2-D array"),
            (file(1, &float("(0, 3)"), &[]), "found an empty array of shape [0, 3], expected at least one element"),
            (file(1, &float("(3, 0)"), &[]), "found an empty array"),
            (file(1, &float("(2, 3)"), &[0; 23]), "found 23 bytes of data, expected 24"),
            (file(1, &float("(4294967296, 4294967296)"), &[0; 23]), "found 23 bytes of data, expected"),
            (file(1, &float("(-1, 3)"), &[0; 23]), "found the header"),
            (file(1, "{'descr': '<f4'}", &[0; 4]), "found the header"),
            (file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x", &[0; 4]), "found the header"),
        ] {
            let file = on_disk(&bytes);
            let error = Npy::open(file.path()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}, not: {message}");
            assert!(error.contains(&*file.path().to_string_lossy()), "no file in: {error}");
        }
        let missing = Npy::open("/no/such.npy").unwrap_err();
        assert!(matches!(missing, DataError::Io { .. }) && missing.to_string().contains("/no/such.npy"));
        assert!(Npy::open(std::env::temp_dir()).is_err());
    }

    #[test]
    fn non_finite_rows_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        // Large enough for two blocks, so that the offset of a later block is tested.
        let (rows, dim) = (70_000, 5);
        let mut data = random(rows * dim, 2);
        data[69_998 * dim + 4] = f32::NAN;
        write_npy_f32(&path, &[rows, dim], &data).unwrap();
        assert!(Npy::open(&path).unwrap().check_finite().unwrap_err().to_string().contains("in row 69998,"));
        let dict = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 1)}";
        let bytes: Vec<u8> = [1.0f64, 1e300].iter().flat_map(|x| x.to_le_bytes()).collect();
        let npy = Npy::open(on_disk(&file(1, dict, &bytes))).unwrap();
        assert!(npy.check_finite().unwrap_err().to_string().contains("in row 1,"));
    }

    /// A panic or an index out of the map would fail it: any file is either read or refused.
    #[test]
    fn corrupt_files_never_panic() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }   \n";
        let mut opened = 0;
        for round in 0..4000 {
            let mut bytes = file(1 + (round % 3) as u8, dict, &[1; 48]);
            for _ in 0..rng.random_range(0..4) {
                let at = rng.random_range(0..bytes.len() - 48);
                bytes[at] = match rng.random_range(0..3) {
                    0 => rng.next_u32() as u8,
                    1 => bytes[at] ^ 1 << rng.random_range(0..8),
                    _ => b"0123456789(),'{} "[rng.random_range(0..17)],
                };
            }
            if rng.random_range(0..3) == 0 {
                bytes.truncate(rng.random_range(0..bytes.len()));
            }
            let file = on_disk(&bytes);
            let _ = read_npy_i64(file.path());
            if let Ok(npy) = Npy::open(file.path()) {
                opened += 1;
                assert_eq!(npy.to_f64().len(), npy.rows() * npy.dim());
                let mut row = vec![0.0; npy.dim()];
                npy.gather(&[npy.rows() - 1], &mut row);
                let _ = npy.check_finite();
            }
        }
        assert!(opened > 100 && opened < 3900, "{opened} of 4000 were readable: the corruption tests nothing");
    }
}
