"""Uploads an adapter and its model card to the Hub, as one commit.

    retention-gates push out/run/adapter user/adapter --private --licence apache-2.0 --evaluation out/evaluation

The card is made of the adapter's files, of run.yaml and log.jsonl beside its folder, and of the evaluations named. A
README.md that somebody has written for the adapter is uploaded instead. Only config, weights and card are uploaded.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument(
        "repository", metavar="REPO", help="name on the Hub, as in user/adapter; made if there is none"
    )
    parser.add_argument("--private", action="store_true", help="only those you let in may see it")
    parser.add_argument("--revision", metavar="BRANCH", help="upload to this branch, made if there is none")
    parser.add_argument("--token", help="a token that may write (default: HF_TOKEN, or that of hf auth login)")
    parser.add_argument(
        "--base-model", metavar="NAME", help="the base model's name on the Hub, if the adapter names a folder"
    )
    parser.add_argument(
        "--licence", "--license", metavar="ID", help="of the gates, as the Hub calls it: apache-2.0, mit"
    )
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="DIR", help="folders that evaluate has written"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the card and upload nothing")


def main(options: argparse.Namespace) -> None:
    from retention_gates.checkpoints.card import CardFacts, model_card, own_card, with_metadata
    from retention_gates.checkpoints.hub import push_adapter, uploaded_config
    from retention_gates.gates.adapter.config import RetentionGateConfig

    if not options.adapter.is_dir():
        raise ValueError(f"There is no folder {options.adapter}: name the folder of an adapter.")
    RetentionGateConfig.from_pretrained(str(options.adapter))
    base_model = uploaded_config(options.adapter, options.base_model)["base_model_name_or_path"]
    facts = CardFacts(
        repository=options.repository,
        base_model=base_model,
        licence=options.licence,
        revision=options.revision,
        evaluations=tuple(options.evaluation),
    )
    written = own_card(options.adapter)
    if written is not None and options.evaluation:
        raise ValueError(
            f"{options.adapter}/README.md was written by somebody and is uploaded as it is, without --evaluation: put "
            "the tables there, or remove it to get a card made."
        )
    card = model_card(options.adapter, facts) if written is None else with_metadata(written, facts)
    if options.dry_run:
        print(card)
        return
    commit = push_adapter(
        options.adapter,
        options.repository,
        card,
        base_model=base_model,
        private=options.private,
        revision=options.revision,
        token=options.token,
    )
    print(f"uploaded: {commit.commit_url}")
    if options.licence is None and written is None:
        print("The card says nothing of a licence: --licence ID adds it.")
