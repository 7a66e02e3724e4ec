"""Sequence models trained without backpropagation through depth or time, and run at the depth you choose."""

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream, load_tokens
from hbll_seq.data.windows import TokenWindows
from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero
from hbll_seq.engine.linearization.low_rank import LowRank
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.generate import generate
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.recurrent import RecurrentLM, RecurrentModel
from hbll_seq.models.sequence_classification import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import ObjectiveOutput
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import DepthMix, Sweeps, TimeTree, Tree, TreeGuess, VCycles
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentOutput
from hbll_seq.tree.topology import DyadicTree

__version__ = "0.2.0"

__all__ = [
    "BackpropObjective",
    "DepthHierarchy",
    "DepthMix",
    "Diagonal",
    "DyadicTree",
    "HBLLClassifierConfig",
    "HBLLConfig",
    "HBLLForCausalLM",
    "HBLLForSequenceClassification",
    "Identity",
    "LocalObjective",
    "LowRank",
    "ObjectiveOutput",
    "RecurrentBackpropObjective",
    "RecurrentLM",
    "RecurrentLocalObjective",
    "RecurrentModel",
    "RecurrentOutput",
    "RecurrentTree",
    "SamplingParams",
    "SharedMatrix",
    "Sweeps",
    "TimeTree",
    "TokenStream",
    "TokenWindows",
    "Tokenizer",
    "Tree",
    "TreeGuess",
    "VCycles",
    "Zero",
    "evaluate_paths",
    "generate",
    "load_tokens",
    "make_cell",
]
