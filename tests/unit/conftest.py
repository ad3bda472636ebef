"""Fixtures of the unit tests."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from checkpoints import SavedOf, stock
from families import tiny_model
from locas import sites
from locas.backbone import Backbone
from locas.cli import main
from locas.sites import FAMILIES, Family
from memory_files import small_memory
from tokens import tiny_backbone

ModelOf = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def model_of() -> ModelOf:
    """`tiny_model`, each model made once: whoever changes one must ask for a model of their own."""
    return functools.cache(tiny_model)


@pytest.fixture(scope="session")
def saved_of(tmp_path_factory: pytest.TempPathFactory) -> SavedOf:
    """(model, folder) of a tiny model as save_pretrained leaves it; made once, never changed."""

    @functools.cache
    def save(name: str, dtype: torch.dtype = torch.float64, shard: str = "1GB") -> tuple[PreTrainedModel, Path]:
        model, folder = tiny_model(name, dtype), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size=shard)
        model = stock(folder, dtype)  # GPT-J's positions are not stored, and come out otherwise than in tiny_model
        (folder / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
        (folder / "LICENSE").write_bytes(b"a licence\r\n")
        (folder / "pytorch_model.bin").write_bytes(b"the same weights in another container")
        return model, folder

    return save


@pytest.fixture(params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, model_of: ModelOf) -> Backbone:
    """Locas-GLU with top-k, and Locas-MLP whose empty slots are filled while reading."""
    return tiny_backbone(model_of(request.param, torch.float32))


@pytest.fixture
def llama(model_of: ModelOf) -> Backbone:
    """A tiny gated one, in float32."""
    return tiny_backbone(model_of("llama", torch.float32))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a run may leave its memory; nothing is there yet."""
    return tmp_path / "m.safetensors"


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """locas.sites.FAMILIES, to be changed freely: restored afterwards."""
    monkeypatch.setattr(sites, "FAMILIES", list(FAMILIES))
    return sites.FAMILIES


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """(a file to overwrite, the bytes of a real memory file)."""
    path = tmp_path_factory.mktemp("store") / "m.safetensors"
    small_memory().save(path)
    return path, path.read_bytes()


@pytest.fixture(scope="session")
def read_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a memory of it, made with the built-in backbone."""
    folder = tmp_path_factory.mktemp("read")
    license_ = (Path(__file__).parents[2] / "LICENSE").read_text()
    (folder / "a.txt").write_text(license_[:5000])
    size = ["--window", "128", "--chunk", "64", "--rank", "8"]
    assert main(["memorize", str(folder / "a.txt"), "-o", str(folder / "m.safetensors"), *size]) == 0
    return folder
