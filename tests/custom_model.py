"""A causal language model that no library knows."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import VOCAB


class Block(nn.Module):
    """A decoder layer of a family that locas does not know: FFN with odd names, no attention."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.ffn = nn.Module()
        self.ffn.one = nn.Linear(d_model, d_ff)
        self.ffn.two = nn.Linear(d_ff, d_model)
        self.ffn.forward = lambda x: self.ffn.two(F.silu(self.ffn.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class Custom(nn.Module):
    """A causal LM in no library, with weights that depend on no random generator."""

    def __init__(self, d_model: int = 11, d_ff: int = 17, layers: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="custom")
        self.embed = nn.Embedding(VOCAB, d_model)
        self.blocks = nn.ModuleList(Block(d_model, d_ff) for _ in range(layers))
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                steps = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
                parameter.copy_((steps * 7 + index * 13) % 31 / 16 - 1)  # exact in bfloat16

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.T


CUSTOM = {"layers": "blocks", "entry": "ffn", "exit": "ffn", "up": "ffn.one", "down": "ffn.two"}
