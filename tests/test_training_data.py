"""What a training run is fed with: recipes, prompts and their mixture, text embeddings, rewards."""

import json
import math
import random
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import accumulate

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from flowopd_eval.errors import RequestError
from flowopd_eval.flow import guided_velocity
from flowopd_eval.models import TINY_RECORD
from flowopd_eval.pipeline import FlowOPDPipeline
from flowopd_eval.records import SETTINGS_FILE, Prompt
from flowopd_eval.tiny.suite import shapes_geneval_prompts, sign_prompts
from training.config import Task, Teacher, load_recipe
from training.data import Embeddings, Mixture, task_prompts
from training.policies import Policies, teacher_record
from training.rewards import Rewards, load_reward

pytest_plugins = ["tiny_training"]
CPU = torch.device("cpu")
TEXTS = ["a photo of a red circle", 'a sign that says "CAT"', "two stars"]


# --- recipes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("distill", "speed=3", r"speed: .*\(got 3\)"),
        ("distill", "rollout.stepps=3", r"rollout\.stepps: .*\(got 3\)"),
        ("distill", "optimizer.ema=1.5", r"optimizer\.ema: .*less than 1.*\(got 1\.5\)"),
        ("distill", 'tasks=[{name="a", prompts="a"}]', "Task 'a' has no teacher; give it `teacher = …`, .*: one, two"),
        ("sft", "tasks.0.teacher=three", r"'shapes' names .* 'three'; .* has: one, two\. Add \[teachers\.three\] or"),
        ("distill", "tasks.1.teacher=one", "No task is routed to two; remove it or give it a task"),
        ("distill", "tasks.1.name=shapes", "Task names must differ, but got shapes, shapes"),
        ("distill", "objective=ode", r"set rollout\.sampler \(now 'sde'\)"),
        ("distill", "objective=policy_gradient", "group_size is 1"),
        ("distill", "objective=policy_gradient rollout.sampler=ode", r"set rollout\.sampler to sde or cps"),
        ("distill", "rollout.sampler=ode", "no `transition` weight; use euler or velocity"),
        ("distill", "rollout.sampler=cps kl_weight=flow-opd-code", r"use rollout\.sampler = 'sde'"),
        ("distill", "micro_batch=3", "batch_size 4 is no multiple of micro_batch 3"),
        ("grpo", "group_size=4", "micro_batch 2 is no multiple of group 4"),
        ("distill", "rollout.window=3", r"rollout: A window of 3 steps does not fit into steps 0\.\.2"),
        (
            "distill",
            "rollout.window=1 rollout.window_range=[1,3]",
            r"rollout: window_range \(1, 3\) is not within steps 0\.\.2",
        ),
        ("distill", "rollout.window_range=[0,2]", "rollout: .* give `window` too"),
        ("distill", "rollout.sampler=cps rollout.a=1.1", r"rollout: .*at most 1, but a is 1\.1"),
        ("distill", "rollout.a=0", "rollout: .* say sampler = 'ode'"),
        ("grpo", "tasks.1.rewards={}", r"Task 'signs' has no rewards; give it `rewards = \{ocr = 1\.0\}`"),
        ("grpo", "rollout.sampler=ode", r"set rollout\.sampler to sde or cps"),
        ("grpo", "updates=4", "2 micro batches do not make 4 updates"),
        ("grpo", "start=merge", r"there are no \[teachers\]"),
        ("distill", "steps", "--set steps: expected key=value"),
        ("distill", "optimizer.betas=[1.5,2]", r"betas.*less than 1"),
        ("distill", "tasks.0.share=inf", r"share.*finite"),
        ("grpo", "tasks.1.rewards={ocr=0.0}", "nothing is rewarded"),
        ("distill", "tasks.9.share=2", r"tasks\.9\.share"),
        ("distill", "tasks.shapes.share=2", r"tasks\.shapes\.share"),
        ("distill", "tasks.9=2", r"tasks\.9"),
        ("distill", "steps.x=2", r"steps\.x"),
    ],
)
def test_an_impossible_recipe_names_the_key_and_the_remedy(stage, change, message, tiny, tmp_path):
    path = tiny.write(tmp_path / "recipe.toml", stage, tmp_path)
    load_recipe(path)  # right but for the change
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [change] if "{" in change else change.split())


