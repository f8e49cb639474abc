"""Multi-scale deformable attention for a CPU: the same sums as transformers' Mask2Former, through less memory.

transformers samples every level with ``grid_sample`` and multiplies what it found by the attention's weights: arrays
of heads · width · queries · points, 160 MB a layer for GenEval's pictures, and two fifths of the detector's time on a
CPU. Here a query's output is one weighted bag of the pixels around its points (``embedding_bag``), head by head, so
that what is made in between stays in the cache.

Source: Zhu et al., *Deformable DETR* (arXiv 2010.04159), equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, pad
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as PlainAttention,
)


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], x: Tensor, y: Tensor, weights: Tensor
) -> Tensor:
    """The weighted sum of bilinear samples, zero outside a level.

    Args:
        value: (B, S, heads, width), the pixels of all levels, level by level and row by row.
        shapes: height and width of each level; their products sum up to S.
        x: (B, Q, heads, levels · points), where to sample, in pixels of the point's level, 0 being the first's centre.
        y: the same, downwards.
        weights: of the same shape.

    Returns:
        (B, Q, heads · width).
    """
    batch, _, heads, width = value.shape
    queries, points = x.shape[1], x.shape[3] // len(shapes)

    def of_level(numbers: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=value.device).repeat_interleave(points)

    # A border of zeros around each level: what lies outside needs no mask.
    levels = value.split([h * w for h, w in shapes], 1)
    bordered = [pad(level.unflatten(1, shape), (0, 0, 0, 0, 1, 1, 1, 1)) for level, shape in zip(levels, shapes)]
    table = (
        torch.cat([level.flatten(1, 2) for level in bordered], 1).transpose(1, 2).contiguous()
    )  # (B, heads, S', width)
    areas = [(h + 2) * (w + 2) for h, w in shapes]
    first_row = of_level([sum(areas[:n]) for n in range(len(shapes))], torch.int32)
    stride = of_level([w + 2 for _, w in shapes], torch.int32)
    right_edge, bottom_edge = (of_level([shape[axis] for shape in shapes], x.dtype) for axis in (1, 0))
    zero = x.new_zeros(())
    output = value.new_empty(batch, queries, heads, width)
    for b in range(batch):
        for head in range(heads):
            # All (Q, levels · points): the pixel above and to the left, and how far the sample is from it.
            across = (x[b, :, head] + 1).clamp_(zero, right_edge + 1)
            down = (y[b, :, head] + 1).clamp_(zero, bottom_edge + 1)
            left, top = across.floor().clamp_(max=right_edge), down.floor().clamp_(max=bottom_edge)
            across -= left
            down -= top
            corner = first_row + top.int() * stride + left.int()
            whole = weights[b, :, head]
            right = whole * across
            bottom_right, bottom_left = right * down, (whole - right) * down
            corners = torch.cat([corner, corner + 1, corner + stride, corner + stride + 1], 1)
            shares = torch.cat([whole - right - bottom_left, right - bottom_right, bottom_left, bottom_right], 1)
            output[b, :, head] = embedding_bag(corners, table[b, head], mode="sum", per_sample_weights=shares)
    return output.flatten(2)


class DeformableAttention(PlainAttention):
    """The attention of Mask2Former's pixel decoder by :func:`deformable_attention`, with the same parameters."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes_list: Sequence[tuple[int, int]] = (),
        **_: object,
    ) -> tuple[Tensor, None]:
        """As :class:`PlainAttention`; the attention's weights are not returned."""
        assert encoder_hidden_states is not None
        assert reference_points is not None
        hidden_states = self.with_pos_embed(hidden_states, position_embeddings)
        value = self.value_proj(encoder_hidden_states).unflatten(-1, (self.n_heads, -1))  # (B, S, heads, width)
        if attention_mask is not None:  # (B, S), true where a pixel is padding
            value = value.masked_fill(attention_mask[..., None, None], 0.0)
        each = (self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(hidden_states).unflatten(-1, (*each, 2))  # pixels of the level
        sizes = offsets.new_tensor([(w, h) for h, w in spatial_shapes_list])
        at = (reference_points * sizes - 0.5)[:, :, None, :, None] + offsets  # (B, Q, heads, levels, points, 2)
        weights = self.attention_weights(hidden_states).unflatten(-1, (self.n_heads, -1)).softmax(-1)
        x, y = at.flatten(3, 4).unbind(-1)
        return self.output_proj(deformable_attention(value, spatial_shapes_list, x, y, weights)), None


def quicken(network: Mask2FormerForUniversalSegmentation) -> None:
    """Exchange the pixel decoder's attention for :class:`DeformableAttention`; outputs stay equal but for rounding.

    Its ReLU works in place then, so that the network can no longer be trained.
    """
    for layer in network.model.pixel_level_module.decoder.encoder.layers:
        layer.activation_fn = nn.ReLU(inplace=True)
        plain = layer.self_attn
        with torch.device("meta"):
            quick = DeformableAttention(plain.d_model, plain.n_heads, plain.n_levels, plain.n_points)
        quick.load_state_dict(plain.state_dict(), assign=True)
        layer.self_attn = quick.train(plain.training)
