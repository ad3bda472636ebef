"""Memories as PEFT adapters: what PEFT promises, held for every family; and what of PEFT we rely on."""

import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import GATED, MLP, MOE, tiny_model
from helpers import START, memory_for, same_bytes, snapshot, text
from locas.grow import freeze, grow
from locas.initialise import InitSettings
from locas.memory import Memory, Provenance, create, load, read
from locas.sites import fingerprint
from locas.stream import ReadSettings

peft = pytest.importorskip("peft", reason='needs PEFT: pip install "locas[peft]"')
from peft import PeftConfig, PeftModel, PeftType, get_peft_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402

from locas.peft_bridge import LocasConfig, LocasLayer, from_peft, to_peft  # noqa: E402

# PEFT's own calls of what transformers has renamed, and PEFT 0.18 on models that were never saved.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

ModelOf = Callable[..., PreTrainedModel]
IDS = text(31)[None]


def a_memory(model: PreTrainedModel, seed: int = 0, layers: dict[int, int] | None = None) -> Memory:
    bank = memory_for(model, layers=layers or {0: 3, 2: 5}, seed=seed)
    return Memory(bank, Provenance("tiny", fingerprint(model)), model)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_memory(model: PreTrainedModel, *memories: Memory) -> Tensor:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for memory in memories:
            stack.enter_context(memory.attached(model))
        return logits(model)


def assert_same_read(found: Tensor, expected: Tensor) -> None:
    """The same operations on the same numbers; where tensors lie in memory may still change a sum's last bit."""
    bound = 1e-12 if expected.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", [*GATED, *MLP, *MOE])
