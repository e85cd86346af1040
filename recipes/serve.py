"""Serves a model with gates under the OpenAI API: many chats in one batch, each with a memory of fixed size.

retention-gates serve --adapter user/adapter --memory-size 512 --max-chats 32 --port 8000
"""

import argparse
import math
import os
import socket
import sys
from importlib.util import find_spec
from urllib.parse import urlsplit

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import check_room
from retention_gates.recipes.loading.models import base_name, chosen_device, load_model, load_tokenizer
from retention_gates.recipes.serving.access import LOCAL, Rules
from retention_gates.recipes.serving.admission import Admission, Limits
from retention_gates.recipes.serving.engine import Engine
from retention_gates.recipes.serving.pace import fitting_chunk
from retention_gates.recipes.serving.rows import ChatRows
from retention_gates.recipes.serving.start import check_memory, client_name, servable_row, skeleton

KEY_VARIABLE = "RETENTION_GATES_API_KEY"


def main(options: argparse.Namespace) -> None:
    _check(options)
    access_rules(options)
    from retention_gates.recipes.serving.server import make_server

    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"The tokenizer of {name} is a {type(tokenizer).__name__}, and serving needs a fast one.")
    count = chats_that_fit(options, name)  # before minutes are spent on loading
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    rows = ChatRows(
        model, options.memory_size, rows=count, chunk_size=options.prefill_chunk_size, budgets=options.budgets
    )
    if options.max_pause_ms is not None:
        rows.chunk_size = fitting_chunk(rows, options.max_pause_ms / 1e3)
        print(f"Prompts are read {rows.chunk_size} tokens at a time", file=sys.stderr)
    eos = end_tokens(model.generation_config, tokenizer)
    engine = Engine(rows, count, tokenizer, eos=eos, most_waiting=options.max_waiting)
    limits = Limits(
        rows.context,
        options.max_tokens,
        body=options.max_body_kib * 1024,
        timeout=options.timeout,
        most_characters=options.max_characters,
    )
    admission = Admission(tokenizer, options.name or client_name(options.adapter), limits)
    server = make_server(
        engine,
        admission,
        host=options.host,
        port=options.port,
        shutdown_timeout=options.shutdown_timeout,
        rules=access_rules(options),
        max_connections=options.max_connections,
    )
    print(
        f"{count} chats at a time, {rows.bytes_per_row / 2**20:.2f} MiB each, however long; "
        f"{rows.memory_bytes() / 2**20:.1f} MiB in all",
        file=sys.stderr,
    )
    server.run()
    if not server.started:
        raise ValueError(f"--host {options.host} --port {options.port}: the server did not start, as its log says.")


def chats_that_fit(options: argparse.Namespace, name: str) -> int:
    """As many as were asked for, in number or memory.

    Raises:
        ValueError: for a model that cannot be served, and for more memory than there is.
    """
    model = skeleton(name, options.adapter, options.gguf_file)
    device = chosen_device(options.device)
    config_dtype = getattr(text_config(find_gated_model(model).model), "dtype", None) or torch.float32
    automatic = torch.float32 if device.type == "cpu" else config_dtype
    dtype = automatic if options.dtype == "auto" else getattr(torch, options.dtype)
    row = servable_row(model, options.memory_size, options.budgets, dtype)
    count = options.max_chats or 16
    if options.cache_gib is not None:
        check_room("--cache-gib", math.ceil(options.cache_gib), lambda gib: gib * 2**30, device, "for chats")
        count = int(options.cache_gib * 2**30 / row) - 1  # one more reads prompts
        if count < 1:
            raise ValueError(
                f"--cache-gib {options.cache_gib} has no room for two rows of {row / 2**20:.3g} MiB: raise it."
            )
    check_room("max_chats", count, lambda chats: (chats + 1) * row, device, "for their rows")
    check_memory(model, row, count, device, dtype)
    return count


def access_rules(options: argparse.Namespace) -> Rules:
    keys = tuple(options.api_key or filter(None, [os.environ.get(KEY_VARIABLE)]))
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("--api-key must be of printable ASCII characters without spaces.")
    origins = tuple(options.cors_origin or ())
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
            raise ValueError(f"--cors-origin {origin!r} must be such as https://chat.example, without a path, or *.")
    hosts: tuple[str, ...] | None = (*LOCAL, options.host, *(options.allowed_host or ()))
    if options.host not in LOCAL and not options.allowed_host:
        hosts = None  # by what name others call this machine is not known here
    return Rules(keys, origins, hosts)


def end_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Tokens that end an answer: those of the generation config, else the tokenizer's own."""
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _check(options: argparse.Namespace) -> None:
    whole = ("memory_size", "max_chats", "max_tokens", "prefill_chunk_size", "max_body_kib", "max_waiting")
    for name in (*whole, "max_characters", "max_connections"):
        least = 0 if name == "max_waiting" else 1
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {least} or more.")
    for name in ("timeout", "cache_gib", "shutdown_timeout", "max_pause_ms"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0, and finite.")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port} must be from 0 to 65535.")
    check_address(options.host, options.port)
    if missing := [package for package in ("fastapi", "uvicorn", "prometheus_client") if find_spec(package) is None]:
        raise ValueError(f"Serving needs {', '.join(missing)}: pip install 'retention-gates[serve]'.")
    from retention_gates.recipes.serving.connections import connections_and_backlog

    connections_and_backlog(options.max_connections)


def check_address(host: str, port: int) -> None:
    """Raises ValueError if nothing can listen there, before minutes are spent on loading a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            trial.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: nothing can listen there ({error.strerror or error}). Choose another port, "
            "or --port 0 for a free one."
        ) from error
