//! Lets ggml quantize and decode the inputs in a folder; see make.py, which runs it, for the files.
//! Depends on `llama-cpp-sys-2 = { version = "=0.1.161", default-features = false }`.

use std::path::Path;

use llama_cpp_sys_2 as ggml;

const WIDTH: usize = 768;
/// Name, ggml's number, and whether `ggml_quantize_chunk` takes an importance matrix into account.
const TYPES: [(&str, u32, bool); 16] = [
    ("F16", 1, false),
    ("BF16", 30, false),
    ("Q4_0", 2, true),
    ("Q4_1", 3, true),
    ("Q5_0", 6, true),
    ("Q5_1", 7, true),
    ("Q8_0", 8, false),
    ("Q2_K", 10, true),
    ("Q3_K", 11, true),
    ("Q4_K", 12, true),
    ("Q5_K", 13, true),
    ("Q6_K", 14, true),
    ("Q8_K", 15, false),
    ("IQ4_NL", 20, true),
    ("IQ4_XS", 23, true),
    ("MXFP4", 39, false),
];

// Q8_K is made for activations only: the tables of types and ggml_quantize_chunk leave it out.
unsafe extern "C" {
    fn quantize_row_q8_K_ref(values: *const f32, blocks: *mut std::ffi::c_void, len: i64);
    fn dequantize_row_q8_K(blocks: *const std::ffi::c_void, values: *mut f32, len: i64);
}

fn main() {
    let folder = std::env::args().nth(1).expect("usage: oracle FOLDER");
    let folder = Path::new(&folder);
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let floats = |bytes: Vec<u8>| -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let write = |name: String, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
    let values = floats(read("values.f32"));
    let many = floats(read("many.f32"));
    let importance = floats(read("importance.f32"));
    for (name, number, weighted) in TYPES {
        let quantized = quantize(number, &values, None);
        let decoded = decode(number, &quantized);
        write(format!("{name}.requantized"), &bytes_of(&decoded));
        write(format!("{name}.quantized"), &quantized);
        write(format!("{name}.many"), &quantize(number, &many, None));
        write(format!("{name}.many_weighted"), &quantize(number, &many, Some(&importance)));
        if weighted {
            write(format!("{name}.weighted"), &quantize(number, &values, Some(&importance)));
        }
        if number != 1 && number != 30 {
            write(format!("{name}.decoded"), &bytes_of(&decode(number, &read(&format!("{name}.random")))));
        }
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn quantize(number: u32, values: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    unsafe {
        let traits = &*ggml::ggml_get_type_traits(number as _);
        let mut bytes = vec![0u8; values.len() / traits.blck_size as usize * traits.type_size];
        if number == 15 {
            quantize_row_q8_K_ref(values.as_ptr(), bytes.as_mut_ptr().cast(), values.len() as i64);
            return bytes;
        }
        let weights = importance.map_or(std::ptr::null(), |i| i.as_ptr());
        let rows = (values.len() / WIDTH) as i64;
        let wrote = ggml::ggml_quantize_chunk(
            number as _,
            values.as_ptr(),
            bytes.as_mut_ptr().cast(),
            0,
            rows,
            WIDTH as i64,
            weights,
        );
        assert_eq!(wrote, bytes.len());
        bytes
    }
}

fn decode(number: u32, bytes: &[u8]) -> Vec<f32> {
    unsafe {
        let traits = &*ggml::ggml_get_type_traits(number as _);
        let len = bytes.len() / traits.type_size * traits.blck_size as usize;
        let mut values = vec![0f32; len];
        match traits.to_float {
            Some(to_float) => to_float(bytes.as_ptr().cast(), values.as_mut_ptr(), len as i64),
            None => dequantize_row_q8_K(bytes.as_ptr().cast(), values.as_mut_ptr(), len as i64),
        }
        values
    }
}
