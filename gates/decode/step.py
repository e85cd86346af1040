"""A decoding step, captured once and then replayed as one CUDA graph.

All that a step with a bounded cache reads and writes stays where it is: weights, slots, counters. So the whole forward
pass from ids to logits can be captured once: the step's ids and positions are copied into the tensors that the capture
reads, the graph runs, and the logits are copied out.

The padding mask, which grows by a column at every step, is no part of it. The prompt's pass has told the cache which
columns are padding, and every token of a step is real.

Where a device has no graphs, as a CPU, steps run as ever, or each is compiled if that is asked for.

A step that waits for the device cannot be captured. Of transformers' forms of sparse experts, "eager" waits, and so
does "grouped_mm" where torch has no grouped product for the device and dtype, as on CUDA in fp32. "grouped_mm" reads
prompts. Sampling goes on with "batched_mm", which does not wait; beams do so only after
`model.set_experts_implementation("batched_mm")`.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import ModelOutput, logging

from retention_gates.compat import attention_implementation, forward_hooks, is_compiled
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.modes import temporarily
from retention_gates.gates.attention.cache_argument import NAMES, find_cache, named_for
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.attention.interface import MASKS, PREFIX, base_implementation_of
from retention_gates.gates.cache.window_layer import WindowLayer
from retention_gates.gates.decode.deferred import settled
from retention_gates.gates.decode.fused_layers import FusedLayers
from retention_gates.gates.decode.in_generate import forward_of, replaced_forward
from retention_gates.gates.decode.recorder import RECORDERS, Recorder, check_compiler
from retention_gates.gates.decode.watch import Watch
from retention_gates.gates.decode.windows import Windows

logger = logging.get_logger(__name__)


Forward = Callable[..., Any]


NOT_CAPTURED = ("output_attentions", "output_hidden_states", "output_router_logits", "labels")


@dataclass
class Capture:
    """One captured step."""

    inputs: dict[str, torch.Tensor]
    output: ModelOutput
    caches: list[str]  # under which names the output has the cache
    replay: Callable[[], None]
    state: list[tuple[dict, Any, Any]]  # a dict, a key and the object that the capture found there
    constants: Any  # kept, because the capture reads them

    def finds_its_state(self) -> bool:
        """Whether the cache keeps everything where the capture reads it."""
        return all(where.get(name) is value for where, name, value in self.state)


@dataclass
class Known:
    """The stage of steps of one kind: watched, then run as they will be captured, then captured."""

    is_watched: bool = False
    is_warm: bool = False
    has_waited: bool = False  # whether one of them waited for the device
    capture: Capture | None = None


class DecodeStep:
    """One decoding step of a model over a bounded cache: a call that is captured at the third and then replayed.

    Every `BoundedCache` has one. It is opened for the model, and then called as the model is:

        with cache.decode_step.opened(model, cache) as step:
            logits = step(input_ids=ids, position_ids=positions).logits  # ids and positions [B, 1]

    `generate`, the endpoint and written answers all decode through it. Steps that cannot be captured run as they are,
    and the log says why, once.
    """

    def __init__(self, compile: bool = False) -> None:
        self.compile = compile
        self.key: tuple | None = None  # of the steps that are known: what they are given, beside the values of tensors
        self.known: dict[tuple, Known] = {}  # by the kind of step, see `EvictingLayer.step_kind`
        self.weights: tuple = ()  # where the weights were at the capture
        self.layers = FusedLayers([], [])  # what was seen of the model's layers
        self.refusal: str | None = None  # why this cache's steps are not captured
        self.prompt_columns = 0
        self.windows: Windows | None = None
        self.is_in_turn = False  # whether the last forward pass was a step of this turn
        self.is_open = False
        self.recorder: Recorder | None = None  # of a device that captures steps
        self.cache: Callable[[], Any] = lambda: None
        self.model: Callable[[], Any] = lambda: None

    def __deepcopy__(self, memo: dict) -> "DecodeStep":
        return DecodeStep(self.compile)  # a copy of the cache has its own slots

    def __reduce__(self) -> tuple:
        return DecodeStep, (self.compile,)

    @property
    def captures(self) -> list[Capture]:
        """All captured steps, one of each kind."""
        return [known.capture for known in self.known.values() if known.capture is not None]

    def forget(self) -> None:
        """Frees what was captured."""
        self.key, self.windows = None, None
        self.known = {}

    def refuse(self, reason: str, *, is_captured: bool = True) -> None:
        self.refusal = reason
        what, option = ("a CUDA graph", "graph=False") if is_captured else ("torch.compile", "compile=False")
        logger.warning_once(
            f"Decoding without {what}, because {reason}. BoundedCache(..., {option}) says that this is meant."
        )
        self.forget()

    @contextmanager
    def opened(self, model: nn.Module, cache: Cache, prompt_columns: int = 0) -> Iterator["DecodeStep"]:
        """Inside the block, steps of the model with the cache are captured and replayed.

        Args:
            model: the base model that has the gates, as `find_gated_model(model).model` gives it.
            cache: the cache that the step belongs to.
            prompt_columns: columns of the padding mask that belong to the prompt: a pass with no more is no step.
        """
        self.cache, self.model = weakref.ref(cache), weakref.ref(model)
        device, refusal = _device(model)
        recorder = RECORDERS.get(device.type)
        if refusal is None and recorder is None and not self.compile:
            yield self
            return
        refusal = refusal or _why_not(model, cache)
        if refusal is not None:
            self.refuse(refusal, is_captured=recorder is not None or not self.compile)
            yield self
            return
        if recorder is None and device.type == "cpu":
            check_compiler()
        weights, kept = _weights(model)
        if weights != self.weights:
            self.forget()
        self.weights, self.refusal, self.is_in_turn = weights, None, False
        own = recorder and recorder(device)
        # the block may lie inside another one of this step: `generate` with a cache whose step is open
        with temporarily([self], recorder=own, prompt_columns=prompt_columns, is_open=True):
            yield self
        del kept  # until here no weight that the capture reads could be freed

    @contextmanager
    def in_generate(self, model: nn.Module, cache: Cache, prompt_columns: int) -> Iterator[None]:
        """Inside the block, forward passes that the model's `generate` makes come here first."""
        with self.opened(model, cache, prompt_columns):
            if not self.is_open:
                yield
                return
            with replaced_forward(model):
                yield

    def __call__(self, **arguments: Any) -> Any:
        """Returns what the model gives for the arguments of its forward pass; the cache need not be among them."""
        forward = forward_of(self.model())
        given = arguments if find_cache(arguments) is not None else arguments | {NAMES[0]: self.cache()}
        return self.run(forward, named_for(forward, given))

    def run(self, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Returns what `forward(**arguments)` gives, by a replay where that is the same."""
        found = self._inputs_of(arguments) if self.is_open else None
        if found is None or self.refusal is not None:
            self.is_in_turn = False
            return forward(**arguments)
        key, tensors, others = found
        if not self.is_in_turn:
            self._begin_turn(arguments.get("attention_mask"))
        if self.recorder is None:
            return self._run(forward, tensors | others)
        if key != self.key:
            self.key, self.known = key, {}
        kind = tuple(layer.step_kind for layer in self._evicting() if layer.step_kind is not None)
        known = self.known.setdefault(kind, Known())
        if known.capture is not None:
            return self._replay(known.capture, tensors)
        if not known.is_warm:
            return self._warm_up(known, forward, tensors | others)
        known.capture = self._capture(forward, tensors, others)
        return self._copied(known.capture)

    def _evicting(self) -> list[EvictingLayer]:
        return [layer for layer in self.cache().layers if isinstance(layer, EvictingLayer)]

    def _replay(self, capture: Capture, tensors: dict[str, torch.Tensor]) -> ModelOutput:
        for name, buffer in capture.inputs.items():
            buffer.copy_(tensors[name])
        self._count()
        capture.replay()
        if self.windows is not None:
            self.windows.count()
        return self._copied(capture)

    def _warm_up(self, known: Known, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Runs a step by itself: the first is watched, the next are as the captured one will be."""
        assert self.recorder is not None
        watch = None if known.is_watched else Watch()
        output, wait = self.recorder.warm_up(lambda: self._run(forward, arguments, watch))
        if watch is not None:
            known.is_watched, self.layers = True, watch.found(self.model())
        if wait is None:
            # a watched step ran as the captured one will, unless something is to be computed otherwise
            known.is_warm = watch is None or not (self.compile or self.layers)
        elif known.has_waited:  # at its first step a model may make tables, at the second it makes them always
            self.refuse(wait)
        known.has_waited = wait is not None
        if not isinstance(output, ModelOutput):
            self.refuse(f"the model gives a {type(output).__name__} and no ModelOutput")
        elif kinds := [name for name, value in output.items() if not isinstance(value, torch.Tensor | Cache)]:
            self.refuse(f"the model gives {', '.join(kinds)} beside logits")
        return output

    def _begin_turn(self, mask: torch.Tensor | None) -> None:
        self.is_in_turn = True
        if not all(capture.finds_its_state() for capture in self.captures):
            self.forget()
        layers = [layer for layer in self.cache().layers if isinstance(layer, WindowLayer)]
        if self.windows is not None and self.windows.visible.shape[0] == layers[0].batch_size:
            self.windows.restart(mask)
        elif layers:
            self.forget()
            self.windows = Windows(layers, mask)

    def _count(self) -> None:
        """Counts on the host, which replayed and compiled steps do not do."""
        evicting = self._evicting()
        evicting[0].check_count(1)
        for layer in evicting:
            layer.count(1)

    def _run(self, forward: Forward, arguments: dict[str, Any], watch: Watch | None = None) -> Any:
        if self.compile and watch is None:
            self._count()
            forward = torch.compile(forward, dynamic=False)
        layers = self.layers.replaced(self.compile) if watch is None else watch.watching(self.model())
        with layers, nullcontext() if self.windows is None else self.windows.one_token():
            output = forward(**arguments)
            for name, each in output.items() if isinstance(output, ModelOutput) else ():
                output[name] = settled(each)
            return output

    def _capture(self, forward: Forward, tensors: dict[str, torch.Tensor], others: dict[str, Any]) -> Capture:
        assert self.recorder is not None
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        constants = [each for layer in self._evicting() for each in layer.constants]
        output, replay = self.recorder.capture(lambda: self._run(forward, inputs | others))
        state = [place for layer in self.cache().layers for place in _places(layer)]
        caches = [name for name, value in output.items() if isinstance(value, Cache)]
        for name in caches:  # a cache that its own capture keeps would wait for the garbage collector
            output[name] = None
        return Capture(inputs, output, caches, replay, state, constants)

    def _copied(self, capture: Capture) -> ModelOutput:
        """The output in tensors that the next replay leaves alone."""
        values: dict[str, Any] = {name: value.clone() for name, value in capture.output.items() if value is not None}
        return type(capture.output)(**values, **dict.fromkeys(capture.caches, self.cache()))

    def _inputs_of(self, arguments: dict[str, Any]) -> tuple[tuple, dict[str, torch.Tensor], dict[str, Any]] | None:
        """A key, the tensors and the other arguments of a step of one token; None of a prompt, or if it is refused."""
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        first = arguments.get("inputs_embeds") if ids is None else ids
        if first is None or first.shape[1] != 1:
            return None
        if mask is not None and mask.shape[1] <= self.prompt_columns:
            return None
        tensors: dict[str, torch.Tensor] = {}
        others: dict[str, Any] = {}
        key: list[tuple] = []
        reasons = ["it gets inputs_embeds and no input_ids"] if ids is None else []
        if arguments.get("return_dict") is False:
            reasons.append("return_dict=False asks for a tuple")
        for name, value in arguments.items():
            if name == "attention_mask" or value is None:
                continue
            others[name] = value
            if isinstance(value, torch.Tensor):
                tensors[name] = others.pop(name)
                key.append((name, value.shape, value.dtype, value.device))
            elif value and name in NOT_CAPTURED:
                reasons.append(f"{name}={value} asks for more than logits")
            elif isinstance(value, bool | int | float | str):
                key.append((name, value))
            elif name not in NAMES:
                reasons.append(f"its argument {name} is a {type(value).__name__}")
        if reasons:
            logger.warning_once(f"A decoding step is not captured, because {'; '.join(reasons)}.")
            return None
        return (*key, torch.is_inference_mode_enabled()), tensors, others


def _places(layer: Any) -> list[tuple[dict, Any, Any]]:
    """Where the layer of a cache keeps tensors, and its rule."""
    found = [(vars(layer), name, value) for name, value in vars(layer).items()]
    found += [
        (inner, name, value) for _, _, inner in found if isinstance(inner, dict) for name, value in inner.items()
    ]
    return [place for place in found if isinstance(place[2], torch.Tensor) or place[1] == "rule"]


def _device(model: nn.Module) -> tuple[torch.device, str | None]:
    devices = {parameter.device for parameter in model.parameters()}
    return next(iter(devices)), f"the model is on {len(devices)} devices" if len(devices) > 1 else None


def _why_not(model: nn.Module, cache: Cache) -> str | None:
    """Why the steps of this model with this cache cannot be captured, None if they can."""
    device = next(model.parameters()).device
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if is_compiled(model):
        return "the model is compiled already, by model.compile()"
    for name, module in model.named_modules():
        for hook in forward_hooks(module):
            # transformers' own listen only while hidden states or attentions are asked for
            if module is not model and not (getattr(hook, "__module__", None) or "").startswith("transformers."):
                return f"{name} has a forward hook, which a replay would not call"
    windows = {layer.sliding_window for layer in cache.layers if isinstance(layer, WindowLayer)}
    if len(windows) > 1:
        return f"the windows of its layers differ: {sorted(windows)} tokens"
    attention = attention_implementation(text_config(model)) or ""
    if windows and attention.startswith(PREFIX) and base_implementation_of(attention) not in MASKS:
        return f"its sliding windows are known with attention by {' and '.join(MASKS)} only"
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, EvictingLayer):
            if layer.why_not_captured is not None:
                return layer.why_not_captured
        elif type(layer) not in (WindowLayer, LinearAttentionLayer):
            return f"layer {index} keeps a {type(layer).__name__}, whose tensors do not stay where they are"
    return None


def _weights(model: nn.Module) -> tuple[tuple, list[torch.Tensor]]:
    """Returns all that a capture of the model depends on beside its inputs, and the tensors it reads."""
    tensors = [tensor.data for tensor in (*model.parameters(), *model.buffers())]
    adapters = [
        (
            str(module.active_adapters),
            module.disable_adapters,
            str(module.merged_adapters),
            str(getattr(module, "scaling", "")),
        )
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    config: Any = model.config
    switches = (model.training, attention_implementation(config))
    return (tuple((t.data_ptr(), t.dtype, t.shape) for t in tensors), tuple(adapters), switches), tensors