def test_an_adapter_reads_as_the_attached_memory_and_leaves_no_trace(name: str) -> None:
    model = tiny_model(name)
    memory, before = a_memory(model), snapshot(model)
    plain, expected = logits(model), with_memory(model, memory)
    adapted = to_peft(model, memory)
    assert_same_read(logits(adapted), expected)
    assert (expected - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert same_bytes(logits(adapted), plain)
    assert_same_read(logits(adapted), expected)
    again = from_peft(adapted)
    assert same_bytes(again.bank.rows, memory.bank.rows)
    assert again.manifest() == memory.manifest()
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("locas_" in n for n in trainable)
    back = adapted.unload()
    assert back is model
    assert same_bytes(logits(back), plain)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(same_bytes(after[name], before[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_memory_that_an_adapter_would_round_is_refused() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    memory, before = a_memory(model), snapshot(model)
    memory.bank = memory.bank.to(dtype=torch.float64)
    with pytest.raises(ValueError, match="kept in float64, an adapter of this backbone in float32, which would round"):
        to_peft(model, memory)
    assert all(same_bytes(value, before[name]) for name, value in snapshot(model).items())
    memory.bank = memory.bank.to(dtype=torch.float32)
    assert same_bytes(from_peft(to_peft(model, memory)).bank.rows, memory.bank.rows)


@pytest.mark.parametrize("name", [n for n in [*GATED, *MLP] if n != "bloom"])
def test_merging_widens_and_can_be_saved_as_an_ordinary_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    memory = a_memory(model)
    expected = with_memory(model, memory)
    merged = to_peft(model, memory).merge_and_unload()
    assert merged is model
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-11, atol=1e-11)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    # GPT-J's rotary table is a buffer that loading makes anew, in float32.
    bound = 1e-5 if name == "gptj" else 1e-11
    torch.testing.assert_close(logits(loaded), expected, rtol=bound, atol=bound)
    whole = memory_for(loaded, layers={1: 2})  # and it is a backbone like any other
    assert with_memory(loaded, Memory(whole, Provenance("x", fingerprint(loaded)))).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, torch.float32)
    memory = create(model, text(11), InitSettings(rank=5, tau_scale=4.0), layers=[0, 2], start_id=START)
    list(read(model, memory, text(53), ReadSettings(window=29, chunk=11), start_id=START))
    expected = with_memory(model, memory)
    adapted = to_peft(model, memory)
    adapted.save_pretrained(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(config, LocasConfig)
    loaded = PeftModel.from_pretrained(tiny_model(name, torch.float32), str(tmp_path / "adapter"))
    assert_same_read(logits(loaded), expected)
    again = from_peft(loaded)
    again.save(tmp_path / "again.safetensors")
    memory.save(tmp_path / "memory.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    model = tiny_model(name, torch.float32)
    assert load(tmp_path / "again.safetensors", model).provenance.documents
    fast = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), low_cpu_mem_usage=True)
    assert_same_read(logits(fast), expected)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    to_peft(model, a_memory(model)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was made with the backbone 'tiny'"):
        PeftModel.from_pretrained(tiny_model("llama", seed=1), str(tmp_path))
    with pytest.raises(ValueError, match="was made with the backbone 'tiny'"):
        to_peft(tiny_model("llama", seed=1), a_memory(tiny_model("llama")))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_several_adapters_switch_add_up_and_merge(name: str) -> None:
    model = tiny_model(name)
    one, two = a_memory(model), a_memory(model, seed=1, layers={0: 2, 1: 7})
    expected = {"one": with_memory(model, one), "two": with_memory(model, two)}
    both, plain = with_memory(model, one, two), logits(model)
    adapted = to_peft(model, one, "one")
    to_peft(adapted, two, "two")
    assert_same_read(logits(adapted), expected["one"])
    for adapter in ("two", "one", "two"):
        adapted.set_adapter(adapter)
        assert_same_read(logits(adapted), expected[adapter])
    adapted.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits(adapted), both, rtol=1e-12, atol=1e-12)
    for adapter, memory in (("one", one), ("two", two)):
        assert same_bytes(from_peft(adapted, adapter).bank.rows, memory.bank.rows)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=1e-11, atol=1e-11)
    assert (both - plain).abs().max() > 1e-3


def test_one_of_several_is_merged_or_deleted() -> None:
    model = tiny_model("llama")
    one, two = a_memory(model), a_memory(model, seed=1)
    expected = with_memory(model, two)
    adapted = to_peft(to_peft(model, one, "one"), two, "two")
    torch.testing.assert_close(
        logits(adapted.merge_and_unload(adapter_names=["two"])), expected, rtol=1e-11, atol=1e-11
    )
    model = tiny_model("llama")
    adapted = to_peft(to_peft(model, one, "one"), two, "two")
    adapted.set_adapter("two")
    adapted.delete_adapter("one")
    assert_same_read(logits(adapted), expected)
    with pytest.raises(ValueError, match="'one' is no memory of this model; it has two"):
        from_peft(adapted, "one")


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_a_fresh_adapter_changes_nothing_and_learns(name: str) -> None:
    model = tiny_model(name, torch.float32)
    plain, before = logits(model), snapshot(model)
    adapted = get_peft_model(model, LocasConfig(r=7, layers=[1, 2], task_type="CAUSAL_LM"))
    assert same_bytes(logits(adapted), plain)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == (3 if name == "qwen2" else 2) * 7 * 2 * model.config.hidden_size
    optimiser = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(7):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    memory = from_peft(adapted)
    assert memory.bank.layers == (1, 2)
    trained = logits(adapted)
    back = adapted.unload()
    assert all(same_bytes(tensor, before[n]) for n, tensor in snapshot(back).items())
    assert_same_read(with_memory(back, memory), trained)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_frozen_slots_get_no_gradient_and_are_checked(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, torch.float32)
    memory = create(model, text(11), InitSettings(rank=3, tau_scale=8.0, init="random-rows"), layers=[0, 2])
    list(read(model, memory, text(53), ReadSettings(window=29, chunk=11)))
    memory = grow(freeze(memory), model, text(7), 2, InitSettings(init="random-rows"))
    to_peft(model, memory).save_pretrained(tmp_path)
    for decay in (0.0, 0.1):
        model = tiny_model(name, torch.float32)
        adapted = PeftModel.from_pretrained(model, str(tmp_path), is_trainable=True, low_cpu_mem_usage=decay == 0)
        assert_same_read(logits(adapted), with_memory(tiny_model(name, torch.float32), memory))
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=0.02, weight_decay=decay)
        for _ in range(3):
            adapted(input_ids=IDS, labels=IDS).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        if decay:
            with pytest.raises(ValueError, match="training changed frozen slots of the adapter 'default'"):
                from_peft(adapted)
            continue
        again = from_peft(adapted)
        assert again.frozen == memory.frozen == {"0": 3, "2": 3}
        for layer in (0, 2):
            now, then = again.bank.slots(layer), memory.bank.slots(layer)
            for one, other in ((now.k, then.k), (now.v, then.v), (now.g, then.g)):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert same_bytes(one[:, :3], other[:, :3])
                    assert not torch.equal(one[:, 3:], other[:, 3:])


