#!/usr/bin/env bash
# Builds libkinglet.so and libkinglet_jni.so for Android into OUT/<abi>/, which aar.sh packs.   libraries.sh OUT
#
# Takes the NDK (ANDROID_NDK_HOME), a JDK, and Rust's targets: rustup target add aarch64-linux-android x86_64-linux-android
# Not run where Kinglet is tested: there is no NDK.
set -euo pipefail
out=$(mkdir -p "${1:?usage: libraries.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."

# The oldest Android with all that the Java classes use.
api=26
tools=("${ANDROID_NDK_HOME:?set it to the folder of the NDK}"/toolchains/llvm/prebuilt/*/bin)
[ -x "${tools[0]}/llvm-strip" ] || { echo "error: $ANDROID_NDK_HOME has no toolchain" >&2; exit 1; }
PATH=${tools[0]}:$PATH
target_dir=${CARGO_TARGET_DIR:-target}

headers=$(mktemp -d)
trap 'rm -rf "$headers"' EXIT
javac --release 11 -h "$headers" -d "$headers/classes" bindings/java/src/kinglet/*.java

for pair in arm64-v8a:aarch64-linux-android x86_64:x86_64-linux-android; do
  abi=${pair%%:*}
  target=${pair##*:}
  cc=$target$api-clang
  linker=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")_LINKER
  env "$linker=$cc" cargo build --profile dist -p kinglet-ffi --target "$target"
  mkdir -p "$out/$abi"
  cp "$target_dir/$target/dist/libkinglet.so" "$out/$abi/"
  "$cc" -std=gnu11 -O2 -Wall -Wextra -Werror -shared -fPIC bindings/java/jni/kinglet_jni.c -I"$headers" -Iffi/include \
    -Wl,-z,defs -Wl,-z,max-page-size=16384 -L"$out/$abi" -lkinglet -o "$out/$abi/libkinglet_jni.so"
  llvm-strip "$out/$abi/libkinglet_jni.so"
done
