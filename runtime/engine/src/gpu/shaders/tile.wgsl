// Tiles of rows in workgroup memory, for attention: a row is a head of D elements, its vectors of four lie one behind the
// other, rows one vector further apart, so that no two invocations wait for one bank. PER_ROW invocations have a row of the
// OWN rows each, and every PER_ROW-th of its vectors.
const VECTORS = D / 4u;
const STRIDE = VECTORS + 1u;
const MINE = (VECTORS + PER_ROW - 1u) / PER_ROW;
// Columns of scores an invocation computes.
const COLUMNS = (OTHER + PER_ROW - 1u) / PER_ROW;

// A number of the arena, which is read by four.
fn number(at: u32) -> f32 { return arena[at >> 2u][at & 3u]; }

// Score of product s at distance `back`.
fn score(s: f32, scale: f32, cap: f32, slopes: u32, h: u32, back: u32) -> f32 {
    var y = s * scale;
    if cap > 0.0 { y = cap * tanh(clamp(y / cap, -15.0, 15.0)); }
    if slopes != NONE { y -= constants[(slopes + h) >> 2u][(slopes + h) & 3u] * f32(back); }
    return y;
}
