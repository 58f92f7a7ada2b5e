// What every binding must do, on the tiny model that `cargo run -p kinglet-ffi --example tiny` writes.
// Conformance VALUES MODEL LESSONS FOLDER, where VALUES is bindings/conformance.tsv
import Foundation
import Kinglet

let arguments = CommandLine.arguments
let (path, lessons, folder) = (arguments[2], arguments[3], arguments[4])
let lines = try String(contentsOfFile: arguments[1], encoding: .utf8).split(separator: "\n")
let values = Dictionary(uniqueKeysWithValues: lines.map { line in
    let pair = line.split(separator: "\t", maxSplits: 1)
    return (String(pair[0]), String(pair[1]))
})

func require(_ condition: Bool, _ what: String) {
    if condition { return }
    FileHandle.standardError.write(Data((what + "\n").utf8))
    exit(1)
}

func ids(_ name: String) -> [Int32] { values[name]!.split(separator: " ").map { Int32($0)! } }

func request(_ name: String) -> [String: Any] {
    try! JSONSerialization.jsonObject(with: Data(values[name]!.utf8)) as! [String: Any]
}

func fails(_ code: String, _ word: String = "", _ work: () async throws -> Void) async {
    do {
        try await work()
    } catch let error as KingletError {
        require(error.code == Int32(values[code]!)! && error.message.contains(word), error.message)
        return
    } catch {
        require(false, "\(error)")
    }
    require(false, "nothing was wrong, but \(code) was to come")
}

func openModel() throws -> Model {
    var options = Model.Options()
    options.backend = "cpu"
    options.threads = 2
    return try Model(path, options)
}

func tokens(of answer: Generation) async throws -> [Int32] {
    var tokens: [Int32] = []
    for try await piece in answer { tokens += piece.tokens }
    return tokens
}

func texts(_ model: Model) throws {
    let tokens = try model.tokenize(values["text"]!)
    require(tokens == ids("text_tokens"), "tokens of the text")
    require(try model.detokenize(tokens) == values["text"]!, "text of the tokens")
    let bytes = try tokens.flatMap { try model.bytes(of: $0) }
    require(bytes == Array(values["text"]!.utf8), "bytes of the tokens")
    require(try model.tokenize("").isEmpty, "no text has no tokens")
}

func answers(_ model: Model) async throws {
    let session = try model.session()
    require(try await tokens(of: session.generate(request("greedy_request"))) == ids("greedy_tokens"), "greedy tokens")
    let prompt = Int(values["chat_prompt_tokens"]!)!
    for reused in [0, prompt - 1] {
        let answer = try session.generate(request("chat_request"))
        require(try await tokens(of: answer) == ids("chat_tokens"), "tokens of the chat")
        require(answer.end == .length && answer.promptTokens == prompt, "end of the chat")
        require(answer.reusedTokens >= reused, "what is read is kept")
    }
    try session.reset()
    let text = ids("text_tokens")
    try await session.feed(Array(text.dropLast()))
    let fork = try session.fork()
    try await fork.feed([text.last!])
    try await session.feed([text.last!])
    require(try fork.logits() == session.logits(), "logits of the fork")
    try session.rewind(to: 1)
    require(try session.count() == 1 && fork.count() == text.count, "a fork goes its own way")
    require(try await fork.score(text).allSatisfy { $0 < 0 }, "log-probabilities")
}

func splitUtf8(_ model: Model) async throws {
    var pieces: [String] = []
    for try await piece in try model.session().generate(request("emoji_request")) { pieces.append(piece.text) }
    require(pieces.count == Int(values["emoji_pieces"]!)! && pieces.joined() == values["emoji_text"]!, "pieces of the emoji")
    require(pieces.allSatisfy { $0.isEmpty || $0 == values["emoji_text"]! }, "a character was split")
}

func structured(_ model: Model) async throws {
    let session = try model.session()
    for _ in 0..<5 {
        let answer = try session.generate(request("schema_request"))
        let text = try await answer.read()
        let value = try JSONSerialization.jsonObject(with: Data(text.utf8)) as! [String: Any]
        require(value["name"] is String && (0...99).contains(value["age"] as! Int) && value.count == 2, text)
        require(answer.end == .endOfText, "the end of the schema is the end")
        require(try answer.message()["content"] as? String == text, "the message")
    }
    await fails("unknown_key_code", values["wrong_schema"]!) { _ = try session.generate(request("wrong_schema_request")) }
}

