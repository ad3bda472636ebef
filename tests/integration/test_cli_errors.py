"""What the command line says where it cannot go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from locas.backbone import load_backbone
from processes import SMALL, Main, sentences

pytestmark = pytest.mark.integration

ON_A_GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."


def on_a_cpu() -> RuntimeError:
    """What torch itself raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)  # no machine has a pebibyte
    return caught.value


def raising(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


# -------------------------------------------------------------------- memory runs out


@pytest.mark.parametrize(
    ("error", "more", "message"),
    [
        (
            torch.OutOfMemoryError(ON_A_GPU),
            (),
            "the GPU's memory is not enough (20.00 GiB more were asked for); try --recompute-ffn, a shorter "
            "--chunk, a shorter --window, a memory in fewer layers (--layers upper-half) or --device cpu",
        ),
        (
            on_a_cpu(),
            ("--recompute-ffn", "--layers", "0", "--attention-gradient", "full", "--model", "tiny-glu"),
            "this machine's memory is not enough (1,073,741,824.0 MiB more were asked for); try "
            "--attention-gradient values, a shorter --chunk, a shorter --window, --dtype bfloat16 or a smaller --model",
        ),
        (
            MemoryError(),
            ("--batch", "2"),
            "this machine's memory is not enough; try --recompute-ffn, a shorter --chunk, a shorter --window, "
            "a smaller --batch, a memory in fewer layers (--layers upper-half) or --dtype bfloat16",
        ),
    ],
)
def test_memory_runs_out_while_reading(
    error: BaseException, more: tuple[str, ...], message: str,
    tale: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("locas.stream.Reader.next_chunk", raising(error))
    arguments = [a for a in SMALL if a not in ("--device", "cpu")]
    status, out, err = main("memorize", tale, "-o", tmp_path / "m", *arguments, *more, "--json")
    assert (status, err) == (1, f"error: {message}\n")
    assert json.loads(out) == {"error": message}


def test_memory_runs_out_while_the_backbone_is_loaded(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter windows do not help there."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", raising(torch.OutOfMemoryError(ON_A_GPU)))
    status, _, err = main("generate", "It was", "--dtype", "float32", "--device", "auto")
    assert status == 1
    assert err == (
        "error: the GPU's memory is not enough to load the backbone (20.00 GiB more were asked for); "
        "try --dtype bfloat16 or --device cpu\n"
    )
    with pytest.raises(torch.OutOfMemoryError) as caught:
        load_backbone()
    assert caught.value.__notes__[-1].startswith("while the model 'tiny-glu' was loaded in ")


def test_other_errors_of_torch_keep_their_traceback(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locas.cli.talk.continuation", raising(RuntimeError("The size of tensor a (3) must match")))
    with pytest.raises(RuntimeError, match="must match"):
        main("generate", "It was")
    monkeypatch.setattr("locas.cli.talk.continuation", raising(MemoryError()))
    monkeypatch.setenv("LOCAS_TRACEBACK", "1")
    with pytest.raises(MemoryError):
        main("generate", "It was")


# -------------------------------------------------------------------- what is said on the way


def test_downloads_have_bars_and_loading_has_none(main: Main) -> None:
    huggingface_hub.utils.disable_progress_bars()
    main("info", "nothing")
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    assert not transformers.logging.is_progress_bar_enabled()


def test_a_folder_with_an_empty_file(tmp_path: Path, main: Main) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text(sentences(5))
    status, out, err = main("memorize", folder, "-o", tmp_path / "m.safetensors", *SMALL, "--json")
    assert status == 0
    assert f"skipped {folder / '__init__.py'}: it is empty\n" in err
    assert [d["name"] for d in json.loads(out)["documents"]] == ["a.py"]
