"""Chats with a model in the terminal: python chat.py MODEL.gguf"""

import sys

import kinglet

with kinglet.Model(sys.argv[1]) as model, model.session() as session:
    messages: list[kinglet.Message] = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        answer = session.chat(messages, max_tokens=200)
        text = ""
        for piece in answer:
            print(piece.text, end="", flush=True)
            text += piece.text
        print()
        messages.append({"role": "assistant", "content": text})
