//! Ways to multiply rows with a matrix of the model, and which is taken: a fixed one, or the quickest that was found (`tune`).

use std::fmt;
use std::sync::Arc;

use super::device::{Device, DeviceKind, lock};
use super::division::columns_within;
use super::kernel::{Kernel, Tile, has_int8};
use crate::quant::DType;
use crate::tape::Gate;

/// Workgroups of the largest tile that keep a large card busy.
const LARGE_TILES: u32 = 256;
/// Weights from which on a matrix is large for a few rows.
const LARGE_MATRIX: u64 = 2 << 20;
/// How much quicker than the usual choice another must be to take its place, and on every shape that stands for a class:
/// products that are timed alone are not a model, where a lead of less than this was seen to be lost. And how much quicker what
/// rounds to eight bits, for that is its price.
const LEAD: f64 = 1.1;
const LEAD_OF_INT8: f64 = 1.2;

/// Seconds that stand for what was tried and is not used: more than anything takes that is.
const UNUSED: f64 = 1e9;

/// What is noted of a candidate that was not tried.
pub(super) const UNTRIED: &str = "not tried, for lack of time";

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

/// A product that is timed, for a class of shapes that are treated alike: rows, and the matrix `[n, k]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shape {
    /// Of the class.
    pub name: &'static str,
    pub rows: u32,
    pub matrix: (u32, u32),
}

const fn shape(name: &'static str, rows: u32, matrix: (u32, u32)) -> Shape {
    Shape { name, rows, matrix }
}

/// Names of classes by [`matvec_class`].
const MATVEC_CLASSES: [&str; 4] =
    ["one row, small matrix", "one row, large matrix", "eight rows, small matrix", "eight rows, large matrix"];
/// By [`matmul_class`].
const MATMUL_CLASSES: [&str; 3] = ["few tiles", "some tiles", "many tiles"];

/// Two of each class, as the maps of small models are: wide and narrow ones (up and down), heads.
const MATVEC: [Shape; 8] = [
    shape(MATVEC_CLASSES[0], 1, (768, 1_536)),
    shape(MATVEC_CLASSES[0], 1, (1_536, 768)),
    shape(MATVEC_CLASSES[1], 1, (4_096, 2_048)),
    shape(MATVEC_CLASSES[1], 1, (16_384, 768)),
    shape(MATVEC_CLASSES[2], 8, (768, 1_536)),
    shape(MATVEC_CLASSES[2], 8, (1_536, 768)),
    shape(MATVEC_CLASSES[3], 8, (4_096, 2_048)),
    shape(MATVEC_CLASSES[3], 8, (16_384, 768)),
];
const MATMUL: [Shape; 6] = [
    shape(MATMUL_CLASSES[0], 512, (768, 1_536)),
    shape(MATMUL_CLASSES[0], 512, (1_536, 768)),
    shape(MATMUL_CLASSES[1], 512, (4_096, 768)),
    shape(MATMUL_CLASSES[1], 512, (2_048, 2_048)),
    shape(MATMUL_CLASSES[2], 512, (8_192, 768)),
    shape(MATMUL_CLASSES[2], 512, (8_192, 2_048)),
];

/// The shapes that are timed for a family; where a processor has to compute them one of each class, and a smaller one.
pub(super) fn shapes(family: Family, kind: DeviceKind) -> Vec<Shape> {
    let smaller = |s: &Shape| match family {
        Family::Matvec => Shape { matrix: (s.matrix.0 / 2, s.matrix.1), ..*s },
        Family::Matmul => Shape { rows: 64, matrix: (s.matrix.0 / 16, s.matrix.1), ..*s },
    };
    let shapes: &[Shape] = match family {
        Family::Matvec => &MATVEC,
        Family::Matmul => &MATMUL,
    };
    match kind {
        DeviceKind::Software => shapes.iter().step_by(2).map(smaller).collect(),
        _ => shapes.to_vec(),
    }
}

/// The class of up to `rows` rows times so many weights.
fn matvec_class(rows: u32, weights: u64) -> &'static str {
    MATVEC_CLASSES[2 * usize::from(rows > 1) + usize::from(weights >= LARGE_MATRIX)]
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