def test_overrides_reach_tables_lists_and_tables_that_are_not_there(tiny, tmp_path):
    path = tiny.write(tmp_path / "recipe.toml", "distill", tmp_path)
    changes = "rollout.steps=5 tasks.1.share=2.5 teachers.one.guidance=2 start=merge anchor.source=base optimizer.eps=1"
    config = load_recipe(path, [*changes.split(), "optimizer.betas=[0.8, 0.9]"])
    assert (config.rollout.steps, config.tasks[1].share, config.tasks[0].share) == (5, 2.5, 1)
    assert (config.teachers["one"].guidance, config.teachers["two"].guidance) == (2, None)
    assert (config.start, config.anchor.source, config.optimizer.betas) == ("merge", "base", (0.8, 0.9))
    assert config.optimizer.learning_rate == 1e-2  # the rest of a table stays


# --- prompts ---------------------------------------------------------------------------------------------------------
def test_held_out_prompts_are_kept_from_training_whatever_the_order_of_the_file(tiny, tmp_path):
    task = Task(name="shapes", prompts=str(tiny.folder / "shapes.jsonl"), held_out=5)
    found = task_prompts(task)
    assert (len(found.training), len(found.held_out)) == (11, 5)
    assert not {p.id for p in found.training} & {p.id for p in found.held_out}
    lines = (tiny.folder / "shapes.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines[:-1]))
    shuffled = task_prompts(task.model_copy(update={"prompts": str(tmp_path / "shuffled.jsonl"), "held_out": 4}))
    assert {p.id for p in shuffled.held_out} <= {p.id for p in found.held_out}  # one prompt or one held out fewer


def test_too_few_prompts_are_refused_with_both_numbers(tiny):
    task = Task(name="signs", prompts=str(tiny.folder / "signs.jsonl"), held_out=5)
    with pytest.raises(RequestError, match=r"'signs': .*signs\.jsonl has 5 prompts, and held_out = 5 of them"):
        task_prompts(task)
    assert len(task_prompts(task.model_copy(update={"held_out": 4})).training) == 1


def test_builtin_prompts_are_none_of_the_evaluation_suite():
    suite = {p.prompt for p in [*shapes_geneval_prompts(), *sign_prompts()]}
    for name in ("builtin:shapes", "builtin:signs"):
        found = task_prompts(Task(name="x", prompts=name))
        training = {p.prompt for p in found.training}
        assert not suite & (training | {p.prompt for p in found.held_out})
        assert {p.task for p in found.held_out if p.prompt in training} <= {"single_object"}
    with pytest.raises(RequestError, match="'builtin:cats' is none of builtin:shapes, builtin:signs"):
        task_prompts(Task(name="x", prompts="builtin:cats"))


# --- the mixture -----------------------------------------------------------------------------------------------------
def mixture_of(shapes, batch, group=1, seed=0):
    """A mixture of tasks given as (share, numbers of prompts of each tag)."""
    tasks = [Task(name=f"t{n}", prompts="x", share=share) for n, (share, _) in enumerate(shapes)]
    prompts = {
        task.name: [
            Prompt(f"{task.name}-{tag}-{n}", "", f"tag{tag}") for tag, count in enumerate(sizes) for n in range(count)
        ]
        for task, (_, sizes) in zip(tasks, shapes, strict=True)
    }
    return Mixture(tasks, prompts, batch, group, seed)


def drawn(mixture, steps):
    return [sample for step in range(steps) for sample in mixture.samples(step)]


SHARES = st.sampled_from([0.1, 0.5, 1, 2, 3]) | st.floats(0.1, 10)
SHAPES = st.lists(st.tuples(SHARES, st.lists(st.integers(1, 4), min_size=1, max_size=3)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 9))
def test_shares_hold_from_the_first_sample_on(shapes, seed):
    samples = drawn(mixture_of(shapes, 10, seed=seed), 8)
    total = sum(share for share, _ in shapes)
    for n, (share, _) in enumerate(shapes):
        share /= total
        counts = accumulate(sample.task.name == f"t{n}" for sample in samples)
        # Where each task is at most half a prompt off its due time, a prefix is off by no more than this.
        bound = 0.5 + share / 2 * max(0, len(shapes) - 2) + 1e-6
        assert all(abs(count - share * (k + 1)) <= bound for k, count in enumerate(counts))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 9))
def test_every_prompt_of_a_tag_comes_once_before_any_comes_again(shapes, seed):
    samples = drawn(mixture_of(shapes, 10, seed=seed), 8)
    for n, (_, sizes) in enumerate(shapes):
        ours = [sample.prompt for sample in samples if sample.task.name == f"t{n}"]
        assert [p.task for p in ours] == [f"tag{k % len(sizes)}" for k in range(len(ours))]  # tags take turns
        for tag, size in enumerate(sizes):
            ids = [p.id for p in ours[tag :: len(sizes)]]
            rounds = [ids[k : k + size] for k in range(0, len(ids), size)]
            assert all(len(set(round_)) == len(round_) for round_ in rounds)


