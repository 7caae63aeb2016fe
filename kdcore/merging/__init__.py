"""Merging the weights of models: formulas on tensors, and merges of whole models that are streamed from disk to disk.

`merge_tensors` merges tensors in memory by a method of `METHODS`, `kdcore.merging.methods` has the formulas;
`read_plan` and `kdcore.merging.merge.merge` are what ``kdcore merge`` does.
"""

from kdcore.merging.merged import merge_tensors
from kdcore.merging.plan import Merge, Model, Plan, Source
from kdcore.merging.plan_file import read_plan
from kdcore.merging.registry import METHODS, Method

__all__ = ["METHODS", "Merge", "Method", "Model", "Plan", "Source", "merge_tensors", "read_plan"]
