//! Trials of ways to multiply: whether they are right, and how long they take. Cooperative matrices are young in compilers and
//! drivers, and products of eight bits round; before a device multiplies so for the first time, small products are compared with
//! those of the plain kernel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};

use super::choice::{Form, Shape};
use super::clock::Clock;
use super::device::{Device, DeviceKind, SLOT, lock};
use super::forward::{MatvecOp, MatvecPart, PACKED_ROWS, QuantizeOp, TILE, quantized_stride};
use super::kernel::{Kernel, Tile};
use super::record::{MatmulOp, NONE};
use crate::quant::{self, DType};
use crate::{Error, Result, random};

/// Rows of X, and the matrix: no multiples of tiles, and a last step that is not whole.
const MANY: Shape = Shape { name: "a trial", rows: 80, matrix: (176, 768) };
/// Of kernels for few rows.
const FEW: [Shape; 2] = [Shape { rows: 1, ..MANY }, Shape { rows: 8, ..MANY }];
/// Rows and elements that are made up; more are the same again.
const MADE_ROWS: usize = 80;
/// How long a product is repeated for one measurement, by the device's clock and by the processor's, which sees submissions too.
const BY_DEVICE: Duration = Duration::from_millis(2);
const BY_PROCESSOR: Duration = Duration::from_millis(6);
/// Most repetitions, and most copies of a matrix they go through.
const REPETITIONS: usize = 256;
const COPIES: u32 = 256;

/// Largest difference from the plain kernel's results, in their root mean square.
fn tolerance(form: Form) -> f32 {
    match form {
        // Operands of half precision have eleven bits.
        Form::Cooperative(_) => 1e-2,
        // Eight bits of the largest of 32 numbers: each is off by 0.5 % of their root mean square, as are sums; the
        // largest of thousands of such sums is off by four to five times as much.
        form if form.is_int8() => 4e-2,
        // Sums in another order.
        _ => 1e-4,
    }
}

/// Buffers that products are tried in: rows, copies of a matrix, room for the results.
struct Bed<'a> {
    device: &'a Arc<Device>,
    dtype: DType,
    /// Whether the product is with the matrix, not with its transpose.
    turned: bool,
    arena: wgpu::Buffer,
    packed: wgpu::Buffer,
    weights: wgpu::Buffer,
    run: wgpu::Buffer,
    /// Bound where kernels of products have nothing; nothing may be bound twice that kernels could write.
    others: [wgpu::Buffer; 2],
}

/// Dispatches to be tried, with their descriptions.
#[derive(Default)]
struct Dispatches {
    slots: Vec<u8>,
    list: Vec<(wgpu::ComputePipeline, [u32; 3])>,
}

impl Dispatches {
    fn push<T: Pod>(&mut self, device: &Device, kernel: &Kernel, op: &T, grid: [u32; 3]) -> Result<()> {
        self.list.push((device.pipeline(kernel)?, grid));
        self.slots.extend_from_slice(bytemuck::bytes_of(op));
        self.slots.resize(self.slots.len().next_multiple_of(SLOT as usize), 0);
        Ok(())
    }
}

/// Near enough to a normal number: the sum of a few uniform ones.
fn normal(seed: u64, i: usize) -> f32 {
    (0..4).map(|j| random::uniform(seed, (4 * i + j) as u64) - 0.5).sum::<f64>() as f32
}

/// Elements of a row of X, and of the results.
fn sides(shape: &Shape, turned: bool) -> (u32, u32) {
    let (n, k) = shape.matrix;
    if turned { (n, k) } else { (k, n) }
}

/// Places in the arena: rows from 0 on, then their scales, then the results. Gives the last two, and the end.
fn places(shape: &Shape, turned: bool) -> (u32, u32, u32) {
    let (inner, columns) = sides(shape, turned);
    let scales = shape.rows * inner;
    let out = (scales + shape.rows).next_multiple_of(4);
    (scales, out, out + shape.rows * columns)
}

