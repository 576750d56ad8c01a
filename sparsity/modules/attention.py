"""torch.nn.MultiheadAttention whose projections are masked.

Torch's own hands its weights to one function, past the output projection's forward pass. Here the usual
case, self-attention of which nobody wants to see the weights (vision transformers), calls both projections as
layers, so kernels may compute them. Any other goes to torch's function, with weight * mask.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from sparsity.modules.layers import MaskedLinear, RunsKernel


class InProjection(MaskedLinear):
    """Linear of in_proj_weight * mask, whose parameters stay the attention's own, under their names there.
    `mask`: bool, (3 embed_dim, embed_dim)."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim
        self._attention = (attention,)  # no submodule: it would be its own grandchild
        self.training = attention.training

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self._attention[0].in_proj_weight

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self._attention[0].in_proj_bias


class MaskedAttention(nn.MultiheadAttention):
    """in_proj: None where in_proj_weight is not masked."""

    in_proj: InProjection | None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's, which says what the arguments are. Raises ValueError for nested tensors."""
        if query.is_nested:
            raise ValueError(
                "masked attention does not take nested tensors: nn.TransformerEncoder(..., "
                "enable_nested_tensor=False) makes none"
            )
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        if query is key is value and query.dim() == 3 and not masked and not need_weights and self._usual():
            return self._attend(query), None
        swap = self.batch_first and query.dim() == 3
        if swap:  # what was one tensor stays one: it is projected once
            first, second = query, key
            query = query.transpose(0, 1)
            key = query if key is first else key.transpose(0, 1)
            value = key if value is second else value.transpose(0, 1)
        output, weights = functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight if self.in_proj is None else self.in_proj_weight * self.in_proj.mask,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            _masked_weight(self.out_proj),
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output.transpose(0, 1) if swap else output, weights

    def _usual(self) -> bool:
        """Whether there is nothing but the two projections."""
        return self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn

    def _attend(self, input: Tensor) -> Tensor:
        """input: (batch, positions, embed_dim), or (positions, batch, embed_dim)."""
        if self.in_proj is None:
            projected = functional.linear(input, self.in_proj_weight, self.in_proj_bias)
        else:
            projected = self.in_proj(input)
        # each (batch, heads, positions, embed_dim / heads)
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        heads = projected.view(*projected.shape[:-1], 3, self.num_heads, self.head_dim).unbind(-3)
        query, key, value = (each.permute(order) for each in heads)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        back = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        output: Tensor = self.out_proj(mixed.permute(back).flatten(2))
        return output


def _masked_weight(layer: nn.Linear) -> Tensor:
    return layer.weight * layer.mask if isinstance(layer, RunsKernel) else layer.weight


def become_masked(attention: nn.MultiheadAttention) -> None:
    """Change its class in place, with no projection masked yet: parameters, their names and hooks stay."""
    changed: Any = attention
    changed.register_module("in_proj", None)
    vars(changed)["plain_class"] = type(attention)
    changed.__class__ = MaskedAttention
