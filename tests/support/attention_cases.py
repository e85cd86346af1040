"""Inputs of retention-gated attention, and two other forms of it: one per pair of tokens, one as models compute it."""

import torch

PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3], [0] * 11])
PADDED = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1], [-1] * 11])
HOLES = torch.tensor([[0, 0, -1, -1, 0, 0, 1, -1, 1, -1, 2], [-1, 0, -1, 0, 0, 0, -1, -1, 0, 0, -1]])


def make_inputs(batch, heads, group, tokens, head_dim=8, value_dim=16, dtype=torch.float32, device="cpu", sinks=False):
    """Leaves with gradients: query, key, value, log_beta (fp32 at least; 0 for the first token), sinks if asked."""
    generator = torch.Generator().manual_seed(tokens * 100 + group * 10 + batch)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = {
        "query": random(batch, heads * group, tokens, head_dim) * 2,
        "key": random(batch, heads, tokens, head_dim),
        "value": random(batch, heads, tokens, value_dim),
        "log_beta": -torch.exp(2 * random(batch, heads, tokens) - 3),
    }
    inputs["log_beta"][..., :1] = 0  # protected
    if sinks:
        inputs["sinks"] = random(heads * group)
    log_beta_dtype = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.to(device, log_beta_dtype if name == "log_beta" else dtype).requires_grad_()
        for name, tensor in inputs.items()
    }


def make_eviction_times(batch, heads, tokens, device="cpu"):
    """int64 [B, H, T]: a third never evicted (T), some never there (0), the first two among them; the rest in between.

    The second head holds nothing at all, so that its rows see no key.
    """
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, heads, tokens)
    times = torch.arange(tokens) + 1 + torch.randint(0, 1 + tokens // 3, shape, generator=generator)
    kind = torch.randint(0, 6, shape, generator=generator)
    times = torch.where(kind < 2, tokens, times.clamp(max=tokens))
    times = torch.where(kind == 5, 0, times)
    times[..., :2] = 0
    times[:, 1:2] = 0
    return times.to(device)


def dense_attention(
    query,
    key,
    value,
    log_beta,
    *,
    scale,
    document_ids=None,
    sliding_window=None,
    eviction_times=None,
    softcap=None,
    sinks=None,
    gaussian=False,
):
    """The equation with every [T, T] written out and one loop over the query heads."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    index = torch.arange(tokens, device=query.device)
    age = index[:, None] - index
    outputs = []
    for head in range(query.shape[1]):
        kv = head // group
        visible = visible_pairs(age, kv, query.shape[0], document_ids, sliding_window, eviction_times)
        logits = query[:, head] @ key[:, kv].transpose(1, 2) * scale  # [B, T, T]
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        fade = age * log_beta[:, kv, None, :]
        logits = logits + (-(fade**2) if gaussian else fade)
        weights = torch.where(visible, logits, 0.0).exp() * visible
        denominator = weights.sum(-1, keepdim=True)
        if sinks is not None:
            denominator = denominator + sinks[head].exp()
        denominator = torch.where(visible.any(-1, keepdim=True), denominator, 1.0)
        outputs.append(weights / denominator @ value[:, kv])
    return torch.stack(outputs, dim=1)


def visible_pairs(age, head, batch, document_ids, sliding_window, eviction_times):
    """Whether token t sees token i, bool [B, T, T]."""
    visible = (age >= 0).expand(batch, -1, -1)
    if sliding_window is not None:
        visible = visible & (age < sliding_window)
    if document_ids is not None:
        visible = visible & (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids[:, None, :] >= 0)
    if eviction_times is not None:
        t = torch.arange(age.shape[0], device=age.device)
        visible = visible & (t[:, None] < eviction_times[:, head, None, :])
    return visible


def eager_attention(query, key, value, log_beta, *, scale, softcap=None, sinks=None, gaussian=False, **limits):
    """As the eager attention of models does it: products in the inputs' dtype, bias and softmax in fp32, then back."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    index = torch.arange(tokens, device=query.device)
    age = index[:, None] - index
    names = ("document_ids", "sliding_window", "eviction_times")
    arguments = [limits.get(name) for name in names]
    visible = torch.stack(
        [visible_pairs(age, head, len(query), *arguments) for head in range(key.shape[1])], dim=1
    ).repeat_interleave(group, 1)  # [B, HQ, T, T]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    fade = age * log_beta.repeat_interleave(group, 1)[:, :, None, :]
    logits = logits.float() + (-(fade**2) if gaussian else fade)
    logits = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1)[..., :tokens].to(query.dtype) * visible
    return weights @ value


def output_and_gradients(attention, inputs, **options):
    """Detached output and gradients by name, those that need none left out; the seed is the same each time."""
    output = attention(**inputs, **options)
    generator = torch.Generator().manual_seed(7)
    seed = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(output, list(wanted.values()), seed)
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def in_fp64(inputs):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
