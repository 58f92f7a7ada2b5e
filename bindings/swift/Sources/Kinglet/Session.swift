// Sessions, and the answers under way in them.

import CKinglet
import Dispatch

/// One conversation. It takes one call at a time: a second one throws `KingletError.busy`.
public final class Session: @unchecked Sendable {
    /// How a session is set up.
    public struct Options: Sendable {
        /// How keys and values are kept.
        public enum KV: Sendable { case f16, f32, q8 }
        /// Tokens that the window holds; 0: as many as the model was trained for.
        public var context: Int32 = 0
        public var kv: KV?
        /// Most tokens of a prompt that are computed at once; 0: 512.
        public var chunk: Int32 = 0

        public init() {}
    }

    let pointer: OpaquePointer
    private let queue = DispatchQueue(label: "kinglet.session")

    init(_ pointer: OpaquePointer) { self.pointer = pointer }
    deinit { kinglet_session_free(pointer) }

    /// Answers a conversation; what the session has read of it is not computed again. `request` has the keys of
    /// `kinglet_generate`: `max_tokens`, `stop`, `tools`, `sampling` and more.
    public func chat(_ messages: [[String: Any]], _ request: [String: Any] = [:]) throws -> Generation {
        try generate(request.merging(["messages": messages]) { _, given in given })
    }

    /// Continues a text, without the chat template.
    public func complete(_ prompt: String, _ request: [String: Any] = [:]) throws -> Generation {
        try generate(request.merging(["prompt": prompt]) { _, given in given })
    }

    /// Answers a request with either `messages` or `prompt` in it.
    public func generate(_ request: [String: Any]) throws -> Generation {
        let written = try encode(request)
        return Generation(try make { kinglet_generate(pointer, written, $0, $1) })
    }

    /// Reads tokens; stops when the task is cancelled.
    public func feed(_ tokens: [Int32]) async throws {
        try await blocking(on: queue, stop: { [self] in cancel() }) { [self] in
            _ = try call { kinglet_session_feed(pointer, tokens, tokens.count, $0) }
        }
    }

    /// The logits of what follows the tokens fed last, one for each token of the vocabulary.
    public func logits() throws -> [Float] {
        try array(of: Float(0)) { kinglet_session_logits(pointer, $0, $1, $2, $3) }
    }

    /// Reads tokens and gives the log-probability of each but the first; stops when the task is cancelled.
    public func score(_ tokens: [Int32]) async throws -> [Float] {
        try await blocking(on: queue, stop: { [self] in cancel() }) { [self] in
            var scores = [Float](repeating: 0, count: max(tokens.count - 1, 0))
            let count = scores.count
            try call { kinglet_session_score(pointer, tokens, tokens.count, &scores, count, $0) }
            return scores
        }
    }

    /// What tokens mean together, as a direction of length 1; the window is left as it is.
    public func embed(_ tokens: [Int32]) async throws -> [Float] {
        try await blocking(on: queue, stop: { [self] in cancel() }) { [self] in
            try array(of: Float(0)) { kinglet_session_embed(pointer, tokens, tokens.count, $0, $1, $2, $3) }
        }
    }

    /// Writes the window to a file.
    public func save(to path: String) throws { try call { kinglet_session_save(pointer, path, $0) } }

    /// Takes the window from a file of `save`, in place of this one.
    public func load(from path: String) throws { try call { kinglet_session_load(pointer, path, $0) } }

    /// A second session that has read the same tokens.
    public func fork() throws -> Session { Session(try make { kinglet_session_fork(pointer, $0, $1) }) }

    /// Forgets all tokens.
    public func reset() throws { try call { kinglet_session_reset(pointer, $0) } }

    /// Keeps the first `count` tokens.
    public func rewind(to count: Int) throws { try call { kinglet_session_rewind(pointer, count, $0) } }

    /// How many tokens the window holds.
    public func count() throws -> Int {
        var count = 0
        try call { kinglet_session_token_count(pointer, &count, $0) }
        return count
    }