impl Bed<'_> {
    /// A bed for products of some shapes, whose matrices have at most `weight_bytes` together.
    fn new<'a>(
        device: &'a Arc<Device>,
        dtype: DType,
        turned: bool,
        shapes: &[Shape],
        weight_bytes: usize,
    ) -> Result<Bed<'a>> {
        let most = |of: &dyn Fn(&Shape) -> u32| u64::from(shapes.iter().map(of).max().unwrap_or(0));
        let bytes_of = |s: &Shape| dtype.row_bytes(s.matrix.1 as usize).unwrap_or(0) * s.matrix.0 as usize;
        // Whole rows, and as much of the matrix as is looked at; the rest is the same again.
        let width = shapes.iter().map(|s| s.matrix.1).max().unwrap_or(0) as usize;
        let count = MANY.matrix.0 as usize * MANY.matrix.1 as usize / width.max(1);
        let matrix: Vec<f32> = (0..count * width).map(|i| 0.1 * normal(1, i)).collect();
        let made = quant::quantize(dtype, &matrix)?;
        let bytes = shapes.iter().map(bytes_of).max().unwrap_or(0).max(weight_bytes);
        let mut blocks: Vec<u8> = made.iter().copied().cycle().take(bytes).collect();
        blocks.resize(blocks.len().next_multiple_of(4) + 16, 0);
        let inner = most(&|s| sides(s, turned).0) as usize;
        let x: Vec<f32> = (0..MADE_ROWS * inner)
            // Rows of very different size, as gradients are.
            .map(|i| normal(2, i) * 10f32.powi((i / inner % 9) as i32 - 6))
            .collect();
        let rows = most(&|s| s.rows) as usize;
        let x: Vec<f32> = x.iter().copied().cycle().take(rows * inner).collect();

        let storage = |bytes: u64| device.storage(bytes, "a trial");
        let bed = Bed {
            device,
            dtype,
            turned,
            arena: storage(4 * most(&|s| places(s, turned).2))?,
            packed: storage(2 * inner.next_multiple_of(32) as u64 * rows.next_multiple_of(PACKED_ROWS) as u64)?,
            weights: storage(blocks.len() as u64)?,
            run: storage(SLOT)?,
            others: [storage(SLOT)?, storage(SLOT)?],
        };
        device.queue.write_buffer(&bed.arena, 0, bytemuck::cast_slice(&x));
        device.queue.write_buffer(&bed.weights, 0, &blocks);
        Ok(bed)
    }

    /// Appends what a product takes, with the matrix that begins at some byte.
    fn product(&self, to: &mut Dispatches, form: Form, shape: &Shape, weight: u32) -> Result<()> {
        let (device, dtype, turned) = (self.device, self.dtype, self.turned);
        let ((inner, columns), (scales, out, _)) = (sides(shape, turned), places(shape, turned));
        let row_bytes = dtype.row_bytes(shape.matrix.1 as usize).unwrap_or(0) as u32;
        let one_a_row = [1, 1, shape.rows];
        if form.is_int8() {
            let op =
                QuantizeOp { x: 0, stride: inner, k: inner, packed: 0, norm: NONE, eps: 0.0, ..QuantizeOp::zeroed() };
            to.push(device, &Kernel::Quantize { normed: false }, &op, one_a_row)?;
        }
        let op = MatmulOp {
            x_stride: inner,
            k: inner,
            weight,
            row_bytes,
            columns,
            out,
            out_stride: columns,
            bias: NONE,
            residual: NONE,
            scale: 1.0,
            scales,
            ..MatmulOp::zeroed()
        };
        let tiles = |rows, across| [columns.div_ceil(across), 1, shape.rows.div_ceil(rows)];
        match form {
            Form::Tile if turned => to.push(device, &Kernel::MatmulTurned(dtype), &op, tiles(TILE, TILE)),
            Form::Tile => to.push(device, &Kernel::Matmul(dtype), &op, tiles(TILE, TILE)),
            Form::TileInt8 => {
                let op = MatmulOp { x_stride: quantized_stride(inner), ..op };
                to.push(device, &Kernel::MatmulInt8(dtype), &op, tiles(TILE, TILE))
            }
            Form::Cooperative(tile) => {
                let padded = inner.next_multiple_of(32);
                to.push(device, &Kernel::Pack, &[0, inner, inner, padded, scales, 0, 0, 0], one_a_row)?;
                let op = MatmulOp { x_stride: padded / 4, ..op };
                let kernel = Kernel::Cooperative { dtype, turned, tile };
                to.push(device, &kernel, &op, tiles(tile.rows, tile.columns))
            }
            Form::Matvec(lanes) => {
                let mut op = MatvecOp { k: inner, parts: 1, norm: NONE, residual: NONE, ..MatvecOp::zeroed() };
                op.part[0] = MatvecPart {
                    weight,
                    row_bytes,
                    rows: columns,
                    out,
                    bias: NONE,
                    stride: columns,
                    ..MatvecPart::zeroed()
                };
                let kernel = lanes.kernel(vec![dtype], shape.rows, false, None);
                to.push(device, &kernel, &op, [columns.div_ceil(lanes.threads / lanes.lanes), 1, 1])
            }
        }
    }

    /// Encodes `count` of some dispatches in one pass, from number `first` on and round and round.
    fn encode(
        &self,
        dispatches: &Dispatches,
        shape: &Shape,
        (first, count): (usize, usize),
        timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<wgpu::CommandEncoder> {
        let device = self.device;
        device.queue.write_buffer(&self.run, 0, bytemuck::cast_slice(&[shape.rows, shape.rows, 1]));
        let uniforms = device.descriptions(&dispatches.slots)?;
        let Bed { run, weights, arena, packed, others: [cache, gradients], .. } = self;
        let group = device.bind(&uniforms, [run, run, weights, arena, cache, run, gradients, packed]);
        let mut encoder = device.encoder();
        let mut pass =
            encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes: timestamps });
        for (i, (pipeline, [x, y, z])) in dispatches.list.iter().enumerate().cycle().skip(first).take(count) {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, &group, &[i as u32 * SLOT as u32]);
            pass.dispatch_workgroups(*x, *y, *z);
        }
        drop(pass);
        Ok(encoder)
    }

    /// What a way to multiply makes of the rows and the first matrix.
    fn results(&self, form: Form, shape: &Shape) -> Result<Vec<f32>> {
        let mut dispatches = Dispatches::default();
        self.product(&mut dispatches, form, shape, 0)?;
        let (_, out, end) = places(shape, self.turned);
        let bytes = 4 * u64::from(end - out);
        let staging = self.device.staging(bytes)?;
        let mut encoder = self.encode(&dispatches, shape, (0, dispatches.list.len()), None)?;
        encoder.copy_buffer_to_buffer(&self.arena, 4 * u64::from(out), &staging, 0, bytes);
        // What is left of another's results is no result of this one's.
        encoder.clear_buffer(&self.arena, 4 * u64::from(out), Some(bytes));
        self.device.queue.submit([encoder.finish()]);
        let mut values = vec![0f32; bytes as usize / 4];
        self.device.read(&staging, bytes, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// A product with each of as many copies of the matrix as there are, to be timed.
    fn products(&self, form: Form, shape: &Shape) -> Result<Products> {
        let row_bytes = self.dtype.row_bytes(shape.matrix.1 as usize).unwrap_or(0) as u64;
        let matrix = row_bytes * u64::from(shape.matrix.0);
        let copies = (self.weights.size() / matrix.max(1)).clamp(1, u64::from(COPIES)) as u32;
        let mut dispatches = Dispatches::default();
        for copy in 0..copies {
            self.product(&mut dispatches, form, shape, copy * matrix as u32)?;
        }
        Products { shape: *shape, dispatches, copies: copies as usize, next: 0, repetitions: 1 }.calibrated(self)
    }
}

/// Products of one form and shape, one after the other with copies of a matrix.
struct Products {
    shape: Shape,
    dispatches: Dispatches,
    copies: usize,
    /// The copy that is next: no measurement begins with matrices that a cache still has from the one before.
    next: usize,
    repetitions: usize,
}

impl Products {
    /// With as many repetitions to a measurement as its clock needs.
    fn calibrated(mut self, bed: &Bed<'_>) -> Result<Products> {
        let wanted = if bed.device.abilities.timestamps { BY_DEVICE } else { BY_PROCESSOR }.as_secs_f64();
        let first = self.measure(bed)?;
        // The first time may be the compiler's.
        let once = if first > 10.0 * wanted { first } else { self.measure(bed)? };
        self.repetitions = ((wanted / once.max(1e-9)) as usize).clamp(1, REPETITIONS);
        Ok(self)
    }

    /// Seconds of a product, with what it takes to make the rows ready.
    fn measure(&mut self, bed: &Bed<'_>) -> Result<f64> {
        let device = bed.device;
        let each = self.dispatches.list.len() / self.copies;
        let clock = match device.abilities.timestamps {
            true => Some(Clock::new(device, 1)?),
            false => None,
        };
        let writes = clock.as_ref().map(|clock| clock.writes(0));
        let range = (self.next * each, self.repetitions * each);
        let encoder = bed.encode(&self.dispatches, &self.shape, range, writes)?;
        let begun = Instant::now();
        let by_device = match &clock {
            Some(clock) => clock.submit(device, encoder, 1)?.next(),
            None => {
                device.queue.submit([encoder.finish()]);
                device.wait()?;
                None
            }
        };
        self.next = (self.next + self.repetitions) % self.copies;
        // A clock that stands still is none.
        let time = by_device.filter(|time| !time.is_zero()).unwrap_or_else(|| begun.elapsed());
        Ok(time.as_secs_f64() / self.repetitions as f64)
    }
}

/// The largest difference of any result from the plain kernel's, in the root mean square of its row of results.
fn worst(ours: &[f32], wanted: &[f32], columns: usize) -> f32 {
    let rows = ours.chunks_exact(columns).zip(wanted.chunks_exact(columns)).map(|(ours, wanted)| {
        let size = (wanted.iter().map(|v| v * v).sum::<f32>() / wanted.len() as f32).sqrt();
        let far = ours.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, largest);
        far / size
    });
    rows.fold(0.0, largest)
}

