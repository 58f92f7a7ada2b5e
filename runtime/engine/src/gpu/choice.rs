//! Ways to multiply rows with a matrix of the model, and which is taken: a fixed one, or the quickest that was found (`tune`).

use std::fmt;
use std::sync::Arc;

use super::device::{Device, DeviceKind, lock};
use super::kernel::{Kernel, Tile, has_int8};
use crate::quant::DType;
use crate::tape::Gate;

/// Workgroups of the largest tile that keep a large card busy.
const LARGE_TILES: u32 = 256;
/// Weights from which on a matrix is large for a few rows.
const LARGE_MATRIX: u64 = 2 << 20;
/// How much quicker than today's fixed choice another must be, for clocks are no better; and how much quicker what rounds to
/// eight bits, for that is the price.
const LEAD: f64 = 1.03;
const LEAD_OF_INT8: f64 = 1.1;

/// Seconds a dispatch may hold the device: screens are drawn in between.
pub(super) const LONGEST: f64 = 0.025;
/// Columns that a dispatch has at least, and in multiples of which long ones are divided: those of the largest tile.
pub(super) const FEWEST_COLUMNS: u32 = Tile::LARGE.columns;

/// What kernels compete for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// Up to eight rows, in decoding.
    Matvec,
    /// Many.
    Matmul,
}

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Family::Matvec => "few rows",
            Family::Matmul => "many rows",
        }
    }
}

/// A way to multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    Matvec(Lanes),
    /// Tiles in single precision.
    Tile,
    /// Tiles of eight-bit products.
    TileInt8,
    Cooperative(Tile),
}

/// How invocations share the rows of a matrix that a few rows are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lanes {
    /// Of a workgroup.
    pub threads: u32,
    /// Of them, to a row: at most a quarter, for results are written by four.
    pub lanes: u32,
    /// Whether the lanes are a subgroup.
    pub subgroup: bool,
    /// Products of eight bits.
    pub int8: bool,
}

impl Lanes {
    const fn new(threads: u32, lanes: u32) -> Lanes {
        Lanes { threads, lanes, subgroup: false, int8: false }
    }

    /// The kernel for up to `rows` rows, which are normed on the way or when they are quantized.
    pub fn kernel(self, types: Vec<DType>, rows: u32, normed: bool, gate: Option<Gate>) -> Kernel {
        let Lanes { threads, lanes, subgroup, int8 } = self;
        Kernel::Matvec { types, rows, normed: normed && !int8, gate, threads, lanes, subgroup, int8 }
    }

    /// Bytes of workgroup memory for so many sums an invocation.
    fn bytes(self, sums: u32) -> u32 {
        4 * self.threads * sums
    }
}

impl Form {
    /// Whether it rounds the rows to eight bits.
    pub fn is_int8(self) -> bool {
        matches!(self, Form::TileInt8 | Form::Matvec(Lanes { int8: true, .. }))
    }

    /// Whether its products are those of single precision.
    fn is_single(self) -> bool {
        matches!(self, Form::Tile | Form::Matvec(Lanes { int8: false, .. }))
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Form::Matvec(Lanes { threads, lanes, subgroup, int8 }) => {
                write!(f, "{lanes} of {threads}")?;
                f.write_str(if *subgroup { ", subgroup" } else { "" })?;
                f.write_str(if *int8 { ", int8" } else { "" })
            }
            Form::Tile => f.write_str("tile"),
            Form::TileInt8 => f.write_str("tile, int8"),
            Form::Cooperative(tile) => write!(f, "cooperative, {} × {}", tile.rows, tile.columns),
        }
    }
}

/// Shapes that are treated alike, and the one that is timed for all: rows, and the matrix `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub name: &'static str,
    pub rows: u32,
    pub matrix: (u32, u32),
}

const fn shape(name: &'static str, rows: u32, matrix: (u32, u32)) -> Shape {
    Shape { name, rows, matrix }
}

