"""The embedding rests on the host only where a GPU reads it from there (that it does: tests/gpu/test_joint.py)."""

from typing import Any

import torch

from tasks.gptoss.embedding import rest_embedding
from tests.tiny import make_model


def test_without_a_gpu_it_stays_as_it_is():
    model: Any = make_model(0)
    embedding = model.get_input_embeddings()
    weight = embedding.weight.detach().clone()
    assert rest_embedding(model) == ""
    assert "forward" not in vars(embedding)
    torch.testing.assert_close(embedding.weight.detach(), weight, rtol=0, atol=0)