def test_a_file_s_own_mixture_of_tags_is_kept_where_that_is_asked_for():
    mixture = mixture_of([(1, [7, 5, 3, 1])], 16)
    mixture_of_file = Mixture(
        [task.model_copy(update={"balance": "prompts"}) for task in mixture.tasks],
        {"t0": [prompt for tag in mixture._tags[0] for prompt in tag]}, 16, 1, 0,
    )  # fmt: skip
    for step in range(3):
        found = Counter(sample.prompt.task for sample in mixture_of_file.samples(step))
        assert found == {"tag0": 7, "tag1": 5, "tag2": 3, "tag3": 1}
    assert set(Counter(sample.prompt.task for sample in mixture.samples(0)).values()) == {4}


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 3), st.integers(1, 4))
def test_a_step_is_a_pure_function_and_batches_only_cut_the_sequence(shapes, group, groups):
    small = mixture_of(shapes, group * groups, group)
    sequence = drawn(small, 12)
    assert small.samples(5) == sequence[5 * group * groups : 6 * group * groups]  # asked again, out of turn
    assert sequence == drawn(mixture_of(shapes, 2 * group * groups, group), 6)
    assert len({sample.seed for sample in sequence}) == len(sequence)
    for k in range(0, len(sequence), group):
        assert len({sample.prompt.id for sample in sequence[k : k + group]}) == 1
    others = drawn(mixture_of(shapes, group * groups, group, seed=1), 12)
    assert not {sample.seed for sample in sequence} & {sample.seed for sample in others}


# --- text ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipeline(tiny):
    pipeline = FlowOPDPipeline.from_pretrained(
        tiny.folder / "base", experts={n: tiny.teacher(n) for n in ("one", "two")}
    )
    pipeline.transformer.eval()
    return pipeline


def encode(pipeline, texts, length):
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return states, pooled


def altered(tiny, folder, file):
    """A copy of the base in ``folder``, the weights of one file a tenth larger."""
    path = shutil.copytree(tiny.folder / "base", folder) / file
    save_file({name: 1.1 * value for name, value in load_file(path).items()}, path)
    return folder


def test_each_text_is_encoded_once_for_all_runs_of_an_encoder(pipeline, tmp_path):
    calls = []

    def counted(texts, length):
        calls.extend((text, length) for text in texts)
        return encode(pipeline, texts, length)

    first = Embeddings(tmp_path, "a" * 64, counted)
    assert first.prepare([*TEXTS, *TEXTS], 0, batch=2) == 3
    assert first.prepare(TEXTS, 0) == 0
    again = Embeddings(tmp_path, "a" * 64, counted)
    assert again.prepare(TEXTS, 0) == 0
    assert calls == [(text, 0) for text in TEXTS]
    states, pooled = encode(pipeline, TEXTS[::-1], 0)
    for embeddings in (first, again):
        found = embeddings(TEXTS[::-1], 0, CPU, torch.float32)
        torch.testing.assert_close(found.states, states, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=0)
    assert again.prepare(TEXTS, 4) == Embeddings(tmp_path, "b" * 64, counted).prepare(TEXTS, 0) == 3


def test_a_run_reads_what_another_encoded_with_the_same_encoders_and_precision(tiny, tmp_path):
    changes = {"cache": str(tmp_path / "cache")}

    def policies(**more):
        return Policies(tiny.recipe("distill", tmp_path, **changes, **more), CPU)

    def no_need(texts, length):
        raise AssertionError(f"{texts} are encoded again")

    def states(policies):
        policies.prepare_text(TEXTS)
        return policies.conditions(TEXTS).at(0)[0].states

    policies(dtype="bfloat16").prepare_text(TEXTS)
    first = policies()
    expected = encode(FlowOPDPipeline.from_pretrained(tiny.folder / "base"), TEXTS, 0)[0]
    torch.testing.assert_close(states(first), expected, atol=1e-6, rtol=0)
    second = policies()
    second.embeddings.encode = no_need
    assert torch.equal(states(second), states(first))
    other = altered(tiny, tmp_path / "other", "text_encoder/model.safetensors")
    assert (states(policies(base=str(other))) - states(first)).abs().max() > 0.01