func errors(_ model: Model) async throws {
    let session = try model.session()
    await fails("missing_model_code") { _ = try Model("/no/such/model") }
    var options = Model.Options()
    options.backend = "cpu"
    options.gpuLayers = 1
    options.gpuImport = true
    let onCpu = try Model(path, options)
    await fails("wrong_options_code", values["layers_on_cpu"]!) { _ = try onCpu.session() }
    options.tuningFolder = ""
    let wrong = options
    await fails("wrong_options_code", values["empty_folder"]!) { _ = try Model(path, wrong) }
    await fails("unknown_key_code", values["unknown_key"]!) { _ = try session.generate(request("unknown_key_request")) }
    await fails("context_full_code") { try await session.feed([Int32](repeating: 1, count: 100_000)) }
    let answer = try session.generate(request("greedy_request"))
    await fails("busy_code") { try session.reset() }
    _ = try await answer.read()
    try session.reset()
}

func cancels(_ model: Model) async throws {
    let session = try model.session()
    let answer = try session.generate(request("endless_request"))
    _ = try await answer.next()
    await Task.detached { answer.cancel() }.value
    _ = try await answer.read()
    require(answer.end == .cancelled, "the end of a cancelled answer")

    let endless = try session.generate(request("endless_request"))
    let task = Task { try await endless.read() }
    task.cancel()
    _ = try await task.value
    require(endless.end == .cancelled, "the end of a cancelled task's answer")
}

func windows(_ model: Model) async throws {
    let (session, other) = (try model.session(), try model.session())
    let (prompt, window) = (ids("text_tokens"), folder + ".window")
    let direction = try await session.embed(prompt)
    require(abs(direction.reduce(0) { $0 + $1 * $1 } - 1) < 1e-4, "a direction")
    require(try session.count() == 0, "the window as it was")
    try await session.feed(prompt)
    try session.save(to: window)
    try other.load(from: window)
    await fails("damaged_window_code") { try other.load(from: path) }
    try await session.feed([prompt.last!])
    try await other.feed([prompt.last!])
    require(try session.logits() == other.logits(), "a window from a file goes on")

    let answer = try other.generate(request("greedy_request"))
    try model.suspend()
    await fails("suspended_code") { _ = try await answer.next() }
    try model.resume()
    require(try await tokens(of: answer) == ids("greedy_tokens"), "an answer goes on after the model was suspended")
    require(try model.trim() > 0, "sessions have memory to give back")
    require(try await tokens(of: other.generate(request("greedy_request"))) == ids("greedy_tokens"), "and take it anew")
}

func anyOrder() async throws {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        var model: Model? = try openModel()
        var session = try model?.session()
        var answer = try session?.generate(request("greedy_request"))
        for which in order {
            if which == 0 { model = nil }
            if which == 1 { session = nil }
            if which == 2 {
                require(try await tokens(of: answer!) == ids("greedy_tokens"), "an answer without its parents")
                answer = nil
            }
        }
    }
}

func training(_ model: Model) async throws {
    let losses = values["training_losses"]!.split(separator: " ").map { Double($0)! }
    let trainer = try model.train([lessons], output: folder, request("training_config"))
    trainer.cancel()
    await fails("cancelled_code") { _ = try await trainer.next() }
    var step = 0
    for try await report in trainer {
        require(report.step == step + 1 && report.steps == losses.count && !report.rolledBack, "the number of the step")
        require(abs(report.loss - losses[step]) < 0.02, "the loss of the step: \(report.loss)")
        step += 1
    }
    require(step == losses.count, "the training's end")
    try trainer.finish()
    let session = try model.session()
    // An adapter and its opposite are the model as it is.
    try session.setAdapters([(trainer.adapter(), 1), (model.adapter(folder + "/adapter.gguf"), -1)])
    require(try await tokens(of: session.generate(request("greedy_request"))) == ids("greedy_tokens"), "an adapter and its opposite")
}

let tiny = try openModel()
require(!Kinglet.version.isEmpty && (try Kinglet.devices())[0]["backend"] as? String == "cpu", "a version and a CPU")
require(try tiny.info()["family"] as? String == "llama", "the family")
require(try tiny.chatTemplate()?.contains("im_start") == true, "the template")
require(try Kinglet.estimate(path).total >= tiny.session().memory().total, "an estimate")
try texts(tiny)
try await answers(tiny)
try await splitUtf8(tiny)
try await structured(tiny)
try await errors(tiny)
try await cancels(tiny)
try await windows(tiny)
try await training(tiny)
try await anyOrder()
print("conforms")
