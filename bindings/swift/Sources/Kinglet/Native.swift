// What stands between Swift and kinglet.h: errors, texts, arrays, JSON, and calls that block off the cooperative threads.

import CKinglet
import Dispatch
import Foundation

/// What the library says went wrong. `code` is a `KINGLET_ERR_*` number.
public struct KingletError: Error, CustomStringConvertible, Sendable {
    public let code: Int32
    public let message: String

    public static let argument = Int32(KINGLET_ERR_ARG)
    public static let memory = Int32(KINGLET_ERR_MEMORY)
    public static let contextFull = Int32(KINGLET_ERR_CONTEXT_FULL)
    public static let busy = Int32(KINGLET_ERR_BUSY)
    public static let cancelled = Int32(KINGLET_ERR_CANCELLED)
    public static let suspended = Int32(KINGLET_ERR_SUSPENDED)
    public static let deviceLost = Int32(KINGLET_ERR_DEVICE_LOST)

    public var description: String { message }
}

/// Calls `function` with a place for its error; a status below 0 is thrown.
@discardableResult
func call(_ function: (UnsafeMutablePointer<kinglet_error>) -> kinglet_status) throws -> kinglet_status {
    var error = kinglet_error()
    let status = function(&error)
    guard status < 0 else { return status }
    let message = withUnsafeBytes(of: &error.message) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    throw KingletError(code: status, message: message)
}

/// The object that `function` hands out.
func make(
    _ function: (UnsafeMutablePointer<OpaquePointer?>, UnsafeMutablePointer<kinglet_error>) -> kinglet_status
) throws -> OpaquePointer {
    var out: OpaquePointer?
    try call { function(&out, $0) }
    guard let object = out else {
        throw KingletError(code: Int32(KINGLET_ERR_INTERNAL), message: "the library handed out nothing")
    }
    return object
}

/// The text that `function` hands out.
func text(
    _ function: (UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>, UnsafeMutablePointer<kinglet_error>) -> kinglet_status
) throws -> String? {
    var out: UnsafeMutablePointer<CChar>?
    try call { function(&out, $0) }
    guard let string = out else { return nil }
    defer { kinglet_string_free(string) }
    return String(cString: string)
}

/// The JSON object or array that `function` hands out.
func json<Value>(
    _ function: (UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>, UnsafeMutablePointer<kinglet_error>) -> kinglet_status
) throws -> Value {
    let written = try text(function) ?? "null"
    guard let value = try JSONSerialization.jsonObject(with: Data(written.utf8), options: .fragmentsAllowed) as? Value else {
        throw KingletError(code: Int32(KINGLET_ERR_INTERNAL), message: "the library gave \(written)")
    }
    return value
}

/// A request as the library reads it.
func encode(_ request: [String: Any]) throws -> String {
    guard JSONSerialization.isValidJSONObject(request) else {
        throw KingletError(code: KingletError.argument, message: "the request cannot be written as JSON")
    }
    return String(decoding: try JSONSerialization.data(withJSONObject: request), as: UTF8.self)
}

/// The array that `function` fills when asked a second time.
func array<Element>(
    of zero: Element,
    _ function: (
        UnsafeMutablePointer<Element>?, Int, UnsafeMutablePointer<Int>, UnsafeMutablePointer<kinglet_error>
    ) -> kinglet_status
) throws -> [Element] {
    var count = 0
    do {
        try call { function(nil, 0, &count, $0) }
    } catch let error as KingletError where error.code == Int32(KINGLET_ERR_TOO_SMALL) {}
    var elements = [Element](repeating: zero, count: count)
    try elements.withUnsafeMutableBufferPointer { buffer in
        _ = try call { function(buffer.baseAddress, buffer.count, &count, $0) }
    }
    return elements
}

/// A model's options, which `body` passes on while the texts in them live.
func withModelOptions<Result>(
    _ options: Model.Options, _ body: (UnsafePointer<kinglet_model_options>) throws -> Result
) rethrows -> Result {
    try withCStrings(options.backend, options.tuningFolder) { backend, folder in
        var native = kinglet_model_options()
        native.struct_size = UInt32(MemoryLayout<kinglet_model_options>.size)
        native.backend = backend
        native.threads = options.threads
        native.memory_budget = options.memoryBudget
        native.prefix_cache = options.prefixCache
        native.gpu_layers = options.gpuLayers
        native.gpu_memory = options.gpuMemory
        native.gpu_import = options.gpuImport ? 1 : 0
        native.tuning_folder = folder
        native.tuning = options.tuneInt8 ? UInt32(KINGLET_TUNE_INT8) : 0
        native.flags = (options.validate ? UInt32(KINGLET_MODEL_VALIDATE) : 0) | (options.copy ? UInt32(KINGLET_MODEL_COPY) : 0)
        return try body(&native)
    }
}

/// Two texts as C has them while `body` runs, the second one NULL for nil.
private func withCStrings<Result>(
    _ first: String, _ second: String?, _ body: (UnsafePointer<CChar>, UnsafePointer<CChar>?) throws -> Result
) rethrows -> Result {
    try first.withCString { first in
        guard let second else { return try body(first, nil) }
        return try second.withCString { try body(first, $0) }
    }
}

extension Session.Options {
    var native: kinglet_session_options {
        var native = kinglet_session_options()
        native.struct_size = UInt32(MemoryLayout<kinglet_session_options>.size)
        native.context_tokens = context
        native.chunk_tokens = chunk
        switch kv {
        case nil: native.kv_type = 0
        case .f16: native.kv_type = Int32(KINGLET_KV_F16)
        case .f32: native.kv_type = Int32(KINGLET_KV_F32)
        case .q8: native.kv_type = Int32(KINGLET_KV_Q8_0)
        }
        return native
    }
}

/// Bytes that a model with one session takes. Of the weights `mapped` are read in place from the file; the rest of the total is
/// allocated.
public struct Memory: Sendable {
    public let weights, kvCache, activations, scratch, adapters, total, mapped: UInt64

    /// What `function` writes.
    init(
        _ function: (UnsafeMutablePointer<kinglet_memory>, UnsafeMutablePointer<kinglet_error>) -> kinglet_status
    ) throws {
        var native = kinglet_memory()
        native.struct_size = UInt32(MemoryLayout<kinglet_memory>.size)
        try call { function(&native, $0) }
        weights = native.weights
        kvCache = native.kv_cache
        activations = native.activations
        scratch = native.scratch
        adapters = native.adapters
        total = native.total
        mapped = native.mapped
    }
}

/// Runs `work`, which blocks, on a thread of `queue`; when the task is cancelled, `stop` ends it.
func blocking<Result>(
    on queue: DispatchQueue, stop: @escaping @Sendable () -> Void = {}, _ work: @escaping () throws -> Result
) async throws -> Result {
    try await withTaskCancellationHandler {
        try await withCheckedThrowingContinuation { continuation in
            queue.async { continuation.resume(with: Swift.Result(catching: work)) }
        }
    } onCancel: {
        stop()
    }
}