/// The class of up to `rows` rows times a matrix of `columns` rows.
fn matmul_class(rows: u32, columns: u32) -> &'static str {
    match large_tiles(rows, columns) {
        0..64 => MATMUL_CLASSES[0],
        64..LARGE_TILES => MATMUL_CLASSES[1],
        _ => MATMUL_CLASSES[2],
    }
}

/// A candidate, and what came out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Timed {
    pub form: Form,
    /// Seconds of a product of each of [`Choices::shapes`]; none where it is not used.
    pub seconds: Vec<f64>,
    /// Largest difference from the plain kernel, in root mean squares of its results.
    pub worst: f32,
    /// Why it is not used.
    pub note: String,
}

/// What was found for a family and a type; nothing where nothing was timed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Choices {
    /// What was timed.
    pub shapes: Vec<Shape>,
    pub candidates: Vec<Timed>,
}

impl Choices {
    /// What is taken for a class of shapes: the usual choice, unless another that may be taken is clearly quicker on every
    /// shape of the class, of several the one with the largest lead where its lead is least.
    fn best(&self, class: &str, usual: Form, may: impl Fn(Form) -> bool) -> Form {
        let Some(before) = self.candidates.iter().find(|c| c.form == usual && c.note != UNTRIED) else {
            // With nothing to compare with nothing is clear.
            return usual;
        };
        let lead = |c: &Timed| -> Option<f64> {
            let wanted = if c.form.is_int8() { LEAD_OF_INT8 } else { LEAD };
            let of_class = self.shapes.iter().enumerate().filter(|(_, shape)| shape.name == class);
            let leads = of_class.map(|(i, _)| {
                let seconds = c.seconds.get(i)?;
                Some(before.seconds.get(i).unwrap_or(&UNUSED) / seconds / wanted)
            });
            leads.reduce(|a, b| Some(a?.min(b?)))?
        };
        let others = self.candidates.iter().filter(|c| c.form != usual && may(c.form));
        let leads = others.filter_map(|c| Some((c.form, lead(c)?))).filter(|(_, lead)| *lead > 1.0);
        // Of equals the first.
        leads.reduce(|a, b| if b.1 > a.1 { b } else { a }).map_or(usual, |(form, _)| form)
    }

    /// Columns of a product of `rows` rows and a matrix `[columns, k]` that take no longer than [`LONGEST`], by the time of the
    /// shape that stands for it; `None` where that is not known.
    fn columns_at_once(&self, form: Form, (rows, columns, k): (u32, u32, u32)) -> Option<u32> {
        let class = matmul_class(rows, columns);
        let index = self.shapes.iter().position(|shape| shape.name == class)?;
        let seconds = self.candidates.iter().find(|c| c.form == form).and_then(|c| c.seconds.get(index))?;
        let shape = self.shapes.get(index)?;
        let column = seconds / matmul_work(shape.rows, shape.matrix.0, shape.matrix.1) * matmul_work(rows, 1, k);
        Some(columns_within(LONGEST / column, columns))
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
    /// The one that was timed: rows, and the matrix `[n, k]`.
    pub timed: (u32, (u32, u32)),
    /// The candidate.
    pub kernel: String,
    /// Time of a product, in microseconds; none where the candidate is not used.
    pub microseconds: Option<f64>,
    /// Largest difference from the plain kernel, in root mean squares of its results.
    pub worst: f32,
    /// What is taken without tuning.
    pub default: bool,
    /// What is taken for these shapes, unless single precision is asked for.
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

    /// What may be taken for a family and a type, the usual choices first.
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
        let int8 = has_int8(dtype) && self.tunes_int8();
        forms.retain(|form| !form.is_int8() || int8);
        let mut seen = std::collections::HashSet::new();
        forms.retain(|form| seen.insert(*form));
        forms
    }

    fn choices(&self, family: Family, dtype: DType) -> Option<Arc<Choices>> {
        lock(&self.choices).get(&(family, dtype)).cloned()
    }

