#!/usr/bin/env bash
# Builds CKinglet.xcframework for macOS, iOS and its simulator beside bindings/swift/Package.swift, which then uses it.
#
# Takes a Mac with Xcode, and Rust's targets: rustup target add aarch64-apple-ios aarch64-apple-ios-sim x86_64-apple-ios
# aarch64-apple-darwin x86_64-apple-darwin. Not run where Kinglet is tested: there is no Mac.
set -euo pipefail
cd "$(dirname "$0")/../.."
target_dir=${CARGO_TARGET_DIR:-target}
out=bindings/swift/CKinglet.xcframework

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/headers"
cp ffi/include/kinglet.h "$work/headers/"
cat >"$work/headers/module.modulemap" <<'MAP'
module CKinglet {
    header "kinglet.h"
    link framework "CoreGraphics"
    link framework "Foundation"
    link framework "Metal"
    link framework "QuartzCore"
    export *
}
MAP

# One library for each place that runs it: all processors of that place in it.
arguments=()
library() {
  local name=$1 target built=()
  shift
  for target in "$@"; do
    cargo build --profile dist -p kinglet-ffi --target "$target"
    built+=("$target_dir/$target/dist/libkinglet.a")
  done
  mkdir -p "$work/$name"
  lipo -create "${built[@]}" -output "$work/$name/libkinglet.a"
  arguments+=(-library "$work/$name/libkinglet.a" -headers "$work/headers")
}
library ios aarch64-apple-ios
library ios-simulator aarch64-apple-ios-sim x86_64-apple-ios
library macos aarch64-apple-darwin x86_64-apple-darwin

rm -rf "$out"
xcodebuild -create-xcframework "${arguments[@]}" -output "$out"
