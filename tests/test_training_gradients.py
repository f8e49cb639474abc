"""The gradient of each stage's update against the papers' formulas, written out one sample and one step at a time.

States, rewards, noise and losses are made here from the samples' seeds, with no help of the code under test but the
transformer with its adapters and the schedule's sigmas, which have tests of their own.
"""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from flowopd_eval.flow import shifted_sigmas
from flowopd_eval.pipeline import FlowOPDPipeline
from training.coldstart import SFT
from training.distill import Distillation, PolicyGradient
from training.grpo import GRPO
from training.nft import NFT
from training.policies import STUDENT
from training.rollout import windows

pytest_plugins = ["tiny_training"]
pytestmark = pytest.mark.usefixtures("one_thread_of_the_processor")
STAGES = {
    "direct": ("distill", Distillation, {"rollout": {"steps": 2, "window": 1}}),
    "policy_gradient": ("distill", PolicyGradient, {"objective": "policy_gradient", "group_size": 2}),
    "grpo": ("grpo", GRPO, {}),
    "nft": ("nft", NFT, {}),
    "sft": ("sft", SFT, {}),
}


class Plain:
    """A stage's policies asked for one picture at a time, past all that the stages ask them through."""

    def __init__(self, tiny, policies):
        self.policies, self.pipeline = policies, FlowOPDPipeline.from_pretrained(tiny.folder / "base")
        self.texts = {}

    @torch.no_grad()
    def encode(self, text):
        if text not in self.texts:
            states, _, pooled, _ = self.pipeline.encode_prompt(text, None, None, False, max_sequence_length=0)
            self.texts[text] = states, pooled
        return self.texts[text]

    def velocity(self, name, x, sigma, text, guidance=3.0):
        """Guided velocity of the adapter ``name``, or of the base; with the student's gradients alone."""
        with self.policies.bank.use(name), torch.set_grad_enabled(torch.is_grad_enabled() and name == STUDENT):
            empty, shown = (
                self.policies.transformer(x, *self.encode(t), sigma.reshape(1) * 1000, return_dict=False)[0]
                for t in ("", text)
            )
        return empty + guidance * (shown - empty)

    @torch.no_grad()
    def states(self, sample, sigmas, noisy, guidance=3.0, start=None):
        """x_0 … x_T of the student; steps that are not noisy are Euler's."""
        source = torch.Generator().manual_seed(sample.seed)
        own = torch.randn(4, 8, 8, generator=source)[None]
        path = [own if start is None else start]
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            x, v = path[-1], self.velocity(STUDENT, path[-1], sigma, sample.prompt.prompt, guidance)
            mean, std = gaussian(x, v, sigma, after, sigmas[1])
            step = mean + std * torch.randn(4, 8, 8, generator=source) if noisy[i] else x - (sigma - after) * v
            path.append(step)
        return path

    @torch.no_grad()
    def bright(self, latent):
        """The reward ``Bright`` of a finished latent."""
        return float((self.pipeline.vae.decode(latent / 1.5 + 0.1, return_dict=False)[0] > 0).double().mean())


def gaussian(x, v, sigma, after, second):
    """Mean and standard deviation of the state that follows ``x`` (Flow-GRPO's SDE)."""
    d, s = sigma - after, 0.7 * (sigma / (1 - torch.minimum(sigma, second))).sqrt()
    return x * (1 - s**2 / (2 * sigma) * d) - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * d, s * d.sqrt()


def divergence(mean, other, std):
    """KL of two Gaussians, mean over the latent's values."""
    return ((mean - other) / std).square().mean() / 2


def log_prob(x, mean, std):
    """Of ``x``, mean over the latent's values, without what does not depend on the mean."""
    return -divergence(x, mean, std)


def source_of(name):
    return torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))


def advantages(rewards, group):
    """Less the group's mean, over the batch's deviation; none where there is no reward."""
    values = np.array(rewards).reshape(-1, group)
    return np.nan_to_num((values - np.nanmean(values, 1, keepdims=True)) / (np.nanstd(values) + 1e-4)).flatten()


def gradient(policies):
    """All of the student's gradients in one row."""
    return torch.cat([p.grad.flatten() for p in policies.bank.parameters() if p.grad is not None])


def first_gradient(stage):
    next(stage.updates(0))
    return gradient(stage.policies)


def assert_gradient(policies, found):
    """What has just been accumulated is ``found``; begins anew."""
    expected = gradient(policies)
    policies.bank.zero_grad()
    assert expected.norm() > 1e-4
    assert (found - expected).norm() <= 5e-5 * expected.norm()


