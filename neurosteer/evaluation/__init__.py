"""What steering does and what it breaks: judges, metrics, controls and receipts."""

from neurosteer.evaluation.evaluate import EvaluatedText, Evaluation, EvaluationSettings, evaluate, with_receipt
from neurosteer.evaluation.judges import (
    CallableJudge,
    Judge,
    JudgeRequest,
    PatternJudge,
    RefusalDetector,
    TextClassifier,
    accuracy_text,
    judge_for,
    judge_from_words,
    named_judge,
)
from neurosteer.evaluation.report import evaluation_page, table_html, write_evaluation

__all__ = [
    "CallableJudge",
    "EvaluatedText",
    "Evaluation",
    "EvaluationSettings",
    "Judge",
    "JudgeRequest",
    "PatternJudge",
    "RefusalDetector",
    "TextClassifier",
    "accuracy_text",
    "evaluate",
    "evaluation_page",
    "judge_for",
    "judge_from_words",
    "named_judge",
    "table_html",
    "with_receipt",
    "write_evaluation",
]