/// The larger of two numbers, infinity if one is no number.
fn largest(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::INFINITY } else { a.max(b) }
}

/// How far some ways to multiply are from the plain kernel, each with what it may be.
fn compare(device: &Arc<Device>, dtype: DType, turned: bool, forms: &[Form]) -> Result<Vec<(f32, f32)>> {
    let bed = Bed::new(device, dtype, turned, &[MANY], 0)?;
    let columns = |shape: &Shape| sides(shape, turned).1 as usize;
    forms
        .iter()
        .map(|form| {
            let shapes: &[Shape] = if matches!(form, Form::Matvec(_)) { &FEW } else { &[MANY] };
            let mut far = 0.0;
            for shape in shapes {
                let (ours, wanted) = (bed.results(*form, shape)?, bed.results(Form::Tile, shape)?);
                far = largest(far, worst(&ours, &wanted, columns(shape)));
            }
            Ok((far, tolerance(*form)))
        })
        .collect()
}

/// How far a way to multiply is from the plain kernel, with what it may be.
pub(super) fn distance(device: &Arc<Device>, dtype: DType, form: Form) -> Result<(f32, f32)> {
    compare(device, dtype, false, &[form]).map(|all| all[0])
}

/// Times products of one type, of some shapes.
pub(super) struct Stopwatch<'a> {
    bed: Bed<'a>,
    shapes: Vec<Shape>,
}