/// By [`matvec_shape`].
const MATVEC: [Shape; 4] = [
    shape("one row, small matrix", 1, (768, 768)),
    shape("one row, large matrix", 1, (4_096, 2_048)),
    shape("eight rows, small matrix", 8, (768, 768)),
    shape("eight rows, large matrix", 8, (4_096, 2_048)),
];
/// By [`matmul_shape`].
const MATMUL: [Shape; 3] = [
    shape("few tiles", 512, (768, 768)),
    shape("some tiles", 512, (4_096, 768)),
    shape("many tiles", 512, (8_192, 768)),
];

/// The shapes of a family; smaller ones where a processor has to compute them.
pub(super) fn shapes(family: Family, kind: DeviceKind) -> Vec<Shape> {
    let smaller = |s: &Shape| match family {
        Family::Matvec => Shape { matrix: (s.matrix.0 / 2, s.matrix.1), ..*s },
        Family::Matmul => Shape { rows: 64, matrix: (s.matrix.0 / 16, s.matrix.1), ..*s },
    };
    let shapes: &[Shape] = match family {
        Family::Matvec => &MATVEC,
        Family::Matmul => &MATMUL,
    };
    shapes.iter().map(|s| if kind == DeviceKind::Software { smaller(s) } else { *s }).collect()
}

/// Index of the shape of up to `rows` rows times so many weights.
fn matvec_shape(rows: u32, weights: u64) -> usize {
    2 * usize::from(rows > 1) + usize::from(weights >= LARGE_MATRIX)
}

/// The tile of a product of many rows with cooperative matrices where nothing was tuned.
pub(super) fn usual_cooperative(rows: u32, columns: u32) -> Tile {
    if large_tiles(rows, columns) >= LARGE_TILES { Tile::LARGE } else { Tile::SMALL }
}

fn large_tiles(rows: u32, columns: u32) -> u32 {
    rows.div_ceil(Tile::LARGE.rows) * columns.div_ceil(Tile::LARGE.columns)
}

/// Multiply-adds of a product of `rows` rows and a matrix `[n, k]`.
pub(super) fn matmul_work(rows: u32, n: u32, k: u32) -> f64 {
    f64::from(rows) * f64::from(n) * f64::from(k)
}

/// Index of the shape of up to `rows` rows times a matrix of `columns` rows.
fn matmul_shape(rows: u32, columns: u32) -> usize {
    match large_tiles(rows, columns) {
        0..64 => 0,
        64..LARGE_TILES => 1,
        _ => 2,
    }
}

/// A candidate, and what came out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Timed {
    pub form: Form,
    /// Seconds of a product of each shape; none where it is not used.
    pub seconds: Vec<f64>,
    /// Largest difference from the plain kernel, in root mean squares of its results.
    pub worst: f32,
    /// Why it is not used.
    pub note: String,
}

/// What was found for a family and a type; nothing where nothing was timed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Choices {
    pub candidates: Vec<Timed>,
}

impl Choices {
    /// The quickest of those that may be taken for a shape.
    fn best(&self, shape: usize, usual: Form, may: impl Fn(Form) -> bool) -> Option<Form> {
        let handicap = |form: Form| match form {
            form if form == usual => 1.0,
            form if form.is_int8() => LEAD_OF_INT8,
            _ => LEAD,
        };
        let timed = self.candidates.iter().filter(|c| may(c.form));
        let times = timed.filter_map(|c| Some((c.form, c.seconds.get(shape)? * handicap(c.form))));
        times.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(form, _)| form)
    }

    /// Columns of a product of `rows` rows and a matrix `[columns, k]` that take no longer than [`LONGEST`], by the time of the
    /// shape that stands for it; all where that is not known.
    fn columns_at_once(&self, form: Form, all: &[Shape], (rows, columns, k): (u32, u32, u32)) -> u32 {
        let index = matmul_shape(rows, columns);
        let seconds = self.candidates.iter().find(|c| c.form == form).and_then(|c| c.seconds.get(index));
        let (Some(seconds), Some(shape)) = (seconds, all.get(index)) else { return columns };
        let column = seconds / matmul_work(shape.rows, shape.matrix.0, shape.matrix.1) * matmul_work(rows, 1, k);
        if column * f64::from(columns) <= LONGEST {
            return columns;
        }
        ((LONGEST / column) as u32 / FEWEST_COLUMNS * FEWEST_COLUMNS).max(FEWEST_COLUMNS)
    }

    /// Whether products of eight bits were found to be right.
    fn int8(&self) -> bool {
        self.candidates.iter().any(|c| c.form.is_int8() && !c.seconds.is_empty())
    }
}

