"""Uploads an adapter and its model card to the Hub, as one commit.

    retention-gates push out/run/adapter user/adapter --private --licence apache-2.0 --evaluation out/evaluation

The card is made of the adapter's files, of run.yaml and log.jsonl beside its folder, and of the evaluations named. A
README.md that somebody has written for the adapter is uploaded instead. Only config, weights and card are uploaded.
"""

import argparse

from retention_gates.checkpoints.card import CardFacts, model_card, own_card, with_metadata
from retention_gates.checkpoints.hub import push_adapter, uploaded_config
from retention_gates.gates.adapter.config import RetentionGateConfig


def main(options: argparse.Namespace) -> None:
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