def test_generation_and_bf16() -> None:
    model = tiny_model("llama", torch.bfloat16)
    memory = a_memory(model)
    memory.bank = memory.bank.to(dtype=torch.float32)
    with memory.attached(model):
        expected = model.generate(IDS, max_new_tokens=11, do_sample=False)
    adapted = to_peft(model, memory)
    assert torch.equal(adapted.generate(input_ids=IDS, max_new_tokens=11, do_sample=False), expected)
    assert {p.dtype for n, p in adapted.named_parameters() if "locas_" in n} == {torch.float32}


def test_merges_that_cannot_be_change_nothing() -> None:
    for name, message in (("qwen3_moe", "a mixture of experts"), ("bloom", "have no one width that is a setting")):
        model = tiny_model(name)
        adapted = to_peft(model, a_memory(model))
        expected = logits(adapted)
        with pytest.raises(ValueError, match=message):
            adapted.merge_and_unload()
        assert_same_read(logits(adapted), expected)
    model = tiny_model("llama")
    adapted = get_peft_model(model, LocasConfig(r=3, variant="mlp", init="gaussian"))
    with pytest.raises(ValueError, match=r"'default' is Locas-MLP with silu, but the backbone's FFN is glu"):
        adapted.merge_and_unload()
    model = tiny_model("llama")
    memory = a_memory(model)
    memory.bank.rows[0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinite"):
        to_peft(model, memory).merge_and_unload()
    model = tiny_model("llama")
    with pytest.raises(NotImplementedError, match="use merge_and_unload"):
        to_peft(model, a_memory(model)).merge_adapter()


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"looks at a text.*to_peft\(model, locas.create"):
        LocasConfig(init="top-k")
    with pytest.raises(ValueError, match="the rank must be 1 or more; got 0"):
        get_peft_model(tiny_model("llama"), LocasConfig(r=0))
    with pytest.raises(ValueError, match="does not describe a memory"):
        get_peft_model(tiny_model("llama"), LocasConfig(memory={"ranks": {"0": 3}}))


# -------------------------------------------------------------------- the contract with PEFT


def test_the_core_never_imports_peft() -> None:
    code = "import sys, locas, locas.cli, locas.merge; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_peft_the_extra_is_named() -> None:
    code = "import sys; sys.modules['peft'] = None; import locas.peft_bridge"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'ImportError: memories as PEFT adapters need PEFT: pip install "locas[peft]"' in done.stderr


def test_locas_is_a_type_of_peft_like_others() -> None:
    import importlib

    kind = PeftType("LOCAS")
    assert kind is PeftType.LOCAS  # type: ignore[attr-defined]
    assert kind == "LOCAS"
    assert kind in list(PeftType)
    assert isinstance(kind, PeftType)
    assert LocasConfig().peft_type is kind
    assert list(PeftType).count(kind) == 1
    assert PeftType("LORA") is PeftType.LORA
    importlib.import_module("locas.peft_bridge")._register()  # once more does no harm
    assert list(PeftType).count(kind) == 1


def test_the_extra_asks_for_what_was_tested() -> None:
    from locas.peft_bridge import PEFT_RANGE

    path = Path(__file__).parents[2] / "pyproject.toml"
    if not path.is_file():
        pytest.skip("the tests run outside a checkout")
    extras = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    assert extras["peft"] == ["peft>={},<{}".format(*PEFT_RANGE)]


def test_an_untested_peft_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from locas import peft_bridge

    monkeypatch.setattr(peft, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match=r"tested with PEFT 0\.18 up to 0\.22; this is 0\.99\.0"):
        peft_bridge._register()


def test_what_we_use_of_peft_is_there() -> None:
    """Names and parameters that the bridge overrides or calls; a PEFT that lacks one needs a look at the bridge."""
    for method, parameters in {
        "_prepare_adapter_config": ["peft_config", "model_config"],
        "_prepare_model": ["self", "peft_config", "model"],
        "_check_target_module_exists": ["peft_config", "key"],
        "_create_and_replace": ["peft_config", "adapter_name", "target", "target_name", "parent", "current_key"],
        "_unload_and_optionally_merge": ["merge", "progressbar", "safe_merge", "adapter_names"],
        "inject_adapter": ["model", "adapter_name"],
        "merge_and_unload": ["progressbar", "safe_merge", "adapter_names"],
    }.items():
        assert set(parameters) <= set(inspect.signature(getattr(BaseTuner, method)).parameters), method
    for name in ("adapter_layer_names", "other_param_names", "disable_adapters", "active_adapters", "set_adapter"):
        assert hasattr(BaseTunerLayer, name), name
    assert issubclass(LocasLayer, BaseTunerLayer)
    assert {"name", "config_cls", "model_cls"} <= set(inspect.signature(peft.utils.register_peft_method).parameters)
