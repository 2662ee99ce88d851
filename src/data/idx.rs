//! The IDX files of MNIST (and of the sets that copy its layout, such as Fashion-MNIST and KMNIST).

use super::{
    DataError, Split,
    images::{CLASSES, EDGE, Images},
};
use flate2::read::MultiGzDecoder;
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Reads the four files from folder `dir`: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-`
/// ones, each plain or compressed, with or without `.gz`, also spelt `train-images.idx3-ubyte`.
///
/// # Errors
/// [`DataError`] naming the file that is missing, corrupt or truncated, whose images are not 28 x 28, whose labels are
/// not 0 to 9, or whose counts of images and labels differ.
pub fn mnist(dir: &Path) -> Result<Split, DataError> {
    Ok(Split { train: Arc::new(part(dir, "train")?), test: Arc::new(part(dir, "t10k")?) })
}

/// The images and labels of one part of the set.
fn part(dir: &Path, name: &str) -> Result<Images, DataError> {
    let (path, shape, pixels) = array::<3>(dir, &format!("{name}-images"))?;
    let [count, height, width] = shape;
    if height != EDGE || width != EDGE {
        return Err(DataError::format(&path, format!("images of {height} x {width}"), "28 x 28"));
    }
    let (path, [labelled], labels) = array::<1>(dir, &format!("{name}-labels"))?;
    if labelled != count {
        let expected = format!("{count}, one for each image of {name}-images");
        return Err(DataError::format(&path, format!("{labelled} labels"), expected));
    }
    if let Some(at) = labels.iter().position(|&l| usize::from(l) >= CLASSES) {
        return Err(DataError::format(&path, format!("label {} at {at}", labels[at]), "labels 0 to 9"));
    }
    Ok(Images::new(pixels, labels))
}

/// The file of `stem` in `dir`, its shape and its bytes.
fn array<const RANK: usize>(dir: &Path, stem: &str) -> Result<(PathBuf, [usize; RANK], Vec<u8>), DataError> {
    for name in [format!("{stem}-idx{RANK}-ubyte"), format!("{stem}.idx{RANK}-ubyte")] {
        for suffix in ["", ".gz"] {
            let path = dir.join(format!("{name}{suffix}"));
            match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => (),
                Err(e) => return Err(DataError::io(&path)(e)),
                Ok(file) => {
                    let (shape, bytes) = parse(&path, BufReader::new(file))?;
                    return Ok((path, shape, bytes));
                }
            }
        }
    }
    Err(DataError::format(dir, format!("no file {stem}-idx{RANK}-ubyte"), "it there, plain or .gz"))
}

fn parse<const RANK: usize>(path: &Path, mut file: impl BufRead) -> Result<([usize; RANK], Vec<u8>), DataError> {
    let compressed = file.fill_buf().map_err(DataError::io(path))?.starts_with(&[0x1f, 0x8b]);
    if compressed { read(path, MultiGzDecoder::new(file)) } else { read(path, file) }
}

/// Big endian: 0, 0, 8 (unsigned bytes), rank, then 4 bytes a dimension, then the elements.
fn read<const RANK: usize>(path: &Path, mut file: impl Read) -> Result<([usize; RANK], Vec<u8>), DataError> {
    // What stands in a file that breaks off or does not decompress is its format's fault, not the system's.
    let broken = |e: io::Error| match e.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            DataError::format(path, format!("a file that cannot be read to its end ({e})"), "a whole IDX file")
        }
        _ => DataError::io(path)(e),
    };
    let mut word = || {
        let mut word = [0; 4];
        file.read_exact(&mut word).map(|()| word).map_err(broken)
    };
    let magic = word()?;
    if magic != [0, 0, 8, RANK as u8] {
        return Err(DataError::format(path, format!("magic {magic:?}"), format!("[0, 0, 8, {RANK}]")));
    }
    let mut shape = [0; RANK];
    for n in &mut shape {
        *n = u32::from_be_bytes(word()?) as usize;
    }
    let size = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).unwrap_or(u64::MAX);
    if size == 0 {
        return Err(DataError::format(path, format!("an empty array of shape {shape:?}"), "at least one element"));
    }
    // One byte more than wanted tells a file that is too long, and no claim of the header allocates memory.
    let mut bytes = Vec::new();
    file.take(size.saturating_add(1)).read_to_end(&mut bytes).map_err(broken)?;
    if bytes.len() as u64 != size {
        let found = if bytes.len() as u64 > size { "more".into() } else { bytes.len().to_string() };
        return Err(DataError::format(path, format!("{found} bytes of data"), format!("{size} for shape {shape:?}")));
    }
    Ok((shape, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Side, Source};
    use rand::{Rng, RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::{fs, io::Write};

    fn idx(shape: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, shape.len() as u8];
        bytes.extend(shape.iter().flat_map(|n| n.to_be_bytes()));
        bytes.extend(data);
        bytes
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn pixels(n: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; n * EDGE * EDGE];
        ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
        bytes
    }

    /// A set of 5 and 3 images whose files are plain, compressed, dotted, and compressed without saying so.
    fn write_set(dir: &Path) {
        fs::write(dir.join("train-images-idx3-ubyte"), idx(&[5, 28, 28], &pixels(5, 1))).unwrap();
        fs::write(dir.join("train-labels-idx1-ubyte.gz"), gz(&idx(&[5], &[0, 1, 2, 3, 9]))).unwrap();
        fs::write(dir.join("t10k-images.idx3-ubyte.gz"), gz(&idx(&[3, 28, 28], &pixels(3, 2)))).unwrap();
        fs::write(dir.join("t10k-labels.idx1-ubyte"), gz(&idx(&[3], &[7, 7, 7]))).unwrap();
    }

    #[test]
    fn all_spellings_are_read() {
        let dir = tempfile::tempdir().unwrap();
        write_set(dir.path());
        let set = mnist(dir.path()).unwrap();
        assert_eq!(set.train.labels(), Some(&[0, 1, 2, 3, 9][..]));
        assert_eq!(set.test.labels(), Some(&[7, 7, 7][..]));
        let mut image = vec![0.0; EDGE * EDGE];
        set.test.gather(Side::U, &[2], &mut image);
        let want = pixels(3, 2);
        for (x, &b) in image.iter().zip(&want[2 * EDGE * EDGE..]) {
            // The inverse of the normalisation, to f32 rounding.
            assert!((x * 0.3081 + 0.1307 - f32::from(b) / 255.0).abs() < 1e-6);
        }
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        for (file, bytes, message) in [
            (
                "train-images-idx3-ubyte",
                idx(&[5, 28, 27], &pixels(5, 1)[..5 * 28 * 27]),
                "images of 28 x 27, expected 28 x 28",
            ),
            ("train-images-idx3-ubyte", idx(&[5, 28, 28], &pixels(4, 1)), "found 3136 bytes of data, expected 3920"),
            ("train-images-idx3-ubyte", idx(&[5, 28, 28], &pixels(6, 1)), "found more bytes of data, expected 3920"),
            ("train-images-idx3-ubyte", idx(&[u32::MAX; 3], &[]), "found 0 bytes of data"),
            ("train-images-idx3-ubyte", idx(&[0, 28, 28], &[]), "found an empty array"),
            ("train-images-idx3-ubyte", b"\0\0\x08".to_vec(), "found a file that cannot be read to its end"),
            ("train-images-idx3-ubyte", idx(&[5], &[0; 5]), "expected [0, 0, 8, 3]"),
            ("t10k-labels.idx1-ubyte", idx(&[2], &[1, 2]), "found 2 labels, expected 3"),
            ("t10k-labels.idx1-ubyte", idx(&[3], &[1, 10, 2]), "found label 10 at 1, expected labels 0 to 9"),
            ("t10k-labels.idx1-ubyte", gz(&idx(&[3], &[1, 1, 2]))[..20].to_vec(), "cannot be read to its end"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write_set(dir.path());
            fs::write(dir.path().join(file), bytes).unwrap();
            let error = mnist(dir.path()).err().expect(message).to_string();
            assert!(error.contains(message) && error.contains(file), "{error}, not: {message}");
        }
        let error = mnist(Path::new("/no/such/folder")).err().unwrap().to_string();
        assert!(error.contains("/no/such/folder: found no file train-images-idx3-ubyte"), "{error}");
    }

    /// A panic would fail it: any file is either read or refused.
    #[test]
    fn corrupt_files_never_panic() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let whole = [idx(&[3], &[1, 2, 3]), gz(&idx(&[3], &[1, 2, 3]))];
        let mut refused = 0;
        for round in 0..4000 {
            let mut bytes = whole[round % 2].clone();
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.next_u32() as u8;
            bytes.truncate(rng.random_range(0..=2 * bytes.len()));
            refused += usize::from(parse::<1>(Path::new("x"), &bytes[..]).is_err());
        }
        assert!(refused > 1000 && refused < 4000, "{refused} of 4000 refused: the corruption tests nothing");
    }
}
