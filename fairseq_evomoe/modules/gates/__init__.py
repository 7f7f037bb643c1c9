"""Gates, chosen by `--moe-gate`. A new gate is one file here and one line in `GATES`."""

from fairseq_evomoe.modules.gates.base import Gate, ScoreGate, Site
from fairseq_evomoe.modules.gates.base_assignment import BaseGate
from fairseq_evomoe.modules.gates.dense import DenseGate
from fairseq_evomoe.modules.gates.dense_to_sparse import DenseToSparseGate
from fairseq_evomoe.modules.gates.expert_choice import ExpertChoiceGate
from fairseq_evomoe.modules.gates.gshard import GShardGate
from fairseq_evomoe.modules.gates.hash import HashGate
from fairseq_evomoe.modules.gates.stable import StableGate
from fairseq_evomoe.modules.gates.switch import SwitchGate
from fairseq_evomoe.modules.gates.top_k import TopKGate

GATES: dict[str, type[Gate]] = {
    "dts": DenseToSparseGate,
    "dense": DenseGate,
    "switch": SwitchGate,
    "gshard": GShardGate,
    "topk": TopKGate,
    "base": BaseGate,
    "hash": HashGate,
    "stable": StableGate,
    "expert_choice": ExpertChoiceGate,
}

__all__ = ["GATES", "Gate", "ScoreGate", "Site", *(g.__name__ for g in GATES.values())]
