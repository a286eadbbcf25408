"""Rows are nearly full on the lengths that chats have: log-normal, median 400 tokens, cut at the row."""

import random

from tasks.pack import run as subject
from tasks.pack.render import Document
from tasks.specs import PackSpec

ROW_TOKENS = 4096


def test_rows_of_realistic_chats_are_98_pct_full():
    draw = random.Random(0)
    lengths = [min(ROW_TOKENS, max(8, int(draw.lognormvariate(6, 1)))) for _ in range(3000)]
    documents = [Document(row_id=str(n), prompt_ids=[1] * (n // 2), answer_ids=[2] * (n - n // 2)) for n in lengths]
    rows = subject._pack(documents, is_chat=True, spec=PackSpec(row_tokens=ROW_TOKENS))
    assert sum(map(len, rows["input_ids"])) == sum(lengths)  # nothing is cut, nothing doubled
    assert sum(lengths) / (len(rows["input_ids"]) * ROW_TOKENS) > 0.98
    assert max(map(len, rows["input_ids"])) <= ROW_TOKENS