impl Stopwatch<'_> {
    pub fn new(device: &Arc<Device>, dtype: DType, shapes: Vec<Shape>) -> Result<Stopwatch<'_>> {
        // More than the caches of a card hold, where there is room for it.
        let bytes = match device.info().kind {
            DeviceKind::Discrete => 64 << 20,
            DeviceKind::Software => 0,
            _ => 16 << 20,
        };
        let bytes = bytes.min(device.binding_bytes as usize / 2);
        Ok(Stopwatch { bed: Bed::new(device, dtype, false, &shapes, bytes)?, shapes })
    }

    /// A candidate that is ready to be timed.
    pub fn ready(&self, form: Form) -> Result<Racer<'_>> {
        let products = self.shapes.iter().map(|shape| self.bed.products(form, shape)).collect::<Result<Vec<_>>>()?;
        Ok(Racer { bed: &self.bed, seconds: vec![f64::INFINITY; products.len()], products })
    }
}

/// A candidate whose times are taken in turns with the others', so that a device that changes its clock does so for all.
pub(super) struct Racer<'a> {
    bed: &'a Bed<'a>,
    products: Vec<Products>,
    /// The least of each shape so far.
    pub seconds: Vec<f64>,
}

impl Racer<'_> {
    /// Takes the time of each shape once more.
    pub fn turn(&mut self) -> Result<()> {
        for (products, least) in self.products.iter_mut().zip(&mut self.seconds) {
            *least = least.min(products.measure(self.bed)?);
        }
        Ok(())
    }
}

