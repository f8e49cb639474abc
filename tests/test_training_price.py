"""What a recipe is said to cost, against what it costs: bytes, rows through the transformer, FLOPs, parameters."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, SD3Transformer2DModel
from random_adapters import TARGETS, random_adapter
from safetensors.torch import load_file
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModelWithProjection

from flowopd_eval.adapters import fresh_adapter, write_adapter
from flowopd_eval.errors import RequestError
from flowopd_eval.models import resolve
from flowopd_eval.records import SD35_RECORD
from flowopd_eval.tiny.vocabulary import TEXT_LENGTH
from training.__main__ import main
from training.architecture import SD35_MEDIUM, architecture, build, text_encoder
from training.coldstart import SFT
from training.config import ATTENTION, DistillConfig, Rollout, load_recipe
from training.data import Mixture, task_prompts
from training.distill import Distillation, PolicyGradient
from training.grpo import GRPO
from training.loop import Parallel
from training.meter import Meter, device_attention
from training.nft import NFT
from training.policies import Policies
from training.price import ENCODED_AT_ONCE, decoding, duration, encoding, price, print_price, trained_steps, work
from training.rollout import windows

pytest_plugins = ["tiny_training"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def on_the_processor() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def broad(tmp_path_factory) -> Path:
    """A pipeline with all kinds of blocks and tokens enough that every kind of activation counts; and three experts."""
    from tiny_training import build_pipeline  # a plugin: pytest is the first to import it

    folder = tmp_path_factory.mktemp("broad")
    pipeline = build_pipeline()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=32,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pipeline.register_modules(transformer=transformer.eval())
    pipeline._record = replace(pipeline.record, width=64, height=64)  # 256 tokens
    pipeline.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two", "anchor")):
        write_adapter(random_adapter(transformer, seed), folder / name)
    return folder


def recipe(tiny, broad: Path, out: Path, stage: str, **changes):
    """A recipe on the broad base: rank 8 where the experts have 4."""
    values = {"base": str(broad / "base"), "lora": {"rank": 8, "alpha": 16, "target_modules": TARGETS}, "seed": 1}
    if stage not in ("grpo", "nft"):
        values["teachers"] = {name: {"source": str(broad / name)} for name in ("one", "two")}
    if stage == "distill":
        values["anchor"] = {"source": str(broad / "anchor")}
    return tiny.recipe(stage, out, **values | changes)


def stage_of(config):
    """The stage of a recipe, and its policies, ready to step."""
    policies = Policies(config, CPU)
    prompts = {task.name: task_prompts(task).training for task in config.tasks}
    mixture = Mixture(config.tasks, prompts, config.batch_size, config.group, config.seed)
    objective = getattr(config, "objective", None)
    kinds = {
        "sft": SFT,
        "grpo": GRPO,
        "nft": NFT,
        "distill": PolicyGradient if objective == "policy_gradient" else Distillation,
    }
    stage = kinds[config.stage](config, policies, mixture, Parallel(Accelerator(cpu=True)))
    policies.prepare_text([sample.prompt.prompt for sample in stage.needed(0)])
    return stage, policies


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- memory ----------------------------------------------------------------------------------------------------------
MEASURED = {
    "direct": ("distill", 4, {"rollout": {"steps": 1}}),
    "direct, small micro batch": ("distill", 2, {"rollout": {"steps": 1}}),
    "direct, checkpointed": ("distill", 4, {"rollout": {"steps": 1}, "gradient_checkpointing": True}),
    "direct, backbone in fp8": ("distill", 4, {"rollout": {"steps": 1}, "storage": "float8"}),
    "direct, backbone in fp8, checkpointed": ("distill", 4, {"gradient_checkpointing": True, "storage": "float8"}),
    "direct, checkpointed, small micro batch": ("distill", 2, {"gradient_checkpointing": True}),
    "grpo": ("grpo", 4, {"beta": 0.1}),
    "nft, guided": ("nft", 4, {"guidance": 3.0, "updates": 3}),
    "nft with a pull to the base": ("nft", 4, {"guidance": 3.0, "base_weight": 0.1}),
    "sft, checkpointed": ("sft", 4, {"gradient_checkpointing": True}),
}
PASSING = ("trajectories", "activations", "transient")


class StorageTracker(MemTracker):
    """Torch's tracker of real storages, without its statistics by module: those hook every parameter, frozen or not."""

    def _ignore(self, *arguments):
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore


