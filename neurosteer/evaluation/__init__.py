"""What steering does and what it breaks: judges, metrics, controls and receipts."""

from neurosteer.evaluation.evaluate import EvaluatedText, Evaluation, evaluate, with_receipt
from neurosteer.evaluation.figures import evaluation_figure, evaluation_page, table_html, write_evaluation
from neurosteer.evaluation.judges import (
    CallableJudge,
    Judge,
    PatternJudge,
    RefusalDetector,
    TextClassifier,
    accuracy_text,
    judge_for,
    named_judge,
)

__all__ = [
    "CallableJudge",
    "EvaluatedText",
    "Evaluation",
    "Judge",
    "PatternJudge",
    "RefusalDetector",
    "TextClassifier",
    "accuracy_text",
    "evaluate",
    "evaluation_figure",
    "evaluation_page",
    "judge_for",
    "named_judge",
    "table_html",
    "with_receipt",
    "write_evaluation",
]
