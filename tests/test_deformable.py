"""The detector's attention on a CPU, against transformers' own and against sums by hand."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from flowopd_eval.scorers.deformable import deformable_attention, quicken
from flowopd_eval.scorers.mask2former import build_network

ONE = torch.ones(1, 1, 1, 1)


def sampled(x: float, y: float) -> float:
    """One level of two rows and three columns with 1 … 6, sampled at one place."""
    value = torch.arange(1.0, 7.0).view(1, 6, 1, 1)
    return float(deformable_attention(value, [(2, 3)], x * ONE, y * ONE, ONE))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 0, 1), (2, 1, 6), (0.5, 0, 1.5), (1, 0.5, 3.5), (0.25, 0.5, 2.75),
        (-0.5, 0, 0.5), (2.5, 1, 3), (2, 1.75, 1.5), (-0.5, -0.5, 0.25),  # half outside
        (-1, 0, 0), (3, 1, 0), (0, 2, 0), (-7, 0.5, 0), (1e6, -1e6, 0),  # outside
    ],
)  # fmt: skip
def test_a_sample_is_bilinear_and_nothing_lies_outside(x, y, expected) -> None:
    assert sampled(x, y) == pytest.approx(expected)


@pytest.mark.parametrize("shapes", [[(5, 7)], [(3, 4), (6, 8), (12, 16)], [(1, 9), (2, 1)]])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_transformers_attention(shapes, batch) -> None:
    """Samples in and around every level; transformers measures places in levels, we in pixels."""
    heads, width, queries, points = 3, 4, 11, 4
    draw = torch.Generator().manual_seed(len(shapes))
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=draw)
    places = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=draw) * 1.6 - 0.3
    weights = torch.rand(batch, queries, heads, len(shapes) * points, generator=draw).softmax(-1)
    expected = multi_scale_deformable_attention(value, shapes, places, weights.unflatten(-1, (-1, points)))
    pixels = places * torch.tensor([(w, h) for h, w in shapes])[:, None] - 0.5
    x, y = pixels.flatten(3, 4).unbind(-1)
    torch.testing.assert_close(deformable_attention(value, shapes, x, y, weights), expected, rtol=1e-4, atol=1e-5)


def test_the_detector_s_network_answers_as_before() -> None:
    torch.manual_seed(0)
    network = build_network().eval()
    for layer in network.model.pixel_level_module.decoder.encoder.layers:  # samples a few pixels apart, and padding
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.2)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.2)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    before_names = list(network.state_dict())
    decoder = network.model.pixel_level_module.decoder
    with torch.inference_mode():
        features = network.model.pixel_level_module.encoder(pixels).feature_maps
        plain, before = decoder(features).mask_features, network(pixel_values=pixels)
        quicken(network)
        torch.testing.assert_close(decoder(features).mask_features, plain, rtol=1e-4, atol=1e-4)
        after = network(pixel_values=pixels)
    torch.testing.assert_close(after.class_queries_logits, before.class_queries_logits, rtol=1e-3, atol=1e-3)
    assert list(network.state_dict()) == before_names


def test_padding_is_not_sampled() -> None:
    network = build_network().eval()
    layer = network.model.pixel_level_module.decoder.encoder.layers[0]
    plain = layer.self_attn
    quicken(network)
    draw = torch.Generator().manual_seed(2)
    states, mask = torch.randn(1, 30, 256, generator=draw), torch.rand(1, 30, generator=draw) < 0.5
    asked = {
        "hidden_states": states, "attention_mask": mask, "encoder_hidden_states": states,
        "reference_points": torch.rand(1, 30, 3, 2, generator=draw), "spatial_shapes_list": [(1, 2), (2, 4), (4, 5)],
    }  # fmt: skip
    with torch.inference_mode():
        torch.testing.assert_close(layer.self_attn(**asked)[0], plain(**asked)[0], rtol=1e-4, atol=1e-5)