def updates(stage, size):
    """The gradient of each update of the first batch; afterwards the student moves by about ``size``."""
    source, policies = torch.Generator().manual_seed(0), stage.policies
    for _ in stage.updates(0):
        found = gradient(policies)
        policies.bank.zero_grad()
        yield found
        with torch.no_grad():
            for parameter in policies.bank.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=source))


@pytest.mark.parametrize(("every", "window"), [(1, None), (2, None), (1, 2)])
def test_a_mixed_batch_has_the_mean_gradient_of_its_samples_each_with_its_own_teacher(every, window, tiny, tmp_path):
    tasks = tiny.values("distill", tmp_path)["tasks"]
    anchor = {"source": "base", "weight": 0.5, "every": every}
    changes = {"tasks": [tasks[0] | {"share": 2.0}, tasks[1]], "anchor": anchor}
    changes |= {"start": tiny.teacher("anchor"), "batch_size": 6, "micro_batch": 6}
    changes["rollout"] = {"steps": 3} | ({"window": window} if window else {})
    share = [2 / 3, 1 / 3, 2 / 3] if window else [1 / 3] * 3  # of a window of two, the middle step is always one
    stage = tiny.stage(Distillation, "distill", tmp_path, **changes)
    plain, sigmas, samples = Plain(tiny, stage.policies), shifted_sigmas(3, 3.0), stage.mixture.samples(0)
    assert [sample.task.name for sample in samples].count("shapes") == 4
    (found,) = updates(stage, 0)
    for sample in samples:
        path, text = plain.states(sample, sigmas, [True] * 3), sample.prompt.prompt
        (trained,) = windows([sample.seed], 3, window, None)
        for i in trained:
            x, sigma, d = path[i], sigmas[i], sigmas[i] - sigmas[i + 1]
            v, teacher, base = (plain.velocity(name, x, sigma, text) for name in (STUDENT, sample.task.teacher, None))
            s = 0.7 * (sigma / (1 - torch.minimum(sigma, sigmas[1]))).sqrt()
            weight = d / 2 * (1 / s + s * (1 - sigma) / (2 * sigma)) ** 2  # the paper's
            pull = 0.5 * every * ((i + sample.seed) % every == 0)
            loss = weight * ((v - teacher).square().mean() + pull * (v - base).square().mean())
            (share[i] * loss / 6).backward()
    assert_gradient(stage.policies, found)


@pytest.mark.parametrize("kind", STAGES)
def test_the_size_of_a_micro_batch_does_not_change_the_gradient(kind, tiny, tmp_path):
    stage, make, settings = STAGES[kind]
    # From an adapter: of a fresh one, whose B is zero, half of the gradients are zero.
    settings = settings | {"batch_size": 8, "start": tiny.teacher("anchor")}
    sizes = (tiny.stage(make, stage, tmp_path / str(size), micro_batch=size, **settings) for size in (2, 8))
    small, large = map(first_gradient, sizes)
    assert large.norm() > 1e-4
    assert (small - large).norm() <= 1e-5 * large.norm()


