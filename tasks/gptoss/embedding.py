"""A frozen embedding that rests in the host's memory: a GPU kernel reads the few rows that a pass needs over the bus.

gpt-oss-20b's table is 1.2 GB on the GPU, of which a pass of 4,096 tokens reads 24 MB: half a millisecond on PCIe 5.

Ring: edge (live tensors, CUDA).  Shapes: B batch, T tokens, V vocabulary, H hidden.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn

from tasks.gptoss.fused import power_of_two


def rest_embedding(model: Any) -> str:  # Any: a PeftModel or transformers model of gpt-oss
    """Move the input embedding into pinned memory of the host, where that can be done; return what is to be said of it.

    Not a table that is trained, or that the head shares. What is left of it on the GPU is one NaN, so that nothing
    else can read it unnoticed.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight
    if type(embedding) is not nn.Embedding or weight.requires_grad or not weight.is_cuda or head.weight is weight:
        return ""
    table_VH = weight.data.cpu()
    cudart: Any = torch.cuda.cudart()  # Any: its stubs may be None
    if int(cudart.cudaHostRegister(table_VH.data_ptr(), table_VH.nbytes, 0)):
        return "the embedding stays on the GPU: the system refused to pin its memory"
    weight.data = torch.full((1, 1), float("nan"), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    embedding.forward = MethodType(_Lookup(table_VH), embedding)
    return f"the embedding rests in the host's memory: {table_VH.nbytes:,} bytes"


class _Lookup:
    def __init__(self, table_VH: torch.Tensor) -> None:
        self.table_VH = table_VH

    def __call__(self, embedding: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
        look_up = _triton().look_up
        num_ids, width = self.table_VH.shape
        rows = torch.empty(*input.shape, width, dtype=self.table_VH.dtype, device=input.device)
        if input.numel():
            block = power_of_two(width)
            look_up[(input.numel(),)](self.table_VH, input.contiguous(), rows, num_ids, width, BLOCK=block)
        return rows


def _triton() -> Any:  # Any: a module of Triton kernels, which exists with CUDA builds of torch only
    from tasks.gptoss import embedding_triton

    return embedding_triton
