//! The packages as they are released, laid out from the libraries of this build and used as by somebody who has nothing else:
//! C programs by CMake and by pkg-config, the wheel, the npm package.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bindings::conforms;
use crate::support::{Scratch, built, file, have, run, succeed};

/// A package for C in a folder that was moved behind the maker's back.
fn package(scratch: &Scratch) -> PathBuf {
    let (first, package) = (scratch.path("first"), scratch.path("package"));
    xtask::install(&built(), &first).expect("a package");
    std::fs::rename(first, &package).expect("a move");
    package
}

/// The examples of a package talk and learn.
fn work(chat: &Path, train: Option<&Path>, lib: &Path, scratch: &Scratch) {
    let mut command = Command::new(chat);
    let answer = succeed(command.env("LD_LIBRARY_PATH", lib).arg(scratch.model()).arg("What is on the table?"));
    assert!(!answer.is_empty());
    if let Some(train) = train {
        let mut command = Command::new(train);
        command.arg(scratch.model()).arg(scratch.lessons()).arg(scratch.path("learned")).arg("what is on the table");
        assert!(succeed(&mut command).contains("\nthe other hat"));
    }
}

#[test]
fn the_examples_build_with_cmake_from_the_package() {
    assert!(have("cmake"), "cmake is missing; this test needs it: apt-get install cmake");
    let scratch = Scratch::new("cmake");
    let package = package(&scratch);
    let build = scratch.path("build");
    let mut cmake = Command::new("cmake");
    cmake.arg("-S").arg(package.join("share/kinglet/examples")).arg("-B").arg(&build);
    succeed(cmake.arg(format!("-DCMAKE_PREFIX_PATH={}", package.display())).env_remove("CMAKE_PROJECT_INCLUDE"));
    succeed(Command::new("cmake").arg("--build").arg(&build));
    work(&build.join("chat"), Some(&build.join("train")), &package.join("lib"), &scratch);
    // Another first number is another contract.
    let examples = scratch.path("newer");
    std::fs::create_dir_all(&examples).expect("a folder");
    let lists = "cmake_minimum_required(VERSION 3.13)\nproject(newer C)\nfind_package(Kinglet 1.0 REQUIRED)\n";
    std::fs::write(examples.join("CMakeLists.txt"), lists).expect("a file");
    let mut cmake = Command::new("cmake");
    cmake.arg("-S").arg(&examples).arg("-B").arg(scratch.path("newer-build"));
    let refused =
        run(cmake.arg(format!("-DCMAKE_PREFIX_PATH={}", package.display())).env_remove("CMAKE_PROJECT_INCLUDE"));
    assert!(!refused.status.success());
}

#[test]
fn the_example_builds_with_pkg_config_from_the_package() {
    assert!(have("pkg-config"), "pkg-config is missing; this test needs it: apt-get install pkg-config");
    let scratch = Scratch::new("pkg-config");
    let package = package(&scratch);
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.env("PKG_CONFIG_PATH", package.join("lib/pkgconfig")).args(["--cflags", "--libs", "kinglet"]);
    let flags = succeed(&mut pkg_config);
    let program = scratch.path("chat");
    let mut gcc = Command::new("gcc");
    gcc.arg(package.join("share/kinglet/examples/chat.c")).args(flags.split_whitespace());
    succeed(gcc.arg("-o").arg(&program));
    work(&program, None, &package.join("lib"), &scratch);
}

#[test]
fn the_wheel_has_all_it_needs() {
    let scratch = Scratch::new("wheel");
    let wheel = xtask::wheel(&built(), &scratch.path("out"), &scratch.path("work")).expect("a wheel");
    let name = wheel.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(name.contains("-py3-none-manylinux_2_"), "{name}");
    let site = scratch.path("site");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--root-user-action=ignore", "--target"]);
    succeed(pip.arg(&site).arg(&wheel));
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", &site).env_remove("KINGLET_LIBRARY").current_dir(&site);
    conforms(python.arg(file("../bindings/python/conformance.py")), &scratch);
}

#[test]
fn the_npm_package_has_all_it_needs() {
    let scratch = Scratch::new("npm");
    let package = xtask::npm(&built(), &scratch.path("out"), &scratch.path("work")).expect("an npm package");
    // As npm lays it, beside its one dependency.
    let modules = scratch.path("app/node_modules");
    std::fs::create_dir_all(&modules).expect("a folder");
    succeed(Command::new("tar").arg("-xzf").arg(&package).arg("-C").arg(&modules));
    std::fs::rename(modules.join("package"), modules.join("kinglet")).expect("a move");
    for name in ["koffi", "@koromix"] {
        let installed = file("../bindings/node/node_modules").join(name);
        assert!(installed.is_dir(), "{name} is missing; this test needs it: npm install --prefix bindings/node");
        std::os::unix::fs::symlink(installed.canonicalize().expect("a path"), modules.join(name)).expect("a link");
    }
    let script = scratch.path("app/conformance.mjs");
    std::fs::copy(file("../bindings/node/conformance.js"), &script).expect("a copy");
    let mut node = Command::new("node");
    conforms(node.arg("--preserve-symlinks").env_remove("KINGLET_LIBRARY").arg(&script), &scratch);
}

#[test]
fn the_archive_for_android_has_its_parts() {
    assert!(have("jar"), "jar is missing; this test needs a JDK: apt-get install default-jdk-headless");
    let scratch = Scratch::new("aar");
    let folder = scratch.path("libraries/x86_64");
    std::fs::create_dir_all(&folder).expect("a folder");
    // Not what Android would load; where they come to lie is what counts.
    for name in ["libkinglet.so", "libkinglet_jni.so"] {
        std::os::unix::fs::symlink(built().join("libkinglet.so"), folder.join(name)).expect("a link");
    }
    let archive = scratch.path("kinglet.aar");
    succeed(Command::new(file("../packaging/android/aar.sh")).arg(scratch.path("libraries")).arg(&archive));
    let list = succeed(Command::new("jar").arg("--list").arg("--file").arg(&archive));
    for name in [
        "AndroidManifest.xml",
        "R.txt",
        "classes.jar",
        "proguard.txt",
        "jni/x86_64/libkinglet.so",
        "jni/x86_64/libkinglet_jni.so",
        "prefab/prefab.json",
        "prefab/modules/kinglet/module.json",
        "prefab/modules/kinglet/include/kinglet.h",
        "prefab/modules/kinglet/libs/android.x86_64/abi.json",
        "prefab/modules/kinglet/libs/android.x86_64/libkinglet.so",
    ] {
        assert!(list.lines().any(|line| line == name), "{name} is missing:\n{list}");
    }
}
