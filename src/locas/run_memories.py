"""What a run reads its texts into, and the files that come of it: one memory for all texts, or one for each.

Both are asked for a bank when a group of texts begins to be read, and told when the group is read; both say what of
theirs a state file must hold. All else is `locas.run`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from locas.backbone import Backbone
from locas.bank import Bank
from locas.grow import freeze, grow, thaw
from locas.memory import Memory, load, record_reading
from locas.run_settings import RunSettings, Text, first_ids, fresh_memory
from locas.stream import OnFailure

_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_LONGEST_NAME = 200  # bytes; file systems take 255, of which a temporary file's name needs some


class OneMemory:
    """One memory, into which the texts are read one after another; its file is written at the end.

    Attributes:
        kind: of the state file.
        position: what the state file calls the first text that is not read to its end.
        on_failure: what becomes of a text whose loss is not finite.
        size: texts that are read side by side.
        key: what a run's key holds besides the common.
        stem: the state file's name and place, without what makes it unlike another run's.

    Raises:
        ValueError: settings that do not fit the backbone, or something else in the file's place.
        OSError: the folder does not exist or cannot be written.
    """

    kind: ClassVar[str] = "locas-run"
    position: ClassVar[str] = "document"
    on_failure: ClassVar[OnFailure] = "raise"
    size: ClassVar[int] = 1
    key: ClassVar[dict[str, Any]] = {}

    def __init__(self, backbone: Backbone, texts: Sequence[Text], path: Path, settings: RunSettings) -> None:
        check_output(path)
        _check_texts(texts)
        self.texts, self.path, self.settings, self.stem = texts, path, settings, path
        self.memory = (
            fresh_memory(texts[0], backbone, settings)
            if settings.start_from is None
            else _continued(settings.start_from, texts[0], backbone, settings)
        )
        self.n_parameters = self.memory.n_parameters

    def open(self, group: range) -> Bank:
        """The bank that a group of texts is read into."""
        return self.memory.bank

    def close(self, group: range, bank: Bank, failed: Mapping[int, int]) -> None:
        """Notes that the group is read."""
        for i in group:
            _note(self.memory, self.texts[i], self.settings)

    def finish(self) -> None:
        """Writes what is not written yet."""
        self.memory.save(self.path)

    def about(self, i: int) -> dict[str, Any]:
        """What the results say about text `i` besides its figures."""
        return {}

    def results(self, failed: list[dict[str, Any]]) -> dict[str, Any]:
        """What they say of all texts besides the figures."""
        return {"memory": str(self.path)}

    def tensors(self) -> dict[str, Tensor]:
        """What a state file must hold when no group is being read."""
        return {"rows": self.memory.bank.rows, "tau": self.memory.bank.tau}

    def manifest(self, failed: Mapping[int, int]) -> dict[str, Any]:
        """What it must say besides the common."""
        return {}

    def check(self, first: int, manifest: Mapping[str, Any]) -> dict[int, int]:
        """The texts that had failed when this manifest was made with the texts before `first` read.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is none of this run.
        """
        return {}

    def go_on(self, first: int, manifest: Mapping[str, Any], state: Mapping[str, Tensor] | None) -> None:
        """Takes over what was checked. state: `tensors`; None: the bank is restored already.

        Raises:
            KeyError, ValueError: it does not fit; nothing was changed.
        """
        if state is not None:
            mine = self.tensors()
            for name in sorted(mine.keys() | state.keys()):
                wanted, found = ((tuple(t[name].shape), t[name].dtype) if name in t else None for t in (mine, state))
                if wanted != found:
                    raise ValueError(f"reader.{name} should be {wanted} and is {found}")
            for name, tensor in mine.items():
                tensor.copy_(state[name])
        for text in self.texts[:first]:
            _note(self.memory, text, self.settings)


class MemoryEach:
    """A fresh memory for each text, `size` of them side by side, each written when its group is read.

    A text on which the backbone's loss is not finite is dropped, gets no file, and the others go on.

    Attributes: as `OneMemory`'s, and
        outputs: each text's memory file.
        written: {text: sha256 of its file}, of the groups that are read.

    Raises:
        ValueError: settings that do not fit the backbone or one another, or a file in the way.
        OSError: the folder cannot be made or written.
    """

    kind: ClassVar[str] = "locas-batch-run"
    position: ClassVar[str] = "first"
    on_failure: ClassVar[OnFailure] = "drop"

    def __init__(
        self, backbone: Backbone, texts: Sequence[Text], folder: Path, settings: RunSettings, size: int
    ) -> None:
        self.backbone, self.texts, self.folder, self.settings, self.size = backbone, texts, folder, settings, size
        self.key, self.stem = {"batch": size}, folder / "batch"
        self._check()
        self.outputs = [folder / f"{name}.safetensors" for name in unique_names([t.name for t in texts])]
        self._check_folder()
        # What does not fit shows now, not after the first group: settings, or a text too short for them.
        shortest = min(texts, key=lambda text: text.ids.numel())
        self.n_parameters = fresh_memory(shortest, backbone, settings).n_parameters
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        self.written: dict[int, str] = {}
        self._memories: list[Memory] = []

    def _check(self) -> None:
        if self.size < 1:
            raise ValueError(f"a batch has 1 text or more side by side; got {self.size}")
        if self.settings.start_from is not None:
            raise ValueError("in a batch every text gets a fresh memory; leave --memory, --grow and --freeze out")
        if self.settings.compare:
            raise ValueError(
                "a batch is not compared with reading without memory; use `locas score TEXT --memory FILE` afterwards"
            )
        _check_texts(self.texts)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a batch of memories goes into a folder: choose another -o")
        for path in self.outputs:
            check_replaceable(path)

    def open(self, group: range) -> Bank:
        """See `OneMemory`."""
        self._memories = [fresh_memory(self.texts[i], self.backbone, self.settings) for i in group]
        return Bank.stack([memory.bank for memory in self._memories])

    def close(self, group: range, bank: Bank, failed: Mapping[int, int]) -> None:
        """Writes the memory files of the group, but those of texts that failed."""
        for row, (i, memory) in enumerate(zip(group, self._memories, strict=True)):
            if i not in failed:
                memory.bank = bank.select(row)
                _note(memory, self.texts[i], self.settings)
                memory.save(self.outputs[i])
                self.written[i] = _sha256(self.outputs[i])
        self._memories = []

    def finish(self) -> None:
        """See `OneMemory`; here all is written."""

    def about(self, i: int) -> dict[str, Any]:
        """See `OneMemory`."""
        return {"memory": str(self.outputs[i])}

    def results(self, failed: list[dict[str, Any]]) -> dict[str, Any]:
        """See `OneMemory`."""
        return {"failed": failed}

    def tensors(self) -> dict[str, Tensor]:
        """See `OneMemory`; here every group begins afresh."""
        return {}

    def manifest(self, failed: Mapping[int, int]) -> dict[str, Any]:
        """See `OneMemory`."""
        return {
            "failed": {str(i): start for i, start in failed.items()},
            "written": {str(i): digest for i, digest in self.written.items()},
        }

    def check(self, first: int, manifest: Mapping[str, Any]) -> dict[int, int]:
        """See `OneMemory`. ValueError also where a file that was written has changed since."""
        failed = {int(i): int(start) for i, start in manifest["failed"].items()}
        written = _written(manifest)
        if sorted([*written, *(i for i in failed if i < first)]) != list(range(first)):
            raise ValueError("it does not say what became of every text")
        if any(i >= first + self.size or i >= len(self.texts) for i in failed):
            raise ValueError("texts are dropped that were not read yet")
        for i, digest in written.items():
            if not self.outputs[i].is_file() or _sha256(self.outputs[i]) != digest:
                raise ValueError(f"{self.outputs[i]}, which it has written, was changed or removed since")
        return failed

    def go_on(self, first: int, manifest: Mapping[str, Any], state: Mapping[str, Tensor] | None) -> None:
        """See `OneMemory`."""
        if state:
            raise ValueError(f"{min(state)} belongs to no text")
        self.written = _written(manifest)


def _written(manifest: Mapping[str, Any]) -> dict[int, str]:
    return {int(i): str(digest) for i, digest in manifest["written"].items()}


def _continued(path: str, text: Text, backbone: Backbone, settings: RunSettings) -> Memory:
    """The memory of a file, grown and frozen as the settings say."""
    memory = load(path, backbone.model, tokenizer_sha256=backbone.tokenizer_sha256)
    ids = first_ids(text, backbone, settings)
    if settings.thaw:
        memory = thaw(memory)
    if settings.freeze:
        memory = freeze(memory)
    if settings.grow:
        memory = grow(memory, backbone.model, ids, settings.grow, settings.init, start_id=backbone.start_id)
    frozen = memory.bank.frozen_rows()
    if frozen is not None and bool(frozen.all()):
        raise ValueError(f"every slot of {path} is frozen: nothing can be learnt; add slots (--grow 32) or --thaw it")
    return memory


def _note(memory: Memory, text: Text, settings: RunSettings) -> None:
    record_reading(memory, text.ids, settings.read, name=text.name, text_sha256=text.sha256)


# -------------------------------------------------------------------- files


def check_output(path: Path) -> None:
    """Raises ValueError or OSError unless a memory file can be written there, before hours of reading and not after."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it, or choose another -o")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of the memory file, e.g. {path}/m.safetensors")
    check_writable(path.parent)
    check_replaceable(path)