impl Device {
    /// Whether products with matrices of this type are made with cooperative matrices: the device has them, and a trial went
    /// well. The answer is kept.
    pub(super) fn cooperative(self: &Arc<Self>, dtype: DType, turned: bool) -> bool {
        if !self.abilities.cooperative {
            return false;
        }
        let known = lock(&self.trials).get(&(dtype, turned)).copied();
        known.unwrap_or_else(|| {
            let forms = [Form::Cooperative(Tile::SMALL), Form::Cooperative(Tile::LARGE)];
            let verdict = compare(self, dtype, turned, &forms).map(|all| all.iter().all(|(far, may)| far < may));
            if !matches!(verdict, Ok(true)) {
                let why = verdict.as_ref().err().map_or("results are wrong".into(), Error::to_string);
                log::warn!("{} multiplies {dtype} without cooperative matrices: {why}", self.info().name);
            }
            let good = verdict.unwrap_or(false);
            lock(&self.trials).insert((dtype, turned), good);
            good
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Limits;
    use crate::gpu::choice::{Family, Lanes};
    use crate::gpu::device::Abilities;
    use crate::gpu::kernel::has_int8;

    fn open(limits: Limits) -> Arc<Device> {
        Device::open(0, limits).expect("a GPU, or lavapipe in its place")
    }

    /// The judge is right: the plain kernel agrees with itself, and not with what makes something else.
    #[test]
    fn trials_tell_right_from_wrong() {
        let device = open(Limits::default());
        for dtype in [DType::F16, DType::Q8_0, DType::Q4_K] {
            for turned in [false, true] {
                let same = compare(&device, dtype, turned, &[Form::Tile]).expect("a trial");
                assert_eq!(same[0].0, 0.0, "{dtype} {turned}");
            }
        }
        // The same matrix in four bits and in sixteen.
        let results = |dtype| {
            let bed = Bed::new(&device, dtype, false, &[MANY], 0).expect("a bed");
            bed.results(Form::Tile, &MANY).expect("results")
        };
        let far = worst(&results(DType::Q4_0), &results(DType::F16), MANY.matrix.0 as usize);
        assert!(far > tolerance(Form::TileInt8), "Q4_0 is no F16: {far}");
        assert!(worst(&[1.0, f32::NAN], &[1.0, 1.0], 2).is_infinite());
        // A device without cooperative matrices is not asked.
        let Abilities { cooperative, .. } = device.abilities;
        assert!(cooperative || !device.cooperative(DType::Q8_0, false));
    }

    /// Products of eight bits, of every type that has them, with all checks of indices and without: they round, and no more.
    #[test]
    fn products_of_eight_bits_are_nearly_the_plain_kernels() {
        let lanes = Lanes { threads: 64, lanes: 8, subgroup: false, int8: true };
        let judge = |device: &Arc<Device>, dtype| {
            for form in [Form::TileInt8, Form::Matvec(lanes)] {
                let (far, may) = distance(device, dtype, form).expect("a trial");
                assert!(far < may && far > 1e-3, "{dtype}, {form}: {far}");
            }
        };
        let (whole, baseline) = (open(Limits::default()), open(Limits { baseline: true, ..Limits::default() }));
        DType::WEIGHTS.into_iter().filter(|dtype| has_int8(*dtype)).for_each(|dtype| judge(&whole, dtype));
        [DType::Q4_K, DType::Q6_K, DType::Q8_0].into_iter().for_each(|dtype| judge(&baseline, dtype));
    }

    /// Every way to divide a matrix among invocations.
    #[test]
    fn lanes_agree() {
        let device = open(Limits::default());
        for dtype in [DType::Q4_K, DType::F16] {
            let forms = device.candidates(Family::Matvec, dtype);
            assert!(forms.len() >= 5, "{forms:?}");
            for (form, (far, may)) in forms.iter().zip(compare(&device, dtype, false, &forms).expect("trials")) {
                assert!(far < may, "{dtype}, {form}: {far}");
            }
        }
    }
}
