"""Gates, chosen by `--moe-gate`. A new gate is one file here and one line in `GATES`."""

from fairseq_evomoe.modules.gates.base import Gate
from fairseq_evomoe.modules.gates.dense import DenseGate
from fairseq_evomoe.modules.gates.dense_to_sparse import DenseToSparseGate
from fairseq_evomoe.modules.gates.switch import SwitchGate
from fairseq_evomoe.modules.gates.top_k import TopKGate

GATES: dict[str, type[Gate]] = {
    "dts": DenseToSparseGate,
    "dense": DenseGate,
    "switch": SwitchGate,
    "topk": TopKGate,
}

__all__ = ["GATES", "DenseGate", "DenseToSparseGate", "Gate", "SwitchGate", "TopKGate"]
