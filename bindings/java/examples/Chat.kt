// Asks a model one question and shows the answer as it comes.   ChatKt MODEL.gguf "QUESTION"

import kinglet.Model

fun main(arguments: Array<String>) {
    val messages = listOf(mapOf("role" to "user", "content" to arguments[1]))
    Model.open(arguments[0]).use { model ->
        model.session().use { session ->
            session.generate(mapOf("messages" to messages, "max_tokens" to 200)).use { answer ->
                for (piece in answer) print(piece.text)
                println()
                System.err.println("${answer.outputTokens} tokens, end: ${answer.end}")
            }
        }
    }
}
