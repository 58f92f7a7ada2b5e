//! How the shared library is linked: everything it needs is found now (`defs`, which also makes the proofs of `no_panic`
//! count), its name for the loader is that of the ABI, and its segments suit systems with pages of 16 KiB.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    // Android packs files named `lib*.so` only.
    let name = if os == "android" { "libkinglet.so" } else { "libkinglet.so.1" };
    if matches!(os.as_str(), "linux" | "android") {
        for flag in ["-Wl,-z,defs", &format!("-Wl,-soname,{name}"), "-Wl,-z,max-page-size=16384"] {
            println!("cargo:rustc-cdylib-link-arg={flag}");
        }
    }
}
