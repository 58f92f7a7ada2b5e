// Sixteen elements of a row of the model's matrix.
fn weight(row: u32, k: u32) -> Unit { return unpack(0u, op.weight + row * op.row_bytes, k); }