/// What was found for a candidate and a shape, for people.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TunedKernel {
    /// Few rows or many.
    pub family: &'static str,
    /// Type of the matrix.
    pub weights: &'static str,
    /// Shapes it is about.
    pub shape: &'static str,
    /// The candidate.
    pub kernel: String,
    /// Time of a product, in microseconds; none where the candidate is not used.
    pub microseconds: Option<f64>,
    /// Largest difference from the plain kernel, in root mean squares of its results.
    pub worst: f32,
    /// What is taken without tuning.
    pub default: bool,
    /// What is taken, unless single precision is asked for.
    pub chosen: bool,
    /// Why the candidate is not used.
    pub note: String,
}

/// What products are for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demands {
    /// They are to be those of single precision.
    pub exact: bool,
    /// Rows may be rounded to eight bits.
    pub int8: bool,
}

impl Demands {
    fn allow(self, form: Form) -> bool {
        form.is_single() || !self.exact && (self.int8 || !form.is_int8())
    }
}

impl Device {
    /// How a few rows are multiplied where nothing was tuned.
    fn usual_lanes(&self) -> Lanes {
        // A software driver runs an invocation per lane of a vector: rows side by side suit it best.
        match self.info().kind {
            DeviceKind::Software => Lanes::new(64, 1),
            _ => Lanes { subgroup: self.abilities.subgroups_of_32, ..Lanes::new(128, 32) },
        }
    }

    /// How many rows are multiplied where nothing was tuned.
    fn usual_tile(self: &Arc<Self>, dtype: DType, rows: u32, columns: u32) -> Form {
        match self.cooperative(dtype, false) {
            false => Form::Tile,
            true => Form::Cooperative(usual_cooperative(rows, columns)),
        }
    }

    fn usual(self: &Arc<Self>, family: Family, dtype: DType, shape: Shape) -> Form {
        match family {
            Family::Matvec => Form::Matvec(self.usual_lanes()),
            Family::Matmul => self.usual_tile(dtype, shape.rows, shape.matrix.0),
        }
    }

    /// What may be taken for a family and a type, today's fixed choices first.
    pub(super) fn candidates(self: &Arc<Self>, family: Family, dtype: DType) -> Vec<Form> {
        let mut forms = match family {
            Family::Matvec => {
                let usual = self.usual_lanes();
                let subgroup = self.abilities.subgroups_of_32;
                let eight = |lanes: Lanes| Lanes { int8: true, ..lanes };
                let mut all = vec![
                    usual,
                    eight(usual),
                    Lanes::new(64, 8),
                    Lanes { subgroup, ..Lanes::new(256, 32) },
                    eight(Lanes::new(64, 8)),
                    Lanes::new(64, 16),
                    Lanes::new(64, 1),
                    Lanes::new(128, 32),
                ];
                all.retain(|lanes| lanes.bytes(8) <= self.abilities.workgroup_bytes);
                all.into_iter().map(Form::Matvec).collect()
            }
            Family::Matmul if self.cooperative(dtype, false) => {
                vec![Form::Cooperative(Tile::SMALL), Form::Cooperative(Tile::LARGE), Form::TileInt8, Form::Tile]
            }
            Family::Matmul => vec![Form::Tile, Form::TileInt8],
        };
        forms.retain(|form| !form.is_int8() || has_int8(dtype));
        let mut seen = std::collections::HashSet::new();
        forms.retain(|form| seen.insert(*form));
        forms
    }

