"""`locas memorize --batch`: a memory for each text, also when it is killed and goes on."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from locas.backbone import Backbone, load_backbone
from locas.cli import main
from locas.memory import load
from locas.store import load_tensors
from processes import Forks, sentences

pytestmark = pytest.mark.integration

SIZES = ("--window", "128", "--chunk", "64", "--rank", "8")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of about 330, 150 and 240 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / name for name in ("a.txt", "b.txt", "c.txt")]
    for seed, (path, n) in enumerate(zip(paths, (37, 17, 27), strict=True)):
        path.write_text(sentences(n, seed=seed))
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_a_batch_is_read_as_its_texts_are_alone_and_survives_kills(
    texts: list[Path], tmp_path: Path, forks: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("memorize", *texts, "--batch", "2", *SIZES, "--json")
    results = json.loads(forks.run(*arguments, "-o", tmp_path / "whole").stdout)
    whole = contents(tmp_path / "whole")
    assert list(whole) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert [d["name"] for d in results["documents"]] == ["a.txt", "b.txt", "c.txt"]
    assert results["failed"] == []
    for key in ("tokens", "bytes", "nll"):
        assert results[key] == pytest.approx(sum(d[key] for d in results["documents"]))
    for path, document in zip(texts, results["documents"], strict=True):
        alone = tmp_path / f"alone-{path.stem}.safetensors"
        assert main(["memorize", str(path), "-o", str(alone), *SIZES, "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)
        assert document["nll"] == pytest.approx(expected["nll"], rel=1e-5)
        assert document["bytes"] == expected["bytes"] == len(path.read_bytes())
        mine, other = load(document["memory"]), load(alone)
        assert mine.manifest() == other.manifest()
        # Sums in another order: float32's rounding, made larger by each of some five writes.
        torch.testing.assert_close(mine.bank.rows, other.bank.rows, rtol=1e-3, atol=1e-4)

    folder = tmp_path / "killed"
    process = forks.start(*arguments, "-o", folder, "--save-every", "0")
    process.alive_until(lambda: bool(list(folder.glob("*.partial"))))
    time.sleep(0.3)
    process.kill()
    (state,) = folder.glob("*.partial")
    load_tensors(state, kind="locas-batch-run", may_be_nan=("losses.",))
    done = forks.run(*arguments, "-o", folder, "--save-every", "0", "--resume")
    assert "going on at token" in done.stderr
    assert contents(folder) == whole
    assert json.loads(done.stdout)["nll"] == results["nll"]


def test_what_does_not_go_with_a_batch(texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--compare",), "--compare and --batch do not go together"),
        (("--memory", "m", "--grow", "2"), "--memory, --grow and --batch do not go together"),
        (("--memory", "m", "--freeze"), "--memory, --freeze and --batch do not go together"),
        (("--batch", "0"), "a batch has 1 text or more side by side; got 0"),
    ):
        given = ["memorize", str(texts[0]), "-o", str(tmp_path / "m"), "--json", "--batch", "2", *SIZES, *more]
        assert main(given) == 2
        assert message in json.loads(capsys.readouterr().out)["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_fails_is_named(
    texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*args: Any, **more: Any) -> Backbone:
        """The built-in backbone, its states not finite on one token that only the second text has."""
        backbone = load_backbone(*args, **more)
        token = int(backbone.encode("~")[0][-1])
        backbone.model.get_input_embeddings().register_forward_hook(
            lambda _, args, output: output.masked_fill((args[0] == token)[..., None], torch.nan)
        )
        return backbone

    monkeypatch.setattr("locas.cli.common.load_backbone", poisoned)
    (tmp_path / "bad.txt").write_text(sentences(9) + "~\n")
    given = ["memorize", str(texts[1]), str(tmp_path / "bad.txt"), "-o", str(tmp_path / "m"), "--batch", "2", *SIZES]
    for as_json in (True, False):
        assert main([*given, "--json"] if as_json else given) == 1
        out, err = capsys.readouterr()
        assert "bad.txt was left out: the loss on tokens" in " ".join(err.split())
        assert list(contents(tmp_path / "m")) == ["b.safetensors"]
        if as_json:
            assert [d["name"] for d in json.loads(out)["documents"]] == ["b.txt"]
            assert json.loads(out)["failed"][0]["name"] == "bad.txt"
        else:
            assert "1 memory of" in out


def test_a_table_for_people(texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["memorize", *map(str, texts[1:]), "-o", str(tmp_path / "m"), "--batch", "7", *SIZES, "--max-tokens", "90"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "2 memories of 27,648 parameters, 180 tokens in" in shown
    for name in ("b", "c"):
        assert f"{name}.safetensors" in "".join(shown.split())
