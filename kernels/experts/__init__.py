"""The feed-forward networks of experts: `moe_ffn.moe_ffn` is the op, the other files serve it.

`values` names what travels together. `serve` chooses between `eager` (library calls), `gpu`
(Triton) and `reference`; `compiled` wraps the choice as one opaque op for torch.compile.
"""
