//! A model's weights on a device: matrices as the quantized blocks of the file, vectors as f32.
//!
//! Matrices are packed one behind the other into buffers no larger than what a kernel can bind; one that does not fit is
//! split by rows. They go up in chunks straight from the map, so that at most a few chunks exist twice. Executors on one
//! device that use the same matrices of the same model share them: the device knows who has them, and the last one frees them.
//!
//! On a device that imports pages they lie as in the file: a buffer is some pages of the map, one behind the other, and a piece
//! begins where the file has it, a word's address, which is all that kernels need. Pages that the driver refuses become a buffer
//! that they are copied into, so that pieces stay where they are.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Weak};

use super::device::{Device, lock};
use super::import::Import;
use crate::tape::{Spec, Weight, WeightId, Weights};
use crate::{Error, Result};

/// Between matrices, and behind the last for reads of whole words.
const ALIGN: u64 = 16;
/// Rows that stay together when a matrix is split: what a kernel writes at once.
const UNIT: usize = 4;
/// Most bytes of the file that nobody uses, between matrices in one buffer of pages.
const GAP: usize = 1 << 20;

/// Rows of a matrix that lie in one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub buffer: usize,
    /// Byte address of its first row.
    pub at: u32,
    pub first: usize,
    pub rows: usize,
    pub row_bytes: u32,
}

/// A buffer of matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// Of so many bytes, for copies.
    Own(u64),
    /// Pages of the mapped file, by their addresses, and what of them is used.
    Pages { pages: Range<usize>, used: Range<usize> },
}

impl Place {
    fn bytes(&self) -> u64 {
        match self {
            Place::Own(bytes) => *bytes,
            Place::Pages { pages, .. } => pages.len() as u64,
        }
    }
}

/// What weights take on a device, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Matrices as in the file, norms and biases.
    pub all: u64,
    /// Of them what is read from the pages of the mapped file, and no memory of the device's; as far as a page of it tells what
    /// the driver takes.
    pub imported: u64,
}

/// Matrices on a device, for all who use them.
#[derive(Debug)]
pub(super) struct Resident {
    /// Of which model, and which of its matrices.
    weights: Arc<Weights>,
    used: BTreeSet<WeightId>,
    buffers: Vec<wgpu::Buffer>,
    /// Bytes of those that are pages of the file.
    imported: u64,
}

impl Resident {
    /// What a device has of these matrices, if anybody uses them.
    fn find(all: &[Weak<Resident>], weights: &Arc<Weights>, used: &BTreeSet<WeightId>) -> Option<Arc<Resident>> {
        let is_it = |one: &Arc<Resident>| Arc::ptr_eq(&one.weights, weights) && one.used == *used;
        all.iter().filter_map(Weak::upgrade).find(is_it)
    }

    fn bytes(&self) -> u64 {
        self.buffers.iter().map(wgpu::Buffer::size).sum()
    }