def check_writable(folder: Path) -> None:
    """Raises OSError unless a file can be made in this folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be written ({error.strerror}); choose another -o") from error


def check_replaceable(path: Path) -> None:
    """Raises ValueError if something lies there that is no memory."""
    if path.exists() and not (path.is_file() and may_be_replaced(path)):
        raise ValueError(f"{path} is not a memory and would be overwritten; delete it, or choose another -o")


def may_be_replaced(path: Path) -> bool:
    """Whether an old output is empty, a memory, or a damaged one: not a text or weights that were named by mistake."""
    with path.open("rb") as file:
        head = file.read(9)
        if not head or head[8:] != b"{":
            return not head
        rest = file.read(min(int.from_bytes(head[:8], "little"), _LONGEST_HEADER) - 1)
    try:
        entries = json.loads(b"{" + rest)
    except ValueError:
        return True  # begins like one of ours and can be read by nobody
    return "locas" in (entries.get("__metadata__") or {})


def unique_names(paths: Sequence[str]) -> list[str]:
    """File names without ending, one for each path: "in/a.txt" is "a", the next a "a-2".

    Unlike in more than upper and lower case, so that they are different files on every system.
    """
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "", Path(path).stem).strip(". ") or "text"
        while len(os.fsencode(stem)) > _LONGEST_NAME:
            stem = stem[:-1]
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _check_texts(texts: Sequence[Text]) -> None:
    for text in texts:
        if text.ids.numel() == 0:
            raise ValueError(f"{text.name} has no tokens; leave it out")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