@pytest.mark.parametrize("case", MEASURED)
def test_predicted_peak_is_the_peak_of_the_real_step(tiny, broad, tmp_path, case):
    """Against torch's own tracker on real tensors: it counts storages, whatever an allocator makes of them.

    Peaks are compared without what lies there all the time, which would hide their difference; the next test is on it.
    """
    stage, size, changes = MEASURED[case]
    config = recipe(tiny, broad, tmp_path, stage, batch_size=size, micro_batch=size, **changes)
    step, policies = stage_of(config)
    list(step.updates(0))  # gradients are there from now on, and SFT's pictures are drawn
    gc.collect()
    tracker = StorageTracker()
    tracker.track_external(policies.transformer, policies.bank, policies.pipeline.vae)
    before = tracker.get_tracker_snapshot()[CPU]["Total"]
    with tracker:
        list(step.updates(0))
    measured = tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before

    predicted = max(sum(m.parts.get(part, 0) for part in PASSING) for m in price(config).moments[1:])
    assert predicted == pytest.approx(measured, rel=0.03)


def test_decoding_and_encoding_take_what_they_really_take(tiny):
    base = architecture(str(tiny.folder / "base"))
    vae = AutoencoderKL.from_pretrained(tiny.folder / "base" / "vae")
    deep = {**base.encoders["text_encoder"], "num_hidden_layers": 4}  # so that keeping all hidden states shows
    encoder = text_encoder(deep).eval()
    tokens = base.tokens_of("text_encoder", 0)

    def encode():
        encoder(torch.zeros(ENCODED_AT_ONCE, tokens, dtype=torch.long), output_hidden_states=True)

    peaks = []
    for call in (lambda: vae.decode(torch.zeros(3, *base.latent_shape)), encode):
        tracker = StorageTracker()
        tracker.track_external(vae, encoder)
        before = tracker.get_tracker_snapshot()[CPU]["Total"]
        with torch.no_grad(), tracker:
            call()
        peaks.append(tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before)
    predicted = decoding(build(AutoencoderKL.from_config, base.vae, torch.float32), 3, base.latent_shape, torch.float32)
    assert predicted.peak == pytest.approx(peaks[0], rel=0.02)
    assert encoding(build(text_encoder, deep, torch.float32), tokens) == pytest.approx(peaks[1], rel=0.02)


@pytest.mark.parametrize("storage", [{}, {"storage": "float8"}], ids=["bf16", "fp8"])
def test_what_stays_is_counted_to_the_byte(storage, tiny, broad, tmp_path):
    config = recipe(tiny, broad, tmp_path, "distill", dtype="bfloat16", **storage)
    policies = Policies(config, CPU)
    stored = {p.dtype for p in policies.transformer.parameters()}
    assert stored == {torch.bfloat16} | ({torch.float8_e4m3fn} if storage else set())
    parts = price(config).moments[1].parts
    own = size(policies.bank.parameters())
    assert parts["transformer"] == size(policies.transformer.parameters()) + size(policies.transformer.buffers())
    assert parts["VAE"] == size(policies.pipeline.vae.parameters())
    experts = [parts[f"adapter {name}"] for name in ("one", "two", "anchor")]
    assert sum(experts) + parts["zero adapter, for the base"] == size(policies.bank.buffers())
    assert parts["student, fp32"] == parts["gradients"] == parts["student's average (EMA)"] == own
    optimizer = torch.optim.AdamW(list(policies.bank.parameters()))
    for parameter in policies.bank.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    averages = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert parts["AdamW's two averages"] == size(averages)


