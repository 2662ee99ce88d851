//! Named f32 tensors on disk, in the safetensors format: models and checkpoints.

use super::{DataError, write_atomic};
use safetensors::{Dtype, SafeTensors};
use std::{collections::BTreeMap, path::Path};

/// Text beside the tensors, by key.
pub type Metadata = BTreeMap<String, String>;

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name, unique in its file.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its elements in C order.
    pub data: Vec<f32>,
}

/// Writes tensors `(name, shape, elements)` and `metadata` to `path`, atomically; the bytes depend on nothing else.
///
/// # Errors
/// [`DataError::Write`] naming `path`.
///
/// # Panics
/// When a shape does not hold its elements or a name occurs twice.
pub fn write(path: &Path, tensors: &[(&str, &[usize], &[f32])], metadata: &Metadata) -> Result<(), DataError> {
    // The header is made here and not by the safetensors crate, whose metadata comes in a hash map's random order.
    let mut entries = vec![format!("\"__metadata__\":{}", json(metadata))];
    let mut at = 0;
    for (i, (name, shape, data)) in tensors.iter().enumerate() {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "elements of {name}, shape {shape:?}");
        assert!(tensors[..i].iter().all(|other| other.0 != *name), "two tensors named {name}");
        let end = at + 4 * data.len();
        entries.push(format!("{}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}", json(name)));
        at = end;
    }
    let mut header = format!("{{{}}}", entries.join(","));
    // The format wants the data aligned to 8 bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    write_atomic(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        for chunk in tensors.iter().flat_map(|(_, _, data)| data.chunks(1 << 13)) {
            w.write_all(&chunk.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    })
}

/// Reads all tensors of `path`, in the order they lie in it, and its metadata.
///
/// # Errors
/// [`DataError::Io`] when it cannot be read, [`DataError::Format`] when it is corrupt, truncated or holds another
/// dtype than f32.
pub fn read(path: &Path) -> Result<(Vec<Tensor>, Metadata), DataError> {
    let bytes = std::fs::read(path).map_err(DataError::io(path))?;
    let refuse = |found: String| DataError::format(path, found, "a safetensors file of f32 tensors");
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| refuse(e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| refuse(e.to_string()))?;
    let mut tensors = Vec::with_capacity(file.len());
    for name in header.offset_keys() {
        let view = file.tensor(&name).map_err(|e| refuse(e.to_string()))?;
        if view.dtype() != Dtype::F32 {
            return Err(refuse(format!("tensor {name} of dtype {:?}", view.dtype())));
        }
        let data = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        tensors.push(Tensor { shape: view.shape().to_vec(), name, data });
    }
    let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok((tensors, metadata))
}

/// Strings and maps of strings always have a JSON form.
fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("text has a JSON form")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn metadata() -> Metadata {
        ["step", "seed", "a \"quoted\" key\n", "é"].iter().map(|k| (k.to_string(), format!("{k} {k}"))).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // Every bit pattern must survive, NaN payloads included; the empty and the scalar shape too.
        let data: Vec<f32> = (0..20_011).map(|_| f32::from_bits(rng.next_u32())).collect();
        let tensors: [(&str, &[usize], &[f32]); 4] = [
            ("z.0.weight", &[20_011], &data),
            ("a \"b\"", &[3, 2], &data[..6]),
            ("scalar", &[], &data[..1]),
            ("none", &[0, 4], &[]),
        ];
        write(&path, &tensors, &metadata()).unwrap();
        let (read, meta) = read(&path).unwrap();
        assert_eq!(meta, metadata());
        assert_eq!(read.len(), tensors.len());
        for (name, shape, data) in tensors {
            let tensor = read.iter().find(|t| t.name == name).unwrap();
            assert_eq!(tensor.shape, shape);
            assert!(tensor.data.iter().map(|x| x.to_bits()).eq(data.iter().map(|x| x.to_bits())));
        }
        // Models are compared by their bytes, so equal contents must give equal files.
        let first = std::fs::read(&path).unwrap();
        for _ in 0..5 {
            write(&path, &tensors, &metadata()).unwrap();
            assert!(std::fs::read(&path).unwrap() == first);
        }
        // The format's own rule: data starts at a multiple of 8.
        assert_eq!(u64::from_le_bytes(first[..8].try_into().unwrap()) % 8, 0);
    }

    /// A panic would fail it: any file is either read or refused.
    #[test]
    fn corrupt_files_never_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        write(&path, &[("w", &[3, 2], &[1.0; 6]), ("b", &[2], &[2.0; 2])], &metadata()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(matches!(read(&path), Err(DataError::Format { .. })), "cut at {len} was read");
        }
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut refused = 0;
        for _ in 0..3000 {
            let mut bytes = whole.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len() - 32);
                bytes[at] = rng.next_u32() as u8;
            }
            std::fs::write(&path, &bytes).unwrap();
            refused += usize::from(read(&path).is_err());
        }
        assert!(refused > 1000, "{refused} of 3000 refused: the corruption tests nothing");
        let missing = read(&folder.path().join("none")).unwrap_err();
        assert!(matches!(missing, DataError::Io { .. }) && missing.to_string().contains("none"));
    }
}
