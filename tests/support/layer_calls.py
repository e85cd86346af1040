"""One forward pass of a cache layer, as the wrapper, transformers and the attention function make it."""

from retention_gates.kernels.softmax import Softmax


def attend(layer, owner, log_beta, query, key, value, padding_mask=None, scale=0.5):
    """The attention output [B, HQ, T, Dv] of new tokens that enter a layer of `owner`'s cache."""
    layer.begin(owner, key.shape[2])
    key, value = layer.update(key, value)
    return layer.attend(query, key, value, log_beta, padding_mask, Softmax(scale))