def test_policy_gradient_is_the_direct_term_and_the_score_function_times_what_each_action_still_costs(tiny, tmp_path):
    """Flow-OPD's trajectory KL; baseline: the others of the group."""
    changes = {"objective": "policy_gradient", "group_size": 3, "batch_size": 6, "micro_batch": 3}
    changes |= {"rollout": {"steps": 3, "window": 2}, "anchor": {"source": "base", "weight": 0.5}}
    stage = tiny.stage(PolicyGradient, "distill", tmp_path, **changes, start=tiny.teacher("anchor"))
    plain, sigmas, samples = Plain(tiny, stage.policies), shifted_sigmas(3, 3.0), stage.mixture.samples(0)
    (found,) = updates(stage, 0)
    costs, scores = np.empty((6, 3)), {}
    share = [2 / 3, 1 / 3, 2 / 3]
    for n, sample in enumerate(samples):
        path, (trained,) = plain.states(sample, sigmas, [True] * 3), windows([sample.seed], 3, 2, None)
        for i in range(3):
            names = (STUDENT, sample.task.teacher, None)
            v = [plain.velocity(name, path[i], sigmas[i], sample.prompt.prompt) for name in names]
            (mean, std), *others = (gaussian(path[i], each, sigmas[i], sigmas[i + 1], sigmas[1]) for each in v)
            teacher, base = (divergence(mean, other, std) for other, _ in others)
            cost = teacher + 0.5 * base
            costs[n, i] = cost.detach()
            if i in trained:
                (share[i] * cost / 6).backward(retain_graph=True)
                scores[n, i] = mean.numel() * log_prob(path[i + 1], mean, std)  # of the whole latent
    for (n, i), score in scores.items():
        later = costs[:, i + 1 :].sum(1)
        others = [k for k in range(n // 3 * 3, n // 3 * 3 + 3) if k != n]
        (share[i] * (later[n] - later[others].mean()) * score / 6).backward(retain_graph=True)
    assert_gradient(stage.policies, found)


GRPO_VARIANTS = {
    "clip": {"clip": 3e-4},
    "dppo": {"trust": "dppo", "tau": 1.5e-4},
    "shared noise": {"clip": 3e-4, "shared_noise": True, "micro_batch": 6},
}


@pytest.mark.parametrize("kind", GRPO_VARIANTS)
def test_grpo_makes_likelier_what_scores_above_its_group_within_its_trust_and_is_held_to_the_base(kind, tiny, tmp_path):
    """Flow-GRPO-Fast; the second update is made by a student that has moved away from the one that drew."""
    (task, _) = tiny.values("grpo", tmp_path)["tasks"]
    changes = {"tasks": [task | {"rewards": {tiny.reward("Blinking"): 1.0}}], "start": tiny.teacher("anchor")}
    changes |= {"rollout": {"steps": 4, "window": 2, "window_range": [1, 4], "guidance": 2.0}, "beta": 0.3}
    changes |= {"group_size": 3, "batch_size": 12, "micro_batch": 3, "updates": 2}
    stage = tiny.stage(GRPO, "grpo", tmp_path, **changes | GRPO_VARIANTS[kind])
    plain, sigmas, samples = Plain(tiny, stage.policies), shifted_sigmas(4, 3.0), stage.mixture.samples(0)

    def window(step):  # one for the whole batch
        seed = int(hashlib.sha256(f"window|0|{step}".encode()).hexdigest()[:8], 16)
        return windows([seed], 4, 2, (1, 4))[0]

    def student(n, i):
        """Mean and deviation of step ``i`` of sample ``n``, by the student as it is now and by the base."""
        x, text = paths[n][i], samples[n].prompt.prompt
        v = [plain.velocity(name, x, sigmas[i], text, 2.0) for name in (STUDENT, None)]
        (mean, std), (base, _) = (gaussian(x, each, sigmas[i], sigmas[i + 1], sigmas[1]) for each in v)
        return mean, base, std

    noisy, paths = [i in window(0) for i in range(4)], []
    for n, sample in enumerate(samples):
        start = paths[n // 3 * 3][0] if n % 3 and kind == "shared noise" else None
        paths.append(plain.states(sample, sigmas, noisy, 2.0, start))
    assert len({float(path[0].sum()) for path in paths}) == (4 if kind == "shared noise" else 12)
    rewards = [np.nan if n % 5 == 4 else plain.bright(path[-1]) for n, path in enumerate(paths)]
    advantage = advantages(rewards, 3)
    with torch.no_grad():
        old = {(n, i): student(n, i)[0] for n in range(12) for i in window(0)}
    for update, found in enumerate(updates(stage, 0.03)):
        stopped = 0
        for n in range(6 * update, 6 * update + 6):
            for i in window(0):
                mean, base, std = student(n, i)
                after, a = paths[n][i + 1], float(advantage[n])
                ratio = (log_prob(after, mean, std) - log_prob(after, old[n, i], std)).exp()
                gone = divergence(mean, old[n, i], std) >= 1.5e-4 if kind == "dppo" else abs(ratio - 1) > 3e-4
                stop = bool(gone and (ratio - 1) * a > 0)
                loss = 0.3 * divergence(mean, base, std) - (0 if stop else a * ratio)
                (loss / 2 / 6).backward()
                stopped += stop
        assert_gradient(stage.policies, found)
        assert (0 < stopped < 10) if update else (stopped == 0)
    for step in range(20):
        assert stage._noisy_steps(step) == [i in window(step) for i in range(4)]


def test_nft_moves_towards_good_pictures_and_away_from_bad_ones(tiny, tmp_path):
    """DiffusionNFT; the second update has noise of its own, and the old policy is the one that drew."""
    (task, _) = tiny.values("nft", tmp_path)["tasks"]
    changes = {"tasks": [task | {"rewards": {tiny.reward("Blinking"): 1.0}}], "start": tiny.teacher("anchor")}
    changes |= {"group_size": 3, "batch_size": 6, "micro_batch": 3, "updates": 2, "guidance": 2.0, "picture_steps": 3}
    changes |= {"beta": 0.5, "base_weight": 0.2, "advantage_clip": 1.5, "sigma_mean": 0.3, "sigma_std": 0.7}
    stage = tiny.stage(NFT, "nft", tmp_path, **changes)
    plain, sigmas, samples = Plain(tiny, stage.policies), shifted_sigmas(3, 3.0), stage.mixture.samples(0)
    clean, noised = [], {}
    with torch.no_grad():
        for sample in samples:
            x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(sample.seed))[None]
            before = None
            for sigma, after in pairwise(sigmas):  # Adams-Bashforth: the velocity is carried on along its change
                v, d = plain.velocity(STUDENT, x, sigma, sample.prompt.prompt, 2.0), sigma - after
                x = x - d * (v if before is None else v + d / (2 * before[1]) * (v - before[0]))
                before = v, d
            clean.append(x)
        for n, sample in enumerate(samples):
            for update in range(2):
                source = source_of(f"nft|{sample.seed}|0|{update}")
                sigma = (0.3 + 0.7 * torch.randn((), generator=source)).sigmoid()
                noise = torch.randn(4, 8, 8, generator=source)
                state = (1 - sigma) * clean[n] + sigma * noise
                asked = (plain.velocity(name, state, sigma, sample.prompt.prompt, 2.0) for name in (STUDENT, None))
                noised[n, update] = state, sigma, noise - clean[n], *asked
    rewards = [np.nan if n % 5 == 4 else plain.bright(x) for n, x in enumerate(clean)]
    good = 0.5 + 0.5 * (advantages(rewards, 3) / 1.5).clip(-1, 1)
    assert len(set(good)) > 3
    for update, found in enumerate(updates(stage, 0.03)):
        for n, sample in enumerate(samples):
            x, sigma, target, old, base = noised[n, update]
            v = plain.velocity(STUDENT, x, sigma, sample.prompt.prompt, 2.0)
            towards, away = ((old + 0.5 * sign * (v - old) - target).square().mean() for sign in (1, -1))
            loss = (float(good[n]) * towards + float(1 - good[n]) * away) / 0.5 + 0.2 * (v - base).square().mean()
            (loss / 6).backward()
        assert_gradient(stage.policies, found)


def test_nft_pulls_where_all_scored_alike_too_however_the_batch_is_cut(tiny, tmp_path):
    tasks = tiny.values("nft", tmp_path)["tasks"]
    tasks = [tasks[0], tasks[1] | {"rewards": {tiny.reward("Flat"): 1.0}}]
    changes = {"tasks": tasks, "start": tiny.teacher("one"), "base_weight": 1.0, "batch_size": 8, "guidance": 3.0}
    sizes = (tiny.stage(NFT, "nft", tmp_path / str(micro), micro_batch=micro, **changes) for micro in (2, 8))
    small, large = map(first_gradient, sizes)
    assert (small - large).norm() <= 1e-4 * large.norm()


def test_sft_matches_the_flow_to_the_routed_teachers_pictures_with_and_without_their_prompts(tiny, tmp_path):
    changes = {"batch_size": 6, "text_dropout": 0.3, "sigma_std": 0.7, "start": tiny.teacher("anchor")}
    stage = tiny.stage(SFT, "sft", tmp_path, **changes)
    plain, sigmas, samples = Plain(tiny, stage.policies), shifted_sigmas(2, 3.0), stage.samples
    (found,) = updates(stage, 0)
    shown = 0
    for sample in samples:  # six pictures, six a batch: each comes once
        text = sample.prompt.prompt
        x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(sample.seed))[None]
        with torch.no_grad():
            for sigma, after in pairwise(sigmas):
                x = x - (sigma - after) * plain.velocity(sample.task.teacher, x, sigma, text)
        source = source_of(f"sft|{sample.seed}|0")
        sigma = (1.1 + 0.7 * torch.randn((), generator=source)).sigmoid()
        noise = torch.randn(4, 8, 8, generator=source)
        kept = float(torch.rand((), generator=source)) >= 0.3
        shown += kept
        v = plain.velocity(STUDENT, (1 - sigma) * x + sigma * noise, sigma, text if kept else "", 1.0)
        ((v - (noise - x)).square().mean() / 6).backward()
    assert shown not in (0, 3, 6)
    assert_gradient(stage.policies, found)