    fn choices(&self, family: Family, dtype: DType) -> Option<Arc<Choices>> {
        lock(&self.choices).get(&(family, dtype)).cloned()
    }

    /// Whether rows may be rounded to eight bits for matrices of all these types.
    fn all_int8(&self, family: Family, types: &[DType]) -> bool {
        types.iter().all(|dtype| self.choices(family, *dtype).is_some_and(|c| c.int8()))
    }

    /// How up to `rows` rows are multiplied with matrices of some types, of so many weights together, the most of them of
    /// type `most`; an invocation has `sums` sums for each row.
    pub(super) fn lanes(
        &self,
        demands: Demands,
        (types, most): (&[DType], DType),
        rows: u32,
        weights: u64,
        sums: u32,
    ) -> Lanes {
        let usual = self.usual_lanes();
        let Some(choices) = self.choices(Family::Matvec, most) else { return usual };
        let demands = Demands { int8: demands.int8 && self.all_int8(Family::Matvec, types), ..demands };
        let fits = |lanes: Lanes| lanes.bytes(sums * rows) <= self.abilities.workgroup_bytes;
        let may = |form| demands.allow(form) && matches!(form, Form::Matvec(lanes) if fits(lanes));
        match choices.best(matvec_shape(rows, weights), Form::Matvec(usual), may) {
            Some(Form::Matvec(lanes)) => lanes,
            _ => usual,
        }
    }

    /// How up to `rows` rows are multiplied with a matrix `[columns, k]`, in a way that `may` be taken.
    pub(super) fn tile(
        self: &Arc<Self>,
        demands: Demands,
        dtype: DType,
        (rows, columns): (u32, u32),
        may: impl Fn(Form) -> bool,
    ) -> Form {
        let usual = if demands.exact { Form::Tile } else { self.usual_tile(dtype, rows, columns) };
        let usual = if may(usual) { usual } else { Form::Tile };
        let choices = self.choices(Family::Matmul, dtype).unwrap_or_default();
        let may = |form| demands.allow(form) && may(form);
        choices.best(matmul_shape(rows, columns), usual, may).unwrap_or(usual)
    }

    /// Columns of a product of up to `rows` rows and a matrix `[columns, k]` that one dispatch is to compute.
    pub(super) fn columns_at_once(&self, dtype: DType, form: Form, (rows, columns, k): (u32, u32, u32)) -> u32 {
        let all = shapes(Family::Matmul, self.info().kind);
        match self.choices(Family::Matmul, dtype).filter(|c| !c.candidates.is_empty()) {
            Some(choices) => choices.columns_at_once(form, &all, (rows, columns, k)),
            None => self.columns_of(matmul_work(rows, 1, k), columns, FEWEST_COLUMNS),
        }
    }

    /// Whether matrices of all these types can be multiplied in the way of `form`.
    pub(super) fn suits(self: &Arc<Self>, form: Form, types: &[DType]) -> bool {
        match form {
            Form::Cooperative(_) => types.iter().all(|dtype| self.cooperative(*dtype, false)),
            Form::TileInt8 => self.all_int8(Family::Matmul, types),
            _ => true,
        }
    }

