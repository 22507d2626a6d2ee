"""Training and evaluation, of language models on text and of any model on tasks."""

from seqmix.train.evaluation import evaluate
from seqmix.train.language import train
from seqmix.train.result import Trained
from seqmix.train.task import evaluate_task, train_task

__all__ = ["Trained", "evaluate", "evaluate_task", "train", "train_task"]