    /// Bytes that it reads from the mapped file.
    pub fn imported_bytes(&self) -> u64 {
        self.imported
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // Groups that bind them would keep them alive.
        self.buffers.iter().for_each(wgpu::Buffer::destroy);
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Uploaded {
    device: Arc<Device>,
    weights: Arc<Weights>,
    used: BTreeSet<WeightId>,
    /// None while they are not needed here.
    resident: Option<Arc<Resident>>,
    places: Vec<Place>,
    pieces: Vec<Vec<Piece>>,
    /// First element of a vector among the constants.
    vectors: Vec<u32>,
    pub constants: wgpu::Buffer,
    /// First slope of ALiBi among the constants.
    pub slopes: Option<u32>,
    /// Grows whenever the buffers may be others.
    pub generation: u64,
}

impl Uploaded {
    /// Brings all vectors up, and of the matrices those that are `used`.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`], rows that no buffer holds.
    pub fn new(
        device: &Arc<Device>,
        spec: &Spec,
        weights: &Arc<Weights>,
        used: &BTreeSet<WeightId>,
    ) -> Result<Uploaded> {
        let (places, pieces) = divide(device, weights, used)?;
        let mut constants = Vec::new();
        let mut vectors = Vec::new();
        for (_, weight) in weights.iter() {
            vectors.push(constants.len() as u32);
            constants.extend_from_slice(weight.vector());
            constants.resize(constants.len().next_multiple_of(ALIGN as usize), 0.0);
        }
        let slopes = spec.alibi.as_ref().map(|slopes| {
            let at = constants.len() as u32;
            constants.extend_from_slice(slopes);
            at
        });
        constants.resize(constants.len().next_multiple_of(ALIGN as usize), 0.0);
        let buffer = device.storage(4 * constants.len() as u64, "norms and biases")?;
        device.upload(&buffer, 0, bytemuck::cast_slice(&constants))?;
        let mut uploaded = Uploaded {
            device: device.clone(),
            weights: weights.clone(),
            used: used.clone(),
            resident: None,
            places,
            pieces,
            vectors,
            constants: buffer,
            slopes,
            generation: 0,
        };
        uploaded.wake()?;
        Ok(uploaded)
    }

    /// What the weights come to take.
    ///
    /// # Errors
    /// Rows that no buffer holds.
    pub fn needs(device: &Device, weights: &Arc<Weights>, used: &BTreeSet<WeightId>) -> Result<WeightBytes> {
        let (places, _) = divide(device, weights, used)?;
        let vector = |len: usize| 4 * (len.next_multiple_of(ALIGN as usize)) as u64;
        let vectors: u64 = weights.iter().map(|(_, w)| vector(w.vector().len())).sum();
        let imported = places.iter().filter(|place| imports(device, weights, place)).map(Place::bytes).sum();
        Ok(WeightBytes { all: places.iter().map(Place::bytes).sum::<u64>() + vectors, imported })
    }

    /// Bytes of the matrices that are `used` which a device has in memory of its own already for others; 0 where it has not.
    pub fn present(device: &Device, weights: &Arc<Weights>, used: &BTreeSet<WeightId>) -> u64 {
        Resident::find(&lock(&device.residents), weights, used).map_or(0, |r| r.bytes() - r.imported)
    }

    /// Does without the matrices until [`Uploaded::wake`]. Gives the bytes of their own memory if that is free now, 0 if others
    /// use them.
    pub fn park(&mut self) -> u64 {
        // Nobody else takes or lets go of them meanwhile.
        let _all = lock(&self.device.residents);
        self.resident.take().and_then(Arc::into_inner).map_or(0, |r| r.bytes() - r.imported)
    }

    /// Brings the matrices up, if they are not there.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`]; they are not there then.
    pub fn wake(&mut self) -> Result<()> {
        if self.resident.is_some() {
            return Ok(());
        }
        self.device.check()?;
        // Who wants the same meanwhile waits for it.
        let mut all = lock(&self.device.residents);
        all.retain(|one| one.strong_count() > 0);
        let resident = match Resident::find(&all, &self.weights, &self.used) {
            Some(resident) => resident,
            None => {
                let resident = Arc::new(self.upload()?);
                all.push(Arc::downgrade(&resident));
                resident
            }
        };
        drop(all);
        self.resident = Some(resident);
        self.generation += 1;
        Ok(())
    }

    fn upload(&self) -> Result<Resident> {
        let (weights, used) = (self.weights.clone(), self.used.clone());
        let mut resident = Resident { weights, used, buffers: Vec::with_capacity(self.places.len()), imported: 0 };
        for place in &self.places {
            let buffer = match place {
                Place::Own(bytes) => self.device.storage(*bytes, "the weights")?,
                Place::Pages { pages, used } => self.pages(pages, used, &mut resident.imported)?,
            };
            resident.buffers.push(buffer);
        }
        for (id, _) in self.weights.iter() {
            for piece in &self.pieces[id.0 as usize] {
                if matches!(self.places[piece.buffer], Place::Pages { .. }) {
                    continue;
                }
                let rows = self.weights.rows(id, piece.first..piece.first + piece.rows);
                self.device.upload(&resident.buffers[piece.buffer], u64::from(piece.at), rows)?;
            }
        }
        Ok(resident)
    }

    /// A buffer of pages of the file: those themselves, which count as imported, or a copy of what of them is used.
    fn pages(&self, pages: &Range<usize>, used: &Range<usize>, imported: &mut u64) -> Result<wgpu::Buffer> {
        let buffer = match &self.device.import {
            Some(import) => import.buffer(&self.device.device, &self.weights, pages),
            None => Err("it does not import pages".into()),
        };
        match buffer {
            Ok(buffer) => {
                *imported += pages.len() as u64;
                Ok(buffer)
            }
            Err(why) => {
                log::warn!("{} gets a copy of {} bytes of weights: {why}", self.device.info().name, used.len());
                let buffer = self.device.storage(pages.len() as u64, "the weights")?;
                let within = |file: &[u8]| Some(used.start.checked_sub(address(file))?..used.end - address(file));
                if let Some(bytes) = self.weights.files().find_map(|file| file.get(within(file)?)) {
                    self.device.upload(&buffer, (used.start - pages.start) as u64, bytes)?;
                }
                Ok(buffer)
            }
        }
    }

    /// The matrices; none while they are not needed here.
    pub fn buffers(&self) -> &[wgpu::Buffer] {
        self.resident.as_ref().map_or(&[], |resident| &resident.buffers)
    }

    /// Where a matrix lies.
    pub fn pieces(&self, id: WeightId) -> &[Piece] {
        &self.pieces[id.0 as usize]
    }

    /// First element of a vector among the constants.
    pub fn vector(&self, id: WeightId) -> u32 {
        self.vectors[id.0 as usize]
    }
}

/// Whether a buffer comes to be pages of the file: the first of them is tried.
fn imports(device: &Device, weights: &Arc<Weights>, place: &Place) -> bool {
    let (Place::Pages { pages, .. }, Some(import)) = (place, &device.import) else { return false };
    import.buffer(&device.device, weights, &(pages.start..pages.start + import.alignment())).is_ok()
}

/// The buffers, and the pieces of every matrix that is `used`.
fn divide(device: &Device, weights: &Weights, used: &BTreeSet<WeightId>) -> Result<(Vec<Place>, Vec<Vec<Piece>>)> {
    let limit = device.binding_bytes;
    let mut pieces = vec![Vec::new(); weights.iter().count()];
    let mut places = match &device.import {
        Some(import) => divide_pages(import, weights, used, limit, &mut pieces),
        None => Vec::new(),
    };
    let mapped = places.len();
    let mut sizes: Vec<u64> = Vec::new();
    for (id, weight) in weights.iter() {
        let mine = &mut pieces[id.0 as usize];
        if !used.contains(&id) || !mine.is_empty() {
            continue;
        }
        let row_bytes = row_bytes(weight) as u64;
        let fits = |end: u64| ((limit.saturating_sub(end + ALIGN)) / row_bytes) as usize;
        let mut first = 0;
        while first < weight.rows {
            let left = weight.rows - first;
            let room = sizes.last().map_or(0, |end| fits(*end));
            let rows = match room >= left {
                true => left,
                false => {
                    sizes.push(0);
                    left.min(fits(0) / UNIT * UNIT)
                }
            };
            let (buffer, Some(end)) = (mapped + sizes.len() - 1, sizes.last_mut()) else { unreachable!() };
            if rows == 0 {
                return Err(Error::Unsupported(format!(
                    "{} rows of {row_bytes} bytes of {} do not fit into a buffer of {limit} bytes of the GPU; use the CPU",
                    UNIT, weight.name
                )));
            }
            mine.push(Piece { buffer, at: *end as u32, first, rows, row_bytes: row_bytes as u32 });
            *end = (*end + rows as u64 * row_bytes).next_multiple_of(ALIGN);
            first += rows;
        }
    }
    if sizes.is_empty() && places.is_empty() {
        // Something to bind.
        sizes.push(ALIGN);
    }
    places.extend(sizes.iter().map(|bytes| Place::Own(bytes + ALIGN)));
    Ok((places, pieces))
}

/// The buffers of pages of the mapped file, and the pieces of the matrices that lie in them. Those have none that lie elsewhere,
/// at a map's very end or in rows of which no buffer holds enough.
fn divide_pages(
    import: &Import,
    weights: &Weights,
    used: &BTreeSet<WeightId>,
    limit: u64,
    pieces: &mut [Vec<Piece>],
) -> Vec<Place> {
    let (page, behind) = (import.alignment(), ALIGN as usize);
    let limit = limit as usize / page * page;
    let mut places: Vec<Place> = Vec::new();
    for file in weights.files() {
        let (begin, whole) = (places.len(), import.pages(file));
        let matrix = |id: &WeightId| (address(weights.data(*id)), *id);
        let mut matrices: Vec<(usize, WeightId)> = used.iter().map(matrix).collect();
        matrices.retain(|(start, id)| {
            let weight = weights.get(*id);
            let end = start + weight.len_bytes() + behind;
            let holds_rows = UNIT * row_bytes(weight) + behind + 2 * page <= limit;
            holds_rows
                && file.as_ptr_range().contains(&weights.data(*id).as_ptr())
                && whole.start <= *start
                && end <= whole.end
        });
        matrices.sort_unstable();
        for (start, id) in matrices {
            let weight = weights.get(id);
            let row_bytes = row_bytes(weight);
            let mut first = 0;
            while first < weight.rows {
                let (start, left) = (start + first * row_bytes, weight.rows - first);
                let end = start + left * row_bytes;
                // Where the pages in use go on, else in a buffer that begins here.
                let goes_on = |place: &&mut Place| match place {
                    Place::Pages { pages, used } => {
                        start <= used.end + GAP && (end + behind).next_multiple_of(page) - pages.start <= limit
                    }
                    Place::Own(_) => false,
                };
                let (from, rows) = match places[begin..].last_mut().filter(goes_on) {
                    Some(Place::Pages { pages, used }) => {
                        used.end = used.end.max(end);
                        pages.end = (used.end + behind).next_multiple_of(page);
                        (pages.start, left)
                    }
                    _ => {
                        let from = start / page * page;
                        let rows = left.min((from + limit - behind - start) / row_bytes);
                        let rows = if rows < left { rows / UNIT * UNIT } else { rows };
                        let end = start + rows * row_bytes;
                        let pages = from..(end + behind).next_multiple_of(page);
                        places.push(Place::Pages { pages, used: start / 4 * 4..end });
                        (from, rows)
                    }
                };
                let buffer = places.len() - 1;
                let at = (start - from) as u32;
                pieces[id.0 as usize].push(Piece { buffer, at, first, rows, row_bytes: row_bytes as u32 });
                first += rows;
            }
        }
    }
    places
}

fn row_bytes(weight: &Weight) -> usize {
    weight.len_bytes() / weight.rows.max(1)
}

fn address(bytes: &[u8]) -> usize {
    bytes.as_ptr() as usize
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;
    use crate::gguf::{Gguf, OpenOptions, Writer};
    use crate::gpu::Limits;
    use crate::gpu::tune::tests::Folder;
    use crate::quant::DType;
    use crate::random::splitmix64;
    use crate::tape::{Gate, WeightRef};

    const WIDTH: usize = 64;
    const VOCAB: usize = 4_000;

    /// A model without layers, whose embedding has rows of 34-byte blocks and whose head lies behind it.
    fn spec() -> Spec {
        let whole = |name: &str| WeightRef { tensor: name.into(), rows: None };
        Spec {
            family: "test".into(),
            vocab: VOCAB,
            width: WIDTH,
            heads: 1,
            kv_heads: 1,
            head_dim: WIDTH,
            ffn: WIDTH,
            context: 16,
            norm_eps: 1e-5,
            embed_scale: 1.0,
            attention_scale: 1.0,
            attention_softcap: None,
            logit_softcap: None,
            alibi: None,
            gate: Gate::Silu,
            ropes: Vec::new(),
            embedding: whole("token_embd.weight"),
            output_norm: whole("output_norm.weight"),
            head: whole("output.weight"),
            layers: Vec::new(),
        }
    }

    fn write(path: &std::path::Path) {
        let tensors = [
            ("token_embd.weight", DType::Q8_0, vec![WIDTH as u64, VOCAB as u64]),
            ("output_norm.weight", DType::F32, vec![WIDTH as u64]),
            ("output.weight", DType::F16, vec![WIDTH as u64, VOCAB as u64]),
        ];
        let mut writer = Writer::new();
        for (name, dtype, shape) in &tensors {
            writer.tensor(name, *dtype, shape).expect("a tensor");
        }
        let mut file = writer.create(path).expect("a file");
        for (i, (name, dtype, shape)) in tensors.iter().enumerate() {
            let rows = shape.get(1).map_or(1, |n| *n as usize);
            let bytes = rows * dtype.row_bytes(WIDTH).expect("whole blocks");
            let random: Vec<u8> = (0..bytes).map(|at| splitmix64(i as u64, at as u64) as u8).collect();
            // A norm has to be numbers.
            file.write(name, if rows > 1 { &random } else { &[0; 4 * WIDTH] }).expect("a tensor");
        }
        file.finish().expect("the file");
    }

    fn open(limits: Limits) -> Arc<Device> {
        Device::open(0, limits).expect("a GPU, or lavapipe in its place")
    }

    /// Whether pages of a file have to be imported: lavapipe does it, others may refuse.
    fn must(device: &Device) -> bool {
        device.info().name.starts_with("llvmpipe")
    }

    fn importing(binding_bytes: Option<u64>) -> Arc<Device> {
        let device = open(Limits { import: true, binding_bytes, ..Limits::default() });
        assert!(device.import.is_some() || !must(&device), "lavapipe imports pages");
        device
    }

    fn matrices(weights: &Weights) -> BTreeSet<WeightId> {
        weights.iter().filter(|(_, w)| w.rows > 1).map(|(id, _)| id).collect()
    }

    /// Whether every row of both matrices is where its piece says.
    fn check(uploaded: &Uploaded) {
        for id in &uploaded.used {
            let mut next = 0;
            for piece in uploaded.pieces(*id) {
                let rows = uploaded.weights.rows(*id, piece.first..piece.first + piece.rows);
                let buffer = &uploaded.buffers()[piece.buffer];
                let end = piece.at as usize + rows.len();
                assert!(
                    piece.first == next
                        && end as u64 + 8 <= buffer.size()
                        && buffer.size() <= uploaded.device.binding_bytes
                );
                let mut there = vec![0; end.next_multiple_of(4)];
                uploaded.device.download(buffer, &mut there).expect("the buffer");
                assert!(there[piece.at as usize..end] == *rows, "{} from row {next}", uploaded.weights.get(*id).name);
                next += piece.rows;
            }
            assert_eq!(next, VOCAB);
        }
    }

    #[test]
    fn gpu_weights_are_those_of_the_file_copied_or_not() {
        let folder = Folder::new("import");
        std::fs::create_dir_all(&folder.0).expect("a folder");
        let path = folder.0.join("model.gguf");
        write(&path);
        let open_with = |copy| {
            let options = OpenOptions { copy, ..OpenOptions::default() };
            let gguf = Arc::new(Gguf::open_with(&path, &options).expect("the model"));
            Arc::new(Weights::resolve(gguf, &spec()).expect("its weights"))
        };
        let (mapped, private) = (open_with(false), open_with(true));
        let heap =
            std::fs::read(&path).map(|bytes| Gguf::from_memory(Arc::new(bytes))).expect("the file").expect("the model");
        let heap = Arc::new(Weights::resolve(Arc::new(heap), &spec()).expect("its weights"));
        let bytes = |weights: &Weights| {
            weights.iter().filter(|(_, w)| w.rows > 1).map(|(_, w)| w.len_bytes() as u64).sum::<u64>()
        };
        let mut refused = importing(None);
        // A driver that has no memory for pages.
        if let Some(import) = &mut Arc::get_mut(&mut refused).expect("one device").import {
            import.coherent = 0;
        }
        for (name, device, weights, imports, buffers) in [
            ("copied", open(Limits::default()), &mapped, false, 1),
            ("imported", importing(None), &mapped, true, 1),
            ("a private copy", importing(None), &private, true, 1),
            ("small bindings", importing(Some(200_000)), &mapped, true, 5),
            ("refused", refused, &mapped, false, 1),
            ("on the heap", importing(None), &heap, false, 1),
        ] {
            let held = device.allocated_bytes().expect("an allocator that counts");
            let told = Uploaded::needs(&device, weights, &matrices(weights)).expect("bytes");
            assert_eq!(device.allocated_bytes(), Some(held), "{name}: an estimate leaves nothing behind");
            let mut uploaded = Uploaded::new(&device, &spec(), weights, &matrices(weights)).expect("the weights");
            let copied = device.allocated_bytes().expect("an allocator that counts") - held;
            assert_eq!(uploaded.buffers().len(), buffers, "{name}");
            let (imported, all) = (device.imported_bytes(), bytes(weights));
            let imports = imports && (must(&device) || imported > 0);
            assert_eq!(told.imported, imported, "{name}: what was told");
            // What they went up through may be there still.
            let own = told.all - told.imported;
            assert!(own <= copied && copied <= 2 * own + (256 << 10), "{name}: {copied} bytes for {own}");
            // What the driver's allocator hands out for norms, at least a block, is far less than the matrices.
            match imports {
                true => assert!(imported >= all && copied < all / 2, "{name}: {imported} and {copied} of {all}"),
                false => assert!(imported == 0 && copied >= all, "{name}: {imported} and {copied} of {all}"),
            }
            check(&uploaded);
            let freed = uploaded.park();
            assert_eq!(freed >= all, !imports, "{name}: {freed}");
            assert_eq!(device.imported_bytes(), 0, "{name}");
            uploaded.wake().expect("the weights again");
            assert_eq!(device.imported_bytes(), imported, "{name}");
            check(&uploaded);
        }
    }

    /// The map lives as long as a buffer does that is its pages, whoever else has let go of both, and no longer.
    #[test]
    fn gpu_buffers_keep_the_map_whose_pages_they_are() {
        let folder = Folder::new("import-life");
        std::fs::create_dir_all(&folder.0).expect("a folder");
        let path = folder.0.join("model.gguf");
        write(&path);
        let device = importing(None);
        let Some(import) = &device.import else { return };
        for round in 0..20 {
            let gguf = Arc::new(Gguf::open(&path).expect("the model"));
            let weights = Arc::new(Weights::resolve(gguf, &spec()).expect("its weights"));
            let (pages, first) =
                weights.files().map(|file| (import.pages(file), file[..64].to_vec())).next().expect("a file");
            for wrong in [pages.start + 4..pages.end, pages.start..pages.end + import.alignment(), pages.end..pages.end]
            {
                assert!(import.buffer(&device.device, &weights, &wrong).is_err());
            }
            let buffer = match import.buffer(&device.device, &weights, &pages) {
                Err(_) if !must(&device) => return,
                buffer => buffer.expect("a buffer"),
            };
            let map = Arc::downgrade(&weights);
            drop(weights);
            assert!(map.strong_count() > 0, "the buffer has the map");
            let mut there = vec![0; first.len()];
            device.download(&buffer, &mut there).expect("the buffer");
            assert_eq!(there, first);
            // Destroyed while somebody could still bind it, or dropped.
            let kept = (round % 2 == 0).then(|| buffer.clone());
            if kept.is_some() {
                buffer.destroy();
            }
            drop(buffer);
            device.wait().expect("the device");
            assert_eq!(map.strong_count(), 0, "round {round}: nobody has the map");
        }
        // A device that is given up meanwhile lets go of it with the last who has it.
        let gguf = Arc::new(Gguf::open(&path).expect("the model"));
        let weights = Arc::new(Weights::resolve(gguf, &spec()).expect("its weights"));
        let uploaded = Uploaded::new(&device, &spec(), &weights, &matrices(&weights)).expect("the weights");
        let map = Arc::downgrade(&weights);
        device.destroy();
        drop((weights, uploaded, device));
        assert_eq!(map.strong_count(), 0, "a lost device has no map");
    }
}
