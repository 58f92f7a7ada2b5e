#!/usr/bin/env bash
# Packs what libraries.sh has built into an archive for Gradle, with the Java classes, and with header and libraries for C++
# (prefab).   aar.sh LIBRARIES OUT.aar
#
# Takes a JDK. Run by a test with libraries of the machine in place of Android's; no Android has loaded the result yet.
set -euo pipefail
libraries=$(cd "${1:?usage: aar.sh LIBRARIES OUT.aar}" && pwd)
out=$(cd "$(dirname "${2:?usage: aar.sh LIBRARIES OUT.aar}")" && pwd)/$(basename "$2")
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
aar=$work/aar
module=$aar/prefab/modules/kinglet
mkdir -p "$module/include" "$aar/jni"

cat >"$aar/AndroidManifest.xml" <<XML
<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="kinglet.android">
    <uses-sdk android:minSdkVersion="26" />
</manifest>
XML
: >"$aar/R.txt"
# The JNI library looks these up by name.
echo '-keep class kinglet.** { *; }' >"$aar/proguard.txt"
javac --release 11 -d "$work/classes" bindings/java/src/kinglet/*.java
jar --create --file "$aar/classes.jar" -C "$work/classes" .

cp ffi/include/kinglet.h "$module/include/"
echo "{\"schema_version\": 2, \"name\": \"kinglet\", \"version\": \"$version\", \"dependencies\": []}" >"$aar/prefab/prefab.json"
echo '{"export_libraries": [], "library_name": "libkinglet", "android": {}}' >"$module/module.json"
for folder in "$libraries"/*/; do
  abi=$(basename "$folder")
  mkdir -p "$aar/jni/$abi" "$module/libs/android.$abi"
  cp "$folder/libkinglet.so" "$folder/libkinglet_jni.so" "$aar/jni/$abi/"
  cp "$folder/libkinglet.so" "$module/libs/android.$abi/"
  echo "{\"abi\": \"$abi\", \"api\": 26, \"ndk\": 27, \"stl\": \"none\"}" >"$module/libs/android.$abi/abi.json"
done

rm -f "$out"
jar --create --no-manifest --file "$out" -C "$aar" .