    /// What the session takes now.
    public func memory() throws -> Memory { try Memory { kinglet_session_memory(pointer, $0, $1) } }

    /// Puts adapters in force, each with its scale, in place of those before; none for the model as it is.
    public func setAdapters(_ adapters: [(Adapter, Float)]) throws {
        let pointers: [OpaquePointer?] = adapters.map { $0.0.pointer }
        let scales = adapters.map { $0.1 }
        try withExtendedLifetime(adapters) {
            _ = try call { kinglet_session_set_adapters(pointer, pointers, scales, pointers.count, $0) }
        }
    }

    /// Stops `feed`, `score` or `embed`, if one is running.
    public func cancel() { kinglet_session_cancel(pointer) }
}

/// A piece of an answer: whole characters, and the tokens behind them.
public struct Piece: Sendable {
    public let text: String
    public let tokens: [Int32]
}

/// Why an answer ended.
public enum EndReason: Sendable {
    case endOfText, length, stop, contextFull, cancelled

    init?(_ number: Int32) {
        switch number {
        case Int32(KINGLET_END_OF_TEXT): self = .endOfText
        case Int32(KINGLET_END_LENGTH): self = .length
        case Int32(KINGLET_END_STOP): self = .stop
        case Int32(KINGLET_END_CONTEXT_FULL): self = .contextFull
        case Int32(KINGLET_END_CANCELLED): self = .cancelled
        default: return nil
        }
    }
}

/// An answer under way: its pieces, which can be walked once, in one task. The session is busy until the end, or until the
/// answer is forgotten. When the task is cancelled, the answer ends.
public final class Generation: AsyncSequence, AsyncIteratorProtocol, @unchecked Sendable {
    public typealias Element = Piece

    private let pointer: OpaquePointer
    private let queue = DispatchQueue(label: "kinglet.generation")
    private var event = kinglet_event()

    /// Why the answer ended; nil before.
    public private(set) var end: EndReason?

    init(_ pointer: OpaquePointer) {
        self.pointer = pointer
        event.struct_size = UInt32(MemoryLayout<kinglet_event>.size)
    }

    deinit { kinglet_generation_free(pointer) }

    public var promptTokens: Int { Int(event.prompt_tokens) }
    public var reusedTokens: Int { Int(event.reused_tokens) }
    public var outputTokens: Int { Int(event.output_tokens) }
    public var prefillMs: Double { event.prefill_ms }
    public var decodeMs: Double { event.decode_ms }

    public func makeAsyncIterator() -> Generation { self }

    /// The next piece; nil at the end.
    public func next() async throws -> Piece? {
        try await blocking(on: queue, stop: { [self] in cancel() }) { [self] in try pull() }
    }

    private func pull() throws -> Piece? {
        while try call({ kinglet_generation_next(pointer, &event, $0) }) == Int32(KINGLET_OK) {
            switch event.kind {
            case Int32(KINGLET_EVENT_TEXT):
                // Both point into the library, until the next call.
                let text = UnsafeRawBufferPointer(start: event.text, count: event.text_len)
                let tokens = UnsafeBufferPointer(start: event.tokens, count: event.n_tokens)
                return Piece(text: String(decoding: text, as: UTF8.self), tokens: Array(tokens))
            case Int32(KINGLET_EVENT_END):
                end = EndReason(event.end_reason)
            default:
                break
            }
        }
        return nil
    }

    /// The rest of the answer.
    public func read() async throws -> String {
        var whole = ""
        while let piece = try await next() { whole += piece.text }
        return whole
    }

    /// The answer so far as a message, with calls of tools told from text; it may go back into `chat`.
    public func message() throws -> [String: Any] { try json { kinglet_generation_message_json(pointer, $0, $1) } }

    /// Ends the answer, from any thread.
    public func cancel() { kinglet_generation_cancel(pointer) }
}