    /// What was found by tuning, family by family and type by type; empty where nothing was timed.
    pub fn tuned(self: &Arc<Self>) -> Vec<TunedKernel> {
        let mut all: Vec<_> = lock(&self.choices).iter().map(|(key, choices)| (*key, choices.clone())).collect();
        all.sort_by_key(|((family, dtype), _)| (family.name(), dtype.name()));
        let mut rows = Vec::new();
        for ((family, dtype), choices) in all {
            for (i, shape) in shapes(family, self.info().kind).into_iter().enumerate() {
                let usual = self.usual(family, dtype, shape);
                let best = choices.best(i, usual, |_| true);
                rows.extend(choices.candidates.iter().map(|c| TunedKernel {
                    family: family.name(),
                    weights: dtype.name(),
                    shape: shape.name,
                    kernel: c.form.to_string(),
                    microseconds: c.seconds.get(i).map(|s| s * 1e6),
                    worst: c.worst,
                    default: c.form == usual,
                    chosen: Some(c.form) == best,
                    note: c.note.clone(),
                }));
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noise changes nothing, rounding to eight bits must be worth it, and whoever wants single precision has it.
    #[test]
    fn the_quickest_that_may_be_taken_is() {
        let usual = Form::Cooperative(Tile::SMALL);
        let choices = |tile: f64, int8: f64| {
            let timed = |form, seconds| Timed { form, seconds: vec![seconds], worst: 0.0, note: String::new() };
            let wrong = Timed { form: Form::Cooperative(Tile::LARGE), seconds: vec![], worst: 1.0, note: "".into() };
            Choices { candidates: vec![timed(usual, 1.0), timed(Form::Tile, tile), timed(Form::TileInt8, int8), wrong] }
        };
        let any = Demands { exact: false, int8: true };
        let best = |choices: &Choices, demands: Demands| choices.best(0, usual, |form| demands.allow(form));
        assert_eq!(best(&choices(0.98, 0.95), any), Some(usual));
        assert_eq!(best(&choices(0.96, 0.95), any), Some(Form::Tile));
        assert_eq!(best(&choices(0.96, 0.8), any), Some(Form::TileInt8));
        assert_eq!(best(&choices(0.96, 0.8), Demands { int8: false, ..any }), Some(Form::Tile));
        assert_eq!(best(&choices(2.0, 0.8), Demands { exact: true, ..any }), Some(Form::Tile));
        assert_eq!(best(&Choices::default(), any), None);
        assert!(choices(1.0, 1.0).int8() && !Choices::default().int8());
    }

    /// 512 rows times 768 × 768 in 1 ms: half the rows and 65,536 columns take 43 times as long.
    #[test]
    fn long_products_are_divided() {
        let timed = |seconds| Timed { form: Form::Tile, seconds, worst: 0.0, note: String::new() };
        let all = shapes(Family::Matmul, DeviceKind::Discrete);
        let choices = Choices { candidates: vec![timed(vec![1e-3, 5.4e-3, 10.67e-3])] };
        let columns = |sizes| choices.columns_at_once(Form::Tile, &all, sizes);
        assert_eq!(columns((512, 768, 768)), 768);
        assert_eq!(columns((256, 65_536, 768)), 38_272);
        assert_eq!(columns((65_536, 65_536, 768)), FEWEST_COLUMNS);
        assert_eq!(choices.columns_at_once(Form::TileInt8, &all, (256, 65_536, 768)), 65_536);
        let nothing = Choices::default();
        assert_eq!(nothing.columns_at_once(Form::Tile, &all, (256, 65_536, 768)), 65_536);
    }

    #[test]
    fn shapes_are_found_by_rows_and_matrix() {
        let matvec = [(1, 576 * 576), (1, 49_152 * 576), (4, 576 * 1_536), (8, 4_096 * 4_096)];
        assert_eq!(matvec.map(|(rows, weights)| matvec_shape(rows, weights)), [0, 1, 2, 3]);
        let matmul = [(512, 576), (512, 2_048), (512, 8_192), (2_048, 2_048)];
        assert_eq!(matmul.map(|(rows, columns)| matmul_shape(rows, columns)), [0, 1, 2, 2]);
        for family in [Family::Matvec, Family::Matmul] {
            for (i, s) in shapes(family, DeviceKind::Discrete).iter().enumerate() {
                let (n, k) = s.matrix;
                let index = match family {
                    Family::Matvec => matvec_shape(s.rows, u64::from(n) * u64::from(k)),
                    Family::Matmul => matmul_shape(s.rows, n),
                };
                assert_eq!(index, i, "{}", s.name);
            }
        }
    }
}