def test_each_expert_has_its_own_guidance_and_text_length(tiny, pipeline, tmp_path):
    teachers = {
        "one": {"source": tiny.teacher("one"), "text_length": 4},
        "two": {"source": tiny.teacher("two"), "guidance": 1.5},
    }
    other = altered(tiny, tmp_path / "other", "transformer/diffusion_pytorch_model.safetensors")
    anchor = {"source": str(other)}  # a whole model
    policies = Policies(tiny.recipe("distill", tmp_path, teachers=teachers, anchor=anchor), CPU)
    policies.prepare_text(TEXTS)
    whole = SD3Transformer2DModel.from_pretrained(other, subfolder="transformer")
    rows = [("one", 4, 3.0), ("two", 0, 1.5), ("anchor", 0, 3.0)]
    x, sigma = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.7)
    found = policies.frozen([policies.experts[name] for name, _, _ in rows], x, sigma, policies.conditions(TEXTS))
    for n, (name, length, guidance) in enumerate(rows):
        both = []
        for text in ("", TEXTS[n]):
            states, pooled = encode(pipeline, [text], length)
            assert states.shape == (1, 16 + length, 32)
            with torch.no_grad(), pipeline._bank.use(None if name == "anchor" else name):
                transformer = whole if name == "anchor" else pipeline.transformer
                both += transformer(x[n : n + 1], states, pooled, sigma[None] * 1000, return_dict=False)
        torch.testing.assert_close(found[n : n + 1], guided_velocity(*both, guidance), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("said", "taught"),
    [({}, (2.5, 7)), ({"guidance": 1.0}, (1.0, 7)), ({"text_length": 3}, (2.5, 3)),
     ({"guidance": 1.0, "text_length": 3}, (1.0, 3))],
)  # fmt: skip
def test_what_a_recipe_leaves_open_a_teachers_own_record_says(tmp_path, said, taught):
    record = replace(TINY_RECORD, guidance=2.5, text_length=7)
    (tmp_path / SETTINGS_FILE).write_text(json.dumps({"adapter_of": "tiny:base", "record": asdict(record)}))
    found = teacher_record(Teacher(source=str(tmp_path), **said), TINY_RECORD)
    assert (found.guidance, found.text_length) == taught


def test_the_record_beside_an_adapter_is_its_file_s_too(tmp_path):
    record = replace(TINY_RECORD, guidance=2.5)
    (tmp_path / SETTINGS_FILE).write_text(json.dumps({"adapter_of": "tiny:base", "record": asdict(record)}))
    (tmp_path / "adapter_model.safetensors").touch()
    assert teacher_record(Teacher(source=str(tmp_path / "adapter_model.safetensors")), TINY_RECORD).guidance == 2.5
    (tmp_path / SETTINGS_FILE).write_text(json.dumps({"record": asdict(record), "experts": []}))  # a pipeline's
    assert teacher_record(Teacher(source=str(tmp_path / "adapter_model.safetensors")), TINY_RECORD).guidance == 4.5


# --- rewards ---------------------------------------------------------------------------------------------------------
def test_rewards_of_a_users_file_are_weighted_by_task_and_a_failed_judgement_is_nan(tiny):
    bright, flat = tiny.reward("Bright"), tiny.reward("Flat")
    shapes = Task(name="shapes", prompts="x", rewards={bright: 2.0, flat: 0.5})
    signs = Task(name="signs", prompts="x", rewards={flat: 3.0})
    rewards = Rewards([shapes, signs])
    white, black = (Image.new("RGB", (4, 4), colour) for colour in ("white", "black"))
    prompts = [Prompt(text, text, "x") for text in ("a star", "a sign", "a star", "a green star", "a green sign")]
    found = rewards.judge([white, white, black, white, white], prompts, [shapes, signs, shapes, shapes, signs])
    assert [values["total"] for values in found[:3] + found[4:]] == [2.25, 1.5, 0.25, 1.5]
    assert math.isnan(found[3]["total"])
    assert found[1] == {flat: 0.5, "total": 1.5}
    assert json.loads(json.dumps(rewards.identity()))[bright]["identity"] == {"name": "bright"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sharpness",
            "Reward 'sharpness': .*expected FILE.py:Class, or an entry point.*Built in: partial_credit, .*ocr",
        ),
        ("{folder}/rewards.py", "Unknown scorer"),
        ("{folder}/dim.py:Bright", "there is no file .*dim.py"),
        ("{folder}/rewards.py:Smile", r"rewards\.py has no Smile"),
        ("{folder}/rewards.py:Mute", r"Mute' has no method `score\(images, prompts\)`"),
    ],
)
def test_a_reward_that_is_none_is_named(name, message, tiny):
    with pytest.raises(RequestError, match=message):
        load_reward(name.format(folder=tiny.folder))


def test_a_users_file_is_a_module_like_any_other(tmp_path):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Smile:\n"
    body = "    scale: float = 2.0\n    def score(self, images, prompts): return [self.scale for _ in images]\n"
    (tmp_path / "my_reward.py").write_text(head + body)  # dataclasses look their module up by its name
    scorer = load_reward(f"{tmp_path / 'my_reward.py'}:Smile")
    assert scorer.score([Image.new("RGB", (4, 4))], [Prompt("a", "a", "x")])[0].value == 2.0
