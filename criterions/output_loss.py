"""Takes the task loss from a decoder's last hidden states, in pieces, where that is possible."""

from typing import Any

from fairseq.models import FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase, TransformerModelBase
from torch import Tensor, nn

from fairseq_evomoe.kernels.transformer.output_loss import output_loss

FORWARD = (TransformerModelBase.forward, FairseqLanguageModel.forward)
"""Forward passes that can stop before the output layer (`features_only`)."""


def output_weight(model: Any) -> Tensor | None:
    """The matrix that maps a decoder's last states to logits; None if they come about otherwise.

    That is the case with an adaptive softmax, a bias, a hooked or replaced output layer, a model
    whose forward pass is not fairseq's, and under torch's DDP with `--find-unused-parameters`,
    which would take the matrix for unused.
    """
    inner = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        if getattr(inner, "find_unused_parameters", False):
            return None
        inner = inner.module
    decoder = getattr(inner, "decoder", None)
    if type(inner).forward not in FORWARD or not isinstance(decoder, TransformerDecoderBase):
        return None
    projection = decoder.output_projection
    plain = (
        type(projection) is nn.Linear
        and type(decoder).output_layer is TransformerDecoderBase.output_layer
        and projection.bias is None
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and decoder.adaptive_softmax is None
    )
    return projection.weight if plain else None


class OutputLossMixin:
    """Computes the loss of fairseq's criterion without the logits of all tokens at once.

    List it before fairseq's class. It falls back to that class wherever something else than the two
    sums is asked for.
    """

    padding_idx: int
    eps: float = 0.0
    ignore_prefix_size: int = 0
    report_accuracy: bool = False

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        usual = reduce and not (self.ignore_prefix_size or self.report_accuracy)
        if usual and output_weight(model) is not None:
            net_input = {**sample["net_input"], "features_only": True}
            sample = {**sample, "net_input": net_input}
        return super().forward(model, sample, reduce)  # type: ignore[misc]

    def compute_loss(self, model: Any, net_output: Any, sample: Any, reduce: bool = True) -> Any:
        if not sample["net_input"].get("features_only"):
            return super().compute_loss(model, net_output, sample, reduce=reduce)  # type: ignore[misc]
        weight = output_weight(model)
        assert weight is not None, "forward() asked for the states because there is a matrix"
        states, target = net_output[0], model.get_targets(sample, net_output)
        real = target.ne(self.padding_idx)
        loss, nll = output_loss(states[real], weight, target[real], smoothing=self.eps)
        return loss, nll if self.eps else loss
