"""A tiny gpt-oss that was taught two chats by heart, so that what it says is known: reasoning and a final answer."""

from pathlib import Path

import torch

from tests.tiny import byte_tokenizer, make_model

CHATS = {"hi": ("short", "やあ、こんにちは!"), "who?": ("a name", "Tatara, a furnace.")}


def teach(folder: Path) -> Path:
    """Save the model and its tokenizer. Cost: some seconds."""
    tokenizer, model = byte_tokenizer(), make_model().train()
    rows = [_row(tokenizer, question, *answer) for question, answer in CHATS.items()]
    length = max(map(len, rows))
    ids = torch.tensor([row + [261] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(ids == 261, -100)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        loss = model(input_ids=ids, attention_mask=(ids != 261).long(), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.01:
            break
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row(tokenizer, question, reasoning, answer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    thought = f"<|channel|>analysis<|message|>{reasoning}<|end|>"
    final = f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    return tokenizer(prompt + thought + final)["input_ids"]
