"""`locas chat` and `generate`: what the backbone is shown."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from locas.backbone import Backbone, load_backbone
from locas.cli.talk import SamplingOptions, _Conversation, continuation, prompt_ids

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The built-in one, which answers with what it was shown."""
    found = load_backbone(device="cpu")
    assert found.start_id is not None

    def echo(inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        shown.append(inputs[0].tolist())
        return torch.cat([inputs, inputs[:, -1:]], dim=1)

    shown: list[list[int]] = []
    monkeypatch.setattr(found.model, "generate", echo)
    monkeypatch.setattr(found.model, "shown", shown, raising=False)
    return found


@pytest.mark.parametrize("begins", [False, True])
def test_one_start_token_whether_the_chat_template_writes_it_or_not(backbone: Backbone, begins: bool) -> None:
    start = backbone.tokenizer.convert_ids_to_tokens(backbone.start_id)
    backbone.tokenizer.chat_template = ("{{ '" + start + "' }}" if begins else "") + TEMPLATE
    conversation = _Conversation(backbone, SamplingOptions(temperature=0.0))
    conversation.answer("I like whales.", None)
    (shown,) = backbone.model.shown
    assert shown[0] == backbone.start_id
    assert shown[1:] == backbone.encode("<user>I like whales.\n<me>")[0].tolist()
    ids, first = conversation.with_message("I like whales.")  # a reader puts the start token before it
    assert (ids.tolist(), first) == (backbone.encode("<user>I like whales.\n")[0].tolist(), 0)
    conversation.hear("I like whales.", "So do I.")
    ids, first = conversation.with_message("Why?")
    said = "<user>I like whales.\n<assistant>So do I.\n"
    assert ids.tolist() == backbone.encode(said + "<user>Why?\n")[0].tolist()
    assert first == backbone.encode(said)[0].numel()


def test_a_prompt_that_is_but_the_start_token_is_left(backbone: Backbone) -> None:
    start = backbone.tokenizer.convert_ids_to_tokens(backbone.start_id)
    assert prompt_ids(backbone, start).tolist() == [backbone.start_id]
    none = replace(backbone, start_id=None)
    assert prompt_ids(none, start + "It").tolist() == backbone.encode(start + "It")[0].tolist()
    continuation(none, None, prompt_ids(none, "It"), SamplingOptions(temperature=0.0))
    assert backbone.model.shown == [backbone.encode("It")[0].tolist()]
