// The cache of one layer: pages of `[K, V][kv_head][PAGE]` rows, each a head's vector of `dim` elements. How a row lies in
// words is told by the file of its type, which has
//   kv_load(dim, row, i): elements i to i + 3 of a row, i a multiple of four;
//   kv_store(dim, row, t, v, wanted): writes a row if it is wanted. Every invocation of the workgroup calls it, with the same
//   row; those with t < dim / 4 bring elements 4t to 4t + 3.
struct Kv { heads: u32, kv_heads: u32, head_dim: u32, window: u32 }

const PAGE = 128u;

// A head's row at a position, by its number; `part` is 0 for keys and 1 for values.
fn kv_row(kv: Kv, pages: u32, position: u32, part: u32, head: u32) -> u32 {
    let page = run[pages + position / PAGE];
    return ((page * 2u + part) * kv.kv_heads + head) * PAGE + position % PAGE;
}