def test_text_encoders_are_there_only_while_prompts_are_encoded(tiny, tmp_path):
    prompts, training = price(tiny.recipe("distill", tmp_path)).moments
    named = {part: part.partition(",")[0] for part in prompts.parts if part.startswith("text_encoder")}
    assert sorted(named.values()) == ["text_encoder", "text_encoder_2"]
    assert not named.keys() & training.parts.keys()
    for part, folder in named.items():
        encoder = CLIPTextModelWithProjection.from_pretrained(tiny.folder / "base" / folder)
        assert prompts.parts[part] == size([*encoder.parameters(), *encoder.buffers()])


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("distill", {"steps": 50}), ("distill", {"steps": 1}), ("sft", {"steps": 50, "pictures": 4})],
    ids=["every prompt, some of them often", "one batch's", "the pictures'"],
)
def test_embeddings_take_what_they_take(tiny, tmp_path, stage, changes):
    config = tiny.recipe(stage, tmp_path, cache=str(tmp_path / "cache"), **changes)
    found = price(config)
    stage_of(config)
    kept = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert found.prompts + 1 == len(kept)  # and the negative one
    assert found.embeddings == sum(size([text["states"], text["pooled"]]) for text in kept)


def test_a_whole_model_among_the_teachers_costs_a_backbone(tiny, tmp_path):
    base = str(tiny.folder / "base")
    teachers = {"one": {"source": base}, "two": {"source": tiny.teacher("two")}}
    parts = price(tiny.recipe("distill", tmp_path, teachers=teachers)).moments[1].parts
    assert parts["teacher one, a whole model"] == parts["transformer"]
    assert "adapter one" not in parts


def test_meter_counts_storages_while_they_live():
    weight = torch.ones(1000, device="meta")
    with Meter([weight]) as meter:
        view = weight.view(10, 100).t()
        first = torch.ones(256, device="meta") * 2  # a kilobyte, and another one for a moment
        assert (meter.live, meter.peak) == (1024, 2048)
        kept, first = first[3:], None
        assert meter.live == 1024
        del kept
        assert (meter.live, meter.peak) == (0, 2048)
        assert view.shape == (100, 10)


def test_attention_is_put_back():
    stock = F.scaled_dot_product_attention
    with pytest.raises(KeyError), device_attention():
        raise KeyError
    assert F.scaled_dot_product_attention is stock


# --- shapes ----------------------------------------------------------------------------------------------------------
def count(kind, config) -> int:
    return sum(p.numel() for p in build(kind, config, torch.bfloat16).parameters())


def test_sd35_medium_has_the_published_number_of_parameters():
    assert count(SD3Transformer2DModel.from_config, SD35_MEDIUM.transformer) == pytest.approx(2.243e9, abs=5e5)
    assert count(AutoencoderKL.from_config, SD35_MEDIUM.vae) == pytest.approx(83.82e6, abs=1e4)
    encoders = {name: count(text_encoder, config) for name, config in SD35_MEDIUM.encoders.items()}
    published = {"text_encoder": 123.65e6, "text_encoder_2": 694.66e6, "text_encoder_3": 4762.31e6}
    assert encoders == pytest.approx(published, rel=1e-5)


def test_an_adapter_of_rank_32_has_18_8_million_parameters():
    transformer = build(SD3Transformer2DModel.from_config, SD35_MEDIUM.transformer, torch.bfloat16)
    with torch.device("meta"):
        adapter = fresh_adapter(transformer, ATTENTION, 32)
    assert sum(f.A.numel() + f.B.numel() for f in adapter.factors.values()) == pytest.approx(18.8e6, rel=2e-3)


def test_names_and_folders_give_an_architecture_without_a_download(tiny):
    assert architecture("flow-opd:base") is SD35_MEDIUM
    assert architecture("hub:stabilityai/stable-diffusion-3.5-medium@abc") is SD35_MEDIUM
    assert SD35_MEDIUM.latent_shape == (16, 64, 64)
    assert SD35_MEDIUM.tokens(128) == 205
    miniature = architecture("tiny:base")
    assert miniature.latent_shape == (16, 16, 16)
    assert miniature.record == resolve("tiny:base").record
    assert architecture(str(tiny.folder / "base")).transformer["num_layers"] == 2


@pytest.mark.parametrize(
    ("base", "words"),
    [("flow-opd:geneval", "has an adapter"), ("hub:somebody/model", "folder on disk"), ("{empty}", "config.json")],
)
def test_a_base_without_known_shapes_is_refused(tmp_path, base, words):
    with pytest.raises(RequestError, match=words):
        architecture(base.format(empty=tmp_path))


