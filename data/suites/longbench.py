"""LongBench: 21 tasks of long-context understanding in English and Chinese (arXiv 2308.14508).

The prompts are part of the data. Summaries are scored by ROUGE-L as it is defined, over words; packages differ in how
they cut sentences and words, so that published scores can differ a little.
"""

from retention_gates.data.suites.base import Record, Scorer, Suite, SuiteExample
from retention_gates.data.suites.prompted import read_prompted
from retention_gates.data.suites.scoring import (
    character_f1,
    classification,
    edit_similarity,
    number_share,
    rouge_l,
    rouge_l_characters,
    word_f1,
)

# The Chinese tasks are scored by characters, the published ones by words that a segmenter finds.
SCORERS: dict[str, Scorer | None] = {
    "narrativeqa": word_f1,
    "qasper": word_f1,
    "multifieldqa_en": word_f1,
    "multifieldqa_zh": character_f1,
    "hotpotqa": word_f1,
    "2wikimqa": word_f1,
    "musique": word_f1,
    "dureader": rouge_l_characters,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": rouge_l_characters,
    "trec": None,  # by the classes that the record names
    "triviaqa": word_f1,
    "samsum": rouge_l,
    "lsht": None,
    "passage_count": number_share,
    "passage_retrieval_en": number_share,
    "passage_retrieval_zh": number_share,
    "lcc": edit_similarity,
    "repobench-p": edit_similarity,
}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # few-shot tasks: the model goes on with more examples


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A question of the task that the subset names."""
    scorer = SCORERS[subset] or classification(record.texts("all_classes"))
    if subset in FIRST_LINE:
        scorer = _first_line(scorer)
    return [read_prompted(record, f"longbench/{subset}", record.texts("answers"), scorer)]


def _first_line(scorer: Scorer) -> Scorer:
    return lambda answer, references: scorer(answer.lstrip("\n").split("\n")[0], references)


LONGBENCH = Suite("longbench", "Xnhyacinth/LongBench", tuple(SCORERS), "test", read)
