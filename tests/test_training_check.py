"""``python -m training check``: a teacher that is better, one that is worse, and the base itself, on drawn pictures."""

import sys

import numpy as np
import pytest

from flowopd_eval.errors import RequestError
from flowopd_eval.pipeline import FlowOPDPipeline
from training.__main__ import main
from training.check import check_task
from training.data import task_prompts
from training.rewards import Rewards

pytest_plugins = ["tiny_training"]
pytestmark = pytest.mark.usefixtures("one_thread_of_the_processor")
VERDICTS = {"darker": "better", "lighter": "worse", "itself": "no difference"}  # teacher "one" darkens its pictures
REWARDS = '''
import numpy as np
from flowopd_eval.records import Score

class Light:
    """Mean brightness, 0..1."""
    def identity(self):
        return {}
    def score(self, images, prompts):
        return [Score(float(np.asarray(image).mean()) / 255) for image in images]

class Dark(Light):
    """The contrary; of red things it says nothing."""
    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return [Score(None if "red" in p.prompt else 1 - s.value) for s, p in zip(scores, prompts)]
'''


@pytest.fixture(scope="module")
def tasks(tiny, tmp_path_factory):
    """One and the same prompts under three names: for teacher one with either reward, and for the base."""
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(REWARDS)
    common = {"prompts": str(tiny.folder / "shapes.jsonl"), "held_out": 10}
    kinds = {"darker": ("one", "Dark"), "lighter": ("one", "Light"), "itself": ("base", "Light")}
    return [
        {"name": name, "teacher": teacher, "rewards": {f"{file}:{reward}": 1.0}} | common
        for name, (teacher, reward) in kinds.items()
    ]


@pytest.fixture(scope="module")
def changes(tiny, tasks):
    teachers = {"one": {"source": tiny.teacher("one")}, "base": {"source": "base"}}
    return {"tasks": tasks, "teachers": teachers, "seed": 3, "batch_size": 6, "micro_batch": 3}


def test_teacher_and_base_are_judged_on_the_held_out_prompts_from_the_same_noise(tiny, changes, tmp_path):
    stage = tiny.stage(lambda *parts: parts, "distill", tmp_path, **changes)
    config, policies, *_ = stage
    pipeline = FlowOPDPipeline.from_pretrained(tiny.folder / "base", experts={"one": tiny.teacher("one")})
    held_out = task_prompts(config.tasks[0]).held_out
    assert len(held_out) == 10
    light = {
        prompt.prompt: [
            np.asarray(pipeline(prompt.prompt, expert=expert, seed=prompt.seed(3, 0)).images[0]).mean() / 255
            for expert in (None, "one")
        ]
        for prompt in held_out
    }
    known = [pair for text, pair in light.items() if "red" not in text]
    assert 2 < len(known) < 10
    expected = {"darker": 1 - np.array(known), "lighter": np.array(list(light.values()))}
    expected["itself"] = expected["lighter"][:, [0, 0]]
    for task in config.tasks:
        found, (base, teacher) = check_task(policies, task, Rewards([task]), 3, 3), expected[task.name].mean(0)
        assert (found.task, found.teacher, found.verdict) == (task.name, task.teacher, VERDICTS[task.name])
        assert [found.base_score, found.teacher_score] == pytest.approx([base, teacher], abs=2e-4)
        assert found.difference.value == pytest.approx(teacher - base, abs=2e-4)
        assert (found.difference.n, found.unscored) == (len(expected[task.name]), 10 - len(expected[task.name]))
    with pytest.raises(RequestError, match=r"'darker' holds no prompts out \(held_out = 0\)"):
        check_task(policies, config.tasks[0].model_copy(update={"held_out": 0}), Rewards([]), 3, 3)


@pytest.fixture
def check(monkeypatch, capsys, tiny, tmp_path):
    """Runs the command on a recipe; returns exit code, stdout and stderr."""

    def run(stage, **changes):
        recipe = tiny.write(tmp_path / "recipe.toml", stage, tmp_path, **changes)
        monkeypatch.setattr(sys, "argv", ["training", "check", str(recipe)])
        return main(), *capsys.readouterr()

    return run


def test_a_dud_is_named_and_is_the_exit_code(check, changes):
    code, out, _ = check("distill", **changes)
    assert code == 1
    assert "Not better than the base: one on lighter (worse), base on itself (no difference). Look at" in out


def test_all_teachers_being_better_is_exit_code_0(check, tiny, changes, tasks):
    unjudged = [{key: value for key, value in tasks[1].items() if key != "rewards"}]
    teachers = {"one": changes["teachers"]["one"]}
    code, out, _ = check("sft", **changes | {"tasks": tasks[:1] + unjudged, "teachers": teachers})
    assert code == 0
    assert "Not better" not in out
    assert "Not checked, for want of `rewards`: one on lighter." in out


@pytest.mark.parametrize(
    ("stage", "why"), [("grpo", "stage 'grpo' has no teachers to check"), ("distill", "No task has rewards")]
)
def test_what_cannot_be_checked_is_refused(stage, why, check):
    code, _, errors = check(stage)
    assert code == 2
    assert why in errors


def test_the_base_is_drawn_with_the_guidance_of_the_student_to_be(check, tiny, changes, tmp_path):
    """Without guidance on either side a teacher that is the base has no difference at all; with the base's, it has."""
    task = changes["tasks"][2]
    same = changes | {"tasks": [task], "teachers": {"base": {"source": "base", "guidance": 1.0}}}
    _, out, _ = check("distill", **same | {"rollout": {"guidance": 1.0, "steps": 3}})
    assert "+0.000 [+0.000, +0.000]" in out
    assert "Guidance: the base 1, as the student; base 1." in out
    assert all(len(line) <= 80 for line in out.splitlines()[:4])
    _, out, _ = check("distill", **same | {"rollout": {"guidance": 3.0, "steps": 3}})
    assert "+0.000 [+0.000, +0.000]" not in out
    assert "Guidance: the base 3, as the student; base 1." in out