    /// Whether rows may be rounded to eight bits for matrices of all these types.
    pub(super) fn all_int8(&self, family: Family, types: &[DType]) -> bool {
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
        match choices.best(matvec_class(rows, weights), Form::Matvec(usual), may) {
            Form::Matvec(lanes) => lanes,
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
        choices.best(matmul_class(rows, columns), usual, may)
    }

    /// Columns of a product of up to `rows` rows and a matrix `[columns, k]` that one dispatch is to compute.
    pub(super) fn columns_at_once(&self, dtype: DType, form: Form, (rows, columns, k): (u32, u32, u32)) -> u32 {
        let timed = self.choices(Family::Matmul, dtype).and_then(|c| c.columns_at_once(form, (rows, columns, k)));
        timed.unwrap_or_else(|| self.columns_of(matmul_work(rows, 1, k), columns))
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
            for (i, shape) in choices.shapes.iter().enumerate() {
                let usual = self.usual(family, dtype, *shape);
                let best = choices.best(shape.name, usual, |_| true);
                rows.extend(choices.candidates.iter().map(|c| TunedKernel {
                    family: family.name(),
                    weights: dtype.name(),
                    shape: shape.name,
                    timed: (shape.rows, shape.matrix),
                    kernel: c.form.to_string(),
                    microseconds: c.seconds.get(i).map(|s| s * 1e6),
                    worst: c.worst,
                    default: c.form == usual,
                    chosen: c.form == best,
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

    const USUAL: Form = Form::Cooperative(Tile::SMALL);
    const CLASS: &str = MATMUL_CLASSES[0];
    const ANY: Demands = Demands { exact: false, int8: true };

    fn timed(form: Form, seconds: &[f64], note: &str) -> Timed {
        Timed { form, seconds: seconds.into(), worst: 0.0, note: note.into() }
    }

    /// With times of two shapes of a class.
    fn choices(candidates: Vec<Timed>) -> Choices {
        Choices { shapes: vec![shape(CLASS, 512, (768, 768)); 2], candidates }
    }

    fn best(choices: &Choices, demands: Demands) -> Form {
        choices.best(CLASS, USUAL, |form| demands.allow(form))
    }

    /// A small lead changes nothing, rounding to eight bits must be worth it, and whoever wants single precision has it.
    #[test]
    fn the_usual_choice_stays_without_a_clear_lead() {
        let of = |tile: f64, int8: f64| {
            let times = [(USUAL, 1.0), (Form::Tile, tile), (Form::TileInt8, int8)];
            let wrong = timed(Form::Cooperative(Tile::LARGE), &[], "results are off");
            choices(times.iter().map(|(form, s)| timed(*form, &[*s, *s], "")).chain([wrong]).collect())
        };
        assert_eq!(best(&of(0.92, 0.85), ANY), USUAL);
        assert_eq!(best(&of(0.90, 0.85), ANY), Form::Tile);
        assert_eq!(best(&of(0.90, 0.7), ANY), Form::TileInt8);
        assert_eq!(best(&of(0.90, 0.7), Demands { int8: false, ..ANY }), Form::Tile);
        let exact = Demands { exact: true, ..ANY };
        assert_eq!(of(2.0, 0.7).best(CLASS, Form::Tile, |form| exact.allow(form)), Form::Tile);
        assert_eq!(best(&Choices::default(), ANY), USUAL);
        assert_eq!(of(0.5, 0.5).best(MATMUL_CLASSES[1], USUAL, |_| true), USUAL, "another class");
        assert!(of(1.0, 1.0).int8() && !Choices::default().int8());
    }

    /// Of the mid-size tile that is quicker on one sort of matrix and not on another, nothing comes; of two that lead, the one
    /// that leads more where it leads least.
    #[test]
    fn a_lead_is_one_on_every_shape() {
        let (large, tile) = (Form::Cooperative(Tile::LARGE), Form::Tile);
        let of = |large_times, tile_times| {
            choices(vec![timed(USUAL, &[1.0, 2.0], ""), timed(large, large_times, ""), timed(tile, tile_times, "")])
        };
        assert_eq!(best(&of(&[0.6, 1.9], &[3.0, 3.0]), ANY), USUAL);
        assert_eq!(best(&of(&[0.8, 1.6], &[3.0, 3.0]), ANY), large);
        assert_eq!(best(&of(&[0.5, 1.8], &[0.8, 1.6]), ANY), tile);
        assert_eq!(best(&of(&[0.5], &[3.0, 3.0]), ANY), USUAL, "a shape was not timed");
    }

    /// What the usual choice takes is not known, or it cannot be used.
    #[test]
    fn without_a_comparison_nothing_is_clear() {
        let of = |note| {
            choices(vec![
                timed(USUAL, &[], note),
                timed(Form::Tile, &[0.2, 0.2], ""),
                timed(Form::Cooperative(Tile::LARGE), &[0.1, 0.1], ""),
            ])
        };
        assert_eq!(best(&of(UNTRIED), ANY), USUAL);
        assert_eq!(best(&of("results are off"), ANY), Form::Cooperative(Tile::LARGE));
    }

    /// The maps of smollm2 (a width of 576, 1,536 in between) in chunks of 512 tokens are all of the class of few tiles.
    #[test]
    fn a_small_models_maps_have_few_tiles() {
        for columns in [192, 576, 1_536] {
            assert_eq!(matmul_class(512, columns), MATMUL_CLASSES[0]);
            assert_eq!(usual_cooperative(512, columns), Tile::SMALL);
        }
    }

    /// 512 rows times 768 × 768 in 1 ms: half the rows and 65,536 columns take 43 times as long.
    #[test]
    fn long_products_are_divided() {
        let shapes = [768, 4_096, 8_192].iter().zip(MATMUL_CLASSES).map(|(n, class)| shape(class, 512, (*n, 768)));
        let candidates = vec![timed(Form::Tile, &[1e-3, 5.4e-3, 10.67e-3], "")];
        let choices = Choices { shapes: shapes.collect(), candidates };
        let columns = |sizes| choices.columns_at_once(Form::Tile, sizes).unwrap();
        assert_eq!(columns((512, 768, 768)), 768);
        assert_eq!(columns((256, 65_536, 768)), 38_272);
        assert_eq!(columns((65_536, 65_536, 768)), FEWEST_COLUMNS);
        assert_eq!(choices.columns_at_once(Form::TileInt8, (256, 65_536, 768)), None);
        let nothing = Choices::default();
        assert_eq!(nothing.columns_at_once(Form::Tile, (256, 65_536, 768)), None);
    }

    #[test]
    fn shapes_are_found_by_rows_and_matrix() {
        let matvec = [(1, 576 * 576), (1, 49_152 * 576), (4, 576 * 1_536), (8, 4_096 * 4_096)];
        assert_eq!(matvec.map(|(rows, weights)| matvec_class(rows, weights)), MATVEC_CLASSES);
        let matmul = [(512, 576), (512, 2_048), (512, 8_192), (2_048, 2_048)];
        let [few, some, many] = MATMUL_CLASSES;
        assert_eq!(matmul.map(|(rows, columns)| matmul_class(rows, columns)), [few, some, many, many]);
        // What is timed for a class is of it, and every class is timed, by software too.
        for (family, classes) in [(Family::Matvec, &MATVEC_CLASSES[..]), (Family::Matmul, &MATMUL_CLASSES)] {
            let all = shapes(family, DeviceKind::Discrete);
            for s in &all {
                let (n, k) = s.matrix;
                let class = match family {
                    Family::Matvec => matvec_class(s.rows, u64::from(n) * u64::from(k)),
                    Family::Matmul => matmul_class(s.rows, n),
                };
                assert_eq!(class, s.name, "{s:?}");
            }
            let mut names: Vec<_> = all.iter().map(|s| s.name).collect();
            names.dedup();
            assert_eq!(names, classes);
            let of_software: Vec<_> = shapes(family, DeviceKind::Software).iter().map(|s| s.name).collect();
            assert_eq!(of_software, classes);
        }
    }
}
