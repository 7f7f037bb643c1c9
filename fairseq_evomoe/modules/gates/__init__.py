"""Gates, chosen by `--moe-gate`.

A new gate is one file with a class under `register_gate`, here or in a package of your own that is
imported before the model is built.
"""

from fairseq_evomoe.modules.gates.base import GATES, Gate, GateContext, ScoreGate, register_gate
from fairseq_evomoe.modules.gates.base_assignment import BaseGate
from fairseq_evomoe.modules.gates.dense import DenseGate
from fairseq_evomoe.modules.gates.dense_to_sparse import DenseToSparseGate
from fairseq_evomoe.modules.gates.expert_choice import ExpertChoiceGate
from fairseq_evomoe.modules.gates.gshard import GShardGate
from fairseq_evomoe.modules.gates.hash import HashGate
from fairseq_evomoe.modules.gates.stable import StableGate
from fairseq_evomoe.modules.gates.switch import SwitchGate
from fairseq_evomoe.modules.gates.top_k import TopKGate

__all__ = [
    "GATES",
    "BaseGate",
    "DenseGate",
    "DenseToSparseGate",
    "ExpertChoiceGate",
    "GShardGate",
    "Gate",
    "GateContext",
    "HashGate",
    "ScoreGate",
    "StableGate",
    "SwitchGate",
    "TopKGate",
    "register_gate",
]
