"""Layers, in the order in which data flows through them.

tokens -> `gates` -> `plan.RoutingPlan` -> `kernels.routing` -> `experts.ExpertBank` (over
`kernels.grouped_ffn`) -> `moe_layer.EvoMoELayer` -> `records.RoutingRecord` -> `losses`.
`ffn.build_ffn` decides which module replaces the FFN of each layer of a model, and
`transformer_layer` puts it in place.
"""
