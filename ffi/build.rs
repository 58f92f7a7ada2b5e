//! How the shared library is linked: everything it needs is found now (`defs`, which also makes the proofs of `no_panic`
//! count), its name for the loader is that of the ABI, and its segments suit systems with pages of 16 KiB; for wasm it brings its
//! stack. What crates below export to C (`llguidance` does) stays inside. What a sanitizer needs is in the program that loads the
//! library.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    // Android packs files named `lib*.so` only.
    let name = if os == "android" { "libkinglet.so" } else { "libkinglet.so.1" };
    if std::env::var("CARGO_CFG_TARGET_FAMILY").is_ok_and(|family| family == "wasm") {
        // Everything runs on the caller's stack there; by default it has 1 MiB.
        println!("cargo:rustc-cdylib-link-arg=-zstack-size={}", 8 << 20);
    }
    if matches!(os.as_str(), "linux" | "android") {
        let sanitized = ["CARGO_CFG_SANITIZE", "CARGO_CFG_FUZZING"].iter().any(|cfg| std::env::var_os(cfg).is_some());
        let defs = (!sanitized).then_some("-Wl,-z,defs");
        let soname = format!("-Wl,-soname,{name}");
        for flag in defs.into_iter().chain([soname.as_str(), "-Wl,-z,max-page-size=16384", "-Wl,--exclude-libs,ALL"]) {
            println!("cargo:rustc-cdylib-link-arg={flag}");
        }
    }
}
