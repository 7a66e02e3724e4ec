"""Sequence models trained without backpropagation through depth or time, and run at the depth you choose."""

from hbll_seq.cells import make_cell
from hbll_seq.classifier import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.config import HBLLConfig
from hbll_seq.data import TokenStream, TokenWindows, load_tokens
from hbll_seq.depth import DepthHierarchy
from hbll_seq.evaluation import evaluate_paths
from hbll_seq.generation import generate
from hbll_seq.local_objective import LocalObjective
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective, ObjectiveOutput
from hbll_seq.recurrent_model import RecurrentLM, RecurrentModel
from hbll_seq.recurrent_objective import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentOutput
from hbll_seq.recurrent_tree import RecurrentTree
from hbll_seq.tokenizer import Tokenizer
from hbll_seq.tree import DyadicTree

__version__ = "0.1.0"

__all__ = [
    "BackpropObjective",
    "DepthHierarchy",
    "DyadicTree",
    "HBLLClassifierConfig",
    "HBLLConfig",
    "HBLLForCausalLM",
    "HBLLForSequenceClassification",
    "LocalObjective",
    "ObjectiveOutput",
    "RecurrentBackpropObjective",
    "RecurrentLM",
    "RecurrentLocalObjective",
    "RecurrentModel",
    "RecurrentOutput",
    "RecurrentTree",
    "TokenStream",
    "TokenWindows",
    "Tokenizer",
    "evaluate_paths",
    "generate",
    "load_tokens",
    "make_cell",
]
