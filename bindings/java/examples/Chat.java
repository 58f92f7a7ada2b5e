// Asks a model one question and shows the answer as it comes.   Chat MODEL.gguf "QUESTION"

import java.util.List;
import java.util.Map;
import kinglet.*;

final class Chat {
    public static void main(String[] arguments) {
        Map<String, Object> request = Map.of(
                "messages", List.of(Map.of("role", "user", "content", arguments[1])), "max_tokens", 200);
        try (Model model = Model.open(arguments[0]);
                Session session = model.session();
                Generation answer = session.generate(request)) {
            for (Piece piece : answer) {
                System.out.print(piece.text);
                System.out.flush();
            }
        }
        System.out.println();
    }
}