# --- work ------------------------------------------------------------------------------------------------------------
CPS = {"steps": 3, "sampler": "cps"}  # has no density on its last step
REAL = {
    "an anchor, checkpointed": ("distill", {"anchor": {"source": "base"}, "gradient_checkpointing": True}),
    "an anchor at every second step": ("distill", {"rollout": {"steps": 4}, "anchor": {"source": "base", "every": 2}}),
    "a window, a student without guidance": ("distill", {"rollout": {"steps": 3, "window": 2, "guidance": 1.0}}),
    "policy gradient": ("distill", {"objective": "policy_gradient", "group_size": 2, "rollout": CPS}),
    "policy gradient with an anchor": (
        "distill",
        {"objective": "policy_gradient", "group_size": 2, "rollout": CPS, "anchor": {"source": "base"}},
    ),
    "grpo with a pull to the base": ("grpo", {"beta": 0.1, "rollout": CPS, "gradient_checkpointing": True}),
    "grpo with a window": ("grpo", {"beta": 0.1, "rollout": {"steps": 3, "window": 1}, "updates": 2}),
    "nft": ("nft", {"updates": 3}),
    "nft, guided": ("nft", {"guidance": 3.0, "gradient_checkpointing": True}),
    "nft with a pull to the base": ("nft", {"guidance": 3.0, "base_weight": 0.1}),
    "sft": ("sft", {}),
}


class Rows:
    """Rows through a transformer: of its forwards, of their backwards, and of a block's forwards."""

    def __init__(self, transformer) -> None:
        self.forward = self.backward = self.block = 0
        transformer.register_forward_hook(self._forward)
        # Before it: a block computed again stops as soon as the backward has what it needs.
        transformer.transformer_blocks[0].register_forward_pre_hook(self._block, with_kwargs=True)

    def _forward(self, module, arguments, outputs) -> None:
        self.forward += len(outputs[0])
        if outputs[0].requires_grad:
            outputs[0].register_hook(self._backward)

    def _backward(self, gradient) -> None:
        self.backward += len(gradient)

    def _block(self, module, arguments, named) -> None:
        self.block += len(named["hidden_states"] if named else arguments[0])


@pytest.mark.parametrize("case", REAL)
def test_rows_of_a_real_run_are_the_rows_of_the_price(tiny, tmp_path, case):
    stage, changes = REAL[case]
    config = tiny.recipe(stage, tmp_path, **changes)
    step, policies = stage_of(config)
    rows = Rows(policies.transformer)
    for number in range(config.steps):
        list(step.updates(number))
    samples = config.steps * config.batch_size
    parts = work(config, policies.record)
    assert rows.forward == samples * sum(part.forward for part in parts)
    assert rows.backward == samples * sum(part.backward for part in parts) > 0
    assert rows.block - rows.forward == samples * sum(part.recomputed for part in parts)


def distillation(**changes) -> DistillConfig:
    values = {
        "stage": "distill", "out": "x", "base": "flow-opd:base", "steps": 100, "batch_size": 8, "micro_batch": 4,
        "tasks": [
            {"name": "a", "prompts": "a.txt", "teacher": "a", "share": 3},
            {"name": "b", "prompts": "b.txt", "teacher": "b"},
        ],
        "teachers": {"a": {"source": "flow-opd:geneval"}, "b": {"source": "flow-opd:ocr"}},
        "anchor": {"source": "flow-opd:deqa"}, "strip_every": 0,
    }  # fmt: skip
    return DistillConfig.model_validate(values | changes)


def equivalents(config, record=SD35_RECORD) -> float:
    return sum(part.equivalents for part in work(config, record))


def test_forward_equivalents_of_the_documented_cost_model():
    """8 a trained step of a sample with guidance: 4 of the student, 2 of its teacher, 2 of the anchor."""
    assert equivalents(distillation()) == 10 * 8
    assert equivalents(distillation(anchor=None)) == 10 * 6
    assert equivalents(distillation(gradient_checkpointing=True)) == 10 * 10
    assert equivalents(distillation(rollout={"steps": 10, "window": 2})) == 10 * 2 + 2 * 6
    one = {"a": {"source": "flow-opd:geneval", "guidance": 1.0}, "b": {"source": "flow-opd:ocr"}}
    assert equivalents(distillation(teachers=one)) == 10 * (4 + 0.75 * 1 + 0.25 * 2 + 2)


