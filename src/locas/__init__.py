"""Long-term memory for language models that lives in weights: Locas (arXiv:2602.05085).

import locas

backbone = locas.load_backbone()                        # or any folder or hub name
ids, _ = backbone.encode(open("book.txt").read())
memory = locas.create(backbone.model, ids[:256], rank=64)
for record in locas.read(backbone.model, memory, ids):
    print(record.stop, record.nll.mean())
memory.save("book.safetensors")

memory = locas.load("book.safetensors", backbone.model)
with memory.attached(backbone.model):
    backbone.model.generate(...)
"""

from locas._version import __version__
from locas.backbone import Backbone, load_backbone
from locas.initialise import InitSettings
from locas.memory import Memory, create, load, read
from locas.metrics import Score
from locas.sites import FAMILIES, Family
from locas.stream import ChunkRecord, ReadSettings
from locas.write import WriteSettings

__all__ = [
    "FAMILIES",
    "Backbone",
    "ChunkRecord",
    "Family",
    "InitSettings",
    "Memory",
    "ReadSettings",
    "Score",
    "WriteSettings",
    "__version__",
    "create",
    "load",
    "load_backbone",
    "read",
]
