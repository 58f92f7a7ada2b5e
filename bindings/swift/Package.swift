// swift-tools-version:5.9
// In a release the C library is CKinglet.xcframework beside this file; in a checkout, libkinglet as cargo has built it:
//     swift build -Xlinker -L../../target/release
import Foundation
import PackageDescription

let framework = "CKinglet.xcframework"
let released = FileManager.default.fileExists(atPath: Context.packageDirectory + "/" + framework)

let package = Package(
    name: "Kinglet",
    platforms: [.macOS(.v12), .iOS(.v15)],
    products: [.library(name: "Kinglet", targets: ["Kinglet"])],
    targets: [
        released ? .binaryTarget(name: "CKinglet", path: framework) : .systemLibrary(name: "CKinglet"),
        .target(name: "Kinglet", dependencies: ["CKinglet"]),
        .executableTarget(name: "Chat", dependencies: ["Kinglet"], path: "Examples/Chat"),
        .executableTarget(name: "Conformance", dependencies: ["Kinglet"], path: "Conformance"),
    ]
)
