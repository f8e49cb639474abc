"""Rows choose their adapter: each as if it were alone, whatever the batch, the compiler or the checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from flowopd_eval.adapters import Adapter, AdapterBank, Factors, fresh_adapter, read_adapter
from flowopd_eval.errors import RequestError


@pytest.fixture(scope="session")
def models(make_peft):
    """Three PEFT models: two of one shape, one of another rank, alpha and set of modules."""
    return {
        "a": make_peft(1),
        "b": make_peft(2),
        "c": make_peft(3, r=2, lora_alpha=1, target_modules=["attn.to_q", "attn2.to_k", "ff.net.2", "norm1.linear"]),
    }


@pytest.fixture(scope="session")
def adapters(models, tmp_path_factory) -> dict[str, Adapter]:
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
    return {name: read_adapter(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def expected(base, models, velocity) -> dict[str | None, torch.Tensor]:
    """Velocities (4, 16, 8, 8) by PEFT, one adapter at a time."""
    return {name: velocity(model, 4) for name, model in {None: base, **models}.items()}


def rows(expected: dict[str | None, torch.Tensor], names: list[str | None]) -> torch.Tensor:
    return torch.stack([expected[name][row] for row, name in enumerate(names)])


def close(x: torch.Tensor, y: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(x, y, atol=atol, rtol=0)


@pytest.mark.parametrize("trainable", [{}, {"b": 2.0}, {"c": 0.5, "a": 2.0}])
def test_rows_equal_one_after_the_other(trainable, transformer, adapters, expected, velocity):
    bank = AdapterBank(transformer, adapters, trainable)
    for name in (None, "a", "b", "c"):
        with bank.use(name):
            assert close(velocity(transformer, 4), expected[name])
    for names in (["c", None, "a", "b"], ["b", "b", "a", "b"], [None, None, None, "c"]):
        with bank.use(names):
            assert close(velocity(transformer, 4), rows(expected, names))
        with bank.select(bank.index(names)):
            assert close(velocity(transformer, 4), rows(expected, names))
    assert min((expected[x] - expected[y]).abs().max() for x in "abc" for y in "abc" if x < y) > 0.01


def test_index_repeats_for_guidance(transformer, adapters, expected, velocity):
    bank = AdapterBank(transformer, adapters)
    with bank.use(["a", None]):
        assert close(velocity(transformer, 4), rows(expected, ["a", None, "a", None]))
    with bank.use(["a", "b", "c"]), pytest.raises(RequestError, match="3 rows chose an adapter, but the batch has 4"):
        velocity(transformer, 4)


def test_choice_ends_with_its_context_and_none_is_an_error(transformer, adapters, expected, velocity):
    bank = AdapterBank(transformer, adapters)
    with bank.use("a"):
        with bank.use("b"):
            assert close(velocity(transformer, 4), expected["b"])
        assert close(velocity(transformer, 4), expected["a"])
    with pytest.raises(RuntimeError, match=r"call the transformer inside `with bank\.use\(\.\.\.\)`"):
        velocity(transformer, 4)
    assert close(bank("c", **_inputs(velocity), return_dict=False)[0], expected["c"])


def _inputs(velocity):
    """The inputs ``velocity`` feeds, as a transformer sees them."""
    seen = {}

    def model(**kwargs):
        seen.update({key: value for key, value in kwargs.items() if key != "return_dict"})
        return (torch.zeros(1),)

    velocity(model, 4)
    return seen


# --- gradients


def loss(transformer: nn.Module, velocity) -> torch.Tensor:
    return transformer(**_inputs(velocity), return_dict=False)[0].square().mean()


def test_gradients_reach_only_the_chosen_adapter(transformer, adapters, velocity):
    bank = AdapterBank(transformer, adapters, {"a": 2.0, "b": 2.0})
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    with bank.use("b"):
        loss(transformer, velocity).backward()
    assert all(p.grad is None for slot in bank.slots for p in (slot.trainable_A[0], slot.trainable_B[0]))
    assert sum(p.grad.abs().sum() for slot in bank.slots for p in (slot.trainable_A[1], slot.trainable_B[1])) > 0
    bank.zero_grad()
    with bank.use(["b", "c", None, "b"]):
        loss(transformer, velocity).backward()
    assert not any(slot.trainable_A[0].grad.any() or slot.trainable_B[0].grad.any() for slot in bank.slots)
    assert sum(slot.trainable_B[1].grad.abs().sum() for slot in bank.slots) > 0


def test_gradients_are_pefts(transformer, adapters, models, velocity):
    model = copy.deepcopy(models["a"])
    loss(model, velocity).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    for choice in (bank.use("a"), bank.select(bank.index(["a"] * 4))):
        bank.zero_grad()
        with choice:
            loss(transformer, velocity).backward()
        _same_gradients(bank, theirs)


def test_gradients_of_mixed_rows_are_the_sum_of_the_rows(transformer, adapters, velocity):
    inputs = _inputs(velocity)
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    with bank.use("a"):
        out = transformer(**{k: v[[0, 2]] for k, v in inputs.items()}, return_dict=False)[0]
    out.square().sum().backward()
    alone = [parameter.grad.clone() for parameter in bank.parameters()]
    bank.zero_grad()
    with bank.select(bank.index(["a", "b", "a", None])):
        transformer(**inputs, return_dict=False)[0].square().sum().backward()
    mixed = [parameter.grad for parameter in bank.parameters()]
    assert all(torch.allclose(x, y, atol=1e-4, rtol=1e-4) for x, y in zip(alone, mixed, strict=True))


def _same_gradients(bank: AdapterBank, theirs: dict[str, torch.Tensor]) -> None:
    compared = 0
    for module, slot in zip(bank.modules_covered, bank.slots, strict=True):
        for side, parameter in (("A", slot.trainable_A[0]), ("B", slot.trainable_B[0])):
            if parameter.numel():
                expected = theirs[f"base_model.model.{module}.lora_{side}.default.weight"]
                assert close(parameter.grad, expected, 1e-6)
                compared += bool(expected.any())
    assert compared == 20  # A and B of 11 modules without the last block's text queries, which have no gradient


@pytest.mark.parametrize("late", [False, True])
def test_checkpointing_recomputes_with_the_first_choice(late, transformer, adapters, velocity):
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    with bank.select(bank.index(["a", "b", "a", None])):
        loss(transformer, velocity).backward()
    plain = [parameter.grad.clone() for parameter in bank.parameters()]
    bank.zero_grad()
    transformer.enable_gradient_checkpointing()
    blocks: list[int] = []
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    with bank.select(bank.index(["a", "b", "a", None])):
        value = loss(transformer, velocity)
        if not late:
            with bank.use("c"):
                value.backward()
    if late:
        value.backward()
    assert len(blocks) == 2  # the forward and its recomputation
    again = [parameter.grad for parameter in bank.parameters()]
    assert all(torch.allclose(x, y, atol=1e-7, rtol=1e-4) for x, y in zip(plain, again, strict=True))


# --- the transformer stays what it was


def test_saved_transformer_is_the_stock_one(transformer, base, adapters, velocity, tmp_path):
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    assert transformer.state_dict().keys() == base.state_dict().keys()
    assert [name for name, _ in transformer.named_modules()] == [name for name, _ in base.named_modules()]
    transformer.save_pretrained(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert close(velocity(loaded), velocity(base), 1e-6)
    bank.detach()
    assert close(velocity(transformer), velocity(base), 1e-6)
    assert {type(m) for m in transformer.modules()} == {type(m) for m in base.modules()}


def test_detach_and_attach(transformer, adapters, expected, velocity):
    bank = AdapterBank(transformer, adapters)
    with pytest.raises(RequestError, match=r"are no plain Linear: .*another bank \(`detach\(\)` it\)"):
        AdapterBank(transformer, adapters)
    transformer.enable_gradient_checkpointing()
    with bank.use("a"):
        loss(transformer, velocity)
    bank.detach()
    assert "AdapterBank" not in repr(transformer._gradient_checkpointing_func)
    assert type(transformer._gradient_checkpointing_func).__name__ == "function"
    bank.attach()
    with bank.use("b"):
        assert close(velocity(transformer, 4), expected["b"])


def test_fuse_and_unfuse(transformer, base, adapters, expected, velocity):
    bank = AdapterBank(transformer, adapters, {"b": 2.0})
    for name in ("b", "c"):
        bank.fuse(name)
        assert bank.fused == name
        assert close(velocity(transformer, 4), expected[name])
        with bank.use(name):
            assert close(velocity(transformer, 4), expected[name])
        for action, *arguments in (
            (bank.use, "a"),
            (bank.use, None),
            (bank.use, [name, "a"]),
            (bank.select, bank.index(["a"])),
            (bank.fuse, "a"),
            (bank.detach,),
        ):
            with pytest.raises(RequestError, match=rf"'{name}' is fused into the weights: `unfuse\(\)` before"):
                action(*arguments)
        bank.unfuse()
        assert all(torch.equal(x, y) for x, y in zip(transformer.parameters(), base.parameters(), strict=True))
    with bank.use("a"):
        assert close(velocity(transformer, 4), expected["a"])


def test_moving_the_transformer_moves_its_adapters(transformer, adapters):
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    transformer.to("meta")
    assert {t.device.type for t in [*bank.parameters(), *bank.buffers()]} == {"meta"}


def test_bf16_backbone_keeps_fp32_masters(transformer, adapters, expected, velocity):
    bank = AdapterBank(transformer.to(torch.bfloat16), adapters, {"a": 2.0})
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    inputs = {key: value.bfloat16() for key, value in _inputs(velocity).items()}
    for names in ("a", "b", ["a", "b", "c", None]):
        with bank.use(names), torch.no_grad():
            out = transformer(**inputs, return_dict=False)[0]
        target = rows(expected, names) if isinstance(names, list) else expected[names]
        assert out.dtype == torch.bfloat16
        assert (out - target).norm() / target.norm() < 0.03


def test_fp8_storage_leaves_the_adapters_alone(transformer, base, adapters, velocity):
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    before = [t.clone() for t in [*bank.parameters(), *bank.buffers()]]
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with bank.use(["a", "b", "c", None]):
        found = velocity(transformer, 4)
    assert all(torch.equal(x, y) for x, y in zip(before, [*bank.parameters(), *bank.buffers()], strict=True))
    with pytest.raises(RequestError, match="'a' into weights stored in fp8"):
        bank.fuse("a")

    # The same adapters over weights that were rounded once and are computed with in fp32.
    rounded = copy.deepcopy(base)
    stored = {name for name, p in transformer.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert any("attn.to_q" in name for name in stored)
    for name, parameter in rounded.named_parameters():
        if name in stored:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    other = AdapterBank(rounded, adapters, {"a": 2.0})
    with other.use(["a", "b", "c", None]):
        expected = velocity(rounded, 4)
    assert close(found, expected)
    assert not close(expected, velocity(base, 4), 0.01)
    for one in (bank, other):
        one("a", **_inputs(velocity), return_dict=False)[0].square().mean().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (bank, other))
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_layers_under_a_hook_are_refused(transformer, adapters):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(RequestError, match=r"layers have a forward that a hook replaced.*Load the adapters first"):
        AdapterBank(transformer, adapters)


# --- adapters out of a bank, and into it


def test_adapter_comes_back_as_it_went_in(transformer, adapters):
    bank = AdapterBank(transformer, adapters, {"c": 0.5})
    assert {name: bank.adapter(name).sha256 for name in adapters} == {n: a.sha256 for n, a in adapters.items()}


def test_training_does_not_touch_the_given_adapter(transformer, adapters, velocity):
    before = adapters["a"].factors["transformer_blocks.0.attn.to_q"].A.clone()
    bank = AdapterBank(transformer, adapters, {"a": 1.0})
    optimiser = torch.optim.SGD(bank.parameters(), lr=0.1)
    with bank.use("a"):
        loss(transformer, velocity).backward()
    optimiser.step()
    assert torch.equal(adapters["a"].factors["transformer_blocks.0.attn.to_q"].A, before)
    assert bank.adapter("a").sha256 != Adapter(adapters["a"].factors).sha256


def test_scale_decides_the_step_and_not_the_start(transformer, adapters, velocity):
    """With B = scale * parameter, the gradient and the step are each scale times larger: SGD moves B by scale²."""
    module = "transformer_blocks.0.attn.to_v"
    steps = []
    for scale in (1.0, 2.0):
        bank = AdapterBank(copy.deepcopy(transformer), {"a": adapters["a"]}, {"a": scale})
        with bank.use("a"):
            loss(bank.transformer, velocity).backward()
        torch.optim.SGD(bank.parameters(), lr=1e-2).step()
        steps.append(bank.adapter("a").factors[module].B - adapters["a"].factors[module].B)
    assert torch.allclose(steps[1], 4 * steps[0], atol=1e-6)


def test_fresh_adapter_starts_as_the_base_and_learns(transformer, expected, velocity):
    g = torch.Generator().manual_seed(0)
    fresh = fresh_adapter(transformer, ["attn.to_q", "attn.to_out.0"], 8, g)
    assert sorted(fresh.factors) == [f"transformer_blocks.{i}.attn.{t}" for i in (0, 1) for t in ("to_out.0", "to_q")]
    a = torch.cat([f.A.flatten() for f in fresh.factors.values()])
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.1)
    bank = AdapterBank(transformer, {"student": fresh}, {"student": 2.0})
    with bank.use("student"):
        assert close(velocity(transformer, 4), expected[None], 1e-6)
        before = loss(transformer, velocity)
        before.backward()
        torch.optim.SGD(bank.parameters(), lr=1.0).step()
        assert loss(transformer, velocity) < before
    with pytest.raises(RequestError, match=r"No linear layer of SD3Transformer2DModel answers to attn\.to_x"):
        fresh_adapter(transformer, ["attn.to_q", "attn.to_x"], 8)


def test_any_module_tree():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Sequential(nn.Linear(5, 3, bias=False)))
    g = torch.Generator().manual_seed(1)
    adapter = Adapter({"2.0": Factors(torch.randn(2, 5, generator=g), torch.randn(3, 2, generator=g))})
    x = torch.randn(4, 2, 3, 6, generator=g)
    hidden = net[1](net[0](x))
    base = net(x)
    changed = hidden @ (net[2][0].weight + adapter.factors["2.0"].B @ adapter.factors["2.0"].A).T
    bank = AdapterBank(net, {"z": adapter})
    with bank.use(["z", None, None, "z"]):
        assert close(net(x), torch.stack([changed[0], base[1], base[2], changed[3]]), 1e-6)


# --- requests that make no sense


def test_refusals(transformer, adapters):
    with pytest.raises(RequestError, match="No adapters"):
        AdapterBank(transformer, {})
    with pytest.raises(RequestError, match="No adapter to train by the name nobody"):
        AdapterBank(transformer, adapters, {"nobody": 1.0})
    misfit = Adapter({"nowhere": next(iter(adapters["a"].factors.values()))}, source="misfit")
    with pytest.raises(RequestError, match="'misfit': 1 of 1 modules match no linear layer"):
        AdapterBank(transformer, {"x": misfit})
    bank = AdapterBank(transformer, adapters)
    for ask in (bank.use, bank.fuse, bank.adapter, lambda name: bank.index([name])):
        with pytest.raises(RequestError, match="Unknown adapter 'd'; expected one of a, b, c"):
            ask("d")


# --- compiled


def test_compiled_equals_eager_and_does_not_recompile(transformer, adapters, expected, velocity):
    bank = AdapterBank(transformer, adapters, {"a": 2.0})
    torch._dynamo.reset()
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    with bank.use(["a", "b", "a", None]):
        loss(transformer, velocity).backward()
    eager = [parameter.grad.clone() for parameter in bank.parameters()]
    bank.zero_grad()
    transformer.transformer_blocks[1].compile(backend=count)
    seen = []
    for choices in (["b", "c"], [["a", "b", "c", None], ["c", None, None, "a"]]):
        for names in choices:
            with bank.use(names):
                target = rows(expected, names) if isinstance(names, list) else expected[names]
                assert close(velocity(transformer, 4), target)
            seen.append(graphs)
    assert seen[0] == seen[1] < seen[2] == seen[3]  # other values: no graph more
    with bank.use(["a", "b", "a", None]):
        loss(transformer, velocity).backward()
    assert all(close(x, p.grad, 1e-6) for x, p in zip(eager, bank.parameters(), strict=True))
