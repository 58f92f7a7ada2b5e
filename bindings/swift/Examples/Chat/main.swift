// Asks a model one question and shows the answer as it comes.   Chat MODEL.gguf "QUESTION"
import Kinglet

let model = try Model(CommandLine.arguments[1])
let session = try model.session()
let answer = try session.chat([["role": "user", "content": CommandLine.arguments[2]]], ["max_tokens": 200])
for try await piece in answer {
    print(piece.text, terminator: "")
}
print()
