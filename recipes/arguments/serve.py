"""The arguments of `retention-gates serve`."""

import argparse

from retention_gates.recipes.arguments.shared import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter_required=True)
    parser.add_argument(
        "--memory-size",
        type=int,
        default=512,
        metavar="M",
        help="entries kept per KV head, in the mean (default: 512)",
    )
    parser.add_argument(
        "--budgets", help="uniform, calibrated or pyramid (default: calibrated if the adapter has been, else uniform)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--max-chats", type=int, metavar="N", help="chats decoded at a time (default: 16)")
    size.add_argument("--cache-gib", type=float, metavar="GIB", help="as many as this memory has room for instead")
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N", help="chats that may wait (default: 256)")
    parser.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="of clients at a time (default: 1024, or what the limit of open files allows)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="of an answer, and if it says nothing (default: 1024)",
    )
    chunk = parser.add_mutually_exclusive_group()
    chunk.add_argument(
        "--prefill-chunk-size", type=int, default=512, metavar="T", help="tokens of a prompt read at a time (512)"
    )
    chunk.add_argument(
        "--max-pause-ms",
        type=float,
        metavar="MS",
        help="as many tokens instead as, measured at the start, let running chats pause no longer",
    )
    parser.add_argument("--max-body-kib", type=int, default=1024, metavar="KIB", help="of a request (default: 1024)")
    parser.add_argument(
        "--max-characters", type=int, metavar="N", help="of a prompt (default: 16 for each token of the context)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for a chat (default: 600)")
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds in which chats that run may end after SIGTERM (default: 30)",
    )
    parser.add_argument("--name", help="of the model, for clients (default: the adapter's, of a folder its last part)")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="that clients must send, one of those given (default: RETENTION_GATES_API_KEY, if set, else none)",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="of web pages that may ask, such as https://chat.example",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="that clients may call the server by (default: localhost; any, if --host is another machine's view)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
