// Models, and the library itself.

import CKinglet
import Dispatch
import Foundation

/// The library itself.
public enum Kinglet {
    /// The version of the library.
    public static var version: String { String(cString: kinglet_version()) }

    /// How the library was built and what it uses of this processor.
    public static func build() throws -> [String: Any] { try json { kinglet_build_json($0, $1) } }

    /// The devices that models can run on; `backend` of each is what `Model.Options` takes.
    public static func devices() throws -> [[String: Any]] { try json { kinglet_devices_json($0, $1) } }

    /// What opening a model and one session with a full window would take. Nothing is allocated.
    public static func estimate(
        _ path: String, _ model: Model.Options = .init(), session: Session.Options = .init()
    ) throws -> Memory {
        try withModelOptions(model) { options in
            var native = session.native
            return try Memory { kinglet_model_estimate(path, options, &native, $0, $1) }
        }
    }
}

/// Weights with tokenizer and chat template, shared by any number of sessions.
public final class Model: @unchecked Sendable {
    /// How a model is opened.
    public struct Options: Sendable {
        /// `auto` (the best GPU, else the CPU), `cpu`, `gpu` or `gpu:1`.
        public var backend = "auto"
        /// Of each session and trainer; 0: one per core.
        public var threads: Int32 = 0
        /// Most bytes that the file and one session, or trainer, take together; 0: no limit.
        public var memoryBudget: UInt64 = 0
        /// Most bytes for prompts that were read, so that sessions that begin alike share the work; 0: none.
        public var prefixCache: UInt64 = 0
        /// How many of the last layers a GPU runs, while the CPU runs the others; 0: all, or as many as its memory holds.
        public var gpuLayers: Int32 = 0
        /// Most bytes of a GPU's memory that a session takes: it gets as many layers as that holds; 0: no limit.
        public var gpuMemory: UInt64 = 0
        /// Read the weights on a GPU from the mapped file, without a copy, where its driver allows that; for one in the processor.
        public var gpuImport = false
        /// Where the times of a GPU's kernels are kept, which are timed once then, and the quickest taken; nil: none are timed.
        public var tuningFolder: String?
        /// Let products of eight bits compete too: quicker for some, but rounded more. With a folder only.
        public var tuneInt8 = false
        /// Read all weights on opening, and refuse NaN and infinity.
        public var validate = false
        /// Read the file into memory instead of mapping it: for files that others change.
        public var copy = false

        public init() {}
    }

    let pointer: OpaquePointer

    /// Opens the GGUF file at `path`; of a model in several files, any one of them.
    public init(_ path: String, _ options: Options = .init()) throws {
        pointer = try withModelOptions(options) { native in try make { kinglet_model_open(path, native, $0, $1) } }
    }

    /// Opens the model that takes `length` bytes (0: all) from `offset` of an open file, which may be closed afterwards.
    public init(descriptor: Int32, offset: UInt64 = 0, length: UInt64 = 0, _ options: Options = .init()) throws {
        pointer = try withModelOptions(options) { native in
            try make { kinglet_model_open_fd(descriptor, offset, length, native, $0, $1) }
        }
    }

    /// Opens the model in `data`, which is copied.
    public init(_ data: Data, _ options: Options = .init()) throws {
        var options = options
        options.copy = true
        pointer = try withModelOptions(options) { native in
            try data.withUnsafeBytes { bytes in
                try make { kinglet_model_open_memory(bytes.baseAddress, bytes.count, nil, nil, native, $0, $1) }
            }
        }
    }

    deinit { kinglet_model_free(pointer) }

    /// What the model is.
    public func info() throws -> [String: Any] { try json { kinglet_model_info_json(pointer, $0, $1) } }

    /// Its chat template; nil for a base model.
    public func chatTemplate() throws -> String? { try text { kinglet_model_chat_template(pointer, $0, $1) } }

    /// The tokens of a text; `special` adds BOS and EOS where the model wants them, `control` reads control tokens.
    public func tokenize(_ content: String, special: Bool = false, control: Bool = false) throws -> [Int32] {
        let flags = (special ? UInt32(KINGLET_TOKENIZE_SPECIAL) : 0) | (control ? UInt32(KINGLET_TOKENIZE_CONTROL) : 0)
        let length = content.utf8.count
        return try array(of: Int32(0)) { kinglet_tokenize(pointer, content, length, flags, $0, $1, $2, $3) }
    }

    /// The text of tokens.
    public func detokenize(_ tokens: [Int32], control: Bool = false) throws -> String {
        let flags = control ? UInt32(KINGLET_DETOKENIZE_CONTROL) : 0
        let bytes = try array(of: CChar(0)) {
            kinglet_detokenize(pointer, tokens, tokens.count, flags, $0, $1, $2, $3)
        }
        return String(decoding: bytes.map(UInt8.init(bitPattern:)), as: UTF8.self)
    }

    /// The bytes of one token, which may be a part of a character.
    public func bytes(of token: Int32, control: Bool = false) throws -> [UInt8] {
        let flags = control ? UInt32(KINGLET_DETOKENIZE_CONTROL) : 0
        return try array(of: UInt8(0)) { kinglet_token_bytes(pointer, token, flags, $0, $1, $2, $3) }
    }

    /// Gives back memory that can be had again, and says how many bytes: for a memory warning.
    @discardableResult
    public func trim() throws -> UInt64 {
        var freed: UInt64 = 0
        try call { kinglet_model_trim(pointer, &freed, $0) }
        return freed
    }

    /// Lets nothing compute with the model until `resume`, as iOS wants it of an application in the background: what would
    /// throws `KingletError.suspended`. Returns when nothing does any more.
    public func suspend() throws { try call { kinglet_model_suspend(pointer, $0) } }

    /// Takes `suspend` back.
    public func resume() throws { try call { kinglet_model_resume(pointer, $0) } }

    /// A conversation.
    public func session(_ options: Session.Options = .init()) throws -> Session {
        var native = options.native
        return Session(try make { kinglet_session_create(pointer, &native, $0, $1) })
    }

    /// The LoRA adapter at `path`: a GGUF file, or a folder as PEFT writes it.
    public func adapter(_ path: String) throws -> Adapter {
        Adapter(try make { kinglet_adapter_open(pointer, path, $0, $1) })
    }

    /// Writes a new model file with adapters inside; changed matrices get the type `quant`, or keep theirs.
    public func merge(_ adapters: [(Adapter, Float)], to path: String, quant: String? = nil) throws {
        let pointers: [OpaquePointer?] = adapters.map { $0.0.pointer }
        let scales = adapters.map { $0.1 }
        try withExtendedLifetime(adapters) {
            _ = try call { kinglet_adapter_merge(pointer, pointers, scales, pointers.count, path, quant, $0) }
        }
    }

    /// A training on `data`, which writes into the folder `output`. Settings are those of `kinglet_trainer_create`.
    public func train(_ data: [String], output: String, _ config: [String: Any] = [:]) throws -> Trainer {
        let given: [String: Any] = ["data": data, "output": output]
        let request = try encode(given.merging(config) { _, own in own })
        return Trainer(try make { kinglet_trainer_create(pointer, request, $0, $1) })
    }
}

/// A LoRA adapter: small trained corrections to a model.
public final class Adapter: @unchecked Sendable {
    let pointer: OpaquePointer

    init(_ pointer: OpaquePointer) { self.pointer = pointer }
    deinit { kinglet_adapter_free(pointer) }

    /// What the adapter is.
    public func info() throws -> [String: Any] { try json { kinglet_adapter_info_json(pointer, $0, $1) } }
}