def test_strips_of_pictures_are_counted_with_the_run():
    """Every 30 of 100 steps and after the last: 4 strips of 3 prompts in 40 steps, by base, teacher and student."""
    strips = work(distillation(strip_every=30, strip_prompts=3), SD35_RECORD)[-1]
    assert strips.forward * 100 * 8 == pytest.approx(4 * 3 * 40 * 3 * 2)


@pytest.mark.parametrize(("low", "high", "window"), [(0, 5, 2), (2, 5, 1), (3, 5, 2)])
def test_expected_trained_steps_are_the_mean_over_drawn_windows(low, high, window):
    possible = [True, True, True, False, False]
    rollout = Rollout(steps=5, window=window, window_range=(low, high))
    drawn = windows(range(2000), 5, window, (low, high))
    counts = [sum(possible[i] for i in steps) for steps in drawn]
    assert trained_steps(rollout, possible) == pytest.approx(sum(counts) / len(counts), abs=0.05)


def test_flops_of_a_row_are_those_of_a_real_forward_and_backward(tiny, broad, tmp_path):
    """Attention is computed by products that torch's counter sees; their backward has 4 of them, that of flash 5.

    There are three attentions with a backward: the second of the first block has nothing trained before it.
    """
    config = recipe(tiny, broad, tmp_path, "sft", batch_size=2, micro_batch=2)
    found = price(config).micro_batch
    step, _ = stage_of(config)
    list(step.updates(0))  # draws the pictures
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(step.updates(0))
    tokens = 256 + TEXT_LENGTH
    fifth = 3 * 2 * tokens**2 * 128
    assert found.forward_flops + found.backward_flops == pytest.approx(counter.get_total_flops() / 2 + fifth)
    checkpointed = price(recipe(tiny, broad, tmp_path, "sft", micro_batch=2, gradient_checkpointing=True)).micro_batch
    assert checkpointed.forward_flops == found.forward_flops
    assert checkpointed.backward_flops == pytest.approx(found.backward_flops, rel=0.02)


def test_a_run_is_its_samples_and_takes_their_flops(tiny, tmp_path):
    found = price(tiny.recipe("grpo", tmp_path, steps=5, updates=2))
    m, samples = found.micro_batch, 5 * 4
    assert (found.samples, found.optimiser_steps) == (samples, 10)
    rows = 4 * m.forward_flops + 4 * (m.forward_flops + m.backward_flops)  # drawn on 2 guided steps, trained on them
    larger = price(tiny.recipe("grpo", tmp_path, micro_batch=4))
    assert found.decoding_flops == larger.decoding_flops > 0  # of one picture, however many are decoded at once
    assert found.flops == pytest.approx(samples * (rows + found.decoding_flops))
    assert found.seconds(2.0) == pytest.approx(found.flops / 2e12)


# --- what is printed -------------------------------------------------------------------------------------------------
def dry_run(recipe_file: Path, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["training", str(recipe_file), "--dry-run"])
    return main()


def test_dry_run_prints_memory_and_work_and_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    file = tiny.write(tmp_path / "recipe.toml", "distill", tmp_path / "out", strip_every=1)
    assert dry_run(file, monkeypatch) == 0
    printed = capsys.readouterr().out
    total = equivalents(load_recipe(file), architecture(str(tiny.folder / "base")).record)
    for words in (
        "Memory in GB",
        "adapter two",
        "prompts ┃ training ┃ pictures",
        f"{total:.4g}",
        "two CPU cores",
        "assumed)",
    ):
        assert words in printed
    assert not (tmp_path / "out").exists()


def test_a_given_speed_replaces_the_assumed_ones(tiny, tmp_path, capsys):
    config = tiny.recipe("distill", tmp_path, steps=1000)
    print_price(config, speed=0.001)
    printed = capsys.readouterr().out
    assert duration(price(config).seconds(0.001)) in printed
    assert "assumed)" not in printed


def test_a_merge_has_no_price(tmp_path, monkeypatch, capsys):
    file = tmp_path / "merge.toml"
    file.write_text('stage = "merge"\nout = "x"\nbase = "tiny:base"\nteachers = {"tiny:ocr" = 1.0}\n')
    assert dry_run(file, monkeypatch) == 0
    assert "nothing to price" in capsys.readouterr().out


def test_durations_are_readable():
    assert [duration(s) for s in (35, 720, 26280)] == ["35 seconds", "12.0 minutes", "7.3 hours"]
